"""Requests off one client's byte stream: where its head ends, what it asks for, its body as it comes."""

import re
from enum import Enum

from l40sd.proxy.admission import admit
from l40sd.proxy.bounds import FREE_BODY_BYTES
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.http1.cached_heads import CachedRequestHead, cached_request_head
from l40sd.proxy.http1.chunked import ChunkedBody
from l40sd.proxy.http1.heads import RequestHead, parse_request, plain_request
from l40sd.proxy.refused import Refused

DISCARD_LIMIT_BYTES = 65536  # a refused request's body is read to its end up to this; beyond, the connection is closed

bare_line_feed = re.compile(rb"(?<!\r)\n").search


class Progress(Enum):
    """How far the reading of a head has come that is not whole."""

    BEGUN = 1  # its first bytes are there
    PART = 2  # none is, or some more


class RequestReader:
    """What was read of the present request and not passed on yet. The same object reads the next one.

    Attributes:
        held: Bytes that were not looked at, or not to their end.
        head: Of the present request, once it is whole.
        target: What to ask a worker for; empty: the request is answered here.
        allowed: What to answer to OPTIONS.
        refused: The answer once the body is read, which is not kept.
        cached_head: The latest head that was admitted, as long as only its length differs;
        cached_target: what to ask a worker for, for that one.
    """

    __slots__ = (
        "_chunks",
        "_context",
        "_missing",
        "_parts",
        "_rules",
        "_scanned",
        "_taken_bytes",
        "allowed",
        "cached_head",
        "cached_target",
        "head",
        "held",
        "refused",
        "target",
    )

    def __init__(self, context: ProxyContext) -> None:
        self._context = context
        self.held = b""
        self.cached_head: CachedRequestHead | None = None
        self.cached_target = b""
        self._rules: object = None  # under which it was admitted
        self._taken_bytes = 0  # of the memory for bodies
        self.begin()

    def begin(self) -> None:
        """Expect a request's head next."""
        self.head: RequestHead | None = None
        self.target = b""
        self.allowed: tuple[bytes, ...] = ()
        self.refused: Refused | None = None
        self._parts: list[bytes] = []
        self._missing = 0  # bytes of the body still to come
        self._chunks: ChunkedBody | None = None
        self._scanned = 0
        self.release_memory()

    def add(self, data: bytes) -> None:
        """Hold what the client sent."""
        self.held = self.held + data if self.held else data

    def is_idle(self) -> bool:
        """Whether nothing of a request has come."""
        return self.head is None and not self.held

    def end_of_known(self, data: bytes) -> int:
        """Return where the head ends if ``data`` is exactly one request with the cached head and a small body, else 0.

        Most are; passing those on at once saves 2 us.
        """
        cached = self.cached_head
        if cached is None or self.head is not None or self.held:
            return 0
        end = self._known_end(cached, data)
        size = len(data) - end
        return end if size == cached.request.content_length and size <= FREE_BODY_BYTES else 0

    def _known_end(self, cached: CachedRequestHead, held: bytes) -> int:
        """Return where the head ends if it is one that was parsed and admitted on this connection before, else 0."""
        if self._rules is not self._context.rules:
            return 0
        end = cached.end_in(held)
        return end if cached.request.content_length <= self._context.config.body_limit_bytes else 0

    def read_head(self) -> RequestHead | Progress:
        """Take a head off what is held, and return it where it is whole.

        Raises:
            Refused: It is too large, or none; nothing after it has a meaning.
        """
        held = self.held
        if held.startswith(b"\r\n"):
            held = self.held = held.lstrip(b"\r\n")  # an empty line before a request is harmless (RFC 9112, 2.2)
            self._scanned = 0
        end = held.find(b"\r\n\r\n", self._scanned) + 4
        limit = self._context.config.head_limit_bytes
        if end < 4 or end > limit:
            return self._look_at_part(held, limit)
        cached = self.cached_head
        if cached is not None and self._known_end(cached, held) == end:
            head = self.head = cached.request
            self.target = self.cached_target
            self._missing = head.content_length
        else:
            head = self._take_head(held[:end])
        self.held = held[end:]
        return head

    def _look_at_part(self, held: bytes, limit: int) -> Progress:
        if len(held) > limit:
            raise Refused(431, "head_too_large", f"the request's head is larger than {limit} bytes")
        if bare_line_feed(held, self._scanned):
            raise Refused(400, "bad_request", "lines end in CR LF")
        progress = Progress.BEGUN if not self._scanned and held else Progress.PART
        self._scanned = max(0, len(held) - 3)
        return progress

    def _take_head(self, raw: bytes) -> RequestHead:
        head = parse_request(raw)
        self.head = head
        context = self._context
        limit = context.config.body_limit_bytes
        try:
            self.target, self.allowed = admit(head, context.has_key, context.cors, limit)
        except Refused as refused:
            if head.is_chunked or head.content_length > DISCARD_LIMIT_BYTES or head.expects_continue:
                raise
            self.refused = refused
        if head.is_chunked:
            self._chunks = ChunkedBody(limit)
        else:
            self._missing = max(0, head.content_length)
        self.cached_head = cached_request_head(head, raw) if self.target else None
        self.cached_target, self._rules = self.target, context.rules
        return head

    def read_body(self) -> bool:
        """Take the body off what is held; return whether it is whole.

        Raises:
            Refused: It is broken, or too large together with others.
        """
        if self._chunks is not None:
            return self._read_chunks(self._chunks)
        if self._missing:
            part = self.held[: self._missing]
            self.held = self.held[len(part) :]
            self._missing -= len(part)
            if self.refused is None:
                self._parts.append(part)
                self._take_memory(self.head.content_length - self._missing if self.head is not None else 0)
        return not self._missing

    def _read_chunks(self, chunks: ChunkedBody) -> bool:
        rest = chunks.feed(self.held) if self.held else None
        self.held = rest or b""
        self._take_memory(len(chunks.content))
        if rest is None:
            return False
        self._parts = [bytes(chunks.content)]
        self._chunks = None
        return True

    def take_body(self) -> bytes:
        """Return the whole body; it is the caller's from now on."""
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def discard(self) -> None:
        """Keep nothing of what came: further bytes have no meaning."""
        self.held = b""
        self._parts = []
        self._chunks = None
        self.release_memory()

    def target_so_far(self) -> bytes:
        """Return what the present request asks for, as far as that can be read."""
        return self.head.target if self.head is not None else self.held.partition(b" ")[2].partition(b" ")[0]

    def unread(self) -> bytes:
        """Return all that came and was not passed on, as another connection could read it."""
        if self.head is None:
            return self.held
        if self._chunks is not None:
            return plain_request(self.head) + self._chunks.so_far() + self.held
        body = b"".join(self._parts)
        return plain_request(self.head, len(body) + self._missing) + body + self.held

    # Memory that all bodies share

    def hold_memory(self, size_bytes: int) -> None:
        """Count a body that another daemon had read."""
        self._taken_bytes = size_bytes
        self._context.bounds.hold_memory(size_bytes)

    def _take_memory(self, held_bytes: int) -> None:
        """Count what is held of the present body.

        Raises:
            Refused: There is none left for it.
        """
        more = held_bytes - self._taken_bytes
        if held_bytes > FREE_BODY_BYTES and more > 0:
            self._taken_bytes += more
            self._context.bounds.take_memory(more)

    def release_memory(self) -> None:
        """Count the body no more: it is gone, or will be in this turn of the loop."""
        if self._taken_bytes:
            self._context.bounds.give_back_memory(self._taken_bytes)
            self._taken_bytes = 0
