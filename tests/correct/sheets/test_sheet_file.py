"""The file of a sheet: what is written is read, and nothing damaged is accepted."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from errata.correct import Plan, Sheet
from errata.correct.sheets.fitted_maps import CallLevels, FittedMaps
from errata.correct.sheets.sheet_file import (
    LARGEST_SHEET,
    METADATA,
    SheetFacts,
    from_bytes,
    to_bytes,
)
from errata.errors import PlanError
from errata.runtime.paired_change import PairedChange


def sheet_of(seed: int = 0, calls: int = 6, channels: int = 3) -> Sheet:
    generator = torch.Generator().manual_seed(seed)
    rows = calls + 2  # full evaluations of all calls, cached ones of two
    maps = FittedMaps(
        call=torch.tensor([*range(calls), 1, 3]),
        kind=torch.tensor([0] * calls + [1, 1], dtype=torch.uint8),
        matrix=torch.randn(rows, channels, channels, generator=generator),
        bias=torch.randn(rows, channels, generator=generator),
    )
    facts = SheetFacts(
        artifact="ab" * 32,
        teacher="float",
        plan=({"type": "Forecast", "version": 1, "order": 1, "basis": "newton", "sigma": 0.5},),
        plan_steps=("3-5",),
        samples=64,
        seed=7,
        levels=CallLevels(values=tuple(2.5 - step for step in range(calls)), are_known=True),
        measured=PairedChange(images=32, psnr=24.25, corrected_psnr=31.5, change=7.25, low=6.5, high=8.0),
    )
    return Sheet(maps=maps, facts=facts)


def parts_of(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    length = int.from_bytes(data[:8], "little")
    told = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][METADATA])
    return load(data), told


def rewritten(tensors: dict[str, Tensor], told: Any) -> bytes:
    return save(tensors, metadata={METADATA: json.dumps(told)})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    sheet = sheet_of()
    sheet.save(tmp_path / "sheet.safetensors")
    read = Sheet.load(tmp_path / "sheet.safetensors")
    assert read == sheet
    assert read.facts == sheet.facts or dataclasses.asdict(read.facts) == json.loads(
        json.dumps(dataclasses.asdict(sheet.facts))
    )
    for name in ("call", "kind", "matrix", "bias"):
        assert torch.equal(getattr(read.maps, name), getattr(sheet.maps, name))
    assert read != sheet_of(seed=1)


def test_equal_sheets_have_equal_bytes() -> None:
    assert sheet_of().to_bytes() == sheet_of().to_bytes()
    assert from_bytes(sheet_of().to_bytes(), "it")[1].samples == 64
    assert to_bytes(*from_bytes(sheet_of().to_bytes(), "it")) == sheet_of().to_bytes()


def test_it_takes_a_few_kilobytes() -> None:
    assert len(sheet_of(calls=50).to_bytes()) < 6000


def test_a_plan_file_holds_it(tmp_path: Path) -> None:
    plan = Plan(sheet_of()) + Plan.none()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    stored = json.loads((tmp_path / "plan.json").read_text())
    stored["plan"]["method"]["file"] = stored["plan"]["method"]["file"][:-40] + "A" * 40
    (tmp_path / "plan.json").write_text(json.dumps(stored))
    with pytest.raises(PlanError, match="sheet in the plan"):
        Plan.load(tmp_path / "plan.json")


def test_three_hundred_damaged_sheets_are_refused() -> None:
    """Bytes changed, cut off, doubled, inserted: at random places of the whole file."""
    data, chance = sheet_of().to_bytes(), random.Random(3)
    accepted = []
    for number in range(300):
        place, damaged = chance.randrange(len(data)), bytearray(data)
        kind = ("bit", "byte", "cut", "insert", "swap")[number % 5]
        if kind == "bit":
            damaged[place] ^= 1 << chance.randrange(8)
        elif kind == "byte":
            damaged[place] = (damaged[place] + chance.randrange(1, 256)) % 256
        elif kind == "cut":
            damaged = damaged[:place]
        elif kind == "insert":
            damaged[place:place] = chance.randbytes(chance.randrange(1, 9))
        else:
            other = chance.randrange(len(data))
            if damaged[place] == damaged[other]:
                damaged[place] ^= 0x55
            else:
                damaged[place], damaged[other] = damaged[other], damaged[place]
        try:
            from_bytes(bytes(damaged), "it")
        except PlanError:
            continue
        accepted.append((kind, place))
    assert accepted == []


def _with(**changes: Any) -> Any:
    return lambda tensors, told: (tensors, told | changes)


def _with_tensor(name: str, change: Any) -> Any:
    return lambda tensors, told: (tensors | {name: change(tensors[name])}, told)


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (_with(format="errata-sheet/9"), "reads errata-sheet/1"),
        (_with(extra=1), "unknown key 'extra'"),
        (_with(artifact="x"), "malformed"),
        (_with(teacher="nobody"), "malformed"),
        (_with(plan=[1]), "list of methods"),
        (_with(plan_steps=[]), "plan_steps"),
        (_with(samples=-1), "not a count"),
        (_with(levels={"values": [1.0], "are_known": True, "calls_per_step": 1}), "of no call"),
        (_with(levels={"values": [], "are_known": True, "calls_per_step": 1}), "levels"),
        (_with(levels={"values": [1.0] * 6, "are_known": True, "calls_per_step": 4}), "calls_per_step"),
        (_with_tensor("matrix", lambda value: value * torch.nan), "not finite"),
        (_with_tensor("bias", lambda value: value + 1e6), "above 10000"),
        (_with_tensor("bias", lambda value: value.double()), "tensor 'bias'"),
        (_with_tensor("matrix", lambda value: value[:, :2].contiguous()), "tensor 'matrix'"),
        (_with_tensor("kind", lambda value: value + 1), "of no call"),
        (_with_tensor("call", lambda value: value + 3), "of no call"),
        (_with_tensor("call", lambda value: value * 0), "two for one call"),
        (lambda tensors, told: ({**tensors, "more": torch.zeros(1)}, told), "holds the tensors"),
    ],
)
def test_a_forged_sheet_with_a_right_digest_is_refused(forge: Any, reason: str) -> None:
    from errata.correct.sheets.sheet_file import _digest

    tensors, told = parts_of(sheet_of().to_bytes())
    tensors, told = forge(tensors, told)
    told.pop("sha256")
    told["sha256"] = _digest(told, {name: tensors[name] for name in ("call", "kind", "matrix", "bias")})
    with pytest.raises(PlanError, match=reason):
        from_bytes(rewritten(tensors, told), "it")


def test_what_is_no_sheet_is_named(tmp_path: Path) -> None:
    for data, reason in (
        (b"", "0 bytes"),
        (b"{" * (LARGEST_SHEET + 1), "at most"),
        (save({"a": torch.zeros(2)}), "metadata"),
    ):
        (tmp_path / "it").write_bytes(data)
        with pytest.raises(PlanError, match=reason):
            Sheet.load(tmp_path / "it")
    with pytest.raises(PlanError, match="errata sheet"):
        Sheet.load(tmp_path / "absent")


@pytest.mark.parametrize("version", [True, 1.0, "1", 2, None])
def test_another_version_in_a_plan_is_refused(version: Any) -> None:
    """In Python True and 1.0 equal 1."""
    stored = {**sheet_of().to_json(), "version": version}
    with pytest.raises(PlanError, match=f"Sheet version {version!r}"):
        Sheet.from_json(stored)


@pytest.mark.parametrize("data", [b"garbage", bytes(range(256)), b""])
def test_a_damaged_file_is_named_once(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.sheet"
    path.write_bytes(data)
    with pytest.raises(PlanError, match="is not a sheet, or is damaged: it is not a safetensors") as caught:
        Sheet.load(path)
    assert str(caught.value).count("mine.sheet") == 1
