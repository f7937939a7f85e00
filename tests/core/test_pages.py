"""Every Python example of the README and of docs/ runs, page by page, from top to bottom.

The blocks of a page share their names, as a reader's session would. They run in an empty directory, in which
the page finds what it says that it needs (`FOUND`). Numbers that only decide how long something takes are
lowered (`LOWERED`), and a smaller network stands in for the embedded one, as a reader's own would; all else
is run as it stands. One test is one page, so pages may be spread over processes.

The embedded model itself goes through all stages in `tests/report/test_demo.py`.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, UNet2DModel
from sybil import Document, Example, Lexeme, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.evaluators.skip import Skipper
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.typing import Parser

from errata import calibration, compress, deploy, embedded
from errata.deploy import kernel_registry
from errata.pipelines import ClassConditionalLDMPipeline
from errata.runtime import weight_formats

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# What lies in runs/my when a page's first example starts; pages that make everything themselves have none.
FOUND: dict[str, tuple[str, ...]] = {
    "docs/calibrate.md": ("labelled-model",),
    "docs/compress.md": ("calibration",),
    "docs/correct.md": ("artifact",),
    "docs/deploy.md": ("compressed",),
    "docs/extend-cache.md": ("calibration",),
    "docs/extend-corrector.md": ("artifact",),
    "docs/extend-kernel.md": ("artifact",),
    "docs/extend-metric.md": ("artifact",),
    "docs/extend-quantizer.md": ("calibration",),
    "docs/extend-weight-format.md": ("calibration",),
    "docs/get-quality-back.md": ("artifact",),
    "docs/make-it-faster.md": ("compressed",),
    "docs/prove-it.md": ("artifact",),
    "docs/report.md": ("artifact",),
    "docs/run-it-elsewhere.md": ("artifact",),
    "docs/scale.md": ("artifact",),
}
# `<!-- skip: next -->` keeps a block from being run. Whoever adds one has to say so here, and why.
SKIPPED: dict[str, int] = {}
LOWERED = {"num_inference_steps": 6, "num_samples": 4, "batch_size": 4, "samples_per_step": 4, "samples": 4}
# Pages that need more: a covariance in 64 features needs as many images, else a report warns; and a forecast
# needs three full calls.
LOWERED_LESS: dict[str, dict[str, int]] = {
    page: {"samples": 66, "batch_size": 33}
    for page in ("docs/extend-metric.md", "docs/prove-it.md", "docs/report.md", "docs/scale.md")
} | {
    "docs/get-quality-back.md": {"samples": 8, "held_out": 8},  # a fit takes no fewer
    "README.md": {"samples": 66, "batch_size": 33, "num_inference_steps": 11},
}
STEPS, SAMPLES, RECIPE = 6, 4, "w8a8+deepcache-3"


def run_lowered(example: Example) -> None:
    """Run a block with lower numbers, in the namespace of its page."""
    source: Lexeme = example.parsed
    limits = LOWERED | LOWERED_LESS.get(name_of(Path(example.path)), {})
    for name, most in limits.items():
        lower = lambda found, most=most: f"{found[1]}{min(int(found[2]), most)}"  # noqa: E731
        source = Lexeme(re.sub(rf"(\b{name}=)(\d+)\b", lower, source), source.offset, source.line_offset)
    example.parsed = source
    PythonEvaluator()(example)


def name_of(page: Path) -> str:
    """Return a page's path in the repository, or its whole path elsewhere."""
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else str(page)


def document_of(page: str) -> Document:
    parsers: list[Parser] = [CodeBlockParser("python", run_lowered), SkipParser()]
    return Sybil(parsers).parse(ROOT / page)


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.+?)^```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `digits`, its calibration, simulated model and artifact, in few steps."""
    root = tmp_path_factory.mktemp("my")
    digits_pipeline().save_pretrained(root / "digits")
    pipe = calibration.load_pipeline(root / "digits")
    recording = calibration.collect(
        pipe,
        root / "calibration",
        num_inference_steps=STEPS,
        num_samples=SAMPLES,
        batch_size=SAMPLES,
    )
    compressed = compress.apply(pipe, recording, RECIPE, root / "compressed")
    deploy.export(compressed, root / "artifact")
    labelled_pipeline().save_pretrained(root / "labelled-model")
    return root


def digits_pipeline() -> DDIMPipeline:
    """Return a pipeline with the embedded one's interface and kinds of blocks, and random weights."""
    config = UNet2DModel.load_config(embedded.PIPELINE / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        unet = UNet2DModel.from_config(config, block_out_channels=(16, 16, 16), layers_per_block=1)
    return DDIMPipeline(
        unet=unet.eval(), scheduler=DDIMScheduler.from_pretrained(embedded.PIPELINE / "scheduler")
    )


def labelled_pipeline() -> ClassConditionalLDMPipeline:
    """Return a pipeline that takes class labels, with random weights."""
    unet = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=11,  # ten digits, and no digit at all
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return ClassConditionalLDMPipeline(
        vae=vae, unet=unet.eval(), scheduler=DDIMScheduler(), unconditional_label=10
    )


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that changes to a new directory with what a page needs."""

    def make(page: str) -> Path:
        mine = tmp_path / "runs" / "my"
        mine.mkdir(parents=True)
        for name in FOUND.get(page, ()):
            shutil.copytree(prepared / name, mine / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(embedded, "PIPELINE", prepared / "digits")
        # What a page registers is for that page alone.
        monkeypatch.setattr(weight_formats, "_FORMATS", dict(weight_formats._FORMATS))
        monkeypatch.setattr(kernel_registry, "_LAYER_KERNELS", list(kernel_registry._LAYER_KERNELS))
        return tmp_path

    return make


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_examples_run(page: str, workplace: Callable[[str], Path]) -> None:
    document = document_of(page)
    document.namespace["__name__"] = "example"
    workplace(page)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES)
def test_no_example_is_overlooked(page: str) -> None:
    """What fences hold is what was parsed, and blocks that are not run are counted."""
    fences = re.findall(r"^\s*(?:```|~~~)(.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert fences == ["python", ""] * len(blocks(page)), "a fence of another kind; commands are indented"
    examples = list(document_of(page).examples())
    skips = [example for example in examples if isinstance(example.region.evaluator, Skipper)]
    assert all(example.parsed == ("next", None) for example in skips), "skip single blocks, by `skip: next`"
    assert len(skips) == SKIPPED.get(page, 0)
    assert len(examples) - len(skips) == len(blocks(page))


def test_the_index_has_one_line_for_each_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.+?)\]\((.+?)\): .+\.$", index, re.MULTILINE)
    assert all(name == target for name, target in listed)
    assert sorted(f"docs/{name}" for name, _ in listed) == [
        page for page in PAGES if page not in ("README.md", "docs/README.md")
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_nothing_is_listed_for_pages_that_are_gone() -> None:
    assert {*FOUND, *SKIPPED, *LOWERED_LESS} <= {*PAGES}


def test_a_wrong_example_fails_and_names_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nbatch_size = 3\n```\n\n```python\nbatch_size / 0\n```\n")
    first, second = document_of(str(page)).examples()
    first.evaluate()
    with pytest.raises(ZeroDivisionError) as raised:
        second.evaluate()
    assert (raised.traceback[-1].lineno + 1, str(raised.traceback[-1].path)) == (8, str(page))
