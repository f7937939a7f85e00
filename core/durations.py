"""Times as text, for people."""


def time_left(done: int, ahead: int, seconds: float) -> str:
    """Return text such as `about 9 min left`: `done` pieces took `seconds`, and `ahead` are to come."""
    return f"about {duration(ahead * seconds / max(done, 1))} left"


def duration(seconds: float) -> str:
    """Return a time for people: `4.2 s`, `35 s`, `12 min`, `3.5 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
