"""The last things that happened, numbered, for `l40sctl events` and whoever follows them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

from l40sd.adapters.clock import wall_time_iso
from l40sd.core.messages import Event


class Events:
    """A ring of events. A follower that reads too slowly loses the oldest, and sees that by the gap in ``seq``."""

    def __init__(self, kept: int) -> None:
        self._ring: deque[Event] = deque(maxlen=kept)
        self._seq = 0
        self._more = asyncio.Event()

    def add(self, level: str, event: str, data: Mapping[str, Any]) -> None:
        """Append one event; the log hands them in, info and above."""
        self._seq += 1
        self._ring.append(Event(seq=self._seq, time=wall_time_iso(), level=level, event=event, data=dict(data)))
        self._more.set()
        self._more = asyncio.Event()

    def since(self, seq: int) -> list[Event]:
        """Return the events after ``seq`` that are still kept, oldest first."""
        return [event for event in self._ring if event.seq > seq]

    async def follow(self, seq: int) -> AsyncIterator[Event]:
        """Yield the events after ``seq``, then every further one as it happens."""
        while True:
            more = self._more
            for event in self.since(seq):
                seq = event.seq
                yield event
            await more.wait()
