"""Amplification against closed forms, exact Jacobians, and a quantized network."""

import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Generator, Tensor

from errata import deploy
from errata.correct.analysis import Amplification, amplification
from errata.correct.analysis.probe import jacobian_norms
from errata.correct.analysis.watch import arguments_for, probes_of
from errata.correct.sampling import default_inputs
from errata.deploy import DeployedPipeline
from errata.errors import ErrataError, PlanError, ReportError
from errata.runtime.denoiser import UNetDenoiser
from errata.runtime.schedule import CacheSchedule
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

Deploy = Callable[..., DeployedPipeline]
STEPS, SIDE = 5, 4
SIZES = (0.1, 0.5, 1.0)
# Linear networks make differences exact up to rounding; the tiny UNet's own curvature is below this too.
RELATIVE = 1e-4


def matrix(seed: int, size: int = SIDE * SIDE) -> Tensor:
    """Not symmetric, and on the whole positive, so the norms of A + B J and A - B J differ."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=Generator().manual_seed(seed))
    return drawn / math.sqrt(size) + torch.eye(size, dtype=torch.float64)


def linear(m: Tensor) -> Callable[[Tensor, int], Tensor]:
    """ε(x, i) = (1 + i / 10) M x, so that every step has a Jacobian of its own."""
    return lambda x, step: (x.flatten(1) @ m.T.to(x.dtype) * (1 + step / 10)).reshape(x.shape)


def latents(side: int = SIDE, dtype: torch.dtype = torch.float64) -> Callable[[range], Mapping[str, Any]]:
    def inputs(indices: range) -> Mapping[str, Any]:
        draws = [
            torch.randn(1, side, side, dtype=dtype, generator=Generator().manual_seed(i)) for i in indices
        ]
        return {"latents": torch.stack(draws)}

    return inputs


def ddim_coefficients(scheduler: Any) -> list[tuple[float, float]]:
    """Eq. 5 of the paper."""
    scheduler.set_timesteps(STEPS)
    alphas = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps] + [1.0]
    pairs = []
    for a, a_next in itertools.pairwise(alphas):
        b = math.sqrt(1 - a_next) - math.sqrt(a_next) * math.sqrt(1 - a) / math.sqrt(a)
        pairs.append((math.sqrt(a_next) / math.sqrt(a), b))
    return pairs


def norm(m: Tensor) -> float:
    return float(torch.linalg.matrix_norm(m, 2))


def norms_of(jacobians: list[Tensor], pairs: list[tuple[float, float]]) -> tuple[list[float], Any]:
    eye = torch.eye(len(jacobians[0]), dtype=torch.float64)
    joined = list(zip(jacobians, pairs, strict=True))
    step = [norm(a * eye + b * j) for j, (a, b) in joined]
    return step, {size: [norm((1 - size) * eye + size * b * j) for j, (_, b) in joined] for size in SIZES}


def assert_norms(
    found: Amplification, step: list[float], refinement: Any, relative: float = RELATIVE
) -> None:
    for row, expected in zip(found.propagation.each, step, strict=True):
        assert row == pytest.approx((expected,) * len(row), rel=relative)
    for size, expected_rows in refinement.items():
        for row, expected in zip(found.refinement[size].each, expected_rows, strict=True):
            assert row == pytest.approx((expected,) * len(row), rel=relative)


@pytest.fixture
def artifact(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> DeployedPipeline:
    return deploy_closed_form(linear(matrix(1)), ddim, STEPS)


def measure(deployed: DeployedPipeline, **options: Any) -> Amplification:
    chosen: dict[str, Any] = {"step_sizes": SIZES, "samples": 2, "inputs": latents(), **options}
    return amplification(deployed, **chosen)


def test_a_linear_network_has_the_norms_of_its_matrix(
    artifact: DeployedPipeline, ddim: DDIMScheduler
) -> None:
    found = measure(artifact)
    pairs = ddim_coefficients(ddim)
    jacobians = [(1 + i / 10) * matrix(1) for i in range(STEPS)]
    assert (found.method, found.is_bound) == ("jacobian", False)
    assert found.steps == tuple(range(STEPS))
    assert found.timesteps == artifact.denoiser.timesteps
    assert [list(pair) for pair in found.coefficients] == [pytest.approx(pair, rel=1e-6) for pair in pairs]
    assert_norms(found, *norms_of(jacobians, pairs))
    wrong_sign, _ = norms_of(jacobians, [(a, -b) for a, b in pairs])
    assert all(
        abs(one - other) > 100 * RELATIVE * one
        for one, other in zip(found.propagation.mean, wrong_sign, strict=True)
    )


def test_chunks_of_any_size_make_the_same_jacobian(artifact: DeployedPipeline) -> None:
    one, other = measure(artifact, batch_size=3), measure(artifact, batch_size=512)
    for row, expected in zip(one.propagation.each, other.propagation.each, strict=True):
        assert row == pytest.approx(expected, rel=1e-9)
    denoiser: Any = artifact.denoiser
    denoiser.calls.clear()
    measure(artifact, batch_size=6, steps="0")
    assert max(rows for _, rows in denoiser.calls) <= 6


def test_steps_are_selected(artifact: DeployedPipeline) -> None:
    whole, part = measure(artifact), measure(artifact, steps="1,3")
    assert part.steps == (1, 3)
    assert part.propagation.each == (whole.propagation.each[1], whole.propagation.each[3])
    with pytest.raises(PlanError, match="selects nothing"):
        measure(artifact, steps="none")


def test_cached_steps_have_the_jacobian_of_the_full_network(
    deploy_closed_form: Deploy, ddim: DDIMScheduler
) -> None:
    schedule = CacheSchedule.uniform(STEPS, interval=2, branch=1)
    deployed = deploy_closed_form(linear(matrix(1)), ddim, STEPS, schedule=schedule)
    jacobians = [(1 + i / 10) * matrix(1) for i in range(STEPS)]
    assert_norms(measure(deployed), *norms_of(jacobians, ddim_coefficients(ddim)))


def test_each_sample_has_its_own_norms(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> None:
    deployed = deploy_closed_form(lambda x, step: torch.sin(2 * x + step), ddim, STEPS)
    found = measure(deployed, steps="0", samples=3)
    a, b = ddim_coefficients(ddim)[0]
    x = latents()(range(3))["latents"].flatten(1)
    expected = (a + b * 2 * torch.cos(2 * x)).abs().amax(1)
    assert found.propagation.each[0] == pytest.approx(expected.tolist(), rel=RELATIVE)
    assert expected.std() > 100 * RELATIVE
    assert found.propagation.low[0] < found.propagation.mean[0] < found.propagation.high[0]


def test_arnoldi_bounds_from_below_and_reaches_the_norm_in_a_whole_basis(artifact: DeployedPipeline) -> None:
    exact, whole = measure(artifact), measure(artifact, method="arnoldi", iterations=SIDE * SIDE)
    assert whole.is_bound
    for size in SIZES:
        assert whole.refinement[size].mean == pytest.approx(exact.refinement[size].mean, rel=RELATIVE)
    for iterations in (3, 6, 10):
        bound = measure(artifact, method="arnoldi", iterations=iterations)
        rows = zip(bound.propagation.mean, exact.propagation.mean, strict=True)
        assert all(0.5 * norm < low <= norm * (1 + RELATIVE) for low, norm in rows)


def test_large_samples_are_bounded_from_below(artifact: DeployedPipeline) -> None:
    assert measure(artifact, max_dimension=SIDE * SIDE - 1).method == "arnoldi"
    with pytest.raises(PlanError, match='use method "arnoldi"'):
        measure(artifact, method="lanczos")


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42 under NumPy 2
def test_scaled_input_and_exploding_noise(deploy_closed_form: Deploy) -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    deployed = deploy_closed_form(linear(matrix(1)), EulerDiscreteScheduler(), STEPS)
    found = measure(deployed, difference=0.1, inputs=latents(dtype=torch.float32))
    jacobians = [(1 + i / 10) * matrix(1) / math.sqrt(1 + sigma**2) for i, sigma in enumerate(sigmas[:STEPS])]
    pairs = [(1.0, sigmas[i + 1] - sigmas[i]) for i in range(STEPS)]
    assert_norms(found, *norms_of(jacobians, pairs))


def test_predictions_of_v(deploy_closed_form: Deploy) -> None:
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    scheduler.set_timesteps(STEPS)
    alphas = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps] + [1.0]
    levels = [(math.sqrt(a), math.sqrt(1 - a)) for a in alphas]
    # x_0 = a x - b v and ε = b x + a v, put into a' x_0 + b' ε.
    pairs = [(a2 * a + b2 * b, b2 * a - a2 * b) for (a, b), (a2, b2) in itertools.pairwise(levels)]
    found = measure(deploy_closed_form(linear(matrix(1)), scheduler, STEPS))
    assert_norms(found, *norms_of([(1 + i / 10) * matrix(1) for i in range(STEPS)], pairs))


def test_guidance_in_a_doubled_batch(
    deploy_closed_form: Deploy, ddim: DDIMScheduler, loop_pipeline: type[Any]
) -> None:
    class Guided(loop_pipeline):  # type: ignore[misc, valid-type]
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            first, second = self.unet(torch.cat([x, x]), t).sample.chunk(2)
            return first + 3.0 * (second - first)

    halves = linear(matrix(1)), linear(matrix(2))

    def network(x: Tensor, step: int) -> Tensor:
        return torch.cat([half(part, step) for half, part in zip(halves, x.chunk(2), strict=True)])

    found = measure(deploy_closed_form(network, ddim, STEPS, pipeline=Guided), batch_size=7)
    guided = matrix(1) + 3.0 * (matrix(2) - matrix(1))
    jacobians = [(1 + i / 10) * guided for i in range(STEPS)]
    assert_norms(found, *norms_of(jacobians, ddim_coefficients(ddim)))


def test_guidance_in_two_calls(
    deploy_closed_form: Deploy, ddim: DDIMScheduler, loop_pipeline: type[Any]
) -> None:
    class Guided(loop_pipeline):  # type: ignore[misc, valid-type]
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            first, second = self.unet(x, t).sample, self.unet(x, t).sample
            return first + 3.0 * (second - first)

    halves = matrix(1), matrix(2)
    deployed = deploy_closed_form(
        lambda x, call: linear(halves[call % 2])(x, call // 2), ddim, STEPS, pipeline=Guided
    )
    denoiser: Any = deployed.denoiser
    denoiser.timesteps = tuple(time for time in denoiser.timesteps for _ in range(2))
    denoiser.schedule = CacheSchedule.uncached(2 * STEPS, calls_per_step=2)
    found = measure(deployed)
    assert found.steps == tuple(range(0, 2 * STEPS, 2))
    jacobians = [(1 + i / 10) * (halves[0] + 3.0 * (halves[1] - halves[0])) for i in range(STEPS)]
    assert_norms(found, *norms_of(jacobians, ddim_coefficients(ddim)))


def jacobian_by_autograd(deployed: DeployedPipeline, x: Tensor, step: int) -> Tensor:
    denoiser: Any = deployed.denoiser
    unet: BranchedUNet = denoiser.unet

    def network(flat: Tensor) -> Tensor:
        full = unet.full(flat.reshape(1, *x.shape), denoiser.timesteps[step], {}, branch=0)[0]
        return full.flatten()

    jacobian: Tensor = torch.autograd.functional.jacobian(network, x.flatten())
    return jacobian


def test_a_unet_has_the_norms_of_its_jacobian(deploy_unet: Deploy, ddim: DDIMScheduler) -> None:
    deployed = deploy_unet(ddim, STEPS)
    x = latents(8)(range(2))["latents"]
    a, b = ddim_coefficients(ddim)[0]
    eye = torch.eye(64, dtype=torch.float64)
    jacobians = [jacobian_by_autograd(deployed, each, 0) for each in x]
    step = [norm(a * eye + b * j) for j in jacobians]
    refinement = [norm(0.5 * eye + 0.5 * b * j) for j in jacobians]
    options: dict[str, Any] = {"steps": "0", "inputs": latents(8), "step_sizes": (0.5,)}
    for method in ("jacobian", "lanczos"):
        found = measure(deployed, method=method, iterations=30, **options)
        assert (found.method, found.is_bound) == (method, False)
        assert found.propagation.each[0] == pytest.approx(step, rel=RELATIVE)
        assert found.refinement[0.5].each[0] == pytest.approx(refinement, rel=RELATIVE)
    bound = measure(deployed, method="arnoldi", iterations=20, **options)
    assert all(0.5 * norm < low <= norm for low, norm in zip(bound.propagation.each[0], step, strict=True))
    assert norm(a * eye - b * jacobians[0]) > (1 + 100 * RELATIVE) * step[0]


def test_few_iterations_of_lanczos_are_a_bound(deploy_unet: Deploy, ddim: DDIMScheduler) -> None:
    deployed = deploy_unet(ddim, STEPS)
    options: dict[str, Any] = {"steps": "0", "inputs": latents(8)}
    few = measure(deployed, method="lanczos", iterations=2, **options)
    assert few.is_bound
    exact = measure(deployed, **options)
    assert exact.method == "jacobian"
    assert few.propagation.mean[0] < exact.propagation.mean[0]
    assert measure(deployed, max_dimension=63, iterations=2, **options).method == "lanczos"


def test_gradients_that_do_not_agree_are_refused(
    deploy_unet: Deploy, ddim: DDIMScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed = deploy_unet(ddim, STEPS)
    unet = deployed.denoiser.unet  # type: ignore[attr-defined]
    full = unet.full
    rounded = lambda x, *args, **kwargs: full((x * 64).round() / 64, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(unet, "full", rounded)
    with pytest.raises(PlanError, match="because it rounds"):
        measure(deployed, method="lanczos", difference=0.1, inputs=latents(8))


@pytest.fixture
def quantized(tiny_artifact: Callable[[str], Path]) -> DeployedPipeline:
    return deploy.load(tiny_artifact("w8a8"), "cpu")


def test_a_quantized_network_has_about_the_norms_of_the_float_one(
    quantized: DeployedPipeline, tiny_pipeline: DDIMPipeline, ddim: DDIMScheduler
) -> None:
    found = amplification(quantized, steps="0,3", samples=2, seed=4, step_sizes=(0.5,))
    finer = amplification(quantized, steps="0,3", samples=2, seed=4, step_sizes=(0.5,), difference=0.003)
    expected = _float_norms(quantized, tiny_pipeline)
    for row, rough, exact in zip(found.propagation.each, finer.propagation.each, expected, strict=True):
        for here, fine, there in zip(row, rough, exact, strict=True):
            assert abs(here - there) < 0.1 * there
            assert fine > 1.2 * there  # below the quantization grid a difference sees its steps


def _float_norms(deployed: DeployedPipeline, pipe: DDIMPipeline) -> list[list[float]]:
    arguments = arguments_for(deployed.pipe, range(2), seed=4, inputs=default_inputs)
    probes = probes_of(deployed, arguments, frozenset({0, 3}), batch_size=128)
    schedule = CacheSchedule.uncached(len(deployed.denoiser.timesteps))
    exact = UNetDenoiser(BranchedUNet(pipe.unet), StepContext(), schedule, deployed.denoiser.timesteps)
    return [
        jacobian_norms(replace(probe, denoiser=exact), [probe.coefficients()], 0.01 * probe.rms)[
            :, 0
        ].tolist()
        for probe in probes
    ]


def test_gradients_do_not_pass_quantizers(quantized: DeployedPipeline) -> None:
    assert amplification(quantized, steps="0", samples=1, max_dimension=1, iterations=3).method == "arnoldi"
    with pytest.raises(PlanError, match="has quantized layers"):
        amplification(quantized, steps="0", method="lanczos")


def test_the_artifact_stays_as_it_is(artifact: DeployedPipeline) -> None:
    before, kind = dict(vars(artifact.pipe.scheduler)), type(artifact.pipe)
    measure(artifact, steps="0")
    after = vars(artifact.pipe.scheduler)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert type(artifact.pipe) is kind


def test_unknown_noise_levels_are_refused(deploy_closed_form: Deploy) -> None:
    with pytest.raises(PlanError, match="noise levels"):
        measure(deploy_closed_form(linear(matrix(1)), LCMScheduler(), STEPS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_sizes": ()}, "give one or more"),
        ({"step_sizes": (0.5, -0.1)}, "above 0"),
        ({"step_sizes": (0.5, 0.5)}, "twice"),
        ({"method": "svd"}, "allowed are auto, jacobian, lanczos, arnoldi"),
        ({"difference": 0.0}, "above 0"),
        ({"samples": 0}, "samples=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"iterations": True}, "iterations=True"),
    ],
)
def test_arguments_out_of_range(artifact: DeployedPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        measure(artifact, **options)


def test_what_is_not_finite_is_an_error(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> None:
    deployed = deploy_closed_form(lambda x, step: x / (step - 1), ddim, STEPS)
    with pytest.raises(ErrataError, match="step 1: the denoiser returned NaN"):
        measure(deployed)


def test_json_is_plain(artifact: DeployedPipeline) -> None:
    found = measure(artifact, steps="0,2")
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["propagation"] == [list(row) for row in found.propagation.each]
    assert [entry["step_size"] for entry in value["refinement"]] == list(SIZES)
    assert value["refinement"][1]["norms"] == found.refinement[0.5].to_json()
    assert (value["steps"], value["method"], value["is_bound"]) == ([0, 2], "jacobian", False)


def test_the_plot_is_a_picture(artifact: DeployedPipeline, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = measure(artifact)
    assert found.plot(tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    drawn = found.plot(tmp_path / "growth.svg").read_text()
    assert "<svg" in drawn
    with pytest.raises(ReportError, match=r"cannot be written as 'growth.xyz'; endings are .*png"):
        found.plot(tmp_path / "growth.xyz")


def test_a_plot_needs_matplotlib(
    artifact: DeployedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure(artifact, steps="0")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match="errata\\[report\\]"):
        found.plot(tmp_path / "growth.png")
