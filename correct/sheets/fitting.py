"""`fit_sheet`: a sheet from pairs of predictions, the artifact's and its teacher's, for the same samples.

    1. Fit. Sample `samples` images with the artifact under the plan. At every evaluation the teacher predicts
       from the very same input; the moments of both are added, and the prediction goes on as the map of all
       moments so far corrects it. So every call is fitted to the samples that corrected calls before it lead
       to, and one pass is enough.
    2. Choose, on images that the fit did not see: matrix and bias, or the bias alone.
    3. Measure the chosen one on images that neither saw. If it does not help there, there is no sheet.

Both 2 and 3 judge by images: PSNR to the teacher's images from the same noise.

Source: this project; see `errata.runtime.output_moments` for the fit of one call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from errata.correct.methods.sheet import Sheet
from errata.correct.pipeline import wrap
from errata.correct.plans import Plan
from errata.correct.sampling import Inputs, PlanSampler, batches_of, default_inputs
from errata.correct.sheets.fitted_maps import CallLevels, FittedMaps
from errata.correct.sheets.learning import Learning
from errata.correct.sheets.sheet_file import SheetFacts
from errata.correct.sheets.teacher import Teacher, open_teacher
from errata.correct.validation import is_count, require
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.fingerprint import value_digest
from errata.journal import Journal, Stage, without_journal
from errata.journal_rules import JournalRules, remove_journal
from errata.quality.paired import psnr
from errata.runtime.output_moments import OutputMoments
from errata.runtime.paired_change import PairedChange

# Added to the seed: images that people make and measure begin at small seeds, and a fit must not see those.
_FIRST_SEED = 2_000_000_000
_NOT_MEASURED = PairedChange(images=0, psnr=0.0, corrected_psnr=0.0, change=0.0, low=0.0, high=0.0)


RULES = JournalRules(
    work="an unfinished sheet",
    format="errata-sheet-work/1",
    error=PlanError,
    request="request.json",
    lock="lock",
    items="stages",
    logger="errata.correct",
    has_own_folder=True,
)


class NoGainError(PlanError):
    """A sheet was fitted and does not help.

    Attributes:
        measured: what it does.
    """

    def __init__(self, measured: PairedChange) -> None:
        super().__init__(
            f"the fitted sheet does not help: on {measured.images} images that the fit did not see, PSNR to "
            f"the teacher's images changes by {measured.change:+.2f} dB ({measured.low:+.2f} to "
            f"{measured.high:+.2f}), from {measured.psnr:.2f} dB; more samples may help, or another plan"
        )
        self.measured = measured


@dataclass(frozen=True, kw_only=True)
class SheetChoices:
    """How to fit a sheet, and on how many images to judge it.

    Attributes:
        samples: images of the fit.
        held_out: images that judge it; the first half chooses, the other half measures.
        batch_size: images per batch.
        seed: of the noise, see `fit_sheet`; below 2**62.

    Raises:
        PlanError: a value out of range.
    """

    samples: int = 64
    held_out: int = 64
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 8), ("held_out", 8), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            require(is_count(value) and value >= least, self, name, f"a whole number, {least} or more")
        require(self.seed < 2**62, self, "seed", "below 2**62")

    @property
    def first_seed(self) -> int:
        """Seed of image 0."""
        return _FIRST_SEED + self.seed

    @property
    def batches(self) -> dict[str, list[range]]:
        """Indices of the images of each part, in batches."""
        middle, end = self.samples + self.held_out // 2, self.samples + self.held_out
        return {
            "fit": batches_of(self.samples, self.batch_size),
            "choose": batches_of(middle, self.batch_size, first=self.samples),
            "measure": batches_of(end, self.batch_size, first=middle),
        }


def fit_sheet(
    deployed: DeployedPipeline,
    teacher: DiffusionPipeline | Literal["self"],
    *,
    plan: Plan | None = None,
    inputs: Inputs | None = None,
    samples: int = 64,
    held_out: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Sheet:
    """Return a sheet that brings the artifact's images closer to its teacher's, as measured here.

    Memory does not grow with the number of images, and only by a few kilobytes with each step.

    Args:
        deployed: a loaded artifact or engine; it stays as it is.
        teacher: the float pipeline that the artifact was made from; or "self", the artifact's own full calls,
            which repairs what a cache does where no float model is left.
        plan: what the sheet will be used with, such as `Plan(Forecast())`: it leaves other errors than the
            artifact alone. None is the artifact alone.
        inputs: the pipeline's keyword arguments for a batch of image indices, 0 to `samples + held_out - 1`;
            None is right for pipelines that draw from noise alone.
        samples: images of the fit; at least 8.
        held_out: images that judge it; the first half chooses between matrix and bias, the other half
            measures. At least 8.
        batch_size: images per batch.
        seed: of the noise; image i has the seed `2_000_000_000 + seed + i`, so that images with small seeds,
            which a report or a plan is made of, are other ones.
        journal: a directory where finished batches are kept, so that a killed fit continues; it is removed in
            the end. None keeps nothing.
        progress: whether to show a bar, with an estimate of the time that is left.

    Raises:
        TypeError: `deployed` is not a loaded artifact, or `teacher` is neither a pipeline nor "self".
        NoGainError: the sheet does not help, see `measured`; a `PlanError`.
        PlanError: an argument is out of range; the plan does not suit the artifact, or has a sheet already;
            the teacher is another model than the artifact's; "self" without a cache.
    """
    if not isinstance(deployed, DeployedPipeline):
        raise TypeError(
            f"fit_sheet() takes a loaded artifact, not a {type(deployed).__name__}: pass what "
            "deploy.load(path) returns"
        )
    choices = SheetChoices(samples=samples, held_out=held_out, batch_size=batch_size, seed=seed)
    plan = Plan.none() if plan is None else plan
    fit = _Fit(deployed, open_teacher(teacher, deployed), plan, choices, inputs or default_inputs)
    with tqdm(total=fit.total, unit="image", desc="fitting", disable=not progress) as bar:
        if journal is None:
            return fit.run(without_journal, bar)
        request = _request_of(deployed, teacher, plan, choices, fit.inputs)
        with _sheet_journal(Path(journal), request) as kept:
            return fit.run(kept.stage, bar)


class _Fit:
    """One fit."""

    def __init__(
        self,
        deployed: DeployedPipeline,
        teacher: Teacher,
        plan: Plan,
        choices: SheetChoices,
        inputs: Inputs,
    ) -> None:
        self._deployed, self._teacher, self._plan, self._choices = deployed, teacher, plan, choices
        self.inputs = inputs
        self._batches = choices.batches
        corrected = wrap(deployed, plan)  # checks the plan before long work begins
        if any(isinstance(method, Sheet) for method, _ in corrected.placed):
            raise PlanError("the plan has a sheet already; fit one under the rest of the plan")
        self._parts = Sheet.parts_of(corrected)
        self._levels = CallLevels.of(corrected.levels, deployed.denoiser.timesteps, deployed.schedule)
        channels = int(deployed.pipe.unet.config.out_channels)
        self._moments = OutputMoments(deployed.schedule.num_steps, channels)

    @property
    def total(self) -> int:
        """Images to sample, those of the teacher and each variant counted by themselves."""
        count = {name: sum(map(len, batches)) for name, batches in self._batches.items()}
        return count["fit"] + 4 * count["choose"] + 3 * count["measure"]

    def run(self, stage: Stage, bar: Any) -> Sheet:
        """Fit, choose and measure; what a stage gave before is not computed again."""
        self._learn(stage, bar)
        # The better one, by images that the fit did not see.
        variants = [self._sheet(bias_only=False), self._sheet(bias_only=True)]
        chosen = self._judge("choose", variants, stage, bar)[1:].mean(dim=1).argmax()
        sheet = variants[int(chosen)]
        # What it does on images that neither saw.
        measured = PairedChange.of(*self._judge("measure", [sheet], stage, bar))
        if not measured.helps:
            raise NoGainError(measured)
        return dataclasses.replace(sheet, facts=dataclasses.replace(sheet.facts, measured=measured))

    def _learn(self, stage: Stage, bar: Any) -> None:
        """Add the moments of all batches of the fit."""
        learning = Learning(self._teacher, self._moments)
        sampler = self._sampler(learning)
        for number, batch in enumerate(self._batches["fit"]):

            def make(batch: range = batch) -> dict[str, Tensor]:
                learning.begin(batch)
                sampler.sample(batch)
                return self._moments.state()

            self._moments.restore(stage(f"fit-{number:05d}", make))
            bar.update(len(batch))

    def _judge(self, part: str, sheets: list[Sheet], stage: Stage, bar: Any) -> Tensor:
        """Return PSNR to the teacher's images, `(1 + sheets, images)`, dB: first without a sheet."""
        teacher = self._teacher.sampler(seed=self._choices.first_seed, inputs=self.inputs)
        samplers = [self._sampler(None), *map(self._sampler, sheets)]
        rows = []
        for number, batch in enumerate(self._batches[part]):

            def make(batch: range = batch) -> dict[str, Tensor]:
                right = teacher.sample(batch).images
                return {"psnr": torch.stack([psnr(each.sample(batch).images, right) for each in samplers])}

            rows.append(stage(f"{part}-{number:05d}", make)["psnr"])
            bar.update(len(batch) * (1 + len(samplers)))
        return torch.cat(rows, dim=1)

    def _sampler(self, correction: Sheet | Learning | None) -> PlanSampler:
        plan = self._plan if correction is None else Plan(correction) + self._plan
        return PlanSampler(self._deployed, plan, seed=self._choices.first_seed, inputs=self.inputs)

    def _sheet(self, *, bias_only: bool) -> Sheet:
        methods, steps = self._parts
        facts = SheetFacts(
            artifact=self._deployed.manifest.artifact_sha256,
            teacher=self._teacher.name,
            plan=methods,
            plan_steps=steps,
            samples=self._choices.samples,
            seed=self._choices.first_seed,
            levels=self._levels,
            measured=_NOT_MEASURED,
        )
        return Sheet(maps=self._maps(bias_only=bias_only), facts=facts)

    def _maps(self, *, bias_only: bool) -> FittedMaps:
        """Return the maps of all calls that the fit saw, for every kind of evaluation that they serve."""
        seen, full_steps = self._moments.seen(), set(self._deployed.schedule.full_steps)
        calls = {"full": seen, "cached": tuple(call for call in seen if call not in full_steps)}
        return FittedMaps.of(
            self._moments.maps(bias_only=bias_only), {kind: calls[kind] for kind in self._teacher.kinds}
        )


@contextmanager
def _sheet_journal(path: Path, request: dict[str, Any]) -> Iterator[Journal]:
    """Yield the journal of a fit; it is removed when the fit ends, with a sheet or without one."""
    try:
        with Journal(path, request, RULES) as journal:
            yield journal
    except NoGainError:
        # The next attempt has other options, and would be refused over this one's work.
        remove_journal(path, RULES)
        raise
    remove_journal(path, RULES)


def _request_of(
    deployed: DeployedPipeline, teacher: object, plan: Plan, choices: SheetChoices, inputs: Inputs
) -> dict[str, Any]:
    """Return everything that decides the bytes of a sheet."""
    batches = [batch for part in choices.batches.values() for batch in part]
    return {
        "artifact": deployed.manifest.sha256,
        "steps": deployed.num_inference_steps,
        "teacher": teacher if isinstance(teacher, str) else "float",
        "plan": plan.to_json(),
        "inputs": value_digest([dict(inputs(batch)) for batch in batches], name="inputs"),
        **asdict(choices),
    }
