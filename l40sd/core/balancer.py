"""Which backend gets the next request: weighted least connections.

Runs once a request over about a dozen backends: a slice and a ``min`` over a number that is kept up to date, 0.5 us.
"""

from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """What the choice needs to know of a backend.

    Attributes:
        serial: Names it in the exclusions.
        in_flight: Requests it holds now, at least 0.
        load: ``load_with_one_more`` of its requests and weight.
    """

    serial: int
    in_flight: int
    load: float


C = TypeVar("C", bound=Candidate)

_load = attrgetter("load")


def load_with_one_more(in_flight: int, weight: int) -> float:
    """Return how busy a backend of this weight would be with one more request.

    Division rounds correctly, so equal fractions give equal numbers, and different ones different numbers as long as
    weights stay below 2**26.
    """
    return (in_flight + 1) / weight


def choose(candidates: Sequence[C], turn: int, *, limit: int = 0, tried: Collection[int] = ()) -> C | None:
    """Return the candidate whose load would be least with one more request; None when none may take it.

    1. Those in ``tried`` and those that already hold ``limit`` requests are left out.
    2. The least load wins.
    3. Of equals the first one from ``turn`` on, so that a caller who counts ``turn`` up spreads ties.

    Args:
        candidates: In a stable order.
        turn: Where to start looking; any number from 0 on.
        limit: Requests at once on one candidate; 0: no limit.
        tried: Serials to leave out.
    """
    if not candidates:
        return None
    first = turn % len(candidates)
    allowed = [*candidates[first:], *candidates[:first]]
    if tried or limit:  # 1
        allowed = [c for c in allowed if c.serial not in tried and (not limit or c.in_flight < limit)]
    return min(allowed, key=_load, default=None)  # 2, 3: min keeps the first of equals
