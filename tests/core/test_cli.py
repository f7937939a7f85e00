import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from forked import ForkServer
from PIL import Image

import errata
from errata import cli, quiet
from errata.cli import conditions, demo, generate, output, plans, usage
from errata.directories import staged_directory
from errata.embedded import PIPELINE
from errata.errors import ErrataError, PlanError, RecipeError

COMMANDS = [
    "demo",
    "calibrate",
    "compress",
    "deploy",
    "verify",
    "inspect",
    "generate",
    "sheet",
    "plan",
    "report",
    "export-onnx",
    "sign",
    "push",
    "pull",
]


def fail_with(problem: BaseException, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """The exit status of a command whose work ends in that exception."""

    def run(args: object) -> int:
        raise problem

    monkeypatch.setattr(demo, "run", run)
    return cli.main(["demo", *options])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"errata {errata.__version__}\n"


def test_help_lists_every_command_in_the_order_of_a_models_life(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^    ([a-z-]+) +\w", text, re.MULTILINE) == COMMANDS
    assert [title for title in cli.GROUPS if f"\n{title}:\n" not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: errata {command}" in text
    assert "--json" in text
    assert "--verbose" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "errata: error: the following arguments are required: COMMAND; see `errata --help`"),
        (["quantise"], "invalid choice: 'quantise'"),
        (["calibrate", "x"], "the following arguments are required: --out; see `errata calibrate --help`"),
        (["calibrate", "x", "--out", "y", "--steps", "0"], "--steps: `0` is not a whole number above zero"),
        (["generate", "x", "--out", "y", "--images", "many"], "`many` is not a whole number above zero"),
        (
            ["generate", "x", "--out", "y", "--correct", "magic"],
            "unknown method 'magic'; choose from diffier,",
        ),
        (["generate", "x", "--out", "y", "--at", "all"], "--at has no effect without `--correct METHOD`"),
        (
            ["generate", "x", "--out", "y", "--step-size", "1"],
            "--step-size has no effect without `--correct diffier` or `--correct iec`",
        ),
        (
            ["generate", "x", "--out", "y", "--correct", "iec", "--step-size", "1.5"],
            "--step-size 1.5 with iec: it must be in (0, 1], one number or one for each",
        ),
        (["generate", "x", "--out", "y", "--step-size", "nan"], "`nan` is not a finite number"),
        (
            ["generate", "x", "--out", "y", "--correct", "iec", "--order", "2"],
            "--order has no effect without `--correct forecast` or `--correct lookahead`",
        ),
        (
            ["generate", "x", "--out", "y", "--correct", "forecast+hindsigth"],
            "unknown method 'hindsigth'; choose from diffier,",
        ),
        (["report", "x", "--reference", "r", "--out", "y", "--correct", "none"], "unknown method 'none'"),
        (
            ["generate", "x", "--out", "y", "--plan", "p", "--correct", "iec"],
            "--correct has no effect with --pl",
        ),
        (["generate", "x", "--out", "y", "--plan", "p", "--at", "0"], "--at has no effect with --plan"),
        (
            ["generate", "x", "--out", "y", "--plan", "p", "--scale", "2"],
            "--scale has no effect with --plan",
        ),
        (
            ["report", "x", "--out", "y", "--reference", "z", "--plan", "p", "--iterations", "2"],
            "--iterations has no effect with --plan; add --at for a row",
        ),
        (
            ["report", "x", "--out", "y", "--reference", "z", "--correct", "forecast", "--iterations", "2"],
            "--iterations has no effect without `--correct iec` or `--correct langevin`",
        ),
        (["generate", "x", "--out", "y", "--guard", "maybe"], "`maybe` is neither true nor false"),
        (["generate", "x", "--out", "y", "--order", "-1"], "`-1` is not a whole number of 0 or more"),
        (["plan", "x", "--out", "y", "--max-overhead", "-0.1"], "`-0.1` is below 0"),
        (
            ["plan", "x", "--out", "y", "--max-overhead", "15"],
            "`15` means 1,500% of extra computation, and the limit is 500%; for 15 percent write 0.15 or 15%",
        ),
        (
            ["plan", "x", "--out", "y", "--max-overhead", "501%"],
            "`501%` means 501% of extra comp",
        ),
        (["plan", "x", "--out", "y", "--max-overhead", "%"], "`%` is not a finite number or percentage"),
        (
            ["plan", "x", "--out", "y", "--features", "inception"],
            "--features has no effect without",
        ),
        (
            ["plan", "x", "--out", "y", "--reference", "embedded", "--features", "inception"],
            "--reference embedded works only with --features digit-features, not with inception",
        ),
        (["plan", "x", "--out", "y", "--max-overhead", "inf"], "`inf` is not a finite number or percentage"),
        (
            ["plan", "x", "--out", "y", "--seed", str(2**63 - 9), "--samples", "5"],
            "is too large for 15 images; the largest is 9223372036854775793",
        ),
        (
            ["generate", "x", "--out", "y", "--correct", "iec", "--at", "sometimes"],
            "'sometimes' is not a sel",
        ),
        (["generate", "x", "--out", "y", "--correct", "iec", "--at", ""], "is not a selection of steps"),
        (["generate", "x", "--out", "y", "--backend", "magic"], "invalid choice: 'magic'"),
        (["generate", "x", "--out", "y", "--seed", "-1"], "`-1` is not a whole number from 0 to"),
        (["calibrate", "x", "--out", "y", "--seed", str(2**63)], "is not a whole number from 0 to 2**63 - 1"),
        (["generate", "x", "--out", "y", "--seed", str(2**63 - 1)], "is too large for 16 images"),
        (
            ["report", "x", "--out", "y", "--reference", "z", "--samples", "1"],
            "`1` is too few; give at least",
        ),
        (["report", "x", "--out", "y", "--reference", "z", "--at", "often"], "'often' is not a selection"),
        (
            ["report", "x", "--reference", "r", "--out", "y", "--correct", "iec@all", "--at", "full"],
            "--at has no effect: every method has steps of its own",
        ),
        (["report"], "--reference is missing; see `errata report --help`"),
        (["report", "x", "--reference", "r"], "--out is missing"),
        (["report", "--reference", "r", "--out", "y"], "ARTIFACT is missing; give what"),
        (["report", "x", "x", "--reference", "embedded", "--out", "y"], "an ARTIFACT is given twice"),
        (["report", "--merge", "x"], "--out is missing"),
        (
            ["report", "x", "--merge", "x", "--out", "y"],
            "--merge reads measurements only; leave out ARTIFACT",
        ),
        (["report", "x", "--reference", "r", "--save-stats", "s.npz"], "--save-stats writes statistics and"),
        (["report", "--reference", "r", "--save-stats", "s.txt"], "`s.txt` is not an .npz file"),
        (
            ["report", "x", "--reference", "embedded", "--features", "inception", "--out", "y"],
            "--reference embedded has digit-features only, not inception",
        ),
        (["compress", "x", "--out", "y", "--calibration", "z", "--recipe", "w3"], "unknown recipe 'w3'"),
        (["calibrate", "x", "--out", "y", "--prompts", "missing"], "allowed are a text file, FILE:COLUMN"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("errata: error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


@pytest.mark.parametrize(
    ("problem", "status", "line"),
    [
        (RecipeError("unknown recipe `w3`"), 1, "errata: error: unknown recipe `w3`\n"),
        (PlanError("two\n  lines"), 1, "errata: error: two lines\n"),
        (
            PermissionError(13, "Permission denied", "x"),
            1,
            "errata: error: [Errno 13] Permission denied: 'x'\n",
        ),
        (usage.UsageError("not so"), 2, "errata: error: not so\n"),
        (KeyboardInterrupt(), 130, "errata: error: interrupted\n"),
        (
            ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"),
            1,
            "errata: error: matplotlib is not installed; install it with: pip install 'errata[report]'\n",
        ),
        (
            ZeroDivisionError("division by zero"),
            1,
            "errata: error: unexpected ZeroDivisionError: division by zero "
            "(run again with --verbose for the traceback)\n",
        ),
    ],
)
def test_failures_are_one_line_and_have_their_status(
    problem: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fail_with(problem, monkeypatch) == status
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", line)


def test_verbose_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(ErrataError("no"), monkeypatch, "--verbose") == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("errata: error: no\n")


def test_termination_cleans_up_as_an_interrupt_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        with staged_directory(tmp_path / "out", error=ErrataError):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        return 0

    monkeypatch.setattr(demo, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "errata: error: interrupted\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "import sys; from errata.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run(
        f'"{sys.executable}" -c "{program}" | head -n 1', shell=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage: errata")
    assert done.stderr == ""


@pytest.mark.slow
def test_stderr_stays_the_programs_own() -> None:
    program = (
        "from errata import quiet\n"
        "with quiet.own_messages(verbose=False):\n"
        "    import torchao, brevitas, tqdm\n"
        "    from diffusers import DDIMPipeline, UNet2DModel\n"
        "    assert list(tqdm.tqdm(range(3))) == [0, 1, 2]"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_the_known_chatter_is_muted(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    noisy, ours = logging.getLogger("torchao"), logging.getLogger("errata.stage")
    with quiet.own_messages(verbose=False):
        noisy.warning("Failed to load %s", "x.so")
        noisy.warning("something else is wrong")
        ours.warning("three shards were there already")
        ours.info("too much detail")
    assert caplog.messages == ["something else is wrong"]
    assert capsys.readouterr().err == "errata: three shards were there already\n"


def test_what_diffusers_also_raises_is_muted() -> None:
    for name, text in [
        ("diffusers.pipelines.pipeline_utils", "Couldn't connect to the Hub: no.\nWill try to load from"),
        ("diffusers.models.modeling_utils", "An error occurred while trying to fetch x: no"),
    ]:
        record = logging.LogRecord(name, logging.ERROR, "", 0, text, None, None)
        assert logging.getLogger(name).filter(record)
        with quiet.without_notices():
            assert not logging.getLogger(name).filter(record)


def test_verbose_mutes_nothing(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with quiet.own_messages(verbose=True):
        logging.getLogger("torchao").warning("Failed to load %s", "x.so")
        logging.getLogger("errata.stage").info("detail")
    assert caplog.messages == ["Failed to load x.so"]
    assert capsys.readouterr().err == "errata: detail\n"


def test_logging_and_warnings_are_put_back() -> None:
    logger = logging.getLogger("errata")
    before = list(logger.handlers), logger.level, logger.propagate, list(warnings.filters), dict(os.environ)
    with quiet.own_messages(verbose=False):
        assert (list(logger.handlers), logger.level) != before[:2]
    assert before == (
        *(list(logger.handlers), logger.level, logger.propagate),
        *(list(warnings.filters), dict(os.environ)),
    )


def test_prompts_come_from_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cube\n\n  a café \nthird\n", encoding="utf-8")
    assert conditions.read_prompts(str(tmp_path / "prompts.txt"), limit=2) == ["a red cube", "a café"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(usage.UsageError, match="empty"):
        conditions.read_prompts(str(tmp_path / "empty.txt"), limit=2)


@pytest.fixture
def files_collected() -> Iterator[None]:
    """datasets leaves the file that it streams from to the garbage collector: not during another test."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("files_collected")
def test_prompts_and_labels_come_from_columns_of_local_files(tmp_path: Path) -> None:
    rows = {"text": ["a red cube", "a café", "third"], "label": [7, 0, 9]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "rows.csv")
    datasets.Dataset.from_dict(rows).to_json(tmp_path / "rows.jsonl")
    for name in ("rows.parquet", "rows.csv", "rows.jsonl"):
        assert conditions.read_prompts(f"{tmp_path / name}:text", limit=2) == ["a red cube", "a café"]
        assert conditions.read_labels(f"{tmp_path / name}:label", limit=9) == [7, 0, 9]
    (tmp_path / "labels.txt").write_text("3\n1\n")
    assert conditions.read_labels(str(tmp_path / "labels.txt"), limit=5) == [3, 1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("files_collected")
def test_a_column_that_is_not_there_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    rows = {"text": ["a red cube"], "label": [7]}
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(file)
    with pytest.raises(usage.UsageError, match="has no column `caption`; it has label, text"):
        conditions.read_prompts(f"{file}:caption", limit=1)
    with pytest.raises(usage.UsageError, match="holds 7, which is not text"):
        conditions.read_prompts(f"{file}:label", limit=1)
    with pytest.raises(usage.UsageError, match="holds 'a red cube', which is not a class label"):
        conditions.read_labels(f"{file}:text", limit=1)
    with pytest.raises(usage.UsageError, match="the column is missing"):
        conditions.read_labels(str(file), limit=1)
    with pytest.raises(usage.UsageError, match="no such file"):
        conditions.read_labels(f"{tmp_path}/other.csv:label", limit=1)


def test_files_that_are_not_utf8_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("prompts.txt", "recipe.yaml"):
        (tmp_path / name).write_bytes(b"caf\xe9\n")
    common = ["x", "--out", f"{tmp_path}/out"]
    assert cli.main(["calibrate", *common, "--prompts", f"{tmp_path}/prompts.txt"]) == 2
    assert "prompts.txt` is not UTF-8 text" in capsys.readouterr().err
    assert cli.main(["compress", *common, "--calibration", "z", "--recipe", f"{tmp_path}/recipe.yaml"]) == 2
    assert "recipe.yaml` is not UTF-8 text" in capsys.readouterr().err


def test_backends_are_those_of_the_deploy_stage() -> None:
    from errata.deploy import assembly, kernel_registry

    registered = len(assembly.OUR_KERNELS)  # by their import
    assert registered == 3
    assert kernel_registry.backend_names() == usage.BACKENDS


def test_seeds_are_what_a_generator_takes() -> None:
    assert [usage.seed("0"), usage.seed(str(2**63 - 1))] == [0, 2**63 - 1]
    usage.check_seeds(2**63 - 2, 2)


def test_an_interrupt_that_lands_in_a_finalizer_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Finalized:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def run(args: object) -> int:
        Finalized()
        time.sleep(10)
        return 0

    monkeypatch.setattr(demo, "run", run)
    before = sys.unraisablehook
    # A job in a shell's background starts with interrupts ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["demo"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "errata: error: interrupted\n"
    assert sys.unraisablehook is before


def test_other_lost_exceptions_are_told_as_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Finalized:
        def __del__(self) -> None:
            raise ValueError("lost")

    def run(args: object) -> int:
        Finalized()
        return 0

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 0
    assert "ValueError: lost" in capsys.readouterr().err


def test_table_is_as_wide_as_its_cells() -> None:
    text = output.table(["layer", "bits"], [["conv_in", 8], ["mid", 16]])
    assert text.splitlines() == ["layer    bits", "-------  ----", "conv_in     8", "mid        16"]
    assert output.table(["layer", "bits"], []).splitlines() == ["layer  bits", "-----  ----"]


def test_sizes_for_people() -> None:
    assert output.megabytes(1234) == "1.2 kB"
    assert output.megabytes(1_234_567) == "1.23 MB"


def test_the_sheet_shows_every_image_in_reading_order(tmp_path: Path) -> None:
    images = [Image.new("L", (2, 3), color=10 * (index + 1)) for index in range(5)]
    sheet = generate.image_sheet(images)
    assert sheet.size == (3 * 64 + 2 * 2, 2 * 96 + 2)  # 32 times as large
    for place in ((0, 0), (63, 95)):
        inside = [
            sheet.getpixel((66 * column + place[0], 98 * row + place[1]))
            for row in range(2)
            for column in range(3)
        ]
        assert inside == [10, 20, 30, 40, 50, 0]
    assert [sheet.getpixel(place) for place in ((64, 0), (65, 0), (0, 96), (0, 97))] == [0, 0, 0, 0]
    large = [Image.new("L", (65, 70)), Image.new("L", (65, 70))]
    assert generate.image_sheet(large).size == (65 * 2 + 2, 70)
    generate.save_images(images, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"{i:05d}.png" for i in range(5)),
        "grid.png",
    ]


def test_no_correction_is_no_plan() -> None:
    parser = usage.OneLineParser()
    plans.add_plan_options(parser)
    assert plans.plan_from(parser.parse_args([])).method is None


@pytest.mark.parametrize(
    ("text", "fraction"),
    [("0.15", 0.15), ("15%", 0.15), ("15 %", 0.15), ("0", 0.0), ("5", 5.0), ("500%", 5.0), ("0.5%", 0.005)],
)
def test_an_overhead_is_a_fraction_or_a_percentage(text: str, fraction: float) -> None:
    assert usage.overhead(text) == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "num_inference_steps=6, but 4 were recorded; sample with num_inference_steps=4",
            "--steps 6, but 4 were recorded; sample with --steps 4",
        ),
        ("leave it out, sample or correct deployed.at_steps(…)", "leave it out, add --on-mismatch nearest"),
        ('load it with on_mismatch="nearest"', "load it with --on-mismatch nearest"),
        ("use `deployed.at_steps(50)`", "use --on-mismatch nearest"),
        ("backend 'vnni' cannot run; use backend='auto'", "backend 'vnni' cannot run; use --backend auto"),
        (
            "make a plan for this one with errata.correct.plan(deployed, …)",
            "make a plan for this one with `errata plan`",
        ),
        ("make one with errata.compress.apply(…) first", "make one with `errata compress` first"),
        ('sample with steps="none"', "sample with --correct none"),
        ("use errata.quality.open_network('inception')", "use --features inception"),
        (
            "pass the network that it was made with as `network`",
            "pass the network that it was made with as --features",
        ),
        ("leave it out, such as steps='1-24'", "leave it out, such as --at 1-24"),
        (
            "write it behind: Plan(Refresh(…)) + Plan(Hindsight()), or refresh+hindsight",
            "write it behind: --correct refresh+hindsight",
        ),
        ("choose another `out`, or remove `runs/a`", "choose another --out, or remove `runs/a`"),
        (
            "guides nothing: guidance_scale=1; sample with more",
            "guides nothing: --guidance-scale 1; sample with more",
        ),
        # What is no option of a command stays as it is.
        (
            "IEC(step_size=1.5): step_size must be in (0, 1]",
            "IEC(step_size=1.5): step_size must be in (0, 1]",
        ),
        ("steps='x' is not a list of step numbers", "steps='x' is not a list of step numbers"),
        ("branch=3; allowed are 1 and 2", "branch=3; allowed are 1 and 2"),
    ],
)
def test_errors_name_the_commands_options(
    message: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(PlanError(message), monkeypatch) == 1
    assert capsys.readouterr().err == f"errata: error: {said}\n"


def test_options_and_commands_in_errors_exist() -> None:
    (commands,) = (
        action.choices for action in cli.build_parser()._actions if isinstance(action.choices, dict)
    )
    options = {option for parser in commands.values() for option in parser._option_string_actions}
    assert set(cli.OPTION_OF.values()) <= options
    assert {name.removeprefix("errata ") for name in cli.COMMAND_OF.values()} <= set(commands)


BASE_INSTALLATION = """
import sys
for name in ("accelerate", "peft", "torchvision", "transformers"):
    sys.modules[name] = None
"""


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs programs that have imported of PyTorch what says nothing, and cannot import optional packages."""
    silent = "import os; os.environ['TQDM_DISABLE'] = '1'\n"  # progress bars are no notices
    preamble = BASE_INSTALLATION + silent + "import torch._dynamo"
    with ForkServer(preamble, tmp_path_factory.mktemp("base")) as server:
        yield server


def said_by(base: ForkServer, program: str, *arguments: object) -> str:
    """What a program says on stderr."""
    done = base.run(program, *arguments, environment={"TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_other_packages_print_no_notices(tmp_path: Path, base: ForkServer) -> None:
    """With a base installation, from calibration to images, on the command line and in Python."""
    # Notices come with imports, so with the first command that needs a package.
    program = (
        "import json, sys\n"
        "from errata.cli import main\n"
        "sys.exit(any(main(command) for command in json.loads(sys.argv[1])))"
    )
    size = ["--steps", "2", "--samples", "2", "--batch-size", "2"]
    calibration, compressed, artifact = (
        f"{tmp_path}/{name}" for name in ("calibration", "compressed", "artifact")
    )
    recipe = ["--calibration", calibration, "--recipe", "deepcache-2"]
    commands = [
        ["calibrate", str(PIPELINE), *size, "--out", calibration],
        ["compress", str(PIPELINE), *recipe, "--out", compressed],
        ["deploy", compressed, "--out", artifact],
        ["generate", artifact, "--images", "1", "--out", f"{tmp_path}/images"],
    ]
    said = said_by(base, program, json.dumps(commands))
    assert [line for line in said.splitlines() if not line.startswith("errata: ")] == []
    program = (
        "import sys\n"
        "from errata import calibration, compress, correct, deploy, report\n"
        "calibration.load_pipeline(sys.argv[1])\n"
        "deploy.load(sys.argv[2])\n"
    )
    assert said_by(base, program, PIPELINE, tmp_path / "artifact") == ""
