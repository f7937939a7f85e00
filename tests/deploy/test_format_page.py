"""docs/artifact-format.md says what the code does."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from errata import deploy
from errata.deploy import limits, manifest, safetensors_header

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "artifact-format.md").read_text(encoding="utf-8")
_, _LIMITS, _AFTER = re.split("## Limits|## Identity", PAGE)
NUMBERS = {name: value for name, value in vars(limits).items() if name.isupper()}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_limit_is_stated(name: str) -> None:
    value = NUMBERS[name]
    spelled = {f"{value:,}", f"{value / 2**20:g} MiB"}
    assert spelled & set(re.findall(r"[\d,]+(?: MiB)?", _LIMITS.replace("; ", " ; "))), (name, value)


def test_every_key_of_the_manifest_is_described(tiny_artifact: Callable[[str], Path]) -> None:
    value = deploy.verify(tiny_artifact("w4a8+cachequant-2")).to_json()
    nested = [
        *value["scheme"], *value["schedule"], *value["sampler"], *value["recipe"],
        *value["scheme"]["layers"][0],
        *value["recipe"]["quantization"], *value["recipe"]["cache"], *value["scheme"]["correction"],
    ]  # fmt: skip
    missing = [key for key in (*value, *nested) if not re.search(rf"`(cache\.)?{key}(\[\])?`", PAGE)]
    assert missing == []
    assert f'"{manifest.FORMAT}"' in PAGE


def test_every_type_of_tensor_is_named() -> None:
    (told,) = re.findall(r"Types are (.+?)\.\s", PAGE, re.DOTALL)
    assert set(re.findall(r"[A-Z]+[0-9]*", told)) == set(safetensors_header._DTYPES)


def test_every_setting_that_leads_elsewhere_is_named() -> None:
    from errata.deploy.component_files import _PLACES

    named = {name for name in _PLACES if f"`{name}`" in PAGE}
    assert {name for name in _PLACES if name.lstrip("_").removesuffix("_internal") not in
            {word.lstrip("_") for word in named}} == set()  # fmt: skip
