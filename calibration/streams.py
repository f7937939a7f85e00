"""How many denoiser calls make one sampler step.

With classifier-free guidance most pipelines call the denoiser once per sampler step, on a doubled batch. Some
call it once for each half instead, which takes half the memory: every timestep then comes twice in a row.
"""

import itertools
import math
from collections.abc import Sequence

__all__ = ["calls_per_step"]


def calls_per_step(timesteps: Sequence[float]) -> int:
    """The largest c such that the calls fall into blocks of c in a row at one timestep; 1 for most samplers.

    A sampler may come back to a timestep by itself: PNDM's `t0, t1, t1, t2, …` and Heun's
    `t0, t1, t1, t2, t2, …` have c = 1, because some timestep stands there once; the same with guidance in two
    calls, `t0, t0, t1, t1, t1, t1, …`, has c = 2. A sampler that calls twice at every timestep for another
    reason gets c = 2 as well, which keeps its predictor and its corrector apart.

    Args:
        timesteps: of every denoiser call of a run, in order; at least one.
    """
    return math.gcd(*(len(list(run)) for _, run in itertools.groupby(timesteps)))
