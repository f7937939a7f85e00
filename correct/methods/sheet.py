"""An errata sheet: an affine map of what the network returns, fitted to one artifact, in a file of its own.

    symbol   here         meaning
    ε̃_i      prediction   of the artifact at call i, (B, C, H, W): noise, velocity or x_0
    M_i, b_i maps         (C, C) and (C,), with numbers of their own for full and for cached evaluations

    ε̂_i = M_i ε̃_i + b_i

A quantized network errs by nearly the same amount at every pixel and in every image. Of the error of one
prediction that is a few per cent; but it has the same sign at step after step and adds up, so most of the
error of the image goes with it. It takes no evaluation.

The map belongs to the network: it acts on every evaluation, those that other methods of the plan add
included, and on each half of a guided batch alike, before guidance. So it does not matter where in a plan a
sheet stands. `errata.correct.fit_sheet` makes one.

Source: this project. Relatives with a factor and an offset per channel: PTQD (He et al., NeurIPS 2023),
D²-DPM (Zeng et al., 2025), TAC-Diffusion (Yao et al., ECCV 2024). What differs: it is fitted along the
artifact's own corrected run, step after step, with weights against heavy tails and coefficients shrunk by
their standard errors.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.correct.network_method import NetworkMethod
from errata.correct.registry import register_method
from errata.correct.sheets.fitted_maps import CallLevels, FittedMaps, MappedDenoiser
from errata.correct.sheets.sheet_file import LARGEST_SHEET, SheetFacts, from_bytes, to_bytes
from errata.correct.steps import spelled
from errata.correct.traits import acts_between
from errata.directories import refusals_as, write_whole
from errata.errors import ErrataWarning, PlanError
from errata.runtime.denoiser import Denoiser

if TYPE_CHECKING:
    from errata.correct.pipeline import CorrectedPipeline
    from errata.deploy import DeployedPipeline


@register_method
@dataclass(frozen=True, kw_only=True, eq=False)
class Sheet(NetworkMethod):
    """An errata sheet, at no evaluation; made by `fit_sheet`, kept as a file.

    Attributes:
        maps: the numbers.
        facts: what it was fitted to and under, and what it was measured to do.
    """

    maps: FittedMaps
    facts: SheetFacts

    def __eq__(self, other: object) -> bool:
        """Return whether the other is a sheet with the same bytes."""
        return isinstance(other, Sheet) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        """Return a hash of the bytes."""
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        """Return its artifact and size, without the numbers."""
        return f"Sheet(artifact='{self.facts.artifact[:12]}…', rows={len(self.maps.call)})"

    @property
    def artifact(self) -> str:
        """Digest of the only artifact that it may be used on."""
        return self.facts.artifact

    def network_correction(
        self, corrected: CorrectedPipeline, steps: tuple[int, ...]
    ) -> Callable[[Denoiser], Denoiser]:
        """Return what puts the map behind a denoiser, at `steps`.

        Raises:
            PlanError: the sheet was fitted to another artifact, or to another number of steps; see
                `errata.deploy.load(on_mismatch=…)`; or the plan has a second sheet.
        """
        deployed = corrected.deployed
        self.check_artifact(deployed)
        if sum(isinstance(method, Sheet) for method, _ in corrected.placed) > 1:
            raise PlanError(
                "the plan has more than one sheet, and each would correct what another corrected already; "
                "keep one, which may be in a plan file or given as a sheet"
            )
        self._warn_of_another_plan(corrected)
        wanted = CallLevels.of(corrected.levels, deployed.denoiser.timesteps, deployed.schedule)
        self._check_levels(deployed, wanted)
        output_map = self.maps.output_map(
            self.facts.levels, wanted, steps=steps, has_cache=deployed.schedule.has_cache
        )
        return lambda denoiser: MappedDenoiser(denoiser, output_map)

    @staticmethod
    def parts_of(corrected: CorrectedPipeline) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
        """Return the methods of a plan that act between calls, as JSON, and the calls where each acts."""
        parts = [(method, steps) for method, steps in corrected.placed if acts_between(method)]
        return tuple(method.to_json() for method, _ in parts), tuple(spelled(steps) for _, steps in parts)

    def _warn_of_another_plan(self, corrected: CorrectedPipeline) -> None:
        methods, steps = self.parts_of(corrected)
        if (list(methods), list(steps)) == (list(self.facts.plan), list(self.facts.plan_steps)):
            return
        fitted, used = (" + ".join(part["type"] for part in plan) for plan in (self.facts.plan, methods))
        other = used or "no other method"
        if fitted == used:
            other = f"{used} at other steps or with other options"
        warnings.warn(
            f"this sheet was fitted to the artifact with {fitted or 'no other method'}, and is used with "
            f"{other}: what it is worth here was not measured; fit one under this plan, or measure it in a "
            "report",
            ErrataWarning,
            stacklevel=5,
        )

    def check_artifact(self, deployed: DeployedPipeline) -> None:
        """Check that it was fitted to this artifact.

        Raises:
            PlanError: it was not.
        """
        digest = deployed.manifest.artifact_sha256
        if digest != self.facts.artifact:
            raise PlanError(
                f"this sheet was fitted to the artifact {self.facts.artifact[:12]}…, but this is "
                f"{digest[:12]}…, whose errors are others; fit one to it with `errata sheet`"
            )

    def _check_levels(self, deployed: DeployedPipeline, wanted: CallLevels) -> None:
        fitted = self.facts.levels
        if fitted.values == wanted.values:
            return
        told = (
            f"this sheet was fitted to {len(fitted.values)} denoiser calls, and this run makes "
            f"{len(wanted.values)}, at other noise levels"
        )
        is_mapped = deployed.num_inference_steps != deployed.manifest.sampler.num_inference_steps
        if fitted.are_known != wanted.are_known or not (is_mapped or deployed.on_mismatch == "nearest"):
            raise PlanError(
                f"{told}; fit one to this number of steps, or load the artifact with on_mismatch='nearest' "
                "to interpolate the sheet"
            )
        warnings.warn(
            f"{told}; its numbers are interpolated over the noise level, and what that does to quality was "
            "not measured",
            ErrataWarning,
            stacklevel=5,
        )

    def summary(self) -> dict[str, Any]:
        """Return what it is and was measured to do, as plain JSON."""
        facts = self.facts
        return {
            "artifact": facts.artifact,
            "teacher": facts.teacher,
            "plan": [dict(part) for part in facts.plan],
            "calls": len(facts.levels.values),
            "rows": len(self.maps.call),
            "bytes": len(self.to_bytes()),
            "samples": facts.samples,
            "measured": asdict(facts.measured),
        }

    def summary_text(self) -> str:
        """Return the same for people, on two lines."""
        facts, measured = self.facts, self.facts.measured
        under = "".join(f" with {part['type']}" for part in facts.plan)
        teacher = "the float model" if facts.teacher == "float" else "the artifact without its cache"
        return (
            f"sheet for the artifact {facts.artifact[:12]}…{under}: {len(facts.levels.values)} denoiser "
            f"calls, {len(self.to_bytes()):,} bytes\n"
            f"PSNR to {teacher}: {measured.psnr:.2f} dB, with the sheet {measured.corrected_psnr:.2f} dB, "
            f"{measured.change:+.2f} dB ({measured.low:+.2f} to {measured.high:+.2f}) on {measured.images} "
            "images that it was not fitted to"
        )

    def to_bytes(self) -> bytes:
        """Return the bytes of its file."""
        return to_bytes(self.maps, self.facts)

    def save(self, path: str | Path) -> None:
        """Write its file, whole or not at all, in place of what is there.

        Raises:
            PlanError: the file cannot be written there.
        """
        write_whole(Path(path), self.to_bytes(), error=PlanError, advice="choose another file")

    @classmethod
    def load(cls, path: str | Path, deployed: DeployedPipeline | None = None) -> Sheet:
        """Return the sheet in a file.

        Args:
            path: a file that `save` wrote.
            deployed: the artifact that it has to belong to; None leaves that to `wrap`.

        Raises:
            PlanError: there is no such file, it is not a sheet or damaged, or it belongs to another artifact.
        """
        source = Path(path)
        advice = "give a file that `errata sheet` wrote"
        with refusals_as(PlanError, doing=f"read `{source}`", advice=advice), source.open("rb") as file:
            data = file.read(LARGEST_SHEET + 1)
        maps, facts = from_bytes(data, str(source))
        sheet = cls(maps=maps, facts=facts)
        if deployed is not None:
            sheet.check_artifact(deployed)
        return sheet

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value: the file's bytes in base64."""
        return {"type": "Sheet", "version": 1, "file": base64.b64encode(self.to_bytes()).decode()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sheet:
        """Return the sheet that `to_json` described.

        Raises:
            PlanError: another version, a missing or unknown key, or a damaged sheet.
        """
        version = value.get("version")
        # In Python True and 1.0 equal 1.
        if type(version) is not int or version != 1 or set(value) != {"type", "version", "file"}:
            raise PlanError(
                f"Sheet version {version!r} with the keys {sorted(value)}; this release reads "
                "version 1 with the keys file, type, version"
            )
        try:
            data = base64.b64decode(value["file"], validate=True)
        except (binascii.Error, TypeError, ValueError) as problem:
            raise PlanError(f"Sheet.file is not base64: {problem}; fit it again") from problem
        maps, facts = from_bytes(data, "the sheet in the plan")
        return cls(maps=maps, facts=facts)
