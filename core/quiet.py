"""Keep stderr for the program's own messages.

Libraries that errata imports report optional packages and kernels that errata does without. The filters are
on the loggers, because an import may reset a level that was set before it. `mute` drops the messages that
come with an import, for every program that imports errata; `own_messages` sets up logging for one run of the
`errata` command, and `--verbose` lets everything through.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TextIO

from errata.errors import ErrataWarning

# Logger: parts of messages that say nothing about the user's program, and come with `import errata.…`.
IMPORT_NOTICES: Mapping[str, Sequence[str]] = {
    # torchao 0.18 ships libraries for other interpreters and CUDA versions, and names each that it skips.
    "torchao": ("Failed to load",),
    # torchao 0.18 registers enums in a way that torch 2.13 deprecates.
    "torch.utils._pytree": ("is an Enum subclass",),
    # diffusers 0.42 looks for tensor classes that torchao 0.18 has moved.
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
}
# Messages that the command turns into one line of its own, or does not need.
COMMAND_NOTICES: Mapping[str, Sequence[str]] = {
    # Images are prepared the same way without torchvision.
    "transformers.utils.import_utils": ("requires torchvision (not installed)",),
    # diffusers 0.42 logs what it then raises: an unreachable hub, and missing weights.
    "diffusers.pipelines.pipeline_utils": ("connect to the Hub",),
    "diffusers.models.modeling_utils": ("while trying to fetch",),
}


class _Without(logging.Filter):
    """A filter that drops messages which contain one of some texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self.texts)


_IMPORT_FILTERS = {name: _Without(texts) for name, texts in IMPORT_NOTICES.items()}


def mute() -> None:
    """Drop the messages of `IMPORT_NOTICES` from now on; calling it again changes nothing."""
    for name, which in _IMPORT_FILTERS.items():
        logging.getLogger(name).addFilter(which)


@contextmanager
def own_messages(*, verbose: bool) -> Iterator[None]:
    """Set up logging, warnings and progress bars for one run of the command, and put them back."""
    with ExitStack() as cleanup:
        cleanup.enter_context(_logging_to_stderr(logging.INFO if verbose else logging.WARNING))
        if verbose:
            cleanup.enter_context(_unmuted())
        else:
            cleanup.enter_context(without_notices())
            cleanup.enter_context(warnings.catch_warnings())
            if not sys.warnoptions:  # `python -W ...` and PYTHONWARNINGS win
                warnings.simplefilter("ignore")
                warnings.simplefilter("default", ErrataWarning)
                warnings.showwarning = _log_warning
        if not sys.stderr.isatty():  # progress bars are for people
            cleanup.enter_context(_environment("TQDM_DISABLE", "1"))
        yield


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning as one line of the command, without the place in the code."""
    logging.getLogger("errata").warning("%s", message)


@contextmanager
def without_notices() -> Iterator[None]:
    """Drop the messages of `COMMAND_NOTICES` as well, and no others."""
    with ExitStack() as cleanup:
        for name, texts in COMMAND_NOTICES.items():
            cleanup.enter_context(_filtered(logging.getLogger(name), _Without(texts)))
        yield


@contextmanager
def _unmuted() -> Iterator[None]:
    """Let the messages of `IMPORT_NOTICES` through."""
    for name, which in _IMPORT_FILTERS.items():
        logging.getLogger(name).removeFilter(which)
    try:
        yield
    finally:
        mute()


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
    """Set a variable that libraries read while they are imported, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
