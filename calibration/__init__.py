"""Calibration: run the float pipeline and keep what its denoiser was fed at every step.

`collect` records trajectories into a directory, `load` opens one again as a `CalibrationSet`, and
`load_pipeline` opens the float pipeline itself. The directory:

    calibration.json            what was asked, of which model, the timesteps, every shard's SHA-256
    shards/00000.safetensors    one sample-batch: `sample`, `timestep`, `cond.<argument>`

While it is being written, `calibration.partial.json` stands in for `calibration.json`, and `collect` with
the same arguments takes the work up again.
"""

from errata.calibration.calibration_set import CalibrationSet, Record, load
from errata.calibration.collection import collect
from errata.calibration.pipelines import load_pipeline
from errata.fingerprint import model_fingerprint
from errata.runtime.conditioning import nest

__all__ = ["CalibrationSet", "Record", "collect", "load", "load_pipeline", "model_fingerprint", "nest"]
