"""Requests that workers died of: which are refused, because one more worker would die of them.

A request is known by its **fingerprint**, a keyed hash of where it goes and of its body. What is counted are deaths:
ends of workers that had the request and had not answered a byte of it. Most requests that were aboard are innocent, so
a death counts in full only where nobody else was aboard.

A death is *suspected* when a connection breaks, and *confirmed* once the worker is no longer routed to: a worker that
only closes its connections is no reason to refuse anything.
"""

from collections.abc import Iterable
from dataclasses import dataclass

ENOUGH_IN_COMPANY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """One worker's end, as one of the requests aboard saw it.

    Attributes:
        is_confirmed: The worker has left the routes since.
        victims: Requests that it had not answered a byte of, this one included.
    """

    is_confirmed: bool
    victims: int


def is_poison(deaths: Iterable[Death]) -> bool:
    """Return whether a request is refused.

    Two confirmed deaths are enough where it was alone aboard in one of them; in company it takes a third, for which it
    is let through once more without a further try.
    """
    confirmed = [death for death in deaths if death.is_confirmed]
    is_alone = any(death.victims == 1 for death in confirmed)
    return len(confirmed) >= (2 if is_alone else ENOUGH_IN_COMPANY)
