from pathlib import Path

import pytest
import torch

from errata.compress.rounding.row_store import RowStore


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    batches = [
        {
            "x": torch.randn(rows, 3, 2),
            "mask": torch.rand(rows, 4) > 0.5,
            "half": torch.randn(rows, 2).bfloat16(),
            "index": torch.arange(rows),
            "constant": torch.tensor([1.0]),
            "scalar": torch.tensor(7),
        }
        for rows in (5, 5, 2)
    ]
    with RowStore(tmp_path / "rows") as store:
        for batch in batches:
            store.append(batch, rows=len(batch["x"]))
        assert len(store) == 12
        index = [11, 0, 6, 6]
        found = store.read(index)
        for name in ("x", "mask", "half", "index"):
            expected = torch.cat([batch[name] for batch in batches])[index]
            assert found[name].dtype == expected.dtype
            assert torch.equal(found[name], expected)
        assert torch.equal(found["constant"], torch.tensor([1.0]))
        assert torch.equal(found["scalar"], torch.tensor(7))
        with pytest.raises(IndexError, match="`x` has no row 12"):
            store.read([12])
        store.append(batches[2], rows=2)  # reading has not moved the end
        assert torch.equal(store.read([13])["x"], batches[2]["x"][1:])


def test_a_batch_that_does_not_continue_is_refused(tmp_path: Path) -> None:
    with RowStore(tmp_path) as store:
        store.append({"x": torch.zeros(2, 3)}, rows=2)
        with pytest.raises(ValueError, match=r"a batch with \['y'\] does not continue rows with \['x'\]"):
            store.append({"y": torch.zeros(2, 3)}, rows=2)
        with pytest.raises(ValueError, match=r"`x` has shape \(2, 4\) .*expected \(2, 3\)"):
            store.append({"x": torch.zeros(2, 4)}, rows=2)
