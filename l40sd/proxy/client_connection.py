"""One client's connection: takes requests off the byte stream, one after the other, and answers or passes them on.

A request is read whole before a worker is chosen: its body names the model, and it may have to be sent twice. What a
client sends ahead (pipelining) waits its turn, up to a bound; then the socket is not read until the turn comes.
"""

import asyncio
import os
import re
import select
import socket
import struct
from math import inf
from typing import cast

from l40sd.proxy import pages as pages
from l40sd.proxy.admission import admit
from l40sd.proxy.bounds import FREE_BODY_BYTES, address_of
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.cors import preflight_fields
from l40sd.proxy.dialects import dialect_of, error_body
from l40sd.proxy.exchange import Exchange
from l40sd.proxy.exchange_handover import duplicate, export_exchange
from l40sd.proxy.handed import HandedConnection, HandedExchange
from l40sd.proxy.http1.cached_heads import CachedRequestHead, cached_request_head
from l40sd.proxy.http1.chunked import ChunkedBody
from l40sd.proxy.http1.heads import RequestHead, parse_request, plain_request
from l40sd.proxy.http1.request_body import CachedModelName
from l40sd.proxy.refused import Refused

AHEAD_LIMIT_BYTES = 65536
DISCARD_LIMIT_BYTES = 65536  # a refused request's body is read to its end up to this; beyond, the connection is closed
REQUESTS_PER_TURN = 16  # of one client that are answered here before the loop looks at others
LINGER_S = 2.0  # for a refused client to read why before its connection is reset
PARTING_S = 0.25  # for a request that is on its way on an idle connection, when nothing new shall come
OUR_REASONS = (500, 503)  # 501 and 505 are for what a client asks
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

bare_line_feed = re.compile(rb"(?<!\r)\n").search


class ClientConnections:
    """All that a proxy has; each enters and leaves by itself.

    Attributes:
        open: Every one of them.
        unread: Those that sent too far ahead to be read for now.
    """

    __slots__ = ("open", "unread")

    def __init__(self) -> None:
        self.open: set[ClientConnection] = set()
        self.unread: set[ClientConnection] = set()


class ClientConnection(asyncio.Protocol):
    """The protocol of one accepted connection."""

    __slots__ = (
        "_address",
        "_ahead_bytes",
        "_allowed",
        "_cached_head",
        "_cached_name",
        "_chunks",
        "_clients",
        "_context",
        "_head",
        "_held",
        "_is_reading",
        "_keep_alive",
        "_known_target",
        "_missing",
        "_parts",
        "_refused",
        "_rules",
        "_scanned",
        "_taken_bytes",
        "_target",
        "_timeout_s",
        "deadline_s",
        "exchange",
        "is_closing",
        "is_paused",
        "transport",
    )

    def __init__(self, context: ProxyContext, clients: ClientConnections) -> None:
        self._context = context
        self._clients = clients
        self.exchange: Exchange | None = None
        self.is_closing = False
        self.is_paused = False
        self._keep_alive = True
        self.deadline_s = inf
        self._timeout_s = inf
        self._held = b""
        self._is_reading = False
        self._address = ""  # that it is counted under
        self._taken_bytes = 0  # of the memory for bodies, for the present one,
        self._ahead_bytes = 0  # and for what was sent ahead
        self._cached_name = CachedModelName()
        self._cached_head: CachedRequestHead | None = None  # of a head that was admitted,
        self._known_target = b""  # for this target,
        self._rules: object = None  # under these rules
        self._begin_request()

    def _begin_request(self) -> None:
        self._head: RequestHead | None = None
        self._target = b""  # what to ask a worker for; empty: answered here
        self._allowed: tuple[bytes, ...] = ()  # what to answer to OPTIONS
        self._parts: list[bytes] = []
        self._missing = 0  # bytes of the body still to come
        self._chunks: ChunkedBody | None = None
        self._refused: Refused | None = None  # answered once the body is read, which is not kept
        self._scanned = 0
        self.release_memory()

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock for a first request, or send the connection away."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop has no common base class
        self.expect(self._context.config.client_header_timeout_s)
        context, count = self._context, len(self._clients.open)
        self._address = address_of(transport)
        refused = context.bounds.enter(self._address, count)
        if refused is not None:
            context.metrics.connection_refused()
            if count >= context.bounds.shares.clients + context.bounds.shares.refused:
                self.is_closing = True
                self.transport.abort()
                return
        self._clients.open.add(self)
        if refused is not None:
            self._answer_and_close(refused)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        if self.is_closing:
            return
        if (
            self.exchange is None
            and self._cached_head is not None
            and self._head is None
            and not self._held
            and not self.is_paused
            and self._pass_on_at_once(data)
        ):
            return
        self._held = self._held + data if self._held else data
        if self.exchange is None and not self.is_paused:
            self._proceed()
        else:
            self._mind_ahead()

    def _mind_ahead(self) -> None:
        """Read no further while more than a little was sent ahead of the answers."""
        if len(self._held) > AHEAD_LIMIT_BYTES and not self.is_closing and self not in self._clients.unread:
            self.transport.pause_reading()
            self._clients.unread.add(self)
            self._ahead_bytes = len(self._held)
            try:
                self._context.bounds.take_memory(self._ahead_bytes)
            except Refused:  # there is no place for an answer to it: that of the present request comes first
                self.reset()

    def _read_on(self) -> None:
        """Read a client again that had sent too far ahead."""
        self._clients.unread.discard(self)
        self._context.bounds.give_back_memory(self._ahead_bytes)
        self._ahead_bytes = 0

    def eof_received(self) -> None:
        """Take a half-closed connection for a client that has gone: that is what it nearly always is."""
        self._gone()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self._clients.open.discard(self)
        self._read_on()
        self._context.bounds.leave(self._address)
        self._address = ""
        self._gone()
        self.release_memory()

    def pause_writing(self) -> None:
        """Stop reading the worker: the client is slow."""
        self.is_paused = True
        if self.exchange is not None:
            self.exchange.stage.pause(is_paused=True)

    def resume_writing(self) -> None:
        """Go on reading the worker, or answering what the client has sent ahead."""
        self.is_paused = False
        if self.exchange is not None:
            self.exchange.stage.pause(is_paused=False)
        elif self._held:
            self._context.loop.call_soon(self._proceed)

    # From the exchange and the sweeper

    def expect(self, timeout_s: float | None) -> None:
        """Set the deadline of what comes next; None: somebody else watches over it."""
        self._timeout_s = inf if timeout_s is None else timeout_s + self._context.tick_s
        self.deadline_s = self._context.now_s + self._timeout_s

    def is_late(self, now_s: float) -> bool:
        """Return whether a deadline has passed; where a reply has moved, the present one starts anew."""
        exchange = self.exchange
        if exchange is not None and exchange.stage.has_moved():
            self.deadline_s = now_s + self._timeout_s
            return False
        return self.deadline_s <= now_s

    def expired(self) -> None:
        """Act on a deadline that has passed."""
        if self.is_closing:
            self.transport.abort()
        elif self.exchange is not None:
            self.exchange.stage.expired()
        elif self.is_paused:  # it reads nothing, so it would not read why either
            self.transport.abort()
        elif self._head is not None:
            self._answer_and_close(Refused(408, "request_timeout", "the request's body stopped coming"))
        elif self._held:
            self._answer_and_close(Refused(408, "request_timeout", "the request's head took too long"))
        else:
            self.close()

    def broke(self, error: Exception) -> None:
        """End what is under way, with an answer where one can be given: our own code failed on it."""
        exchange = self.exchange
        if exchange is not None:
            exchange.broke(error)
            return
        self._context.failures.note_own("", error, self._context.now_s)
        if self.is_closing:
            self.transport.abort()
        else:
            what = f"l40sd failed on this request: {type(error).__name__}; its log has the rest"
            self._answer_and_close(Refused(500, "internal_error", what))

    def look_for_hangup(self) -> None:
        """Notice that a client has gone whose socket is not being read: no event tells of it."""
        raw = self.transport.get_extra_info("socket")
        if raw is None or raw.fileno() < 0:
            return
        poll = select.poll()
        poll.register(raw.fileno(), select.POLLRDHUP)
        if poll.poll(0):
            self._gone()
            self.transport.abort()

    def is_idle(self) -> bool:
        """Whether the connection is between two requests."""
        return self.exchange is None and self._head is None and not self._held and not self.is_closing

    def part(self) -> None:
        """Close an idle connection soon: a client that has just been told it may go on is not cut off in doing so."""
        self.deadline_s = min(self.deadline_s, self._context.now_s + PARTING_S)

    def part_if_idle(self) -> None:
        """Close an idle connection a moment after it was first seen so."""
        if self.is_idle():
            self.part()
            if self.deadline_s <= self._context.now_s:
                self.close()

    def close_after_reply(self) -> None:
        """Promise no further request: the end of this reply is the connection's."""
        self._keep_alive = False

    def will_keep_alive(self) -> bool:
        """Decide, for the head of a reply, whether another request may follow; it is a promise."""
        self._keep_alive = self._keep_alive and not self._context.is_stopping
        return self._keep_alive

    def finished(self) -> None:
        """Go on to the next request: the answer to this one is written."""
        self.exchange = None
        if not self._keep_alive:
            self.close()
            return
        if self._head is not None:
            self._begin_request()
        self.expect(self._context.config.client_idle_timeout_s)
        if self._context.is_stopping:
            self.part()
        if self._held and not self._is_reading:  # otherwise the caller is _proceed, which goes on itself
            self._context.loop.call_soon(self._proceed)

    def refuse(self, refused: Refused, head: RequestHead | None, *, request_id: bytes = b"") -> None:
        """Answer the present request with an error and go on to the next."""
        fields = pages.error_fields(refused)
        if request_id:
            fields += b"x-request-id: %b\r\n" % request_id
        self._answer(head, refused.status, self._error_body(refused, head), fields=fields)

    def close(self) -> None:
        """Close once everything is written."""
        self.exchange = None
        self.is_closing = True
        self.expect(LINGER_S)  # a client that reads nothing is cut off then
        self.transport.close()

    def reset(self) -> None:
        """Close so that the client sees an error, even where a reply's end is the connection's."""
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()
        self.is_closing = True
        raw = self.transport.get_extra_info("socket")
        if raw is not None and raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def reset_unanswered(self, exchange: object) -> None:
        """Reset if it still waits for the answer of this exchange, which has ended and gives none."""
        if self.exchange is exchange:
            self.reset()

    def release_memory(self) -> None:
        """Count the body no more: it is gone, or will be in this turn of the loop."""
        if self._taken_bytes:
            self._context.bounds.give_back_memory(self._taken_bytes)
            self._taken_bytes = 0

    # From one daemon to the next

    def is_settled(self) -> bool:
        """Whether it is at a point where another daemon could go on with it: nothing unsent, between two chunks."""
        if self.transport.get_write_buffer_size():
            return False
        return self.exchange is None or self.exchange.stage.is_settled()

    def come_to_rest(self) -> None:
        """Send no more of a reply than to the next such point."""
        if self.exchange is not None:
            self.exchange.stage.come_to_rest()

    def hand_over(self) -> HandedConnection | None:
        """End here, for another daemon to go on; None, and nothing has ended, where that cannot be."""
        descriptor = duplicate(self.transport)
        try:
            found = self._describe()
        except BaseException:
            os.close(descriptor)
            raise
        if found is None:
            os.close(descriptor)
            return None
        exchange, held = found
        handed = HandedConnection(client=descriptor, held=held, is_parting=self.is_closing, exchange=exchange)
        self.exchange = None
        self.is_closing = True
        self._held = b""
        self._clients.open.discard(self)
        self.transport.abort()  # no more than a close of this descriptor
        return handed

    def _describe(self) -> tuple[HandedExchange | None, bytes] | None:
        """Return what a worker has, and what is to be read again; None where nobody could go on."""
        if self.is_closing:
            return None, b""
        if self.exchange is None:
            return None, (b"" if self._head is None else self._begun_request(self._head)) + self._held
        match export_exchange(self.exchange, keep_alive=self._keep_alive):
            case None:
                return None
            case bytes(again):
                return None, again + self._held
            case handed:
                return handed, self._held

    def carry_on(self, exchange: Exchange) -> None:
        """Have what an earlier daemon asked a worker for."""
        self.exchange = exchange

    def take_up(self, transport: asyncio.Transport, handed: HandedConnection) -> None:
        """Go on with a connection that an earlier daemon accepted; its exchange is set by whoever has both ends."""
        self.transport = transport
        self.is_closing = handed.is_parting
        self._clients.open.add(self)
        self._address = address_of(transport)
        self._context.bounds.enter(self._address, 0)
        self.expect(LINGER_S if handed.is_parting else self._context.config.client_idle_timeout_s)
        if handed.is_parting:
            return
        if handed.exchange is None:
            if handed.held:
                self.data_received(handed.held)
            return
        self._keep_alive = handed.exchange.keep_alive
        self._taken_bytes = len(handed.exchange.body)
        self._context.bounds.hold_memory(self._taken_bytes)
        self._held = handed.held
        self._mind_ahead()

    def _begun_request(self, head: RequestHead) -> bytes:
        """Return what was read of a request, as another connection could read it."""
        if self._chunks is not None:
            return plain_request(head) + self._chunks.so_far()
        body = b"".join(self._parts)
        return plain_request(head, len(body) + self._missing) + body

    # Reading a request

    def _proceed(self) -> None:
        """Take the next requests off what was read, as far as they go: some now, the rest when others had their turn.

        A client that does not read its answers gets no further ones.
        """
        if self._is_reading or not self._is_free():
            return
        if self in self._clients.unread:
            self._read_on()
            self.transport.resume_reading()
        self._is_reading = True
        try:
            for _ in range(REQUESTS_PER_TURN):
                if self._head is None and not self._read_head():
                    break
                if not self._read_body():
                    break
                self._dispatch()
                if not self._is_free():
                    break
            else:
                self._context.loop.call_soon(self._proceed)
                self._mind_ahead()
        except Refused as refused:
            self._answer_and_close(refused)
        except Exception as error:  # noqa: BLE001 - the loop would only log it and close without a word
            self.broke(error)
        finally:
            self._is_reading = False
        if not self._is_free():
            self._mind_ahead()

    def _is_free(self) -> bool:
        """Whether the next request may be looked at."""
        return self.exchange is None and not self.is_closing and not self.is_paused

    def _read_head(self) -> bool:
        held = self._held
        if held.startswith(b"\r\n"):
            held = self._held = held.lstrip(b"\r\n")  # an empty line before a request is harmless (RFC 9112, 2.2)
            self._scanned = 0
        end = held.find(b"\r\n\r\n", self._scanned) + 4
        limit = self._context.config.head_limit_bytes
        if end < 4 or end > limit:
            if len(held) > limit:
                raise Refused(431, "head_too_large", f"the request's head is larger than {limit} bytes")
            if bare_line_feed(held, self._scanned):
                raise Refused(400, "bad_request", "lines end in CR LF")
            if not self._scanned and held:
                self.expect(self._context.config.client_header_timeout_s)
            self._scanned = max(0, len(held) - 3)
            return False
        if self._cached_head is not None and self._known_end(held) == end:
            head = self._head = self._cached_head.request
            self._target = self._known_target
            self._missing = head.content_length
        else:
            head = parse_request(held[:end])
            self._take_head(held[:end], head)
        self._held = held[end:]
        if head.expects_continue and not self._held:
            self.transport.write(CONTINUE)
        self.expect(self._context.config.client_body_timeout_s)
        return True

    def _known_end(self, held: bytes) -> int:
        """Return where the head ends if it is one that was parsed and admitted on this connection before, else 0."""
        template = self._cached_head
        if template is None or self._rules is not self._context.rules:
            return 0
        end = template.end_in(held)
        return end if template.request.content_length <= self._context.config.body_limit_bytes else 0

    def _pass_on_at_once(self, data: bytes) -> bool:
        """Pass on what is exactly one request with a known head; return whether it was: most are, it saves 2 us."""
        end = self._known_end(data)
        template = self._cached_head
        size = len(data) - end
        if not end or template is None or size != template.request.content_length or size > FREE_BODY_BYTES:
            return False
        self._pass_on(template.request, self._known_target, data, end)
        return True

    def _take_head(self, raw: bytes, head: RequestHead) -> None:
        self._head = head
        self._keep_alive = head.keep_alive
        config = self._context.config
        try:
            self._target, self._allowed = admit(
                head, self._context.has_key, self._context.cors, config.body_limit_bytes
            )
        except Refused as refused:
            if head.is_chunked or head.content_length > DISCARD_LIMIT_BYTES or head.expects_continue:
                raise
            self._refused = refused
        if head.is_chunked:
            self._chunks = ChunkedBody(config.body_limit_bytes)
        else:
            self._missing = max(0, head.content_length)
        self._cached_head = cached_request_head(head, raw) if self._target else None
        self._known_target, self._rules = self._target, self._context.rules

    def _read_body(self) -> bool:
        """Take the body off what was read; return whether it is whole."""
        if self._chunks is not None:
            rest = self._chunks.feed(self._held) if self._held else None
            self._held = rest or b""
            self._take_memory(len(self._chunks.content))
            if rest is None:
                self.expect(self._context.config.client_body_timeout_s)
            else:
                self._parts = [bytes(self._chunks.content)]
                self._chunks = None
            return rest is not None
        if self._missing:
            part = self._held[: self._missing]
            self._held = self._held[len(part) :]
            self._missing -= len(part)
            if self._refused is None:
                self._parts.append(part)
                self._take_memory(self._head.content_length - self._missing if self._head is not None else 0)
            if self._missing:
                self.expect(self._context.config.client_body_timeout_s)
        return not self._missing

    def _take_memory(self, held_bytes: int) -> None:
        """Count what is held of the present body.

        Raises:
            Refused: There is none left for it.
        """
        more = held_bytes - self._taken_bytes
        if held_bytes > FREE_BODY_BYTES and more > 0:
            self._taken_bytes += more
            self._context.bounds.take_memory(more)

    # Answering it

    def _dispatch(self) -> None:
        """Answer the request that was read, or pass it on."""
        head = self._head
        assert head is not None
        if self._refused is not None:
            self._count_and_refuse(self._refused, head)
        elif self._allowed:
            fields = b"allow: %b\r\n" % b", ".join(self._allowed)
            if self._context.cors is not None and head.is_preflight:
                fields += preflight_fields(self._allowed, head.asked_fields)
            self._answer(head, 204, b"", fields=fields)
        elif self._target:
            parts = self._parts
            self._parts = []
            self._pass_on(head, self._target, parts[0] if len(parts) == 1 else b"".join(parts), 0)
        else:
            self._show(head)

    def _pass_on(self, head: RequestHead, target: bytes, body: bytes, body_at: int) -> None:
        try:
            name = self._cached_name.name(body, head.content_type, body_at)
        except Refused as refused:
            self._count_and_refuse(refused, head)
            return
        exchange = self.exchange = Exchange(self._context, self, head, target, body, body_at, name)
        try:
            exchange.start()
        except Exception as error:  # noqa: BLE001 - the loop would only log it, and the request never end
            exchange.broke(error)

    def _show(self, head: RequestHead) -> None:
        try:
            page = pages.show(
                head.target, self._context.routes, is_stopping=self._context.is_stopping, metrics=self._metrics_text
            )
        except Refused as refused:
            self._count_and_refuse(refused, head)
            return
        self._answer(head, page.status, page.body, content_type=page.content_type)

    def _metrics_text(self) -> str:
        return self._context.metrics.text(self._context.routes, len(self._clients.open))

    def _count_and_refuse(self, refused: Refused, head: RequestHead) -> None:
        self._count(refused, head)
        self.refuse(refused, head)

    def _count(self, refused: Refused, head: RequestHead | None) -> None:
        """Count a request that is refused before a worker was looked for; for our reasons, it is told of as well."""
        context = self._context
        context.metrics.answered("", refused.status)
        if refused.status in OUR_REASONS:
            request = head.request_id.decode() if head is not None else ""
            context.failures.note(
                refused.message, context.now_s, lambda: {"request": request, "status": refused.status}
            )

    def _answer(
        self,
        head: RequestHead | None,
        status: int,
        body: bytes,
        *,
        content_type: bytes = pages.JSON,
        fields: bytes = b"",
    ) -> None:
        head_only = head is not None and head.method == b"HEAD"
        fields += self._cors_fields(head)
        close = not self.will_keep_alive()
        self.transport.write(
            pages.answer(status, body, content_type=content_type, fields=fields, close=close, head_only=head_only)
        )
        self.finished()

    def _answer_and_close(self, refused: Refused) -> None:
        """Refuse a connection whose further bytes have no meaning; let the client read why before it closes."""
        self._count(refused, self._head)
        fields = pages.error_fields(refused) + self._cors_fields(self._head)
        body = self._error_body(refused, self._head)
        self.transport.write(pages.answer(refused.status, body, fields=fields, close=True))
        self.is_closing = True
        self._held = b""
        self._parts = []
        self._chunks = None
        self.release_memory()
        self.expect(LINGER_S)
        if self.transport.can_write_eof():
            self.transport.write_eof()  # closing now, with bytes unread, would reset the answer away

    def _error_body(self, refused: Refused, head: RequestHead | None) -> bytes:
        """Return an error in the shape of the path that was asked for, as far as one can be read."""
        target = head.target if head is not None else self._held.partition(b" ")[2].partition(b" ")[0]
        return error_body(dialect_of(target), refused)

    def _cors_fields(self, head: RequestHead | None) -> bytes:
        """Return what every reply says of the web pages that may read it, each as ``name: value CR LF``."""
        cors = self._context.cors
        fields = b"" if cors is None or head is None else cors.reply_fields(head.origin)
        return fields[2:] + b"\r\n" if fields else b""

    def _gone(self) -> None:
        self.is_closing = True
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()
        self.transport.close()
