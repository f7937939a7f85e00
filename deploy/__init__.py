"""Deploy: a compressed pipeline becomes a frozen, verifiable artifact that runs on low-bit kernels."""

from errata.deploy.backends import BackendRow
from errata.deploy.deployed import DeployedPipeline, load
from errata.deploy.exporting import export
from errata.deploy.manifest import Manifest
from errata.deploy.signing import sign
from errata.deploy.verification import verify

__all__ = ["BackendRow", "DeployedPipeline", "Manifest", "export", "load", "sign", "verify"]
