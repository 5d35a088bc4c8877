"""How often something is said, and that nothing is forgotten about what is not."""

from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from l40sd.proxy.rate_limit import MINUTE_S, RateLimit

GAPS = st.lists(st.floats(0, 30), max_size=200)


@settings(max_examples=examples(100))
@given(GAPS, st.integers(0, 20))
def test_no_minute_sees_more_than_a_burst_and_what_is_refilled(gaps: list[float], per_minute: int) -> None:
    limit, now_s, said_s = RateLimit(per_minute, 0.0), 0.0, []
    for gap_s in gaps:
        now_s += gap_s
        if limit.admit(now_s) is not None:
            said_s.append(now_s)
    for start_s in said_s:
        assert sum(start_s <= at_s < start_s + MINUTE_S for at_s in said_s) <= 2 * per_minute


@settings(max_examples=examples(100))
@given(GAPS, st.integers(1, 20), st.data())
def test_everything_is_said_or_counted_once(gaps: list[float], per_minute: int, data: st.DataObject) -> None:
    limit, now_s, said, counted = RateLimit(per_minute, 0.0), 0.0, 0, 0
    for gap_s in gaps:
        now_s += gap_s
        suppressed = limit.admit(now_s)
        said += suppressed is not None
        counted += suppressed or 0
        if data.draw(st.booleans()):
            counted += limit.overdue(now_s)
    counted += limit.overdue(now_s + MINUTE_S)
    assert said + counted == len(gaps)


def test_a_burst_comes_at_once_and_then_evenly() -> None:
    limit = RateLimit(2, 0.0)
    assert [limit.admit(0.0) for _ in range(4)] == [0, 0, None, None]
    assert limit.admit(MINUTE_S / 4) is None
    assert limit.admit(MINUTE_S / 2) == 3


def test_what_nothing_told_of_for_a_minute_is_told_by_itself() -> None:
    limit = RateLimit(1, 0.0)
    assert [limit.admit(0.0), limit.admit(0.0)] == [0, None]
    assert limit.overdue(MINUTE_S / 2) == 0
    assert limit.overdue(MINUTE_S) == 1
    assert limit.overdue(3 * MINUTE_S) == 0


def test_a_limit_of_none_says_nothing_and_can_be_raised() -> None:
    limit = RateLimit(0, 0.0)
    assert [limit.admit(0.0), limit.overdue(1000.0)] == [None, 0]
    limit.configure(5)
    assert limit.admit(1000.0) == 1
