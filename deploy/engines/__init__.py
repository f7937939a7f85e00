"""Engines: an artifact's network as files that another runtime runs, corrected like the artifact itself."""

from errata.deploy.engines.exporting import export_onnx
from errata.deploy.engines.loading import load
from errata.deploy.engines.manifest import ENGINE_FILE, FORMS, EngineManifest
from errata.deploy.engines.verification import verify

__all__ = ["ENGINE_FILE", "FORMS", "EngineManifest", "export_onnx", "load", "verify"]
