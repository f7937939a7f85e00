import hashlib
import math
from pathlib import Path
from typing import Any

import pytest

from errata import canonical_json


@pytest.mark.parametrize(
    ("value", "spelling"),
    [
        ({"b": 1, "a": [True, None, 0.5]}, b'{"a":[true,null,0.5],"b":1}\n'),
        ({"λ": "ε"}, '{"λ":"ε"}\n'.encode()),
        ((1, 2), b"[1,2]\n"),
        (1e-05, b"1e-05\n"),
        ({}, b"{}\n"),
    ],
)
def test_golden_spelling(value: Any, spelling: bytes) -> None:
    assert canonical_json.dumps(value) == spelling


def test_order_of_keys_does_not_matter() -> None:
    one, other = {"x": {"p": 1, "q": 2}, "y": 3}, {"y": 3, "x": {"q": 2, "p": 1}}
    assert canonical_json.dumps(one) == canonical_json.dumps(other)
    assert canonical_json.digest(one) == canonical_json.digest(other)


def test_reads_back_what_it_wrote() -> None:
    value = {"name": "conv_in", "scale": 0.1 + 0.2, "codes": [-8, 7], "nested": {"none": None}}
    assert canonical_json.loads_strict(canonical_json.dumps(value)) == value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_refuses_to_write_what_is_not_finite(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json.dumps({"scale": number})


def test_refuses_to_write_keys_that_would_collide() -> None:
    with pytest.raises(TypeError, match="key 1 is a int"):
        canonical_json.dumps({"layers": [{"1": "a", 1: "b"}]})


def test_refuses_to_write_a_value_that_contains_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="Circular"):
        canonical_json.dumps(loop)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a":1,"b":2,"a":3}', "duplicate key 'a'"),
        (b'{"x":{"a":1,"a":1}}', "duplicate key 'a'"),
        (b'{"scale":NaN}', "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e999]", "1e999 is too large"),
        (b"\xff\xfe", "utf-8"),
        (b'\xef\xbb\xbf{"a":1}', "BOM"),
        (b'{"a":1} trailing', "Extra data"),
        (b'{"a":', "Expecting value"),
        (b"", "Expecting value"),
        (b"[" * 200_000, "nested too deep"),
    ],
)
def test_refuses_to_read(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        canonical_json.loads_strict(data)


def test_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    value = {"format": "errata-artifact/1"}
    path = tmp_path / "manifest.json"
    path.write_bytes(canonical_json.dumps(value))
    expected = hashlib.sha256(b'{"format":"errata-artifact/1"}\n').hexdigest()
    assert canonical_json.digest(value) == canonical_json.file_digest(path) == expected
