import errata.correct


def test_all_is_sorted_and_complete() -> None:
    names = errata.correct.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(hasattr(errata.correct, name) for name in names)
