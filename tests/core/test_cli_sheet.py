"""`errata sheet`, and the commands that take one, on the digits in few steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from errata import cli
from errata.embedded import PIPELINE

FEW = ("--samples", "16", "--held-out", "16", "--batch-size", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `artifact`, with weights of 4 bits, `cached`, and `sheet` of the first, made by the commands."""
    folder = tmp_path_factory.mktemp("sheet")
    size = ["--steps", "6", "--samples", "4", "--batch-size", "4"]
    commands = [["calibrate", f"{PIPELINE}", "--out", f"{folder}/calibration", *size]]
    for name, recipe in (("artifact", "w4a8:calibrated_output=false"), ("cached", "deepcache-3")):
        given = ["--calibration", f"{folder}/calibration", "--recipe", recipe]
        commands.append(["compress", f"{PIPELINE}", "--out", f"{folder}/c_{name}", *given])
        commands.append(["deploy", f"{folder}/c_{name}", "--out", f"{folder}/{name}"])
    commands.append(
        ["sheet", f"{folder}/artifact", "--teacher", f"{PIPELINE}", "--out", f"{folder}/sheet", *FEW]
    )
    for command in commands:
        assert cli.main(command) == 0
    return folder


def run(capsys: pytest.CaptureFixture[str], *command: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*map(str, command), "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def complaint(capsys: pytest.CaptureFixture[str], status: int, *command: object) -> str:
    capsys.readouterr()
    assert cli.main([*map(str, command)]) == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("errata: error: ")
    return line


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(Image.open(path)).astype(np.int32)


def test_a_sheet_says_what_it_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "inspect", folder / "sheet")["sheet"]
    assert shown["measured"]["low"] > 0
    assert (shown["teacher"], shown["calls"], shown["samples"]) == ("float", 6, 16)
    assert shown["bytes"] == (folder / "sheet").stat().st_size < 3000
    assert shown["artifact"] == run(capsys, "inspect", folder / "artifact")["manifest_sha256"]
    assert cli.main(["inspect", f"{folder}/sheet"]) == 0
    text = capsys.readouterr().out
    assert f"{shown['measured']['change']:+.2f} dB" in text
    assert not (folder / "sheet.partial").exists()


def test_images_with_a_sheet_are_closer_to_the_float_models(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch
    from diffusers import DDIMPipeline

    pipe = DDIMPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(500 + image) for image in range(8)]
    right = pipe(batch_size=8, num_inference_steps=6, generator=seeds).images
    errors = []
    for name, option in (("plain", ()), ("corrected", ("--sheet", folder / "sheet"))):
        run(
            capsys, "generate", folder / "artifact", "--images", 8, "--seed", 500, "--out", tmp_path / name,
            *option,
        )  # fmt: skip
        found = [pixels(tmp_path / name / f"{image:05d}.png") for image in range(8)]
        squares = [
            np.square(one - np.asarray(other).astype(np.int32)).mean()
            for one, other in zip(found, right, strict=True)
        ]
        errors.append(np.mean(squares))
    assert errors[1] < 0.7 * errors[0]


def test_verify_finds_damage(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "verify", folder / "sheet")["verified"] is True
    data = bytearray((folder / "sheet").read_bytes())
    data[-3] ^= 1
    (tmp_path / "sheet").write_bytes(data)
    assert "digest does not belong" in complaint(capsys, 1, "verify", tmp_path / "sheet")


def test_a_signed_sheet(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("OpenSSL", reason="signing needs the extra `sign`")
    pytest.importorskip("model_signing", reason="signing needs the extra `sign`")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    sheet = shutil.copyfile(folder / "sheet", tmp_path / "sheet")
    run(capsys, "sign", sheet, "--key", tmp_path / "key.pem", "--out", tmp_path / "sheet.sig")
    check = ("--signature", tmp_path / "sheet.sig", "--public-key", tmp_path / "key.pub")
    assert run(capsys, "verify", sheet, *check)["signed"] is True
    run(
        capsys, "sheet", folder / "artifact", "--teacher", PIPELINE, "--out", tmp_path / "other",
        "--seed", 50, *FEW,
    )  # fmt: skip
    assert "is of another artifact" in complaint(capsys, 1, "verify", tmp_path / "other", *check)


def test_an_artifact_repairs_its_own_cache(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ("sheet", folder / "cached", "--teacher", "self", "--correct", "forecast", "--out")
    capsys.readouterr()
    status = cli.main([*map(str, given), f"{tmp_path}/cached", *FEW])
    said = capsys.readouterr()
    if (
        status
    ):  # six steps leave a forecast two calls: there may be nothing to gain, and then there is no file
        assert "does not help" in said.err
        assert not (tmp_path / "cached").exists()
    else:
        assert "PSNR to the artifact without its cache" in said.out


def test_report_and_plan_take_sheets(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = run(
        capsys, "report", folder / "artifact", folder / "cached", "--sheet", folder / "sheet", "--reference",
        "embedded", "--baseline", PIPELINE, "--samples", 66, "--batch-size", 33, "--out", tmp_path / "report",
        "--resamples", 20, "--no-compute-matched",
    )  # fmt: skip
    rows = {(row["artifact"], row["plan"]) for row in report["rows"]}
    assert {name for name, plan in rows if plan == "sheet"} == {
        name for name, _ in rows if name.startswith("w4a8")
    }
    assert ("deepcache-3", "none") in rows
    made = run(
        capsys, "plan", folder / "artifact", "--sheet", folder / "sheet", "--reference", "embedded",
        "--samples", 66, "--batch-size", 33, "--max-overhead", "0%", "--out", tmp_path / "plan.json",
    )  # fmt: skip
    assert made["plan"]["artifact"] is not None


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (("--teacher", "self"), 1, "has no cache"),
        (("--teacher", "self", "--samples", "4"), 2, "at least 8"),
        (("--teacher", "self", "--prompts", "README.md"), 2, "does not take a prompt"),
        (("--teacher", "/nowhere"), 1, "/nowhere"),
        (("--teacher", "ARTIFACT"), 1, "is an artifact; give the float pipeline"),
    ],
)
def test_bad_options_are_refused(
    options: tuple[str, ...],
    status: int,
    reason: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n" * 200)
    paths = {"README.md": f"{tmp_path}/prompts.txt", "ARTIFACT": f"{folder}/artifact"}
    given = [paths.get(option, option) for option in options]
    line = complaint(capsys, status, "sheet", folder / "artifact", "--out", tmp_path / "sheet", *given)
    assert reason in line
    assert not (tmp_path / "sheet").exists()


def test_a_sheet_of_another_artifact_is_refused_before_any_image(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = complaint(
        capsys, 1, "generate", folder / "cached", "--sheet", folder / "sheet", "--out", tmp_path / "images"
    )
    assert "fitted to the artifact" in line
    assert not (tmp_path / "images").exists()
    (tmp_path / "there").write_text("")
    given = ("--teacher", PIPELINE, "--out", tmp_path / "there")
    assert "exists" in complaint(capsys, 1, "sheet", folder / "artifact", *given)


def test_auto_chooses_once_and_keeps_the_plan(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    artifact = shutil.copytree(folder / "cached", tmp_path / "artifact")
    kept = tmp_path / "artifact.auto.json"
    given = ("generate", artifact, "--images", 1, "--correct", "auto", "--out")
    run(capsys, *given, tmp_path / "first")
    stored = kept.read_text()
    assert json.loads(stored)["plan"]["artifact"] == run(capsys, "inspect", artifact)["manifest_sha256"]
    kept.write_text(stored.replace('"hermite"', '"newton"'))
    run(capsys, *given, tmp_path / "second")
    assert (pixels(tmp_path / "first" / "00000.png") == pixels(tmp_path / "second" / "00000.png")).all()
    kept.write_text("{}")  # damaged, so chosen anew
    run(capsys, *given, tmp_path / "third")
    assert kept.read_text() == stored
    assert "--at has no effect" in complaint(capsys, 2, *given, tmp_path / "fourth", "--at", "all")
    assert "--order has no effect" in complaint(capsys, 2, *given, tmp_path / "fourth", "--order", "2")


def test_nothing_is_written_into_an_artifact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One more file there, and `errata verify` would refuse the artifact."""
    for place in ("artifact/new.sheet", "artifact/unet/new.sheet"):
        given = ("sheet", folder / "artifact", "--teacher", PIPELINE, "--out", folder / place)
        assert "inside the artifact" in complaint(capsys, 1, *given)
    run(capsys, "verify", folder / "artifact")


def test_a_sheet_and_a_plan_that_changed_places(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from errata.correct import Plan, Sheet

    plan = tmp_path / "plan.json"
    Plan(Sheet.load(folder / "sheet")).save(plan)
    given = ("generate", folder / "artifact", "--images", 1, "--out", tmp_path / "images")
    assert "a plan file goes to `--plan`" in complaint(capsys, 1, *given, "--sheet", plan)
    assert "a sheet goes to `--sheet`" in complaint(capsys, 1, *given, "--plan", folder / "sheet")
    both = ("--plan", plan, "--sheet", folder / "sheet")
    assert "more than one sheet" in complaint(capsys, 1, *given, *both)
    assert not (tmp_path / "images").exists()
    run(capsys, *given, "--plan", plan)


def test_a_sheet_in_a_use_that_was_not_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ("generate", folder / "artifact", "--sheet", folder / "sheet", "--images", 1, "--out")
    for name, options, reason in (
        ("iec", ("--correct", "iec"), "errata: this sheet was fitted to the artifact with no other method"),
        ("steps", ("--steps", 9, "--on-mismatch", "nearest"), "errata: this sheet was fitted to 6 denoiser"),
        ("right", (), ""),
    ):
        assert cli.main([*map(str, given), f"{tmp_path / name}", *map(str, options)]) == 0
        said = capsys.readouterr().err
        assert reason in said
        assert ("this sheet was fitted" in said) == bool(reason)


def test_auto_says_what_it_chose_at_any_number_of_steps(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    artifact = shutil.copytree(folder / "cached", tmp_path / "artifact")
    kept = tmp_path / "artifact.auto.json"
    given = ("generate", artifact, "--images", 1, "--correct", "auto", "--out")
    other = ("--steps", 12, "--on-mismatch", "nearest")
    for name, options, is_kept in (("a", other, False), ("b", (), True), ("c", other, True)):
        assert cli.main([*map(str, given), f"{tmp_path / name}", *map(str, options)]) == 0
        assert "auto chose: " in capsys.readouterr().out
        assert kept.exists() == is_kept
