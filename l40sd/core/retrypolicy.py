"""What a request does when a worker failed it before the first byte of a reply: who is blamed, and where it goes next.

The table is the whole policy for one try; ``decide`` lays the limits over it. The proxy (services/proxy_exchange.py)
only says what it saw and does what it is told.

| seen before the first byte of a reply        | blamed | a death | next                                         |
|----------------------------------------------|--------|---------|----------------------------------------------|
| STALE: kept connection closed at once        | no     | no      | the same worker, over a new connection, once |
| CONNECT: no connection                       | yes    | no      | another worker; none: wait in line for one   |
| CLOSED: the connection broke without a byte  | yes    | yes     | another worker; none: the same one           |
| VANISHED: STALE, then no connection          | yes    | yes     | another worker; none: wait in line for one   |
| GARBLED: half a head, or no HTTP             | yes    | no      | another worker; none: the same one           |
| UNAVAILABLE: a reply of 502 or 503           | yes    | no      | another worker; none: that reply             |
| ENDING: a reply of 500 by a worker that ends | yes    | yes     | another worker; none: wait in line for one   |
| ABORTED: a reply that says it was aborted    | no     | no      | another worker; none: the same one           |
| STOPPED: l40sd is about to stop the worker   | no     | no      | another worker; none: wait in line for one   |
| HUNG: the same, because it makes no tokens   | no     | yes     | another worker; none: wait in line for one   |
| SILENT: nothing for first_byte_timeout_s     | yes    | no      | none: it may well be working on it           |
| OVERLOADED: no descriptor left here          | no     | no      | none                                         |

Where no try is left, a reply that there is (UNAVAILABLE, ENDING) is passed on.

A **death** may be the request's own doing: a poisoned request ends every engine that reads it. Such a request is tried
on one further worker; the second death ends it, and its client is told not to try again (see core/poison.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

DEATHS_LIMIT = 2
"""Workers that one request may be the end of."""


class Seen(StrEnum):
    """What became of a try before the first byte of its reply; the table above has each."""

    STALE = "stale"
    CONNECT = "connect"
    CLOSED = "closed"
    VANISHED = "vanished"
    GARBLED = "garbled"
    UNAVAILABLE = "unavailable"
    ENDING = "ending"
    ABORTED = "aborted"
    STOPPED = "stopped"
    HUNG = "hung"
    SILENT = "silent"
    OVERLOADED = "overloaded"


class Next(StrEnum):
    """Where a request goes."""

    SAME = "same"  # the same worker, over a new connection
    OTHER_OR_WAIT = "other_or_wait"  # another worker; none is free: the waiting line
    OTHER_OR_SAME = "other_or_same"  # another worker; none is free: the same one again
    OTHER_OR_REPLY = "other_or_reply"  # another worker; none is free: what this one said is passed on
    REPLY = "reply"  # what this one said is passed on
    END = "end"  # an error of ours


@dataclass(frozen=True, slots=True)
class Rule:
    """One row.

    Attributes:
        is_blamed: The worker is.
        is_death: The request may have ended it.
        next: Where the request goes.
        has_reply: The worker did reply; that can be passed on.
    """

    is_blamed: bool
    is_death: bool
    next: Next
    has_reply: bool = False


TABLE: Mapping[Seen, Rule] = {
    Seen.STALE: Rule(is_blamed=False, is_death=False, next=Next.SAME),
    Seen.CONNECT: Rule(is_blamed=True, is_death=False, next=Next.OTHER_OR_WAIT),
    Seen.CLOSED: Rule(is_blamed=True, is_death=True, next=Next.OTHER_OR_SAME),
    Seen.VANISHED: Rule(is_blamed=True, is_death=True, next=Next.OTHER_OR_WAIT),
    Seen.GARBLED: Rule(is_blamed=True, is_death=False, next=Next.OTHER_OR_SAME),
    Seen.UNAVAILABLE: Rule(is_blamed=True, is_death=False, next=Next.OTHER_OR_REPLY, has_reply=True),
    Seen.ENDING: Rule(is_blamed=True, is_death=True, next=Next.OTHER_OR_WAIT, has_reply=True),
    Seen.ABORTED: Rule(is_blamed=False, is_death=False, next=Next.OTHER_OR_SAME),
    Seen.STOPPED: Rule(is_blamed=False, is_death=False, next=Next.OTHER_OR_WAIT),
    Seen.HUNG: Rule(is_blamed=False, is_death=True, next=Next.OTHER_OR_WAIT),
    Seen.SILENT: Rule(is_blamed=True, is_death=False, next=Next.END),
    Seen.OVERLOADED: Rule(is_blamed=False, is_death=False, next=Next.END),
}


def decide(seen: Seen, *, tries_left: int, deaths: int) -> Next:
    """Return where the request goes after a failed try.

    1. So many workers ended with it aboard: no further one, whatever they had said.
    2. A connection that was only stale is made anew even without a try left: once, for only a first try has a kept one.
    3. No try left: the request ends, with the worker's own reply where there is one.
    4. As the table says.

    Args:
        seen: What became of this try.
        tries_left: Further tries that the request may have.
        deaths: Of workers that had it, this one included.
    """
    rule = TABLE[seen]
    if rule.is_death and deaths >= DEATHS_LIMIT:  # 1
        return Next.END
    if rule.next is Next.SAME:  # 2
        return Next.SAME
    if tries_left <= 0:  # 3
        return Next.REPLY if rule.has_reply else Next.END
    return rule.next  # 4
