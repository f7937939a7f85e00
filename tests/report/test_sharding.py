import pytest

from errata.errors import ReportError
from errata.report.sharding import Shard, Workers


@pytest.mark.parametrize("text", ["3", "3/", "/4", "4/4", "-1/4", "0/0", "a/b", "1/2/3", ""])
def test_bad_shards_are_refused(text: str) -> None:
    with pytest.raises(ReportError, match="write I/N with I from 0 to N - 1, such as 3/16"):
        Shard.parse(text)


def test_every_batch_belongs_to_one_share() -> None:
    workers = Workers(on_cpu=True)
    assert (workers.index, workers.count, workers.is_first) == (0, 1, True)
    shares = [list(workers.batches(Shard(index, 3), 10)) for index in range(3)]
    assert sorted(batch for share in shares for batch in share) == list(range(10))
    assert shares[1] == [1, 4, 7]
    assert str(Shard.parse("3/16")) == "3/16"
