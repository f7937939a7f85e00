import pytest

from errata.compress import CacheQuant, CacheSchedule, DeepCache, Recipe
from errata.errors import RecipeError
from errata.runtime.recipes.caching import cache_from_json, group_lengths


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
    assert cache.schedule(12, branch=1).full_steps == full_steps
    assert cache.allows(schedule(*full_steps))
    assert not cache.allows(schedule(0, 2, 9))


def test_a_listed_step_or_a_centre_beyond_the_run_is_refused() -> None:
    with pytest.raises(RecipeError, match="step 12 is beyond the run; its last step is 11; leave it out"):
        DeepCache(steps=(0, 12)).schedule(12, branch=1)
    with pytest.raises(RecipeError, match="center=13 is beyond the run; allowed are 0 to 12"):
        DeepCache(interval=3, spacing="power", center=13).schedule(12, branch=1)


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


@pytest.mark.parametrize(
    "cache",
    [
        DeepCache(interval=5),
        DeepCache(interval=3, spacing="power", center=4),
        DeepCache(steps=(0, 2, 11)),
    ],
)
def test_steps_are_sampler_steps_of_several_calls(cache: DeepCache) -> None:
    one = cache.schedule(12, branch=1)
    three = cache.schedule(36, branch=1, calls_per_step=3)
    assert three.full_steps == tuple(3 * step + call for step in one.full_steps for call in range(3))
    assert cache.allows(three)
    assert cache.allows(one)
    of_one_call = CacheSchedule(num_steps=36, full_steps=three.full_steps, branch=1)
    assert not cache.allows(of_one_call)


def test_steps_beyond_a_run_of_several_calls() -> None:
    message = "step 12 is beyond the run of sampler steps, 2 denoiser calls each; its last step is 11; leave"
    with pytest.raises(RecipeError, match=message):
        DeepCache(steps=(0, 12)).schedule(24, branch=1, calls_per_step=2)
    with pytest.raises(RecipeError, match="center=13 is beyond the run; allowed are 0 to 12"):
        DeepCache(interval=3, spacing="power", center=13).schedule(24, branch=1, calls_per_step=2)


@pytest.mark.parametrize(
    ("full_steps", "is_allowed"),
    [((0, 4, 8), True), ((0, 2, 10), True), ((0, 3, 4), False), ((0, 4), False), ((0, 3, 6, 9), False)],
)
def test_what_a_search_may_find_in_a_run_of_several_calls(
    full_steps: tuple[int, ...], is_allowed: bool
) -> None:
    """As with one call in each step: groups are of two to eight steps."""
    calls = tuple(2 * step + call for step in full_steps for call in range(2))
    found = CacheSchedule(num_steps=24, full_steps=calls, branch=1, calls_per_step=2)
    assert CacheQuant(interval=4).allows(found) is is_allowed
    assert CacheQuant(interval=4).allows(schedule(*full_steps)) is is_allowed
    assert CacheQuant(interval=4, search="uniform").allows(found) is (full_steps == (0, 4, 8))


def test_without_a_cache_any_number_of_calls_is_allowed() -> None:
    recipe = Recipe.named("w8a8")
    assert recipe.allows(CacheSchedule.uncached(6))
    assert recipe.allows(CacheSchedule.uncached(6, calls_per_step=2))
    assert not recipe.allows(CacheSchedule.uniform(6, interval=2, branch=1, calls_per_step=2))
