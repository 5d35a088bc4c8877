"""One client's connection: takes requests off the byte stream, one after the other, and answers or passes them on.

A request is read whole before a worker is chosen: its body names the model, and it may have to be sent twice. What a
client sends ahead (pipelining) waits its turn, up to a bound; then the socket is not read until the turn comes.
"""

import asyncio

from l40sd.proxy import sockets
from l40sd.proxy.answers import Answer, count_refused, error_answer, format_answer, own_answer
from l40sd.proxy.client_socket import ClientSocket
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.exchange import Exchange
from l40sd.proxy.http1.heads import RequestHead
from l40sd.proxy.http1.request_body import CachedModelName
from l40sd.proxy.refused import Refused
from l40sd.proxy.request_reader import Progress, RequestReader

AHEAD_LIMIT_BYTES = 65536
REQUESTS_PER_TURN = 16  # of one client that are answered here before the loop looks at others
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


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


class ClientConnection(ClientSocket):
    """The protocol of one accepted connection.

    Attributes:
        exchange: The request that a worker is to answer; None: none.
        reader: What was read and not passed on.
    """

    __slots__ = ("_cached_name", "_clients", "_is_reading", "exchange", "reader")

    def __init__(self, context: ProxyContext, clients: ClientConnections) -> None:
        super().__init__(context)
        self._clients = clients
        self.exchange: Exchange | None = None
        self._is_reading = False
        self._cached_name = CachedModelName()
        self.reader = RequestReader(context)

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock for a first request, or send the connection away."""
        self.expect(self._context.config.client_header_timeout_s)
        count, shares = len(self._clients.open), self._context.bounds.shares
        refused = self.take_place(transport, count)
        if refused is not None:
            self._context.metrics.connection_refused()
            if count >= shares.clients + shares.refused:
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
        reader = self.reader
        if self.exchange is not None or self.is_paused:
            reader.add(data)
            self._mind_ahead()
            return
        end = reader.end_of_known(data)
        if end and reader.cached_head is not None:
            self._pass_on(reader.cached_head.request, reader.cached_target, data, end)
            return
        reader.add(data)
        self._proceed()

    def eof_received(self) -> None:
        """Take a half-closed connection for a client that has gone: that is what it nearly always is."""
        self._gone()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self._clients.open.discard(self)
        self._read_on()
        self.leave_place()
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
        elif self.reader.held:
            self._context.loop.call_soon(self._proceed)

    def _gone(self) -> None:
        self.is_closing = True
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()
        self.transport.close()

    # What is sent ahead

    def _mind_ahead(self) -> None:
        """Read no further while more than a little was sent ahead of the answers."""
        held_bytes = len(self.reader.held)
        if held_bytes > AHEAD_LIMIT_BYTES and not self.is_closing and self not in self._clients.unread:
            self.transport.pause_reading()
            self._clients.unread.add(self)
            try:
                self.take_memory_ahead(held_bytes)
            except Refused:  # there is no place for an answer to it: that of the present request comes first
                self.reset()

    def _read_on(self) -> None:
        """Count no more of what was sent ahead."""
        self._clients.unread.discard(self)
        self.release_memory_ahead()

    def look_for_hangup(self) -> None:
        """Notice that a client has gone whose socket is not being read."""
        if sockets.has_hung_up(self.transport):
            self._gone()
            self.transport.abort()

    # Deadlines

    def is_late(self, now_s: float) -> bool:
        """Return whether a deadline has passed; where a reply has moved, the present one starts anew."""
        exchange = self.exchange
        if exchange is not None and exchange.stage.has_moved():
            self.moved()
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
        elif self.reader.head is not None:
            self._answer_and_close(Refused(408, "request_timeout", "the request's body stopped coming"))
        elif self.reader.held:
            self._answer_and_close(Refused(408, "request_timeout", "the request's head took too long"))
        else:
            self.close()

    def part_if_idle(self) -> None:
        """Close an idle connection a moment after it was first seen so."""
        if self.exchange is None and self.reader.is_idle() and not self.is_closing:
            self.part()
            if self.deadline_s <= self._context.now_s:
                self.close()

    # From the exchange

    def release_memory(self) -> None:
        """Count the request's body no more: it is gone, or will be in this turn of the loop."""
        self.reader.release_memory()

    def finished(self) -> None:
        """Go on to the next request: the answer to this one is written."""
        self.exchange = None
        if not self.keep_alive:
            self.close()
            return
        reader = self.reader
        if reader.head is not None:
            reader.begin()
        self.expect(self._context.config.client_idle_timeout_s)
        if self._context.is_stopping:
            self.part()
        if reader.held and not self._is_reading:  # otherwise the caller is _proceed, which goes on itself
            self._context.loop.call_soon(self._proceed)

    def refuse(self, refused: Refused, head: RequestHead | None, *, request_id: bytes = b"") -> None:
        """Answer the present request with an error and go on to the next."""
        target = head.target if head is not None else self.reader.target_so_far()
        self._answer(head, error_answer(refused, target, request_id=request_id))

    def close(self) -> None:
        """Close once everything is written."""
        self.exchange = None
        self.close_written()

    def reset(self) -> None:
        """Close so that the client sees an error, even where a reply's end is the connection's."""
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()
        self.close_reset()

    def reset_unanswered(self, exchange: object) -> None:
        """Reset if it still waits for the answer of this exchange, which has ended and gives none."""
        if self.exchange is exchange:
            self.reset()

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

    # One request after the other

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
                head = self._read_request()
                if head is None:
                    break
                self._dispatch(head)
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

    def _read_request(self) -> RequestHead | None:
        """Read on; return a request's head where all of the request is there."""
        head = self.reader.head or self._read_head()
        if head is None or self.reader.read_body():
            return head
        self.expect(self._context.config.client_body_timeout_s)
        return None

    def _read_head(self) -> RequestHead | None:
        found = self.reader.read_head()
        if isinstance(found, RequestHead):
            self.keep_alive = found.keep_alive
            if found.expects_continue and not self.reader.held:
                self.transport.write(CONTINUE)
            self.expect(self._context.config.client_body_timeout_s)
            return found
        if found is Progress.BEGUN:
            self.expect(self._context.config.client_header_timeout_s)
        return None

    def _dispatch(self, head: RequestHead) -> None:
        """Answer the request that was read, or pass it on."""
        reader = self.reader
        if reader.refused is not None:
            self._count_and_refuse(reader.refused, head)
            return
        if reader.target and not reader.allowed:
            self._pass_on(head, reader.target, reader.take_body(), 0)
            return
        try:
            answer = own_answer(self._context, head, reader.allowed, len(self._clients.open))
        except Refused as refused:
            self._count_and_refuse(refused, head)
            return
        self._answer(head, answer)

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

    def _count_and_refuse(self, refused: Refused, head: RequestHead) -> None:
        count_refused(self._context, refused, head)
        self.refuse(refused, head)

    def _answer(self, head: RequestHead | None, answer: Answer) -> None:
        close, head_only = not self.will_keep_alive(), head is not None and head.method == b"HEAD"
        self.transport.write(format_answer(answer, head, self._context.cors, close=close, head_only=head_only))
        self.finished()

    def _answer_and_close(self, refused: Refused) -> None:
        """Refuse a connection whose further bytes have no meaning; let the client read why before it closes."""
        reader = self.reader
        count_refused(self._context, refused, reader.head)
        answer = error_answer(refused, reader.target_so_far())
        self.transport.write(format_answer(answer, reader.head, self._context.cors, close=True))
        reader.discard()
        self.close_read()

    # From one daemon to the next

    def leave(self) -> None:
        """Be no connection any more, and tell nobody: it goes on elsewhere."""
        self.exchange = None
        self.is_closing = True
        self.reader.discard()
        self._clients.open.discard(self)
        self.transport.abort()  # no more than a close of this descriptor

    def import_connection(self, transport: asyncio.Transport, *, is_parting: bool) -> None:
        """Be a connection that an earlier daemon accepted; as for ``import_socket``."""
        self._clients.open.add(self)
        self.import_socket(transport, is_parting=is_parting)

    def import_request(self, *, keep_alive: bool, body_bytes: int, held: bytes) -> None:
        """Have a request under way; its exchange follows.

        Args:
            keep_alive: Another may follow.
            body_bytes: That are kept of it.
            held: What was sent ahead.
        """
        self.keep_alive = keep_alive
        self.reader.hold_memory(body_bytes)
        self.reader.add(held)
        self._mind_ahead()

    def import_exchange(self, exchange: Exchange) -> None:
        """Have the answer of this exchange next."""
        self.exchange = exchange
