"""Names in the order that people expect."""

from hypothesis import given
from hypothesis import strategies as st

from l40sd.naming import natural


def test_numbers_in_names_count_as_numbers() -> None:
    """m-ext10 stood before m-ext2 in `status`."""
    names = ["m-ext10", "m-ext2", "m-ext1", "b-gpu8-9", "b-gpu10-11", "b-gpu0-1"]
    assert sorted(names, key=natural) == ["b-gpu0-1", "b-gpu8-9", "b-gpu10-11", "m-ext1", "m-ext2", "m-ext10"]


@given(st.lists(st.text(max_size=8), max_size=6))
def test_every_set_of_names_has_one_order(names: list[str]) -> None:
    assert sorted(set(names), key=natural) == sorted(sorted(set(names)), key=natural)
    assert len({natural(name) for name in names}) == len(set(names))
