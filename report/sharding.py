"""Which batches of a report a process measures: `errata.sharding`, whose errors are those of a report.

An image is made in the same batch by any process, so a report's numbers do not depend on how many processes
there were.
"""

from __future__ import annotations

from errata import sharding
from errata.errors import ReportError

__all__ = ["Shard", "Workers"]


class Shard(sharding.Shard):
    """Share number `index`, from 0, of `count` independent jobs that measure one report.

    Raises:
        ReportError: the numbers do not fit.
    """

    error = ReportError


class Workers(sharding.Workers):
    """The processes that measure one report.

    Raises:
        ReportError: there are several, and accelerate is not installed.
    """

    error = ReportError
