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


@pytest.fixture
def _one_free_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `auto` choose between two plans; `correct/planner/test_auto.py` has all that it tries."""
    from errata.correct import Forecast, Plan

    monkeypatch.setattr("errata.correct.planner.auto.free_plans", lambda deployed: [Plan(Forecast())])


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


@pytest.mark.usefixtures("_one_free_plan")
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


@pytest.mark.usefixtures("_one_free_plan")
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


def test_an_interrupted_fit_says_what_is_kept_and_goes_on(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from errata.correct.sheets.learning import Learning

    begun: list[range] = []
    begin = Learning.begin

    def stopping(self: Learning, images: range) -> None:
        begun.append(images)
        if len(begun) == 2:
            raise KeyboardInterrupt
        begin(self, images)

    given = ("sheet", folder / "artifact", "--teacher", PIPELINE, "--out", tmp_path / "sheet", *FEW)
    with monkeypatch.context() as patch:
        patch.setattr(Learning, "begin", stopping)
        line = complaint(capsys, 130, *given)
    assert f"interrupted; 8 of 32 images are kept in `{tmp_path}/sheet.partial`" in line
    assert "to resume, give the same command again" in line

    def noted(self: Learning, images: range) -> None:
        begun.append(images)
        begin(self, images)

    monkeypatch.setattr(Learning, "begin", noted)
    run(capsys, *given)
    assert begun == [range(8), range(8, 16), range(8, 16)]  # the first batch was kept
    assert (tmp_path / "sheet").read_bytes() == (folder / "sheet").read_bytes()


def test_a_fit_that_is_interrupted_before_anything_is_kept(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.correct.sheets.learning import Learning

    def stopping(self: Learning, images: range) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Learning, "begin", stopping)
    given = ("sheet", folder / "artifact", "--teacher", PIPELINE, "--out", tmp_path / "sheet", *FEW)
    assert complaint(capsys, 130, *given) == "errata: error: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["/proc/sheet", "missing/sheet"])
def test_a_place_that_cannot_be_written_is_found_before_a_model_is_loaded(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("errata.deploy.load", lambda *args, **options: pytest.fail("a model was loaded"))
    given = ("sheet", "artifact", "--teacher", "self", "--out", out)
    assert f"cannot write `{out}`: " in complaint(capsys, 1, *given)


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ("self", "--teacher self repairs what a cache does, and `ARTIFACT` has no cache; give the float pip"),
        ("/nowhere", "--teacher /nowhere: `/nowhere` does not exist; give a diffusers directory"),
        ("OTHER", "the UNet of --teacher ("),
    ],
)
def test_a_bad_teacher_is_told_in_the_words_of_the_command(
    teacher: str, reason: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if teacher == "OTHER":
        from tiny import tiny_ddim

        tiny_ddim(layers_per_block=1).save_pretrained(tmp_path / "other")
    given = ("sheet", folder / "artifact", "--teacher", teacher.replace("OTHER", f"{tmp_path}/other"))
    line = complaint(capsys, 1, *given, "--out", tmp_path / "sheet")
    assert reason.replace("ARTIFACT", f"{folder}/artifact") in line
    assert "Error" not in line


def test_auto_stands_alone(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in ("generate", "report"):
        for given in ("auto+forecast", "forecast+auto", "auto@all"):
            words = (command, folder / "cached", "--out", tmp_path / "out", "--correct", given)
            assert f"'{given}': auto stands alone" in complaint(capsys, 2, *words)


def test_a_report_has_the_plan_of_auto_as_a_row(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    artifacts = [shutil.copytree(folder / name, tmp_path / name) for name in ("artifact", "cached")]
    given = (
        "report", *artifacts, "--reference", "embedded", "--samples", 66, "--batch-size", 33, "--resamples",
        20, "--no-compute-matched", "--correct", "auto", "--out", tmp_path / "report",
    )  # fmt: skip
    assert "--at has no effect" in complaint(capsys, 2, *given, "--at", "all")
    from errata.correct import Forecast, Plan

    # What is kept beside the artifact is not chosen again.
    digest = run(capsys, "inspect", artifacts[1])["manifest_sha256"]
    Plan(Forecast(), artifact=digest).save(tmp_path / "cached.auto.json")
    found = run(capsys, *given)
    rows = [(row["artifact"].split(":")[0], row["plan"]) for row in found["rows"]]
    assert sorted(rows) == [("deepcache-3", "auto"), ("deepcache-3", "none"), ("w4a8", "none")]
    assert "--correct auto" in found["protocol"]["command"]


def test_inspect_and_verify_know_plans(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from errata.correct import Forecast, Hindsight, Plan

    plan, other = tmp_path / "plan.json", tmp_path / "other.json"
    digest = run(capsys, "inspect", folder / "cached")["manifest_sha256"]
    (Plan(Forecast(), artifact=digest) + Plan(Hindsight(), "first:4")).save(plan)
    Plan.none().save(other)
    for command in ("inspect", "verify"):
        assert cli.main([command, f"{plan}"]) == 0
        said = capsys.readouterr().out
        assert f"plan for the artifact {digest[:12]}…\n1. Forecast(" in said
        assert (
            "at all steps that it can correct: A forecast: the feature extrapolated at cached steps" in said
        )
        assert "\n2. Hindsight(" in said
        assert ", at steps first:4: " in said
        assert cli.main([command, f"{other}"]) == 0
        assert "plan for any artifact\nit corrects nothing" in capsys.readouterr().out
    assert run(capsys, "verify", plan, "--for", folder / "cached")["verified"] is True
    assert "artifact" in complaint(capsys, 1, "verify", plan, "--for", folder / "artifact")
    Plan(Hindsight(), "first:3").save(other)  # it serves call 3 alone
    line = complaint(capsys, 1, "verify", other, "--for", folder / "cached")
    assert "leaves nothing to correct" in line
    assert "--for is for sheets and plans" in complaint(
        capsys, 2, "verify", folder / "cached", "--for", folder / "cached"
    )
    stored = json.loads(plan.read_text())
    stored["plan"]["steps"] = "nowhere"
    plan.write_text(json.dumps(stored))
    for command in ("inspect", "verify"):
        assert "'nowhere' is not a selection of steps" in complaint(capsys, 1, command, plan)


def test_verify_checks_a_sheet_against_its_artifact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify", folder / "sheet", "--for", folder / "artifact")["verified"] is True
    line = complaint(capsys, 1, "verify", folder / "sheet", "--for", folder / "cached")
    assert "fitted to the artifact" in line
