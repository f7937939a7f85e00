"""Keeps stderr for the program's own words.

The libraries below talk while they are imported or open a folder, about optional kernels and packages
that errata does without. Filters sit on the very loggers, because levels set before an import may be
reset by it. `--verbose` lets everything through.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

MUTED = {
    # torchao 0.18 ships libraries for other interpreters and CUDA versions, and names each that it skips.
    "torchao": ("Failed to load",),
    # torchao 0.18 registers enums in a way that torch 2.13 deprecates.
    "torch.utils._pytree": ("is an Enum subclass",),
    # diffusers 0.42 looks for tensor classes that torchao 0.18 has moved.
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    # Pictures are prepared the same way without torchvision.
    "transformers.utils.import_utils": ("requires torchvision (not installed)",),
    # diffusers recommends accelerate, which only large text-to-image models need.
    # diffusers 0.42 announces what it then raises: an unreachable hub, and missing weights.
    "diffusers.pipelines.pipeline_utils": ("because `accelerate` was not found", "connect to the Hub"),
    "diffusers.models.modeling_utils": ("because `accelerate` was not found", "while trying to fetch"),
}


@contextmanager
def own_words(*, verbose: bool) -> Iterator[None]:
    """Configure logging, warnings and progress bars for one run of the command, and put them back."""
    with ExitStack() as cleanup:
        cleanup.enter_context(_logging_to_stderr(logging.INFO if verbose else logging.WARNING))
        if not verbose:
            cleanup.enter_context(without_chatter())
            cleanup.enter_context(warnings.catch_warnings())
            if not sys.warnoptions:  # `python -W ...` and PYTHONWARNINGS win
                warnings.simplefilter("ignore")
        if not sys.stderr.isatty():  # bars are for people
            cleanup.enter_context(_environment("TQDM_DISABLE", "1"))
        yield


@contextmanager
def without_chatter() -> Iterator[None]:
    """Drop the messages of `MUTED`, and no others."""
    with ExitStack() as cleanup:
        for name, texts in MUTED.items():
            cleanup.enter_context(_filtered(logging.getLogger(name), _Without(texts)))
        yield


@contextmanager
def _logging_to_stderr(level: int) -> Iterator[None]:
    logger = logging.getLogger("errata")
    before = logger.level, logger.propagate
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("errata: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextmanager
def _filtered(logger: logging.Logger, which: logging.Filter) -> Iterator[None]:
    logger.addFilter(which)
    try:
        yield
    finally:
        logger.removeFilter(which)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """For libraries that read it while they are imported; a value of the user's is left alone."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


class _Without(logging.Filter):
    """Drops the messages that contain one of some texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self.texts)
