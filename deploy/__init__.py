"""Deploy: a compressed pipeline becomes a frozen, verifiable artifact that runs on low-bit kernels."""

from errata.deploy.backends import BackendRow
from errata.deploy.exporting import export
from errata.deploy.hub import from_hub, push_to_hub
from errata.deploy.loading import load, verify
from errata.deploy.manifest import Manifest
from errata.deploy.pipeline import DeployedPipeline
from errata.deploy.signing import sign

__all__ = [
    "BackendRow",
    "DeployedPipeline",
    "Manifest",
    "export",
    "from_hub",
    "load",
    "push_to_hub",
    "sign",
    "verify",
]
