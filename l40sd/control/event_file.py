"""The events of the daemons before this one: a file of JSON lines that is never longer than twice what is kept."""

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from l40sd.codec import decode, encode
from l40sd.control.messages import Event
from l40sd.shim.files import write_file

READ_LIMIT_BYTES = 16 << 20
WAITING_LIMIT = 10_000
CLOSE_TIMEOUT_S = 1.0
RESERVED = "events.reserved"
"""Stands for numbers, not for something that happened."""


class EventFile:
    """Appends events in a thread of its own: a disk that hangs holds up nothing but what is remembered.

    An event that the disk does not take, or that comes while ``WAITING_LIMIT`` others wait for it, is not remembered.
    Not before the daemon's lock is held: there is one writer.

    Args:
        kept: Events that ``read`` returns, at most.
        in_thread: Called first in the thread that writes.
    """

    def __init__(self, path: Path, kept: int, in_thread: Callable[[], None]) -> None:
        self.path = path
        self._kept = kept
        self._in_thread = in_thread
        self._lines = 0
        self._is_cut = False
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def read(self) -> tuple[list[Event], int]:
        """Return the latest events that are kept, oldest first, without what is none, and the last number given out.

        Blocks on the disk.
        """
        data = self._read()
        lines = data.splitlines()
        self._lines, self._is_cut = len(lines), not data.endswith(b"\n")
        events: list[Event] = []
        last = 0
        for line in lines:
            try:
                event = decode(Event, line)
            except (msgspec.MsgspecError, UnicodeDecodeError):  # half a line of a daemon that was killed, another's
                continue
            last = max(last, event.seq)
            if event.event != RESERVED and (not events or event.seq > events[-1].seq):
                events.append(event)
        return events[-self._kept :], last

    def reserve(self, seq: int, time: str) -> None:
        """Note, soon, that numbers up to this one are given to events that are not remembered."""
        self.append(Event(seq=seq, time=time, level="debug", event=RESERVED))

    def append(self, event: Event) -> None:
        """Write one event, soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="events", daemon=True)
            self._thread.start()
        if self._queue.qsize() < WAITING_LIMIT:
            self._queue.put(encode(event) + b"\n")

    def close(self) -> None:
        """Write what waits; a disk that hangs is not waited for longer than ``CLOSE_TIMEOUT_S``."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_TIMEOUT_S)
            self._thread = None

    def _write_all(self) -> None:
        self._in_thread()
        while (line := self._queue.get()) is not None:
            try:
                self._write(line)
            except OSError:  # the log has it; a disk that is full now may not be at the next one
                continue

    def _write(self, line: bytes) -> None:
        if self._lines >= 2 * self._kept:
            rest = _shortened(self._read().splitlines(keepends=True), self._kept)
            write_file(str(self.path), b"".join(rest), mode=0o640)
            self._lines, self._is_cut = len(rest), False
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        try:
            data = b"\n" + line if self._is_cut and self._lines else line
            self._is_cut = os.write(descriptor, data) < len(data)  # a disk that is full takes half a line
        finally:
            os.close(descriptor)
        self._lines += 1

    def _read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - READ_LIMIT_BYTES))
                return file.read(READ_LIMIT_BYTES)
        except OSError:
            return b""


def _shortened(lines: list[bytes], kept: int) -> list[bytes]:
    """Return the latest events, and of the reservations the latest: many of them must not push out a single event."""
    mark = f'"event":"{RESERVED}"'.encode()
    reservations = [line for line in lines if mark in line]
    return [*reservations[-1:], *[line for line in lines if mark not in line][-kept:]]
