"""Where the bytes of a reply go on their way to the client, when something has to be known of them."""

from collections.abc import Callable
from typing import Protocol

import httptools

from l40sd.proxy.http1.chunked import ends_between_chunks

TAIL_LIMIT_BYTES = 1 << 20


class Source(Protocol):
    """Where a reply comes from."""

    def pause(self, *, is_paused: bool) -> None:
        """Stop reading the reply, or go on."""


class Tail:
    """Passes on a reply in chunks and keeps its latest bytes, to find a place between two chunks.

    Attributes:
        data: The latest bytes.
        is_stopping: Read no further than such a place.
    """

    def __init__(self, source: Source, write: Callable[[bytes], object], seen: bytes) -> None:
        self._source = source
        self._write = write
        self.data = seen
        self.is_stopping = False

    def stop_between_chunks(self) -> None:
        """Read no further than the next place between two chunks."""
        self.is_stopping = True

    def __call__(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        self._write(data)
        self.data = (self.data + data)[-TAIL_LIMIT_BYTES:]
        if self.is_stopping and ends_between_chunks(self.data):
            self._source.pause(is_paused=True)


class Countdown:
    """Passes on a body with a length that comes in several parts.

    Attributes:
        left_bytes: Still to come.
    """

    def __init__(self, write: Callable[[bytes], object], left_bytes: int) -> None:
        self._write = write
        self.left_bytes = left_bytes

    def __call__(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        part = data[: self.left_bytes]  # llhttp allows an empty line behind the reply
        self.left_bytes -= len(part)
        self._write(part)


class Unchunk:
    """Passes on what is inside the chunks, for a client that cannot read them (HTTP/1.0)."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.on_body = write
        self.is_broken = False
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    def __call__(self, data: bytes) -> None:
        """Take the next bytes of a chunked body that was already found sound."""
        self._parser.feed_data(data)
