from errata.correct.sampling import batches_of


def test_batches_cover_every_index_once() -> None:
    assert batches_of(10, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    assert batches_of(10, 4, first=3) == [range(3, 7), range(7, 10)]
