"""Compressing without a fit of the calibrated output, where a test is about something else."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from errata.calibration import CalibrationSet
from errata.compress.quantize.calibrated_output import identity_map
from errata.runtime.scheme import Scheme


@contextmanager
def plain_outputs() -> Iterator[None]:
    """Leave outputs as they are while this holds, as where a fitted map does not help the images.

    A fit and the images that judge it take as long as all else. Tests of both are in
    `compress/quantize/test_calibrated_output.py`, `compress/jobs` and `deploy/test_calibrated_output.py`.
    """

    def idle(
        unet: Any, calibration_set: CalibrationSet, scheme: Scheme, table: Mapping[str, Tensor], *, stage: Any
    ) -> dict[str, Tensor]:
        assert scheme.output is not None
        return identity_map(calibration_set.num_steps, scheme.output.channels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("errata.compress.jobs.work.fit_output_map", idle)
        yield
