"""`load` and `verify` for an artifact, or for an engine made from one.

They only tell the two apart. `assembly` and `verification` do the work for an artifact, `engines` for an
engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from errata.deploy import verification
from errata.deploy.engines.manifest import ENGINE_FILE
from errata.deploy.manifest import Manifest
from errata.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from errata.deploy.pipeline import DeployedPipeline, OnMismatch


def is_engine(path: str | Path) -> bool:
    """Return whether the directory says of itself that it is an engine."""
    return (Path(path) / ENGINE_FILE).is_file()


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    backend: str = "auto",
    on_mismatch: OnMismatch = "error",
) -> DeployedPipeline:
    """Verify the artifact or engine at `path`, then load it.

    Args:
        path: directory made by `deploy` or by `export_onnx`.
        device: None means CUDA where there is one, else CPU; an engine runs on the CPU.
        backend: "auto" picks the fastest kernel for each layer, and computes attention in one fused kernel
            whose softmax output is not quantized; "vnni", "onednn" (CPU) and "triton" (CUDA) use int8
            wherever the scheme allows it, and keep to the scheme; "reference" keeps to it in floating point.
            An engine has a runtime of its own, so only "auto".
        on_mismatch: what a request for another number of steps than recorded does: "error" refuses it,
            "nearest" serves it with the ranges of the nearest recorded steps, and warns; see
            `DeployedPipeline.at_steps`. An engine serves the recorded number of steps, so only "error".

    Raises:
        ArtifactError: and its subclasses as in `verify`; or a device, backend or `on_mismatch` that is
            unknown, or that an engine does not have.
    """
    # Here and not above: `verify` needs neither torch nor diffusers.
    import torch

    from errata.deploy.assembly import load_artifact

    if not is_engine(path):
        return load_artifact(path, device, backend, on_mismatch)
    _check_engine_option(path, "device", None if device is None else torch.device(device).type, (None, "cpu"))
    _check_engine_option(path, "backend", backend, ("auto",))
    _check_engine_option(path, "on_mismatch", on_mismatch, ("error",))
    from errata.deploy.engines.loading import load as load_engine  # the exporter's modules take a second

    return load_engine(path)


def verify(
    path: str | Path, *, signature: str | Path | None = None, public_key: str | Path | None = None
) -> Manifest:
    """Check the artifact or engine at `path` and return its manifest, see `verification.verify`.

    Raises:
        ArtifactError: and its subclasses as there and in `engines.verify`; an engine has no signature of its
            own: check that of the artifact that it names.
    """
    if not is_engine(path):
        return verification.verify(path, signature=signature, public_key=public_key)
    if signature is not None or public_key is not None:
        raise ArtifactError(
            f"{path} is an engine, and only artifacts are signed; check the artifact's signature, and "
            "compare its manifest_sha256 with the one inside the engine's manifest"
        )
    from errata.deploy.engines.verification import verify as verify_engine

    return verify_engine(path)


def _check_engine_option(
    path: str | Path, name: str, given: str | None, allowed: tuple[str | None, ...]
) -> None:
    if given not in allowed:
        told = " or ".join(repr(value) for value in allowed)
        raise ArtifactError(
            f"{name}={given!r}, but {path} is an engine, where only {told} is allowed. For anything else, "
            "load the artifact that it was made from"
        )
