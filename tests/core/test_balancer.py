from dataclasses import dataclass
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from l40sd.core.balancer import choose, load_with_one_more


@dataclass
class Seat:
    serial: int
    in_flight: int
    weight: int

    @property
    def load(self) -> float:
        return load_with_one_more(self.in_flight, self.weight)


seats = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=14).map(
    lambda pairs: [Seat(serial, *pair) for serial, pair in enumerate(pairs)]
)


@given(seats, st.integers(0, 10), st.sets(st.integers(0, 13)))
def test_the_chosen_one_is_allowed_and_nobody_allowed_is_less_busy(
    candidates: list[Seat], limit: int, tried: set[int]
) -> None:
    allowed = [c for c in candidates if c.serial not in tried and (not limit or c.in_flight < limit)]
    chosen = choose(candidates, limit=limit, tried=tried)
    if not allowed:
        assert chosen is None
        return
    assert chosen in allowed
    loads = [Fraction(c.in_flight + 1, c.weight) for c in allowed]
    assert Fraction(chosen.in_flight + 1, chosen.weight) == min(loads)


@given(st.integers(1, 12), st.integers(0, 5))
def test_the_first_of_equals_is_taken(count: int, in_flight: int) -> None:
    chosen = choose([Seat(serial, in_flight, 1) for serial in range(count)])
    assert chosen is not None
    assert chosen.serial == 0


@given(st.lists(st.integers(1, 8), min_size=1, max_size=12), st.integers(0, 300))
def test_load_is_spread_by_weight(weights: list[int], requests: int) -> None:
    """Least connections keeps every backend within one request of its share."""
    candidates = [Seat(serial, 0, weight) for serial, weight in enumerate(weights)]
    for _ in range(requests):
        chosen = choose(candidates)
        assert chosen is not None
        chosen.in_flight += 1
    for candidate in candidates:
        share = Fraction(requests * candidate.weight, sum(weights))
        assert abs(candidate.in_flight - share) <= max(1, len(weights))
    busiest = max(Fraction(c.in_flight, c.weight) for c in candidates)
    assert all(busiest <= Fraction(c.in_flight + 1, c.weight) for c in candidates)
