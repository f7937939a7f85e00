"""Whose noise is whose: it follows the image's generator, not the way in which it was passed."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from errata.correct.batch_invariance import FreshNoise


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def drawn(generator: Any, rows: int = 1, *, step: int = 2, place: int = 1, draw: int = 0) -> Tensor:
    return FreshNoise(generator).draw(torch.zeros(rows, 1, 8, 8), step=step, place=place, draw=draw)


def are_apart(rows: Tensor) -> bool:
    """Whether no two rows are alike; independent ones of 64 values are 1.4 apart, 1 in 10^6 below 0.7."""
    return all(
        (rows[one] - rows[other]).square().mean().sqrt() > 0.7
        for one in range(len(rows))
        for other in range(one)
    )


def test_a_generator_alone_and_in_a_list_are_the_same() -> None:
    alone = drawn(seeded())
    assert torch.equal(alone, drawn([seeded()]))
    assert torch.equal(alone, drawn([seeded(), seeded(1)], 2)[:1])
    assert torch.equal(alone, drawn([seeded(1), seeded()], 2)[1:])
    assert torch.equal(alone, drawn(seeded(), 3)[:1])


@pytest.mark.parametrize("rows", [2, 3])
def test_images_that_share_a_generator_differ(rows: int) -> None:
    shared = seeded()
    in_a_list = drawn([shared] * rows, rows)
    assert are_apart(in_a_list)
    assert torch.equal(in_a_list, drawn(shared, rows))
    assert are_apart(drawn(None, rows))


def test_an_image_is_told_from_those_before_it_with_its_generator_alone() -> None:
    one, other = seeded(), seeded(1)
    mixed = drawn([one, other, one], 3)
    assert torch.equal(mixed[[0, 2]], drawn(one, 2))
    assert torch.equal(mixed[1:2], drawn(other))
    assert are_apart(mixed)


def test_more_images_than_generators() -> None:
    """No pipeline of diffusers has that; no image may get noise that does not depend on a seed."""
    one, other = seeded(), seeded(1)
    rows = drawn([one, other], 4)
    assert torch.equal(rows, drawn([one, other, one, other], 4))
    assert are_apart(rows)


def test_step_place_and_draw_tell_noise_apart() -> None:
    kinds = [{}, {"step": 3}, {"place": 2}, {"draw": 1}, {"step": 1, "place": 2}, {"place": 0, "draw": 1}]
    assert are_apart(torch.cat([drawn(seeded(), **kind) for kind in kinds]))


def test_no_generator_is_advanced() -> None:
    given = seeded()
    before, torchs = given.get_state(), torch.get_rng_state()
    drawn(given)
    drawn(None)
    assert torch.equal(given.get_state(), before)
    assert torch.equal(torch.get_rng_state(), torchs)
