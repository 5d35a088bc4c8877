"""Requests that workers died of: which are refused, because one more worker would die of them.

A request is known by its **fingerprint**, a keyed hash of where it goes and of its body. What is counted are deaths:
ends of workers that had the request and had not answered a byte of it. Most requests that were aboard are innocent, so
a death counts in full only where nobody else was aboard.

A death is suspected when a connection breaks. It does not count any more when the worker is still routed to a moment
later: one that only closes its connections is no reason to refuse anything.
"""

from collections.abc import Iterable
from dataclasses import dataclass

ENOUGH_IN_COMPANY = 3
SEEN_WITHIN_S = 2.0
"""A worker whose process is gone has left the routes within this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """One worker's end, as one of the requests aboard saw it.

    Attributes:
        has_left: The worker has left the routes since.
        age_s: Since the connection broke.
        victims: Requests that it had not answered a byte of, this one included.
    """

    has_left: bool
    age_s: float
    victims: int

    @property
    def counts(self) -> bool:
        """Whether it is one, or may still be seen to be one."""
        return self.has_left or self.age_s < SEEN_WITHIN_S


def is_poison(deaths: Iterable[Death]) -> bool:
    """Return whether a request is refused.

    Two deaths are enough where it was alone aboard in one of them; in company it takes a third, for which it is let
    through once more without a further try. When all engines of a host end at once, every request is aboard two ends.
    """
    counting = [death for death in deaths if death.counts]
    is_alone = any(death.victims == 1 for death in counting)
    return len(counting) >= (2 if is_alone else ENOUGH_IN_COMPANY)
