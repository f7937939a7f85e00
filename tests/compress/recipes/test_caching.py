import pytest

from errata.compress import CacheQuant, CacheSchedule, DeepCache, Recipe
from errata.compress.recipes.caching import cache_from_json, group_lengths
from errata.errors import RecipeError


def schedule(*full_steps: int, num_steps: int = 12, branch: int = 1) -> CacheSchedule:
    return CacheSchedule(num_steps=num_steps, full_steps=full_steps, branch=branch)


@pytest.mark.parametrize(
    ("cache", "full_steps"),
    [
        (DeepCache(interval=5), (0, 5, 10)),
        (DeepCache(interval=12), (0,)),
        (DeepCache(interval=50), (0,)),
        (DeepCache(interval=1), tuple(range(12))),
        (DeepCache(steps=(0, 11)), (0, 11)),
        (DeepCache(steps=(7, 0, 3)), (0, 3, 7)),
        (DeepCache(interval=3, spacing="power"), (0, 3, 6, 8)),
        (DeepCache(interval=50, spacing="power"), (0,)),
        (DeepCache(interval=1, spacing="power"), tuple(range(12))),
        (DeepCache(interval=4, spacing="power", center=0, power=2), (0, 1, 5)),
        (DeepCache(interval=4, spacing="power", center=12, power=2), (0, 6, 10)),
    ],
)
def test_full_steps_of_twelve(cache: DeepCache, full_steps: tuple[int, ...]) -> None:
    assert cache.full_steps(12) == full_steps
    assert cache.allows(schedule(*full_steps))
    assert not cache.allows(schedule(0, 2, 9))


def test_a_listed_step_or_a_centre_beyond_the_run_is_refused() -> None:
    with pytest.raises(RecipeError, match="step 12 is beyond the run; its last step is 11; leave it out"):
        DeepCache(steps=(0, 12)).full_steps(12)
    with pytest.raises(RecipeError, match="center=13 is beyond the run; allowed are 0 to 12"):
        DeepCache(interval=3, spacing="power", center=13).full_steps(12)


@pytest.mark.parametrize(
    ("full_steps", "is_allowed"),
    [
        ((0, 4, 8), True),  # uniform
        ((0, 2, 4), True),  # lengths 2, 2, 8
        ((0, 1, 4), False),  # a group of one step
        ((0, 3), False),  # too few groups, and one of nine steps
        ((0, 3, 6, 9), False),  # too many
    ],
)
def test_what_a_search_may_find(full_steps: tuple[int, ...], is_allowed: bool) -> None:
    assert group_lengths(4) == (2, 8)
    assert CacheQuant(interval=4).allows(schedule(*full_steps)) is is_allowed
    assert CacheQuant(interval=4, search="uniform").allows(schedule(*full_steps)) is (full_steps == (0, 4, 8))


def test_uniform_steps_are_allowed_with_a_short_last_group_too() -> None:
    assert CacheQuant(interval=4).allows(schedule(0, 4, 8, num_steps=9))
    assert CacheQuant(interval=40).allows(schedule(0))


def test_a_recipe_allows_the_branch_that_it_asks_for() -> None:
    assert Recipe.named("cachequant-4").allows(schedule(0, 4, 8, branch=3))
    assert Recipe.named("cachequant-4:branch=3").allows(schedule(0, 4, 8, branch=3))
    assert not Recipe.named("cachequant-4:branch=2").allows(schedule(0, 4, 8, branch=3))
    assert not Recipe.named("deepcache-1").allows(CacheSchedule.uncached(12))
    assert Recipe.named("w8a8").allows(CacheSchedule.uncached(12))
    assert not Recipe.named("w8a8").allows(schedule(0, 4, 8))


@pytest.mark.parametrize(
    "cache", [DeepCache(steps=(0, 4), branch=2), CacheQuant(interval=3, corrected_by="iec")]
)
def test_json_round_trip(cache: DeepCache | CacheQuant) -> None:
    assert cache_from_json(cache.to_json()) == cache
