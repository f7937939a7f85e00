"""Rows of named tensors on disk: written batch by batch, read in any order, never held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor


class RowStore:
    """An append-only table of rows, one raw file a tensor.

    Whether a tensor has a row for each row of the batch is decided by the first batch: its first dimension
    is the number of rows then. Any other tensor is a constant, of which the first one is kept in memory.

    Files are read with plain reads: pages of a memory map would count as memory of the process.
    """

    def __init__(self, folder: Path) -> None:
        """Make `folder` if it is missing; the caller removes it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files: dict[str, _RowFile] = {}
        self._constants: dict[str, Tensor] = {}
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def __len__(self) -> int:
        return self._rows

    def append(self, tensors: Mapping[str, Tensor], *, rows: int) -> None:
        """Add a batch of `rows` rows, from any device.

        Raises:
            ValueError: other names, shapes or types than in the first batch.
        """
        if self._rows == 0:
            self._begin(tensors, rows)
        if tensors.keys() != self._files.keys() | self._constants.keys():
            raise ValueError(
                f"a batch with {sorted(tensors)} does not continue rows with "
                f"{sorted(self._files.keys() | self._constants.keys())}"
            )
        for name, file in self._files.items():
            file.append(tensors[name], rows)
        self._rows += rows

    def read(self, index: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows of that index, in its order, and the constants; on the CPU."""
        rows = {name: file.read(index) for name, file in self._files.items()}
        return rows | self._constants

    def _begin(self, tensors: Mapping[str, Tensor], rows: int) -> None:
        for position, (name, tensor) in enumerate(tensors.items()):
            if tensor.ndim and tensor.shape[0] == rows:
                self._files[name] = _RowFile(self._folder / f"{position}.rows", name, tensor)
            else:
                self._constants[name] = tensor.detach().cpu().clone()


class _RowFile:
    """One tensor's rows, one after another, as raw bytes."""

    def __init__(self, path: Path, name: str, like: Tensor) -> None:
        self._name = name
        self._shape, self._dtype = tuple(like.shape[1:]), like.dtype
        self._row_bytes = like[0].numel() * like.element_size()
        self._file: BinaryIO = path.open("w+b", buffering=0)

    def append(self, tensor: Tensor, rows: int) -> None:
        if tuple(tensor.shape) != (rows, *self._shape) or tensor.dtype != self._dtype:
            raise ValueError(
                f"`{self._name}` has shape {tuple(tensor.shape)} and type {tensor.dtype}, expected "
                f"{(rows, *self._shape)} and {self._dtype} as in the first batch"
            )
        self._file.seek(0, 2)
        waiting = _as_bytes(tensor.detach().cpu().contiguous())
        while waiting:  # one write may take a part only
            waiting = waiting[self._file.write(waiting) :]

    def read(self, index: Sequence[int]) -> Tensor:
        result = torch.empty((len(index), *self._shape), dtype=self._dtype)
        room = _as_bytes(result)
        for position, row in enumerate(index):
            self._file.seek(row * self._row_bytes)
            part = room[position * self._row_bytes : (position + 1) * self._row_bytes]
            while part:
                count = self._file.readinto(part)  # type: ignore[attr-defined]
                if not count:
                    raise IndexError(f"`{self._name}` has no row {row}")
                part = part[count:]
        return result

    def close(self) -> None:
        self._file.close()


def _as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor; numpy does not know every type, so as plain bytes."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
