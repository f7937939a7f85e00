"""Times as text, for people who wait."""


def time_left(done: int, ahead: int, seconds: float) -> str:
    """Such as `about 9 min left`, if `ahead` pieces take as long as the `done` ones did, `seconds` in all."""
    return f"about {duration(ahead * seconds / max(done, 1))} left"


def duration(seconds: float) -> str:
    """A time for people: `4.2 s`, `35 s`, `12 min`, `3.5 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
