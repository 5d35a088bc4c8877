"""Chunked bodies: a request's is taken apart, a worker gets it whole with its length; a reply's is passed on as it is.

Source: RFC 9112 section 7.1.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from l40sd.proxy.refused import Refused

CHUNK_LINE_LIMIT = 1024
CHUNKS_FREE = 4096  # that may be of any size; what comes beyond
CHUNK_MEAN_BYTES = 64  # has to be so large on average: taking a chunk apart costs as much as 5000 bytes within one
TRAILER_LIMIT = 16384
FAR_BYTES = 4096
"""A chunk that goes on for as long as this, or longer, is not looked at further."""

_token = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_quoted = rb'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*+"'
_chunk_size = re.compile(
    rb"([0-9A-Fa-f]{1,15})(?:[ \t]*+;[ \t]*+"
    + _token
    + rb"(?:[ \t]*+=[ \t]*+(?:"
    + _token
    + rb"|"
    + _quoted
    + rb"))?)*+"
).fullmatch
_chunk_line = re.compile(rb"(?:\A\n?|(?<=\r\n))([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
_chunk_begins = re.compile(rb"(?:\A\n?|(?<=\r\n))(?=[0-9A-Fa-f])")
_half_chunk_line = re.compile(rb"([0-9A-Fa-f]{1,15}+)[ \t]*+(?:;[^\r\n]*+)?+(\r?+)").fullmatch
_trailer = re.compile(
    rb"(?!(?i:content-length|transfer-encoding|host|trailer|te|connection):)"
    + _token
    + rb":[^\x00-\x08\x0a-\x1f\x7f]*+"
).fullmatch


def ends_between_chunks(data: bytes) -> bool:
    """Return whether a reply in chunks stands between two of them, as far as its latest bytes can tell.

    That is so when they end with one whole chunk or more. They may begin anywhere: in the middle of a chunk, or of
    the line end behind it, what follows is looked at. A payload may look like that by chance: who acts on it asks the
    parser. The cost grows with the bytes, not with the chunks times their number: no line is followed twice.

    Args:
        data: None at all: at the body's beginning.
    """
    if not data:
        return True
    if not data.endswith(b"\r\n"):
        return False
    followed: set[int] = set()  # where chunk lines end from which the end was not reached
    for first in _chunk_line.finditer(data):
        line: re.Match[bytes] | None = first
        while line is not None and line.end() not in followed:
            followed.add(line.end())
            end = line.end() + int(line[1], 16) + 2
            if data[end - 2 : end] != b"\r\n" or end == line.end() + 2:
                break
            if end == len(data):
                return True
            line = _chunk_line.match(data, end)
    return False


class Place(NamedTuple):
    """Where a reply in chunks broke off.

    Attributes:
        left_bytes: To come until the chunk at hand is ended, its line end included, at most ``FAR_BYTES``; 0: between
            two chunks.
        line_end: Of the chunk's size, as far as that has not come: the first of them.
        payload: What the latest bytes have of the body.
    """

    left_bytes: int
    line_end: bytes
    payload: bytes


def place_of(data: bytes, left_bytes: int | None) -> Place | None:
    """Return where a reply in chunks stands.

    Args:
        data: Its latest bytes. They may begin anywhere: in the middle of a chunk, of its size or of a line end.
        left_bytes: As the parser says, at most ``FAR_BYTES``; it decides where a payload looks like chunks by chance.
            None: it says nothing.
    """
    for left, line_end, spans in _places(data):
        if left_bytes in (None, left):
            return Place(left, line_end, b"".join([data[begin:end] for begin, end in spans]))
    if left_bytes is None:
        return None
    return Place(left_bytes, b"", data[: len(data) - max(0, 2 - left_bytes)])  # all that is seen lies in one chunk


def _places(data: bytes) -> Iterator[tuple[int, bytes, list[tuple[int, int]]]]:
    """Yield what its latest bytes may be, the likeliest first: as in ``Place``, and where in them the payload is.

    The cost grows with the bytes: no line is followed twice, and nothing is copied.
    """
    followed: set[int] = set()
    for begin in _chunk_begins.finditer(data):
        spans = [(0, begin.start() - 2)] if begin.start() else []
        at = begin.end()
        while at not in followed:
            followed.add(at)
            line = _chunk_line.match(data, at)
            size = int(line[1], 16) if line is not None else 0
            if line is None or not size:
                half = _half_chunk_line(data, at)
                if at == len(data):
                    yield 0, b"", spans
                elif half is not None and int(half[1], 16):
                    line_end = b"\n" if half[2] else b"\r\n"
                    yield min(FAR_BYTES, len(line_end) + int(half[1], 16) + 2), line_end, spans
                break
            end = line.end() + size
            spans.append((line.end(), end))
            if len(data) < end + 2:
                if b"\r\n".startswith(data[end:]):
                    yield min(FAR_BYTES, end + 2 - len(data)), b"", spans
                break
            if data[end : end + 2] != b"\r\n":
                break
            at = end + 2


def go_on(place: Place, more: bytes) -> bytes:
    """Return the bytes that continue a reply in chunks with ``more``; its last chunk does not come."""
    line_end, left = place.line_end, place.left_bytes - len(place.line_end)
    room = left - 2 if left > 2 else 0
    if room >= len(more):
        return line_end + more
    rest = more[room:]
    return b"%b%b%b%x\r\n%b\r\n" % (line_end, more[:room], b"\r\n"[-min(left, 2) :] if left else b"", len(rest), rest)


class ChunkedBody:
    """Takes a chunked request body apart. Extensions and trailers are checked and dropped.

    What it holds is in proportion to the body, and so is what it does, however small the chunks are.

    Args:
        limit_bytes: Of the body without its framing.

    Attributes:
        content: The body so far.
        size: Its bytes so far, and what is announced of it.
        chunks: That were announced.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.content = bytearray()
        self.size = 0
        self.chunks = 0
        self._limit_bytes = limit_bytes
        self._held = b""  # a line or line end of which the rest is still to come
        self._left = 0  # bytes to come of the chunk at hand
        self._is_after_chunk = False
        self._trailer_bytes = -1  # counted once the last chunk was seen

    def feed(self, data: bytes) -> bytes | None:
        """Take the next bytes of the connection; return what follows the body, None while it goes on.

        Raises:
            Refused: 400 for broken framing, 413 when a chunk's announced size breaks the limit.
        """
        data = self._held + data
        self._held = b""
        at = 0
        while True:
            if self._left:
                piece = data[at : at + self._left]
                self.content += piece
                self._left -= len(piece)
                at += len(piece)
                if self._left:
                    return None
                self._is_after_chunk = True
            end = data.find(b"\r\n", at)
            if end < 0 or end - at > CHUNK_LINE_LIMIT:
                if len(data) - at > CHUNK_LINE_LIMIT or (self._is_after_chunk and data[at:] not in (b"", b"\r")):
                    raise Refused(400, "bad_request", "the chunked body is broken")
                self._held = data[at:]
                return None
            line = data[at:end]
            at = end + 2
            if self._line(line):
                return data[at:]

    def so_far(self) -> bytes:
        """Return what was fed, in other chunks: to another of us, they and what is still to come are the same body."""
        body = bytes(self.content)
        announced = len(body) + self._left
        begun = b"%x\r\n%b" % (announced, body) if announced else b""
        if self._left or self._is_after_chunk:
            return begun + self._held
        if begun:
            begun += b"\r\n"
        return begun + (b"0\r\n" if self._trailer_bytes >= 0 else b"") + self._held

    def _line(self, line: bytes) -> bool:
        """Take one line that is not chunk data; return whether it was the body's last."""
        if self._is_after_chunk:
            if line:
                raise Refused(400, "bad_request", "a chunk is longer than it said")
            self._is_after_chunk = False
        elif self._trailer_bytes >= 0:
            if not line:
                return True
            self._trailer_bytes += len(line)
            if self._trailer_bytes > TRAILER_LIMIT or not _trailer(line):
                raise Refused(400, "bad_request", "the trailer is broken or too long")
        else:
            size = _chunk_size(line)
            if size is None:
                raise Refused(400, "bad_request", "a chunk's size is not a hexadecimal number")
            self._left = int(size[1], 16)
            self.size += self._left
            if self.size > self._limit_bytes:
                raise Refused(413, "request_too_large", f"the body is larger than {self._limit_bytes} bytes")
            self.chunks += 1
            if (self.chunks - CHUNKS_FREE) * CHUNK_MEAN_BYTES > self.size:
                raise Refused(400, "bad_request", f"the body's chunks are smaller than {CHUNK_MEAN_BYTES} bytes each")
            if not self._left:
                self._trailer_bytes = 0
        return False
