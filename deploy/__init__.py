"""Deploy: a compressed pipeline becomes a frozen, verifiable artifact that runs on low-bit kernels."""

from typing import TYPE_CHECKING

from errata.lazy_names import lazy_names

if TYPE_CHECKING:
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "errata.deploy.exporting": (
            "deploy",
            "export",
            "export_onnx",
        ),
        "errata.deploy.hub": (
            "from_hub",
            "push_to_hub",
        ),
        "errata.deploy.kernel_registry": ("BackendRow",),
        "errata.deploy.loading": (
            "load",
            "verify",
        ),
        "errata.deploy.manifest": ("Manifest",),
        "errata.deploy.pipeline": ("DeployedPipeline",),
        "errata.deploy.signing": ("sign",),
    },
)
