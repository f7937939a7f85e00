from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from errata.correct.planner.candidates import Candidate
from errata.correct.planner.halving import (
    Trial,
    cheapest_of_the_best,
    kept_of,
    ranked,
    round_sizes,
    total_samples,
)
from errata.correct.planner.metrics import AgreementMetric

METRIC = AgreementMetric(cast(Any, None), reference="zero")


def trial(name: str, values: Tensor, overhead: float) -> Trial:
    made = SimpleNamespace(candidate=SimpleNamespace(name=name), kept=values[:, None], overhead=overhead)
    return cast(Trial, made)


def test_rounds_double_and_end_at_the_full_count() -> None:
    assert round_sizes(24, 256, least=4) == [32, 64, 128, 256]
    assert round_sizes(24, 256, least=64) == [64, 128, 256]
    assert round_sizes(2, 256, least=4) == [256]
    assert round_sizes(24, 256, least=2048) == [64, 128, 256]
    assert round_sizes(1000, 7, least=16) == [3, 7]
    assert round_sizes(1000, 2, least=16) == [2]
    assert kept_of(24) == 12
    assert kept_of(3) == 2


def test_the_bar_knows_how_many_images_there_will_be() -> None:
    # 7 candidates on 25 images, 4 on 25 more, 2 on 50 more, and no correction on all 100
    assert total_samples(7, [25, 50, 100]) == 7 * 25 + 4 * 25 + 2 * 50 + 100


def test_of_equals_the_cheaper_comes_first() -> None:
    same = torch.tensor([1.0, 2.0, 3.0]).double()
    trials = [trial("dear", same, 0.2), trial("better", same - 0.5, 0.3), trial("cheap", same, 0.1)]
    assert [each.candidate.name for each in ranked(trials, trials[0], METRIC)] == ["better", "cheap", "dear"]


def test_a_tie_within_noise_goes_to_the_cheapest() -> None:
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    best = trial("best", base, 0.15)
    tied = trial("tied", base + noise - noise.mean() + 0.01, 0.10)  # 0.01 worse, give or take 0.2
    worse = trial("worse", base + 0.01, 0.0)  # as much, but on every single image
    none = trial("none", base + 1, 0.0)
    assert cheapest_of_the_best([best, tied, worse], none, METRIC).candidate.name == "tied"
    assert cheapest_of_the_best([best, worse], none, METRIC).candidate.name == "best"


def test_what_loses_a_part_of_the_gain_is_no_tie() -> None:
    """Few images tell little apart: not to be told from the best is not enough."""
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    best, none = trial("best", base, 0.15), trial("none", base + 1, 0.0)
    cheaper = trial("cheaper", base + noise - noise.mean() + 0.05, 0.10)  # 0.05 worse, give or take 0.2
    assert cheapest_of_the_best([best, cheaper], none, METRIC).candidate.name == "best"


def test_what_is_dearer_than_the_best_is_never_taken() -> None:
    base = torch.zeros(10).double()
    noise = torch.tensor([1.0, -1.0]).double().repeat(5)
    dear = trial("dear", base + noise + 0.001, 0.2)
    finalists, none = [trial("best", base, 0.1), dear], trial("none", base + 1, 0.0)
    assert cheapest_of_the_best(finalists, none, METRIC).candidate.name == "best"


def test_corrects_nothing_costs_nothing() -> None:
    assert Candidate.none().plan.corrects_nothing
    assert Candidate.none().extra == {}
