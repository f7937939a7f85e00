import inspect

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Generator

from errata.correct.preview import SchedulerStep


@pytest.mark.parametrize("places", [(0, 0), (0, 1, 0), (0, 1)])
def test_a_preview_draws_the_noise_of_the_step(places: tuple[int, ...]) -> None:
    """A generator that stands in the list twice goes on from image to image, in the preview too."""
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    held = [Generator().manual_seed(seed) for seed in (1, 2)]
    states = [each.get_state() for each in held]
    sample = torch.zeros(len(places), 1, 4, 4)
    bound = inspect.signature(scheduler.step).bind(
        sample, scheduler.timesteps[3], sample, generator=[held[place] for place in places]
    )
    pending = SchedulerStep(scheduler, scheduler.step, bound)
    first, second = pending.preview(sample), pending.preview(sample)
    assert all(torch.equal(each.get_state(), state) for each, state in zip(held, states, strict=True))
    taken = pending.take(sample).prev_sample
    assert torch.equal(first, taken)
    assert torch.equal(second, taken)
    assert (taken[0] - taken[-1]).abs().max() > 0.1
