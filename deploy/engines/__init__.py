"""Engines: an artifact's network as files that another runtime runs, corrected like the artifact itself."""

from typing import TYPE_CHECKING

from errata.lazy_names import lazy_names

if TYPE_CHECKING:
    from errata.deploy.engines.exporting import export_onnx
    from errata.deploy.engines.loading import load
    from errata.deploy.engines.manifest import ENGINE_FILE, FORMS, EngineManifest
    from errata.deploy.engines.verification import verify

__all__ = ["ENGINE_FILE", "FORMS", "EngineManifest", "export_onnx", "load", "verify"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "errata.deploy.engines.exporting": ("export_onnx",),
        "errata.deploy.engines.loading": ("load",),
        "errata.deploy.engines.manifest": ("ENGINE_FILE", "FORMS", "EngineManifest"),
        "errata.deploy.engines.verification": ("verify",),
    },
)
