"""The retry policy, walked completely: everything that can be seen, every number of tries and deaths that matters."""

from itertools import product

import pytest

from l40sd.core import retrypolicy
from l40sd.core.poison import Death, is_poison
from l40sd.core.retrypolicy import DEATHS_LIMIT, TABLE, Next, Seen, decide

ENDS = (Next.END, Next.REPLY)
WALK = list(product(Seen, range(4), range(4)))


def test_the_table_has_a_row_for_everything_that_can_be_seen_and_the_page_shows_each() -> None:
    assert set(TABLE) == set(Seen)
    assert retrypolicy.__doc__ is not None
    for seen, rule in TABLE.items():
        row = next(line for line in retrypolicy.__doc__.splitlines() if line.startswith(f"| {seen.name}:"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:3] == ["yes" if rule.is_blamed else "no", "yes" if rule.is_death else "no"]
        assert cells[3].startswith("another worker") == (rule.next.startswith("other"))


@pytest.mark.parametrize(("seen", "tries_left", "deaths"), WALK)
def test_a_second_death_ends_a_request_whatever_else_is_left(seen: Seen, tries_left: int, deaths: int) -> None:
    """One request that kills an engine was tried on three workers."""
    if TABLE[seen].is_death and deaths >= DEATHS_LIMIT:
        assert decide(seen, tries_left=tries_left, deaths=deaths) is Next.END


@pytest.mark.parametrize(("seen", "tries_left", "deaths"), WALK)
def test_without_a_try_left_only_a_stale_connection_is_made_anew(seen: Seen, tries_left: int, deaths: int) -> None:
    following = decide(seen, tries_left=tries_left, deaths=deaths)
    if not tries_left:
        assert following in ((Next.SAME,) if seen is Seen.STALE else ENDS)
    if following is Next.REPLY:
        assert TABLE[seen].has_reply
    assert [each.name for each in Seen if TABLE[each].has_reply] == ["UNAVAILABLE", "ENDING"]


@pytest.mark.parametrize(("seen", "tries_left", "deaths"), WALK)
def test_what_is_not_limited_is_what_the_table_says(seen: Seen, tries_left: int, deaths: int) -> None:
    if tries_left and not (TABLE[seen].is_death and deaths >= DEATHS_LIMIT):
        assert decide(seen, tries_left=tries_left, deaths=deaths) is TABLE[seen].next


@pytest.mark.parametrize("retries", range(4))
def test_no_run_of_failures_is_longer_than_the_tries_allow(retries: int) -> None:
    """A kept connection that closed at once came on top of the tries: a request went out four times, not three."""
    todo = [(retries, 0, 0, True)]
    longest = 0
    while todo:
        tries_left, deaths, asked, may_be_stale = todo.pop()
        longest = max(longest, asked + 1)
        for seen in Seen:
            if seen is Seen.STALE and not may_be_stale:
                continue  # only a connection that was kept can be, and a further try makes a new one
            died = deaths + TABLE[seen].is_death
            match decide(seen, tries_left=tries_left, deaths=died):
                case Next.END | Next.REPLY:
                    continue
                case Next.SAME:
                    todo.append((max(0, tries_left - 1), died, asked + 1, False))
                case _:
                    todo.append((tries_left - 1, died, asked + 1, False))
    assert longest == max(retries + 1, 2)


def died(*victims: int, still_there: int = 0, age_s: float = 60.0) -> list[Death]:
    return [Death(has_left=True, age_s=60.0, victims=n) for n in victims] + [
        Death(has_left=False, age_s=age_s, victims=1) for _ in range(still_there)
    ]


@pytest.mark.parametrize(
    ("deaths", "is_refused"),
    [
        (died(), False),
        (died(1), False),
        (died(1, 1), True),
        (died(1, 20), True),
        (died(20, 20), False),  # most of those twenty are innocent
        (died(20, 20, 20), True),
        (died(20, 20, 1), True),
        (died(1, still_there=3), False),  # a worker that only closes its connections has not died
        (died(still_there=9), False),
        (died(still_there=2, age_s=0.1), True),  # nobody can know yet
    ],
)
def test_a_request_is_poison_after_two_deaths_or_three_in_company(deaths: list[Death], is_refused: bool) -> None:
    assert is_poison(deaths) is is_refused
