"""The last things that happened, numbered, for `l40sctl events` and whoever follows them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from l40sd.adapters.clock import wall_time_iso
from l40sd.adapters.eventfile import EventFile
from l40sd.core.messages import Event


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

    The numbers go on from one daemon to the next, and the ring begins with what is remembered of the last one's.
    """

    def __init__(self, kept: int) -> None:
        self._ring: deque[Event] = deque(maxlen=kept)
        self._seq = 0
        self._file: EventFile | None = None
        self._more = asyncio.Event()

    def resume(self, former: Sequence[Event], file: EventFile) -> None:
        """Go on after the events of an earlier daemon, and remember in ``file`` what happens from now on.

        Before anybody follows: what has happened since this daemon started is numbered anew.
        """
        last = max((event.seq for event in former), default=0)
        own = [replace(event, seq=event.seq + last) for event in self._ring]
        self._seq += last
        self._ring.clear()
        self._ring.extend([*former, *own])
        self._file = file
        for event in own:
            file.append(event)

    def close(self) -> None:
        """Write down what is not yet on disk."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, level: str, event: str, data: Mapping[str, Any]) -> None:
        """Append one event; the log hands them in, info and above."""
        self._seq += 1
        happened = Event(seq=self._seq, time=wall_time_iso(), level=level, event=event, data=dict(data))
        self._ring.append(happened)
        if self._file is not None:
            self._file.append(happened)
        self._more.set()
        self._more = asyncio.Event()

    def since(self, seq: int) -> list[Event]:
        """Return the events after ``seq`` that are still kept, oldest first.

        A number that is still to come was another life's, whose events were lost: then all of them.
        """
        return [event for event in self._ring if event.seq > seq or seq > self._seq]

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
