"""Calibration: run the float pipeline and keep what its denoiser was fed at every step.

`calibrate` records trajectories into a directory, `load` opens one again as a `CalibrationSet`, and
`load_pipeline` opens the float pipeline itself. `estimate` says what a calibration will take. The directory:

    calibration.json            the request, the model's fingerprint, the timesteps, every shard's SHA-256
    shards/00000.safetensors    one sample-batch: `sample`, `timestep`, `cond.<argument>`

While it is being written, `calibration.partial.json` stands in for `calibration.json`, and `calibrate` with
the same arguments continues the work.

Work can be divided among processes and machines: `record_share` records a share, `Shard(index, count)`, and
`merge` makes the set of all shares.
"""

from errata.calibration.calibration_set import CalibrationSet, Record, load
from errata.calibration.collection import calibrate, collect, record_share
from errata.calibration.estimation import CalibrationEstimate, estimate
from errata.calibration.merging import merge
from errata.calibration.opening import load_pipeline
from errata.calibration.shares import Shard
from errata.calibration.sizes import choose_sizes
from errata.fingerprint import model_fingerprint
from errata.runtime.conditioning import nest

__all__ = [
    "CalibrationEstimate",
    "CalibrationSet",
    "Record",
    "Shard",
    "calibrate",
    "choose_sizes",
    "collect",
    "estimate",
    "load",
    "load_pipeline",
    "merge",
    "model_fingerprint",
    "nest",
    "record_share",
]
