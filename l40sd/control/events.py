"""The last things that happened, numbered, for `l40sctl events` and whoever follows them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from heapq import merge
from itertools import takewhile
from typing import Any

from l40sd.clock import wall_time_iso
from l40sd.control.event_file import EventFile
from l40sd.control.messages import Event

REQUEST_EVENTS = ("proxy.request", "proxy.request_failed")


RESERVED_AT_ONCE = 1000
"""Numbers of events that are not remembered: the next daemon must not give them out again, and goes on behind them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which events somebody asks for.

    Attributes:
        since: Only those with a higher number.
        after: Only those that are not older than this.
        worker: Only this worker's; empty: all.
    """

    since: int = 0
    after: datetime | None = None
    worker: str = ""

    def has(self, event: Event) -> bool:
        """Whether this one is wanted, whatever its number."""
        if self.worker and event.data.get("worker") != self.worker:
            return False
        return self.after is None or datetime.fromisoformat(event.time) >= self.after


class Events:
    """A ring of events. A follower that reads too slowly loses the oldest, and sees that by the gap in ``seq``.

    The numbers go on from one daemon to the next, and the ring begins with what is remembered of the last one's. What
    happens to single requests (``REQUEST_EVENTS``) has rings of its own and is not remembered: a busy minute of it
    would push out the story of a week.

    Args:
        kept: Events kept.
        requests_kept: Events kept besides, of each of ``REQUEST_EVENTS``.
    """

    def __init__(self, kept: int, requests_kept: int = 1000) -> None:
        self._ring: deque[Event] = deque(maxlen=kept)
        self._of_requests: dict[str, deque[Event]] = {name: deque(maxlen=requests_kept) for name in REQUEST_EVENTS}
        self._seq = 0
        self._reserved = 0
        self._file: EventFile | None = None
        self._more = asyncio.Event()

    def resume(self, former: Sequence[Event], last: int, file: EventFile) -> None:
        """Go on after the events of an earlier daemon, and remember in ``file`` what happens from now on.

        Before anybody follows: what has happened since this daemon started is numbered anew.

        Args:
            last: The last number that earlier daemons gave out.
        """
        self._file = file
        self._seq += last
        for ring in (self._ring, *self._of_requests.values()):
            own = [replace(event, seq=event.seq + last) for event in ring]
            ring.clear()
            ring.extend([*former, *own] if ring is self._ring else own)
            self._remember(own)

    def close(self) -> None:
        """Write down what is not yet on disk."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, level: str, event: str, data: Mapping[str, Any]) -> None:
        """Append one event; the log hands them in, info and above."""
        self._seq += 1
        happened = Event(seq=self._seq, time=wall_time_iso(), level=level, event=event, data=dict(data))
        self._of_requests.get(event, self._ring).append(happened)
        self._remember([happened])
        self._more.set()
        self._more = asyncio.Event()

    def _remember(self, events: Iterable[Event]) -> None:
        for event in events:
            if self._file is not None and event.event not in REQUEST_EVENTS:
                self._file.append(event)
            elif self._file is not None and event.seq > self._reserved:
                self._reserved = event.seq + RESERVED_AT_ONCE
                self._file.reserve(self._reserved, event.time)

    def since(self, seq: int) -> list[Event]:
        """Return the events after ``seq`` that are still kept, oldest first.

        A number that is still to come was another life's, whose events were lost: then all of them.
        """
        rings = (self._ring, *self._of_requests.values())
        return list(
            merge(*(_after(ring, -1 if seq > self._seq else seq) for ring in rings), key=lambda event: event.seq)
        )

    def last(self, wanted: Wanted, count: int | None = None) -> list[Event]:
        """Return the latest ``count`` events that are wanted, or all, oldest first."""
        found = [event for event in self.since(wanted.since) if wanted.has(event)]
        return found if count is None else found[max(0, len(found) - count) :]

    async def follow(self, wanted: Wanted, count: int | None = None) -> AsyncIterator[Event]:
        """Yield ``last(wanted, count)``, then every further one as it happens."""
        more, seq = self._more, self._seq
        for event in self.last(wanted, count):
            yield event
        while True:
            await more.wait()
            more = self._more
            for event in self.since(seq):
                seq = event.seq
                if wanted.has(event):
                    yield event


def _after(ring: deque[Event], seq: int) -> list[Event]:
    """Return a ring's events after ``seq``, oldest first; costs what is returned, not what is kept."""
    return list(takewhile(lambda event: event.seq > seq, reversed(ring)))[::-1]
