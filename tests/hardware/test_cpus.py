"""Kernel CPU lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.errors import L40sError
from l40sd.hardware.cpus import cores_of, format_cpu_list, parse_cpu_list


@given(st.frozensets(st.integers(min_value=0, max_value=511)))
def test_formatting_then_parsing_gives_the_same_cpus(cpus: frozenset[int]) -> None:
    assert parse_cpu_list(format_cpu_list(cpus)) == cpus


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", set()), ("\n", set()), ("0-3,8\n", {0, 1, 2, 3, 8}), ("7", {7}), ("0, 2-3", {0, 2, 3}), ("5-5", {5})],
)
def test_what_the_kernel_writes_is_read(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize("text", ["3-1", "a", "1-", "-1", "1,,2", "0-4000000000", "0x3", "²"])
def test_what_it_never_writes_is_refused_with_the_part_named(text: str) -> None:
    with pytest.raises(L40sError, match="neither a CPU nor an ascending range"):
        parse_cpu_list(text)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        cpus = parse_cpu_list(text)
    except L40sError:
        return
    assert all(0 <= cpu < 1 << 16 for cpu in cpus)


def test_two_equal_ranges_are_cores_and_their_siblings() -> None:
    assert cores_of(parse_cpu_list("0-1,64-65")) == ({0, 64}, {1, 65})
    assert cores_of(parse_cpu_list("0-2,64-65")) == ({0}, {1}, {2}, {64}, {65})
    assert cores_of(frozenset()) == ()
