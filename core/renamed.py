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
    "errata.calibration.journal": ("errata.calibration.document", "errata.calibration.shards"),
    "errata.calibration.plain_json": ("errata.plain_json",),
    "errata.calibration.streams": ("errata.runtime.sampler",),
    "errata.cli.memory": ("errata.memory",),
    "errata.compress.cache.channel_fit": ("errata.compress.cache.cache_correction",),
    "errata.cli.columns": ("errata.cli.conditions",),
    "errata.cli.dry_run": ("errata.cli.compress",),
    "errata.cli.export": ("errata.cli.deploy",),
    "errata.cli.pictures": ("errata.cli.generate",),
    "errata.cli.previews": ("errata.cli.compress",),
    "errata.cli.plan_grid": ("errata.cli.report_options",),
    "errata.cli.pull": ("errata.cli.sharing",),
    "errata.cli.push": ("errata.cli.sharing",),
    "errata.cli.quiet": ("errata.quiet",),
    "errata.cli.recipes": ("errata.cli.compress_options",),
    "errata.cli.sensitivities": ("errata.cli.compress",),
    "errata.cli.sign": ("errata.cli.sharing",),
    "errata.cli.verify": ("errata.cli.inspect",),
    "errata.compress.cache.corrected": ("errata.runtime.feature_correction",),
    "errata.compress.cache.refined_inputs": ("errata.compress.cache.cache_features",),
    "errata.compress.cache.stream_check": ("errata.compress.cache.cache_features",),
    "errata.compress.network.arguments": ("errata.runtime.unet_arguments",),
    "errata.compress.network.attention": ("errata.runtime.attention",),
    "errata.compress.network.branches": ("errata.runtime.branches",),
    "errata.compress.network.clock": ("errata.runtime.step_context", "errata.runtime.ranges"),
    "errata.compress.network.denoiser": ("errata.runtime.denoiser",),
    "errata.compress.network.inputs": ("errata.compress.quantize.recorded_inputs",),
    "errata.compress.network.owned_outputs": ("errata.runtime.copying_denoiser",),
    "errata.compress.network.passes": ("errata.compress.quantize.partial_forward",),
    "errata.compress.network.pipeline": ("errata.runtime.pipeline",),
    "errata.compress.network.refusals": ("errata.runtime.structure",),
    "errata.compress.network.run": ("errata.runtime.run", "errata.runtime.stepped_unet"),
    "errata.compress.network.structure": ("errata.runtime.structure",),
    "errata.compress.network.unet": (
        "errata.runtime.unet",
        "errata.runtime.structure",
    ),
    "errata.compress.quantize.layers": ("errata.runtime.layers", "errata.compress.quantize.simulation"),
    "errata.compress.quantize.mixed_steps": ("errata.compress.quantize.recorded_inputs",),
    "errata.compress.quantize.range_search": ("errata.compress.quantize.quantizers",),
    "errata.compress.quantize.ranges": ("errata.compress.quantize.quantizers", "errata.runtime.ranges"),
    "errata.compress.quantize.scheme": ("errata.runtime.scheme",),
    "errata.compress.recipes.caching": ("errata.runtime.recipes.caching",),
    "errata.compress.recipes.quantization": ("errata.runtime.recipes.quantization",),
    "errata.compress.recipes.recipe": ("errata.runtime.recipes.recipe",),
    "errata.compress.recipes.recipe_name": ("errata.runtime.recipes.recipe",),
    "errata.compress.recipes.schedule": ("errata.runtime.schedule",),
    "errata.compress.rounding.rounding_inputs": ("errata.compress.quantize.recorded_inputs",),
    "errata.compress.rounding.soft_rounding": ("errata.compress.rounding.reconstruction",),
    "errata.compress.rounding.straight_through": ("errata.compress.quantize.quantizers",),
    "errata.compress.work.journal": (
        "errata.compress.jobs.stages",
        "errata.journal",
        "errata.request_differences",
    ),
    "errata.compress.work.lock": ("errata.journal_rules",),
    "errata.compress.work.preparation": ("errata.compress.jobs.preparation",),
    "errata.compress.work.preview": ("errata.compress.jobs.dry_run",),
    "errata.compress.work.progress": ("errata.compress.jobs.progress", "errata.durations"),
    "errata.compress.work.reuse": ("errata.compress.jobs.preparation",),
    "errata.compress.work.stage_file": ("errata.journal",),
    "errata.correct.analysis.growth": ("errata.correct.analysis.amplification_measure",),
    "errata.correct.analysis.measure": ("errata.correct.analysis.amplification_measure",),
    "errata.correct.analysis.norms": ("errata.correct.analysis.probe",),
    "errata.correct.analysis.probing": ("errata.correct.analysis.watch",),
    "errata.correct.call_clock": ("errata.correct.call_timer",),
    "errata.correct.choices": ("errata.correct.validation",),
    "errata.correct.conflicts": ("errata.correct.plan_check",),
    "errata.correct.diffier": ("errata.correct.methods.diffier",),
    "errata.correct.epsilon_scaling": ("errata.correct.methods.epsilon_scaling",),
    "errata.correct.evaluations": ("errata.correct.scheduler_hook",),
    "errata.correct.fitted_forecast": ("errata.correct.methods.fitted_forecast",),
    "errata.correct.forecast": ("errata.correct.methods.forecast",),
    "errata.correct.fresh_noise": ("errata.correct.batch_invariance",),
    "errata.correct.hindsight": ("errata.correct.methods.hindsight",),
    "errata.correct.iec": ("errata.correct.methods.iec",),
    "errata.correct.langevin": ("errata.correct.methods.langevin",),
    "errata.correct.lookahead": ("errata.correct.methods.lookahead",),
    "errata.correct.plan_file": ("errata.correct.plans",),
    "errata.correct.planner.placements": ("errata.correct.planner.candidates",),
    "errata.correct.planner.trial": ("errata.correct.planner.halving",),
    "errata.correct.refresh": ("errata.correct.methods.refresh",),
    "errata.correct.sample_wise": ("errata.correct.batch_invariance",),
    "errata.correct.second_order": ("errata.correct.methods.second_order",),
    "errata.correct.tap": ("errata.correct.scheduler_hook",),
    "errata.correct.waiting": ("errata.correct.device_sync",),
    "errata.deploy.allowed": ("errata.deploy.allowlist",),
    "errata.deploy.backends": ("errata.deploy.kernel_registry", "errata.deploy.assembly"),
    "errata.deploy.contents": ("errata.deploy.verification",),
    "errata.deploy.cpu.embedding": ("errata.deploy.cpu.fusion",),
    "errata.deploy.cpu.output": ("errata.deploy.cpu.fusion",),
    "errata.deploy.cpu.resnet": ("errata.deploy.cpu.fusion",),
    "errata.deploy.cpu.weight_only": ("errata.deploy.reference",),
    "errata.deploy.cuda.availability": ("errata.deploy.cuda.installing",),
    "errata.deploy.denoiser_check": ("errata.deploy.tensors",),
    "errata.deploy.deployed": ("errata.deploy.pipeline", "errata.deploy.assembly"),
    "errata.deploy.engines.denoiser": ("errata.deploy.engines.loading",),
    "errata.deploy.engines.example": ("errata.deploy.engines.exporting",),
    "errata.deploy.engines.installing": ("errata.deploy.engines.onnx_graphs",),
    "errata.deploy.engines.session": ("errata.deploy.engines.runtime",),
    "errata.deploy.hub_source": ("errata.deploy.hub",),
    "errata.deploy.layer_table": ("errata.deploy.verification",),
    "errata.deploy.model_card": ("errata.deploy.hub",),
    "errata.deploy.opening": ("errata.deploy.loading",),
    "errata.deploy.other_steps": ("errata.runtime.schedule", "errata.runtime.sampler"),
    "errata.deploy.packing": ("errata.runtime.weight_formats", "errata.deploy.reference"),
    "errata.deploy.step_mapping": ("errata.runtime.schedule", "errata.runtime.sampler"),
    "errata.runtime.recipes.recipe_name": ("errata.runtime.recipes.recipe",),
    "errata.runtime.support_checks": ("errata.runtime.structure",),
    "errata.embedded.features": ("errata.embedded",),
    "errata.file_lock": ("errata.journal_rules",),
    "errata.pipelines.class_labels": ("errata.pipelines.class_embedder",),
    "errata.pipelines.registry": ("errata.pipelines",),
    "errata.quality.kernel": ("errata.quality.kid",),
    "errata.quality.manifold": ("errata.quality.precision_recall",),
    "errata.quality.lpips": ("errata.quality.paired",),
    "errata.quality.measured": ("errata.quality.intervals",),
    "errata.quality.statistics_file": ("errata.quality.moments",),
    "errata.quality.paired_change": ("errata.runtime.paired_change",),
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
    "SampleWise": "BatchInvariantDenoiser",
    "Setting": "CorrectorContext",
    "StepClock": "StepContext",
    "Tap": "SchedulerHook",
    "contact_sheet": "image_sheet",
    "own_words": "own_messages",
    "Rival": "ComputeMatched",
    "RivalResult": "ComputeMatchedResult",
    "begin": "measure_first_batch",
    "judged_rows": "summarize_rows",
    "refuse_conflicts": "check_conflicts",
    "refuse_lora": "check_no_lora",
    "refuse_taken": "check_is_vacant",
    "refuse_uncacheable": "check_cacheable",
    "refuse_unsupported": "check_supported",
    "require_kept_samples": "check_keeps_samples",
    "works_one_by_one": "run_row_by_row",
    "save_pictures": "save_images",
    "without_chatter": "without_notices",
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


def old_names(
    package: str, names: Mapping[str, str], *, others: Mapping[str, Any] | None = None
) -> Callable[[str], Any]:
    """Return a module-level `__getattr__` for a package some of whose public names were renamed.

    Args:
        package: its name, `__name__` where it is used.
        names: new name by old name.
        others: further attributes of the package, looked up first, which may grow later.
    """

    def find(name: str) -> Any:
        if others is not None and name in others:
            return others[name]
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"{package}.{names[name]}")
        return getattr(sys.modules[package], names[name])

    return find


class _Finder(MetaPathFinder):
    """A finder of the modules in `MODULES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return ModuleSpec(fullname, _Loader(), is_package=not MODULES[fullname])


class _Loader(Loader):
    """A loader of modules that look everything up where it is now."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        places = MODULES[module.__name__]
        parent, _, child = module.__name__.rpartition(".")
        taken = getattr(sys.modules[parent], "__dict__", {}).get(child)
        if isinstance(taken, ModuleType):
            # What is imported becomes an attribute of its package, in place of what has that name there.
            sys.modules[module.__name__] = taken
            return

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
