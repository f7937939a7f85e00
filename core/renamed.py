"""Old names of modules and of what is in them: they work for one release, with a `DeprecationWarning`.

`install` adds a finder that answers only for the modules in `MODULES`, after all others have been asked, so a
current name costs nothing. To rename a module, add a line here; remove the lines of an earlier release.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module: the modules in which its contents are now. Renamed after 0.1.
MODULES: Mapping[str, tuple[str, ...]] = {
    "errata.compress.network": (),
    "errata.compress.recipes": (),
    "errata.compress.work": (),
    "errata.calibration.conditioning": ("errata.runtime.conditioning",),
    "errata.calibration.fingerprint": ("errata.fingerprint",),
    "errata.calibration.plain_json": ("errata.plain_json",),
    "errata.calibration.streams": ("errata.runtime.sampler",),
    "errata.cli.previews": ("errata.cli.dry_run",),
    "errata.compress.cache.corrected": ("errata.runtime.feature_correction",),
    "errata.compress.network.arguments": ("errata.runtime.unet_arguments",),
    "errata.compress.network.attention": ("errata.runtime.attention",),
    "errata.compress.network.branches": ("errata.runtime.branches",),
    "errata.compress.network.clock": ("errata.runtime.step_context", "errata.runtime.ranges"),
    "errata.compress.network.denoiser": ("errata.runtime.denoiser",),
    "errata.compress.network.inputs": ("errata.compress.quantize.recorded_inputs",),
    "errata.compress.network.owned_outputs": ("errata.runtime.copying_denoiser",),
    "errata.compress.network.passes": ("errata.compress.quantize.partial_forward",),
    "errata.compress.network.pipeline": ("errata.runtime.pipeline",),
    "errata.compress.network.refusals": ("errata.runtime.support_checks",),
    "errata.compress.network.run": ("errata.runtime.run", "errata.runtime.stepped_unet"),
    "errata.compress.network.structure": ("errata.runtime.structure",),
    "errata.compress.network.unet": (
        "errata.runtime.unet",
        "errata.runtime.structure",
        "errata.runtime.support_checks",
    ),
    "errata.compress.quantize.layers": ("errata.runtime.layers", "errata.compress.quantize.simulation"),
    "errata.compress.quantize.mixed_steps": ("errata.compress.quantize.recorded_inputs",),
    "errata.compress.quantize.ranges": ("errata.compress.quantize.range_search", "errata.runtime.ranges"),
    "errata.compress.quantize.scheme": ("errata.runtime.scheme",),
    "errata.compress.recipes.caching": ("errata.runtime.recipes.caching",),
    "errata.compress.recipes.quantization": ("errata.runtime.recipes.quantization",),
    "errata.compress.recipes.recipe": ("errata.runtime.recipes.recipe",),
    "errata.compress.recipes.recipe_name": ("errata.runtime.recipes.recipe_name",),
    "errata.compress.recipes.schedule": ("errata.runtime.schedule",),
    "errata.compress.work.journal": ("errata.compress.jobs.journal",),
    "errata.compress.work.lock": ("errata.file_lock",),
    "errata.compress.work.preparation": ("errata.compress.jobs.preparation",),
    "errata.compress.work.preview": ("errata.compress.jobs.dry_run",),
    "errata.compress.work.progress": ("errata.compress.jobs.progress", "errata.durations"),
    "errata.compress.work.reuse": ("errata.compress.jobs.reuse",),
    "errata.compress.work.stage_file": ("errata.compress.jobs.stage_file",),
    "errata.correct.analysis.growth": ("errata.correct.analysis.amplification_measure",),
    "errata.correct.call_clock": ("errata.correct.call_timer",),
    "errata.correct.choices": ("errata.correct.validation",),
    "errata.correct.sample_wise": ("errata.correct.batch_invariance",),
    "errata.correct.tap": ("errata.correct.scheduler_hook",),
    "errata.correct.waiting": ("errata.correct.device_sync",),
    "errata.deploy.allowed": ("errata.deploy.allowlist",),
    "errata.deploy.contents": ("errata.deploy.layer_table",),
    "errata.deploy.deployed": ("errata.deploy.pipeline",),
    "errata.deploy.opening": ("errata.deploy.loading",),
    "errata.deploy.other_steps": ("errata.deploy.step_mapping",),
    "errata.quality.kernel": ("errata.quality.kid",),
    "errata.quality.manifold": ("errata.quality.precision_recall",),
    "errata.quality.lpips": ("errata.quality.paired",),
    "errata.quality.measured": ("errata.quality.intervals",),
    "errata.quality.statistics_file": ("errata.quality.moments",),
    "errata.report.asking": ("errata.report.request",),
    "errata.report.beginning": ("errata.report.first_batch",),
    "errata.report.cards": ("errata.report.tables",),
    "errata.report.columns": ("errata.report.tables",),
    "errata.report.equal_compute": ("errata.report.compute_matched",),
    "errata.report.formatting": ("errata.quality.formatting",),
    "errata.report.grid": ("errata.report.report_index",),
    "errata.report.growth_plots": ("errata.report.growth",),
    "errata.report.judging": ("errata.report.summarize", "errata.quality.metric"),
    "errata.report.labels": ("errata.report.drawing",),
    "errata.report.ledger": ("errata.report.report_index",),
    "errata.report.locking": ("errata.report.sharding",),
    "errata.report.machine": ("errata.machine",),
    "errata.report.markdown": ("errata.report.render",),
    "errata.report.measurements": ("errata.report.store",),
    "errata.report.measuring": ("errata.report.runner",),
    "errata.report.meters": ("errata.machine",),
    "errata.report.metrics": ("errata.report.tables", "errata.quality.metric"),
    "errata.report.page": ("errata.report.render", "errata.report.image_grid"),
    "errata.report.pareto": ("errata.report.assemble",),
    "errata.report.pictures": ("errata.report.image_grid",),
    "errata.report.probing": ("errata.report.sampling",),
    "errata.report.provenance": ("errata.report.protocol", "errata.report.assemble"),
    "errata.report.recorded": ("errata.report.bundled_report",),
    "errata.report.reporting": ("errata.report.runner",),
    "errata.report.rows": ("errata.report.assemble",),
    "errata.report.scoring": ("errata.report.request", "errata.report.sampling"),
    "errata.report.settings": ("errata.report.store", "errata.report.request"),
    "errata.report.shares": ("errata.report.sharding",),
    "errata.report.strips": ("errata.report.image_grid",),
    "errata.report.text": ("errata.report.render", "errata.report.protocol"),
}
# Old name: new name, in whichever module it is.
NAMES: Mapping[str, str] = {
    "Asked": "ReportRequest",
    "CallClock": "CallTimer",
    "Judge": "RowSummarizer",
    "Judged": "RowSummary",
    "Ledger": "ReportIndex",
    "Measurements": "MeasurementStore",
    "OwnedOutputs": "CopyingDenoiser",
    "Rival": "ComputeMatched",
    "RivalResult": "ComputeMatchedResult",
    "Setting": "CorrectorContext",
    "StepClock": "StepContext",
    "Tap": "SchedulerHook",
    "begin": "measure_first_batch",
    "judged_rows": "summarize_rows",
    "refuse_conflicts": "check_conflicts",
    "refuse_lora": "check_no_lora",
    "refuse_taken": "check_is_vacant",
    "refuse_uncacheable": "check_cacheable",
    "refuse_unsupported": "check_supported",
    "require_colour": "check_colour",
    "require_features": "check_features",
    "require_jinja2": "check_jinja2",
    "require_matplotlib": "check_matplotlib",
    "require_same_dimension": "check_same_dimension",
    "require_same_shape": "check_same_shape",
    "rivals_of": "alternatives_of",
    "verdict_of_rival": "verdict_of_alternative",
}


def install() -> None:
    """Let the old module names be imported; calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def old_names(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module-level `__getattr__` for a package some of whose public names were renamed.

    Args:
        package: its name, `__name__` where it is used.
        names: new name by old name.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"{package}.{names[name]}")
        return getattr(sys.modules[package], names[name])

    return find


class _Finder(MetaPathFinder):
    """Finds the modules in `MODULES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return ModuleSpec(fullname, _Loader(), is_package=not MODULES[fullname])


class _Loader(Loader):
    """Makes a module that looks everything up where it is now."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        places = MODULES[module.__name__]

        def find(name: str) -> Any:
            wanted = NAMES.get(name, name)
            for place in places:
                found = importlib.import_module(place)
                if hasattr(found, wanted):
                    if not name.startswith("__"):
                        _warn(f"{module.__name__}.{name}", f"{place}.{wanted}")
                    return getattr(found, wanted)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=3
    )
