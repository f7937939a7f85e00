"""The corrected pipeline as a user meets it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EulerDiscreteScheduler
from torch import Generator, Tensor

from errata.correct import (
    IEC,
    CorrectedPipeline,
    Correction,
    Corrector,
    CorrectorContext,
    Plan,
    StepView,
    wrap,
)
from errata.correct.noise_levels import NoiseLevels, required
from errata.deploy import DeployedPipeline
from errata.errors import ArtifactMismatchError, ErrataError, PlanError
from errata.runtime.pipeline import SteppedPipeline
from errata.runtime.schedule import CacheSchedule

Deploy = Callable[..., DeployedPipeline]
STEPS = 6


def network(x: Tensor, step: int) -> Tensor:
    return torch.sin(2 * x + step)


def latents(batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, 1, 4, 4, generator=Generator().manual_seed(5))


@pytest.fixture
def deployed(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> DeployedPipeline:
    schedule = CacheSchedule.uniform(STEPS, interval=3, branch=1)
    return deploy_closed_form(network, ddim, STEPS, schedule=schedule)


@pytest.fixture
def as_ddim_pipeline(deploy_unet: Deploy) -> DeployedPipeline:
    schedule = CacheSchedule.uniform(STEPS, interval=2, branch=1)
    return deploy_unet(
        DDIMScheduler(clip_sample=False), STEPS, schedule=schedule, pipeline=DDIMPipeline, dtype=torch.float32
    )


def images(pipeline: Callable[..., Any], **options: Any) -> Any:
    return pipeline(batch_size=2, generator=Generator().manual_seed(2), output_type="np", **options).images


def test_none_is_the_plain_pipeline_bit_for_bit(as_ddim_pipeline: DeployedPipeline) -> None:
    plain = images(as_ddim_pipeline)
    for plan in (Plan.none(), Plan(IEC(), "none")):
        corrected = wrap(as_ddim_pipeline, plan)
        assert (images(corrected) == plain).all()
        assert corrected.stats.extra == {}
        assert corrected.stats.base == {"full": 3.0, "cached": 3.0}
        assert corrected.overhead() == 0.0


def test_none_patches_nothing(deployed: DeployedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = deployed.start

    def spied(**options: Any) -> Any:
        started.append(start(**options))
        return started[-1]

    monkeypatch.setattr(deployed, "start", spied)
    seen: list[bool] = []
    record(deployed, monkeypatch, lambda: seen.append("step" in vars(started[-1].pipe.scheduler)))
    for plan in (Plan.none(), Plan(IEC(), "none")):
        wrap(deployed, plan)(latents=latents())
    assert seen
    assert not any(seen)
    seen.clear()
    wrap(deployed, Plan(IEC(), "0"))(latents=latents())
    assert all(seen)
    assert "step" not in vars(started[-1].pipe.scheduler)


def record(deployed: DeployedPipeline, monkeypatch: pytest.MonkeyPatch, note: Callable[[], None]) -> None:
    denoiser: Any = deployed.denoiser
    function = denoiser.function

    def noting(x: Tensor, step: int) -> Tensor:
        note()
        return function(x, step)

    monkeypatch.setattr(denoiser, "function", noting)


def test_a_diffusers_pipeline_is_corrected(as_ddim_pipeline: DeployedPipeline) -> None:
    corrected = wrap(as_ddim_pipeline, Plan(IEC()))
    assert corrected.steps == (0, 2, 4)
    assert abs(images(corrected) - images(as_ddim_pipeline)).max() > 1e-3
    assert (images(corrected) == images(corrected)).all()
    assert corrected.stats.extra == {"full": 3.0}


def test_steps_before_the_first_selected_one_are_untouched(deployed: DeployedPipeline) -> None:
    trace: dict[str, list[Tensor]] = {"plain": [], "corrected": []}
    denoiser: Any = deployed.denoiser
    for name, pipeline in (("plain", deployed), ("corrected", wrap(deployed, Plan(IEC(), "3")))):

        def tracing(x: Tensor, step: int, name: str = name) -> Tensor:
            trace[name].append(x)
            return network(x, step)

        denoiser.function = tracing
        pipeline(latents=latents())
    plain, corrected = trace["plain"], trace["corrected"]
    assert len(plain) == STEPS
    assert len(corrected) == STEPS + 1  # the evaluation at the iterate comes after call 3
    assert all(torch.equal(one, other) for one, other in zip(plain[:4], corrected[:4], strict=True))
    assert not torch.equal(plain[5], corrected[6])


@pytest.mark.parametrize("generators", ["one", "each", "global"])
def test_noise_and_generators_are_those_of_the_plain_run(
    deploy_closed_form: Deploy, ddim: DDIMScheduler, generators: str
) -> None:
    """The prediction does not depend on x here, so only noise could tell the two runs apart."""
    deployed = deploy_closed_form(lambda x, step: torch.full_like(x, 0.1 * step), ddim, STEPS)
    corrected = wrap(deployed, Plan(IEC(iterations=3)))
    results = []
    for pipeline in (deployed, corrected):
        torch.manual_seed(11)
        held = [Generator().manual_seed(seed) for seed in (1, 2)]
        given = {"one": held[0], "each": held, "global": None}[generators]
        sample = pipeline(latents=latents(), generator=given, eta=0.8)
        results.append((sample, torch.get_rng_state(), *(each.get_state() for each in held)))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)
    # The same noise in every preview: the first refinement has nothing to move.
    assert corrected.stats.iterations == (STEPS, STEPS)
    assert {residual for each in corrected.stats.steps for residual in each.residuals} == {(0.0,)}


def test_the_artifact_is_left_as_it_was(deployed: DeployedPipeline) -> None:
    before = deployed(latents=latents())
    scheduler, unet = deployed.pipe.scheduler, deployed.pipe.unet
    state = copy.deepcopy(vars(scheduler))
    wrap(deployed, Plan(IEC()))(latents=latents())
    assert deployed.pipe.scheduler is scheduler
    assert deployed.pipe.unet is unet
    assert vars(scheduler).keys() == state.keys()
    assert torch.equal(deployed(latents=latents()), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_patched_after_an_exception(
    deployed: DeployedPipeline, error: type[BaseException]
) -> None:
    before = deployed(latents=latents())
    corrected = wrap(deployed, Plan(IEC()))
    corrected(latents=latents())
    stats = corrected.stats
    denoiser: Any = deployed.denoiser

    def failing(x: Tensor, step: int) -> Tensor:
        if step == 3:
            raise error("stop")
        return network(x, step)

    denoiser.function = failing
    with pytest.raises(error, match="stop"):
        corrected(latents=latents())
    denoiser.function = network
    assert "step" not in vars(deployed.pipe.scheduler)
    assert torch.equal(deployed(latents=latents()), before)
    assert corrected.stats is stats


def test_two_corrected_pipelines_on_one_artifact(deployed: DeployedPipeline) -> None:
    one, other = wrap(deployed, Plan(IEC(step_size=0.3))), wrap(deployed, Plan(IEC(iterations=2), "0"))
    first, second = one(latents=latents()), other(latents=latents())
    assert not torch.equal(first, second)
    assert torch.equal(one(latents=latents()), first)
    assert torch.equal(other(latents=latents()), second)
    assert one.stats.extra == {"full": 2.0}
    assert other.stats.extra == {"full": 2.0}


def test_half_precision(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> None:
    deployed = deploy_closed_form(network, ddim, STEPS)
    corrected = wrap(deployed, Plan(IEC(iterations=2, tolerance=0.0)))
    exact = corrected(latents=latents().double())
    half = corrected(latents=latents().half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.02 * float(exact.abs().max()))


class Everywhere:
    """A method without choices, at all steps."""

    def __init__(self, kind: type[Corrector]) -> None:
        self.corrector = kind

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        return tuple(range(schedule.num_steps))

    def check(self, context: CorrectorContext) -> None:
        pass


def test_another_method_needs_one_class(deployed: DeployedPipeline) -> None:
    """The contract that later methods build on, in its smallest form."""

    class Scaled(Corrector):
        def at_step(self, view: StepView) -> Correction:
            return Correction(prediction=0.5 * view.prediction)

    denoiser: Any = deployed.denoiser
    corrected = wrap(deployed, Plan(Everywhere(Scaled)))(latents=latents())  # type: ignore[arg-type]
    denoiser.function = lambda x, step: 0.5 * network(x, step)
    assert torch.equal(corrected, deployed(latents=latents()))


def test_a_corrector_may_leave_a_step_alone(deployed: DeployedPipeline) -> None:
    corrected = wrap(deployed, Plan(Everywhere(Corrector)))  # type: ignore[arg-type]
    assert torch.equal(corrected(latents=latents()), deployed(latents=latents()))
    assert corrected.stats.extra == {}


class Levels:
    """Notes the noise levels that it is checked with and made with; refuses schedulers without any."""

    def __init__(self) -> None:
        self.checked: list[NoiseLevels] = []
        self.used: list[NoiseLevels | None] = []

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        return (2,)

    def check(self, context: CorrectorContext) -> None:
        self.checked.append(required(context.levels, self, context.steps))

    def corrector(self, context: CorrectorContext) -> Corrector:
        self.used.append(context.levels)
        return Corrector(context)


def test_noise_levels_are_those_of_the_scheduler_that_samples(
    deployed: DeployedPipeline, ddim: DDIMScheduler
) -> None:
    method = Levels()
    corrected = wrap(deployed, Plan(method))  # type: ignore[arg-type]
    for _ in range(2):
        corrected(latents=latents())
    assert len(method.checked) == 1  # nothing is read again while nothing changes
    deployed.pipe.scheduler = DDIMScheduler.from_config(ddim.config, beta_schedule="scaled_linear")
    corrected(latents=latents())
    deployed.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    corrected(latents=latents())
    assert len(method.checked) == 3
    assert method.used == [method.checked[0], *method.checked]
    first, second, third = method.checked
    assert abs(first.noise[2] - second.noise[2]) > 1e-2
    assert (second.noise, third.prediction_type) == (third.noise, "v_prediction")


def test_a_scheduler_that_a_method_cannot_work_with_is_refused_at_every_call(
    deployed: DeployedPipeline,
) -> None:
    corrected = wrap(deployed, Plan(Levels()))  # type: ignore[arg-type]
    known = deployed.pipe.scheduler
    deployed.pipe.scheduler = type("OwnScheduler", (DDIMScheduler,), {})(clip_sample=False)
    for _ in range(2):
        with pytest.raises(PlanError, match="Levels needs the noise level of every step"):
            corrected(latents=latents())
    assert deployed.denoiser.calls == []  # type: ignore[attr-defined]
    deployed.pipe.scheduler = known
    corrected(latents=latents())


# Refusals.


def test_float_pipelines_are_refused(tiny_pipeline: DDIMPipeline, deployed: DeployedPipeline) -> None:
    message = (
        "wrap\\(\\) takes a loaded artifact, not a float DDIMPipeline: compress it, export it and load it"
    )
    with pytest.raises(TypeError, match=message):
        wrap(tiny_pipeline, Plan(IEC()))
    with pytest.raises(TypeError, match="not a float LoopPipeline"):
        wrap(deployed.pipe, Plan(IEC()))


def test_compressed_pipelines_are_refused(deployed: DeployedPipeline) -> None:
    class CompressedPipeline(SteppedPipeline):
        pass

    compressed: Any = CompressedPipeline(deployed.pipe, num_inference_steps=STEPS)
    message = "not a CompressedPipeline: freeze it first, deploy.load\\(deploy.deploy\\(compressed, out\\)\\)"
    with pytest.raises(TypeError, match=message):
        wrap(compressed, Plan(IEC()))


@pytest.mark.parametrize("given", ["runs/artifact", None])
def test_anything_else_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="pass what deploy.load\\(path\\) returns"):
        wrap(given, Plan(IEC()))


def test_a_method_is_no_plan(deployed: DeployedPipeline) -> None:
    with pytest.raises(TypeError, match="the plan is a IEC; pass a Plan, such as Plan\\(IEC\\(\\)"):
        wrap(deployed, IEC())  # type: ignore[arg-type]


def test_a_plan_that_selects_nothing_is_refused_before_sampling(deployed: DeployedPipeline) -> None:
    with pytest.raises(PlanError, match="leaves nothing to correct: IEC can correct steps 0,3 of"):
        wrap(deployed, Plan(IEC(), "1-2"))
    assert deployed.denoiser.calls == []  # type: ignore[attr-defined]


def test_another_number_of_steps_is_refused_before_sampling(deployed: DeployedPipeline) -> None:
    with pytest.raises(ArtifactMismatchError, match="num_inference_steps=50"):
        wrap(deployed, Plan(IEC()))(latents=latents(), num_inference_steps=50)
    assert deployed.denoiser.calls == []  # type: ignore[attr-defined]


def test_stats_before_a_call(deployed: DeployedPipeline) -> None:
    corrected = wrap(deployed, Plan(IEC()))
    for read in (lambda: corrected.stats, corrected.overhead):
        with pytest.raises(PlanError, match="nothing was sampled yet"):
            read()


def corrected_by(
    deploy_closed_form: Deploy, loop_pipeline: type[Any], predict: Callable[..., Tensor], scheduler: Any
) -> CorrectedPipeline:
    pipeline = type("OddPipeline", (loop_pipeline,), {"predict": predict})
    return wrap(deploy_closed_form(network, scheduler, STEPS, pipeline=pipeline), Plan(IEC(), "0"))


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (
            lambda self, x, t: self.unet(torch.cat([x, x, x]), t).sample.chunk(3)[0],
            "step 0: the prediction is made of 3 parts; only guidance with two is known",
        ),
        (
            lambda self, x, t: self.unet(torch.cat([x, x]), t).sample.chunk(2)[0].square(),
            "step 0: the pipeline changed the network's prediction",
        ),
        (
            lambda self, x, t: self.unet(x[:1], t).sample.repeat(2, 1, 1, 1),
            "step 0: the network was called with 1x1x4x4 for a sample 2x1x4x4",
        ),
        (
            lambda self, x, t: 1.1 * self.unet(x, t).sample,
            "step 0: the pipeline changed the network's prediction",
        ),
        (
            lambda self, x, t: self.unet(x / 2, t).sample,
            "step 0: the network's input is not the scheduler's sample",
        ),
    ],
    ids=["thrice", "squared", "smaller", "rescaled", "scaled"],
)
def test_what_cannot_be_reproduced_is_refused(
    deploy_closed_form: Deploy,
    loop_pipeline: type[Any],
    ddim: DDIMScheduler,
    predict: Callable[..., Tensor],
    message: str,
) -> None:
    with pytest.raises(PlanError, match=message):
        corrected_by(deploy_closed_form, loop_pipeline, predict, ddim)(latents=latents())


def test_two_calls_a_step_are_refused(
    deploy_closed_form: Deploy, loop_pipeline: type[Any], ddim: DDIMScheduler
) -> None:
    def predict(self: Any, x: Tensor, t: Tensor) -> Tensor:
        self.unet(x, t)
        return self.unet(x, t).sample

    corrected = corrected_by(deploy_closed_form, loop_pipeline, predict, ddim)
    denoiser: Any = corrected.deployed.denoiser
    denoiser.timesteps = tuple(t for t in denoiser.timesteps for _ in range(2))
    denoiser.schedule = CacheSchedule.uncached(2 * STEPS)
    corrected = wrap(corrected.deployed, Plan(IEC(), "0-1"))
    with pytest.raises(PlanError, match="step 1: the pipeline called the network 2 times for one step"):
        corrected(latents=latents())


def test_learned_variances_are_refused(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> None:
    deployed = deploy_closed_form(lambda x, step: torch.cat([x, x], dim=1), ddim, STEPS)
    with pytest.raises(
        PlanError,
        match="returned 2x2x4x4, the scheduler was given 2x2x4x4 for a sample 2x1x4x4; learned variances",
    ):
        wrap(deployed, Plan(IEC()))(latents=latents())


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(clip_sample=False), DDIMScheduler(), EulerDiscreteScheduler()]
)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42 under NumPy 2
def test_nan_names_the_step(deploy_closed_form: Deploy, scheduler: Any, iterations: int) -> None:
    def broken(x: Tensor, step: int) -> Tensor:
        eps = network(x, step)
        eps[1:, :, 0] += float("nan") if step == 2 else 0.0
        return eps

    corrected = wrap(deploy_closed_form(broken, scheduler, STEPS), Plan(IEC(iterations=iterations)))
    message = (
        "step 2: the denoiser returned NaN or infinite values for sample 1 \\(2 of 3 samples were hit\\)"
    )
    with pytest.raises(ErrataError, match=message):
        corrected(latents=latents(3))
