"""The proxy's connections to workers: kept idle for the next request, closed before the engine would close them.

The bytes of a reply go to the client's transport as they come. llhttp follows along to know where the reply ends and
that its framing is sound; it calls back at the beginning and the end of a reply and for its fields, never for its body.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from l40sd.proxy.http1.cached_heads import CachedReplyHead, cached_reply_head
from l40sd.proxy.http1.chunked import FAR_BYTES
from l40sd.proxy.http1.heads import ResponseHead, is_reserved_in_trailer, parse_response
from l40sd.routing.routes import Route

RESPONSE_HEAD_LIMIT_BYTES = 65536
KINDS_LIMIT = 4
BROKEN = (httptools.HttpParserError, httptools.HttpParserUpgrade)  # nobody asked for another protocol
ABORTED = "the engine says that it aborted this request"
ABORTED_WITHIN_BYTES = 512
_aborted = re.compile(rb'"finish_reason":\s*"abort"').search


def says_aborted(data: bytes) -> bool:
    """Return whether the end of a reply says that the engine aborted it (vLLM and SGLang, when they are stopped).

    In a text that a model wrote the quotes would be escaped. What stands behind the reason is short (300 bytes with
    vLLM), so that only an end has to be searched: 0.3 us.
    """
    return data.find(b'"abort"', -ABORTED_WITHIN_BYTES) >= 0 and _aborted(data) is not None


class Asker(Protocol):
    """Who asked, until a reply begins: ``on_whole``, ``on_head``, ``on_lost`` or ``broke`` ends it."""

    def on_whole(self, cached: CachedReplyHead, data: bytes) -> None:
        """Take a whole reply of a known kind that came in one read."""

    def on_head(self, head: ResponseHead, rest: bytes) -> None:
        """Take the head and the first bytes after it, and let a ``Taker`` have the others, or let go."""

    def on_lost(self, why: str, *, is_clean: bool) -> None:
        """The connection closed (then it ``is_clean``), or it or the reply's framing broke."""

    def broke(self, error: Exception) -> None:
        """End it: our own code failed on the reply."""


class Taker(Protocol):
    """Who takes a reply that has begun: ``on_complete``, ``on_lost`` or ``broke`` ends it.

    Attributes:
        write: Where its further bytes go.
        latest: Set to every part of it as it comes: whoever watches for silence sees whether it is another one, and
            whoever hands the connection over where in the reply it stands. Costs what a flag would.
    """

    write: Callable[[bytes], object]
    latest: bytes

    def on_complete(self) -> None:
        """The reply is whole and written."""

    def on_lost(self, why: str, *, is_clean: bool) -> None:
        """The connection closed (then it ``is_clean``), or it or the reply's framing broke."""

    def broke(self, error: Exception) -> None:
        """End it: our own code failed on the reply."""


class ConnectionPool:
    """One route's connections.

    Attributes:
        fields: What every request to it carries, each as ``CR LF name: value``.
        reply_field: Names it in every reply.
        idle: Oldest first.
        open: Connections there are, in use or idle.
        cached_heads: Kinds of replies that need no parsing, the latest first. A worker answers with the same fields
            every time, but for a date and a length (uvicorn, llama.cpp): comparing takes 0.3 us, parsing 2.
        served_name: The model's name that its engine answers to.
        ends_streams: Its streams end with the last event that their API has, as far as is known.
    """

    __slots__ = ("cached_heads", "ends_streams", "fields", "idle", "open", "reply_field", "route", "served_name")

    def __init__(self, route: Route) -> None:
        backend = route.backend
        self.route = route
        host = f"[{backend.host}]" if ":" in backend.host else backend.host
        key = f"\r\nauthorization: Bearer {backend.api_key}" if backend.api_key else ""
        self.fields = f"\r\nhost: {host}:{backend.port}{key}".encode()
        self.reply_field = f"\r\nx-l40s-worker: {backend.worker}".encode()
        self.idle: list[WorkerConnection] = []
        self.open = 0
        self.cached_heads: list[CachedReplyHead] = []
        self.served_name = backend.served_name or backend.model
        self.ends_streams = backend.ends_streams

    def take_idle(self, now_s: float, idle_timeout_s: float) -> "WorkerConnection | None":
        """Return the connection that was used last, if it is young enough to trust."""
        while self.idle:
            upstream = self.idle.pop()
            if upstream.idle_since_s + idle_timeout_s > now_s and not upstream.transport.is_closing():
                return upstream
            upstream.transport.close()
        return None

    def learn(self, head: bytes, response: ResponseHead) -> None:
        """Remember the kind of a head that was parsed, in place of the oldest where there are many."""
        cached = cached_reply_head(head, response)
        if cached is not None and all(
            cached.alike != other.alike or cached.status != other.status for other in self.cached_heads
        ):
            self.cached_heads = [cached, *self.cached_heads[: KINDS_LIMIT - 1]]

    def learn_end(self) -> None:
        """Expect of every further stream that it ends with its API's last event, as one has done."""
        self.ends_streams = True

    def opened(self) -> None:
        """Count a connection that was made."""
        self.open += 1

    def closed(self, upstream: "WorkerConnection") -> None:
        """Count a connection no more, which may have been idle."""
        self.open -= 1
        if upstream in self.idle:
            self.idle.remove(upstream)

    def close_oldest(self) -> None:
        """Close the connection that has been idle for longest."""
        self.idle.pop(0).abort()

    def close_idle(self) -> None:
        """Close every idle connection."""
        for upstream in list(self.idle):
            upstream.abort()

    def sweep(self, now_s: float, idle_timeout_s: float) -> None:
        """Close connections idle for too long, and all when the worker is no longer routed to."""
        limit_s = idle_timeout_s if self.route.is_open else 0.0
        while self.idle and self.idle[0].idle_since_s + limit_s <= now_s:
            self.idle.pop(0).transport.close()


class WorkerConnection(asyncio.Protocol):
    """One connection to a worker, carrying one request at a time."""

    __slots__ = (
        "_asker",
        "_begun",
        "_buffer",
        "_feed",
        "_has_bad_trailer",
        "_has_large_body",
        "_is_in_body",
        "_is_paused",
        "_keep",
        "_parser",
        "_taker",
        "idle_since_s",
        "is_broken",
        "is_done",
        "pool",
        "reused",
        "transport",
    )

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool = pool
        self._asker: Asker | None = None
        self._taker: Taker | None = None
        self.idle_since_s = 0.0
        self.reused = False
        self._is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport; ``ask`` comes right after."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop has no common base class
        self.is_broken = False
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self.pool.opened()

    def ask(self, asker: Asker, head: bytes, body: bytes | memoryview = b"") -> None:
        """Send a request; ``asker`` has its reply.

        Args:
            asker: Told what becomes of it.
            head: With a small body behind it.
            body: A larger one: not worth a copy.
        """
        self._expect_reply(asker)
        self._has_large_body = bool(body)
        if body:
            self.transport.writelines((head, body))
        else:
            self.transport.write(head)

    def import_request(self, asker: Asker, *, begun: bytes = b"", is_reused: bool = False) -> None:
        """Wait for the reply to a request that an earlier daemon sent; ``begun`` is what has come of its head."""
        self.reused = is_reused
        self._expect_reply(asker)
        self._buffer = begun
        self._has_large_body = False

    def _expect_reply(self, asker: Asker) -> None:
        self._asker = asker
        self._taker = None
        self._buffer = b""
        self._begun = 0
        self._is_in_body = False
        self._has_bad_trailer = False
        self._keep = False
        self.is_done = False

    def import_reply(self, taker: Taker, framing: bytes) -> None:
        """Go on, after ``import_request``, with a reply whose head was passed on; the connection's last.

        Args:
            taker: Has its further bytes.
            framing: Field lines that say how what is left of the body is framed.
        """
        self.pass_to(taker)
        self._feed(b"HTTP/1.1 200 OK\r\nconnection: close\r\n%b\r\n" % framing)

    def pass_to(self, taker: Taker) -> None:
        """Let this one have what is still to come of the reply, and be told of its end."""
        self._taker = taker
        self._asker = None

    @property
    def begun(self) -> bytes:
        """What has come of a reply's head that is not whole yet."""
        return self._buffer

    @property
    def has_unsent(self) -> bool:
        """Whether some of the request is still with us."""
        return self.transport.get_write_buffer_size() > 0

    def pause(self, *, is_paused: bool) -> None:
        """Stop reading the reply, or go on."""
        if is_paused != self._is_paused:
            self._is_paused = is_paused
            if is_paused:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def release(self, now_s: float) -> None:
        """Let go after a whole reply: keep the connection for the next request where that is safe."""
        self._asker = self._taker = None  # what it says unasked is nobody's
        # It may have answered without reading the whole request. A small one is with the kernel as a rule; what is not
        # goes out before the next request does. A connection that closed meanwhile is found out by ``take_idle``.
        is_sent = not self._has_large_body or not self.transport.get_write_buffer_size()
        if self._keep and is_sent and self.pool.route.is_open and not self.transport.is_closing():
            if self._is_paused:
                self.pause(is_paused=False)
            self.idle_since_s = now_s
            self.reused = True
            self.pool.idle.append(self)
        else:
            self.transport.abort()

    def abort(self) -> None:
        """Let go at once; the worker sees the connection close."""
        self._asker = self._taker = None
        self.transport.abort()

    def abort_for(self, taker: Taker) -> None:
        """Let go at once unless this one's reply has ended: then it may be another's by now."""
        if self._taker is taker:
            self.abort()

    def is_between_chunks(self) -> bool:
        """Return whether a chunked reply, lost now, could be continued with a whole chunk. Ends the parsing."""
        try:
            self._feed(b"0\r\n\r\n")  # a last chunk is one only where a chunk may begin
        except BROKEN:
            return False
        return self.is_done

    def left_in_chunk(self, latest: bytes) -> int | None:
        """Return how many bytes end the chunk at hand of a reply in chunks, its line end included. Ends the parsing.

        llhttp does not say where in a chunk it is, so it is asked: whatever it takes goes into the chunk, but a CR LF
        is a chunk's end only where the chunk ends, and no CR may follow it.

        Args:
            latest: What it had last, from which it is known whether the next could be the LF of a CR.

        Returns:
            0 between two chunks, at most ``FAR_BYTES``, None where the parser cannot go on.
        """
        was_cr = latest.endswith(b"\r")
        if self.is_broken or self.is_done:
            return None
        count = 0
        try:
            while count < FAR_BYTES:
                self._feed(b"\n" if was_cr ^ (count & 1) else b"\r")
                if self.is_done:
                    return None  # the last chunk had begun
                count += 1
        except BROKEN:
            if not count and not was_cr and latest and not latest.endswith(b"\n"):
                return None
            return count if count & 1 == was_cr else count + 2
        return FAR_BYTES

    def data_received(self, data: bytes) -> None:
        """Pass on a reply's next bytes."""
        try:
            taker = self._taker
            if taker is None:
                if self._buffer or not self._take_whole(data):
                    self._head(data)
                return
            try:
                self._feed(data)
            except BROKEN as error:
                self.is_broken = True
                self._lost(f"broken framing: {error}")
                return
            if self.is_done:
                self._complete(data, taker)
                return
            write = taker.write  # taker.write(data) would look for a method first, at every event
            write(data)
            taker.latest = data
        except Exception as error:  # noqa: BLE001 - the loop would only log it
            self._broke(error)

    def on_message_begin(self) -> None:
        """Count replies: a second one was not asked for."""
        self._begun += 1

    def on_headers_complete(self) -> None:
        """Note that fields, if any follow, are a trailer's."""
        self._is_in_body = True

    def on_header(self, name: bytes, _value: bytes) -> None:
        """Look at a trailer's fields; those of the head are read elsewhere."""
        if self._is_in_body and is_reserved_in_trailer(name):
            self._has_bad_trailer = True

    def on_message_complete(self) -> None:
        """Note the end; llhttp answers ``should_keep_alive`` only now."""
        if self._begun == 1:
            self.is_done = True
            self._keep = self._parser.should_keep_alive()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who asked; forget an idle connection."""
        self.pool.closed(self)
        told = self._taker or self._asker
        if told is None:
            return
        try:
            self._lost(f"connection lost: {exc}" if exc else "connection closed", is_clean=exc is None)
        except Exception as error:  # noqa: BLE001 - the loop would only log it, and the request never end
            told.broke(error)

    def _broke(self, error: Exception) -> None:
        told = self._taker or self._asker
        self.abort()
        if told is not None:
            told.broke(error)

    def _take_whole(self, data: bytes) -> bool:
        """Hand over a reply that is whole and of a known kind; return whether it was: most that are no streams are."""
        asker = self._asker
        if asker is not None:
            for cached in self.pool.cached_heads:
                if cached.is_whole(data):
                    self._keep = True
                    asker.on_whole(cached, data)
                    return True
        return False

    def _head(self, data: bytes) -> None:
        asker = self._asker
        if asker is None:  # an idle worker has nothing to say
            self.transport.abort()
            return
        data = self._buffer + data
        while data.startswith(b"HTTP/1.1 1") and b"\r\n\r\n" in data and not data.startswith(b"HTTP/1.1 101"):
            data = data.partition(b"\r\n\r\n")[2]  # 100 Continue and the like were not asked for
        self._buffer = data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > RESPONSE_HEAD_LIMIT_BYTES or not b"HTTP/1.".startswith(data[:7]):
                self._lost("the reply is not HTTP/1.1, or its head is too long")
            return
        try:
            self._feed(data)
            head = parse_response(data[:end])
        except (*BROKEN, ValueError) as error:
            self._lost(f"broken head: {error}")
            return
        if problem := self._problem():
            self._lost(problem)
            return
        self.pool.learn(data[:end], head)
        asker.on_head(head, self._body_of(head, data[end:]))
        self._buffer = b""
        if self.is_done and self._taker is not None:
            self._taker.on_complete()

    def _complete(self, data: bytes, taker: Taker) -> None:
        if problem := self._problem():  # none of this read is passed on: where the reply stops in it is not known
            self._lost(problem)
            return
        if says_aborted(data) or says_aborted(taker.latest):
            self._lost(ABORTED)
            return
        taker.write(self._ended(data))
        taker.on_complete()

    def _problem(self) -> str:
        if self._begun > 1:
            return "more than was asked for"
        return "a trailer with a reserved name" if self._has_bad_trailer else ""

    def _body_of(self, head: ResponseHead, rest: bytes) -> bytes:
        """Return what of the bytes behind a head is its body's."""
        if not head.has_body:
            return b""
        return rest[: head.content_length] if head.content_length >= 0 else self._ended(rest)

    def _ended(self, data: bytes) -> bytes:
        """Return the last part of a reply without the empty lines that llhttp allows behind one."""
        while self.is_done and data.endswith(b"\r\n\r\n\r\n"):
            data = data[:-2]
        return data

    def _lost(self, why: str, *, is_clean: bool = False) -> None:
        told = self._taker or self._asker
        self.abort()
        if told is not None:
            told.on_lost(why, is_clean=is_clean)
