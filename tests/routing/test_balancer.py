from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from l40sd.routing.balancer import AWAY, choose, load_with_one_more

seats = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=14)
turns = st.integers(0, 1000)


@given(seats, turns, st.sets(st.integers(0, 13)))
def test_the_chosen_one_is_allowed_and_nobody_allowed_is_less_busy(
    candidates: list[tuple[int, int]], turn: int, away: set[int]
) -> None:
    loads = [AWAY if place in away else load_with_one_more(*seat) for place, seat in enumerate(candidates)]
    exact = {place: Fraction(n + 1, weight) for place, (n, weight) in enumerate(candidates) if place not in away}
    chosen = choose(loads, turn)
    if not exact:
        assert chosen == -1
        return
    assert chosen in exact
    assert exact[chosen] == min(exact.values())


@given(st.integers(1, 12), st.integers(0, 5), turns)
def test_ties_go_round(count: int, in_flight: int, turn: int) -> None:
    loads = [load_with_one_more(in_flight, 1)] * count
    chosen = [choose(loads, turn + step) for step in range(count)]
    assert chosen == [(turn + step) % count for step in range(count)]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=12), st.integers(0, 300))
def test_load_is_spread_by_weight(weights: list[int], requests: int) -> None:
    """Least connections keeps every backend within one request of its share."""
    in_flight = [0] * len(weights)
    for turn in range(requests):
        in_flight[choose([load_with_one_more(*seat) for seat in zip(in_flight, weights, strict=True)], turn)] += 1
    for held, weight in zip(in_flight, weights, strict=True):
        assert abs(held - Fraction(requests * weight, sum(weights))) <= max(1, len(weights))
    busiest = max(Fraction(held, weight) for held, weight in zip(in_flight, weights, strict=True))
    assert all(busiest <= Fraction(held + 1, weight) for held, weight in zip(in_flight, weights, strict=True))
