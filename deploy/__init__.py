"""Deploy: a compressed pipeline becomes a frozen, verifiable artifact that runs on low-bit kernels."""

from errata.deploy.exporting import deploy, export, export_onnx
from errata.deploy.hub import from_hub, push_to_hub
from errata.deploy.kernel_registry import BackendRow
from errata.deploy.loading import load, verify
from errata.deploy.manifest import Manifest
from errata.deploy.pipeline import DeployedPipeline
from errata.deploy.signing import sign

__all__ = [
    "BackendRow",
    "DeployedPipeline",
    "Manifest",
    "deploy",
    "export",
    "export_onnx",
    "from_hub",
    "load",
    "push_to_hub",
    "sign",
    "verify",
]
