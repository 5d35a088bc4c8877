"""One request: from its model's name to the last byte of a worker's reply.

    start --> WAITING --turn--> CONNECTING --> ASKED --head--> REPLYING --> ended
       \\______________________/    |            |  \\--500--> HELD --/
                ^------ another worker ---------/-------------/   before the first byte of a reply only (invariant 7)

What is tried again, and where, is proxy/retry_policy.py's to say. Once a reply has begun it is never repeated: a stream
that breaks ends in an error event, wherever it broke, and its connection is closed without the last chunk, so that
every client can tell (``proxy_breaks``); anything else is cut.

vLLM ends what it aborts as if it were whole, with ``finish_reason: "abort"`` and ``[DONE]``. Before l40sd tells a
worker to end it takes its requests from it (``given_up``), so none of that reaches a client. Where somebody else ended
it, a whole reply that says so is asked for elsewhere, and a stream that says so in its last two reads is cut.

llama.cpp goes on decoding an unstreamed request whose client left while it streams to another: closing the
connection is all that a proxy can do about it.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine
from enum import Enum

import structlog

from l40sd.model import ModelName
from l40sd.proxy.breaks import end_of_stream, ended_whole
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.handed import HandedExchange, HandedReply
from l40sd.proxy.http1.cached_heads import CachedReplyHead
from l40sd.proxy.http1.chunked import ends_between_chunks
from l40sd.proxy.http1.heads import (
    RequestHead,
    ResponseHead,
    format_request,
    parse_request,
    plain_request,
)
from l40sd.proxy.http1.request_body import replace_model
from l40sd.proxy.interfaces import Client
from l40sd.proxy.metrics import CLIENT_GONE
from l40sd.proxy.pages import no_worker, refused_as_poison, unknown_model
from l40sd.proxy.poison_table import End
from l40sd.proxy.refused import Refused
from l40sd.proxy.retry_policy import DEATHS_LIMIT, TABLE, Next, Seen, decide
from l40sd.proxy.worker_connection import (
    ABORTED,
    ConnectionPool,
    Countdown,
    Tail,
    Unchunk,
    WorkerConnection,
    says_aborted,
)
from l40sd.routing.routes import FailureKind, Lease, Route, Waiter

STALE_WITHIN_S = 1.0  # a kept connection that closes later than this was closed over the request itself
LOGGED_LIMIT = 200  # characters of what a client chose
JOIN_BELOW_BYTES = 16384  # a head and a smaller body are joined: one copy is cheaper than a second buffer
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = structlog.get_logger()

NO_DESCRIPTOR = "no file descriptor is left for a connection to a worker"
CLOSING = "this host is being stopped"
NOTHING_COMES = "none is on its way"
FAILURES = {
    Seen.CONNECT: FailureKind.CONNECT,
    Seen.CLOSED: FailureKind.CLOSED,
    Seen.VANISHED: FailureKind.CONNECT,
    Seen.GARBLED: FailureKind.CLOSED,
    Seen.UNAVAILABLE: FailureKind.STATUS,
    Seen.ENDING: FailureKind.STATUS,
    Seen.SILENT: FailureKind.FIRST_BYTE,
}
"""What a worker is blamed for, where it is."""


def duplicate(transport: asyncio.Transport) -> int:
    """Return another descriptor of a connection, which stays open when the transport closes its own."""
    return os.dup(transport.get_extra_info("socket").fileno())


class Phase(Enum):
    """Where a request is."""

    WAITING = 1
    CONNECTING = 2
    ASKED = 3
    HELD = 4
    REPLYING = 5
    ENDED = 6


class Exchange:
    """One request under way. Ends exactly once, and then holds nothing."""

    __slots__ = (
        "_asked_at_s",
        "_barred",
        "_body",
        "_body_at",
        "_client",
        "_context",
        "_countdown",
        "_dial",
        "_died",
        "_earlier",
        "_fingerprint",
        "_first_byte_at_s",
        "_head",
        "_lease",
        "_model",
        "_name",
        "_phase",
        "_reply",
        "_request_id",
        "_started_at_s",
        "_swept",
        "_tail",
        "_target",
        "_tried",
        "_tries",
        "_tries_left",
        "_upstream",
        "_waiter",
        "_was_stale",
        "latest",
    )

    def __init__(
        self,
        context: ProxyContext,
        client: Client,
        head: RequestHead,
        target: bytes,
        body: bytes,
        body_at: int,
        name: str,
    ) -> None:
        self._context = context
        self._client = client
        self._head = head
        self._target = target
        self._body = body
        self._body_at = body_at  # what stands before it was read with it
        self._name = name  # of the model, as the body has it
        self._request_id = head.request_id or context.make_request_id()
        self._started_at_s = context.loop.time()
        self._first_byte_at_s = 0.0
        self._tries = 0  # workers asked, or connected to in vain
        self._tries_left = context.config.retries
        self._tried: tuple[int, ...] = ()  # serials of routes that failed
        self._barred: tuple[int, ...] = ()  # those of them that it cannot be tried on again
        self._died: tuple[str, ...] = ()  # workers that ended with it and had not answered a byte of it
        self._earlier: End | None = None  # the latest of their ends
        self._fingerprint = b""  # once one has
        self._was_stale = False  # the present worker closed a kept connection over it
        self._model = ModelName("")
        self._lease: Lease | None = None
        self._waiter: Waiter | None = None
        self._dial: asyncio.Task[None] | None = None
        self._upstream: WorkerConnection | None = None
        self._reply: ResponseHead | None = None
        self._countdown: Countdown | None = None  # of a reply with a length, while it comes
        self._tail: Tail | None = None
        self.latest = b""
        self._swept: bytes | None = b""  # the part that the sweep has seen

    # The way to a worker

    def start(self) -> None:
        """Look for a worker; everything further happens through callbacks."""
        routes = self._context.routes
        model = routes.resolve(self._name)
        if model is None:
            self._refuse(unknown_model(routes, self._name))
            return
        self._model = model
        if self._context.poison.lengths and self._is_refused_as_poison():
            return
        lease = routes.take(model)
        if lease is not None:
            self._use(lease)
        else:
            self._look_further()

    def _look_further(self) -> None:
        """Take a worker that has not had the request, else one that could be connected to, else wait for one."""
        routes = self._context.routes
        lease = routes.take(self._model, self._tried)
        if lease is None and len(self._tried) > len(self._barred):
            lease = routes.take(self._model, self._barred)
        if lease is not None:
            self._use(lease)
            return
        if self._context.is_closing:
            self._refuse(no_worker(routes, self._model, CLOSING))
            return
        if not routes.may_wait(self._model):
            self._refuse(no_worker(routes, self._model, NOTHING_COMES))
            return
        self._phase = Phase.WAITING
        self._client.expect(None)  # the line has its own deadline
        deadline_s = self._context.now_s + self._context.config.queue_timeout_s
        self._waiter = routes.wait(self._model, self._on_turn, deadline_s=deadline_s, tried=self._barred)
        if self._waiter is None:
            self._refuse(no_worker(routes, self._model, "its waiting line is full"))

    def _is_refused_as_poison(self) -> bool:
        """Refuse a request that workers died of; one that may be innocent goes on, and is known to have been aboard."""
        poison, body = self._context.poison, memoryview(self._body)[self._body_at :]
        if len(body) not in poison.lengths:
            return False
        fingerprint = poison.fingerprint(self._target, body)
        entry = poison.known(fingerprint)
        if entry is None:
            return False
        now_s = self._context.now_s
        self._fingerprint, self._died, self._earlier = fingerprint, entry.workers(now_s), entry.ends[-1]
        if entry.is_poison(now_s):
            self._refuse(refused_as_poison(self._died, entry.until_s - now_s))
            return True
        return False

    def _on_turn(self, lease: Lease | None) -> None:
        try:
            self._turn(lease)
        except Exception as error:  # noqa: BLE001 - whoever gives turns is another request or a worker: not theirs
            self.broke(error)

    def _turn(self, lease: Lease | None) -> None:
        self._waiter = None
        if lease is not None:
            self._use(lease)
        elif self._context.routes.resolve(self._name) is None:
            self._refuse(unknown_model(self._context.routes, self._name))
        else:
            self._refuse(no_worker(self._context.routes, self._model, self._why_no_turn()))

    def _why_no_turn(self) -> str:
        if self._context.is_closing:
            return CLOSING
        if not self._context.routes.may_wait(self._model):
            return NOTHING_COMES
        return f"none was free within {self._context.config.queue_timeout_s:g} s"

    def _use(self, lease: Lease) -> None:
        self._lease = lease
        self._tries += 1
        self._was_stale = False
        context = self._context
        pool = context.pool(lease.route)
        # A further try takes a new connection: one that may be stale would cost it a try that it may not have.
        upstream = None if self._tried else pool.take_idle(context.now_s, context.config.upstream_idle_timeout_s)
        if upstream is not None:
            self._ask(upstream)
        else:
            self._connect(pool)

    def _connect(self, pool: ConnectionPool) -> None:
        self._phase = Phase.CONNECTING
        if not self._context.make_room_for_upstream():
            self._leave(Seen.OVERLOADED, NO_DESCRIPTOR)
            return
        self._client.expect(self._context.config.connect_timeout_s)
        self._start_task(self._dialling(pool))

    def _start_task(self, task: Coroutine[object, object, None]) -> None:
        """Run a task of this request's; at most one at a time, and it ends with the request."""
        self._dial = self._context.start_task(task)

    async def _dialling(self, pool: ConnectionPool) -> None:
        try:
            await self._dial_and_ask(pool)
        except Exception as error:  # noqa: BLE001 - a task that ends without a word would hold lease and client
            self.broke(error)

    async def _dial_and_ask(self, pool: ConnectionPool) -> None:
        backend = pool.route.backend
        try:
            _, upstream = await self._context.loop.create_connection(
                lambda: WorkerConnection(pool), backend.host, backend.port
            )
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be encoded
            self._dial = None
            if isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS:
                self._leave(Seen.OVERLOADED, NO_DESCRIPTOR)
            else:
                self._leave_unconnected(f"no connection: {error}")
            return
        self._dial = None
        self._ask(upstream)

    def _ask(self, upstream: WorkerConnection) -> None:
        self._phase = Phase.ASKED
        self._upstream = upstream
        self._asked_at_s = self._context.now_s
        self._client.expect(self._context.config.first_byte_timeout_s)
        pool = upstream.pool
        body: bytes | memoryview
        if pool.served_name != self._name:
            try:
                body = replace_model(self._body, self._head.content_type, pool.served_name, self._body_at)
            except Refused as refused:
                self._refuse(refused)
                return
        elif len(self._body) < JOIN_BELOW_BYTES:
            body = self._body[self._body_at :]
        else:
            body = memoryview(self._body)[self._body_at :]
        if isinstance(body, bytes) and len(body) < JOIN_BELOW_BYTES:
            upstream.ask(self, format_request(self._head, self._target, self._request_id, len(body), pool.fields, body))
        else:
            head = format_request(self._head, self._target, self._request_id, len(body), pool.fields)
            upstream.ask(self, head, body)

    def _leave_unconnected(self, why: str) -> None:
        self._leave(Seen.VANISHED if self._was_stale else Seen.CONNECT, why)

    def _leave(self, seen: Seen, why: str) -> bool:
        """Go on after a failed try as the policy says; return False where the worker's own reply is to be passed on."""
        assert self._lease is not None
        lease, rule = self._lease, TABLE[seen]
        route = lease.route
        if rule.is_blamed:
            lease.failed(FAILURES[seen])
        if rule.is_death:
            self._note_death(route)
        following = decide(seen, tries_left=self._tries_left, deaths=len(self._died))
        match following:
            case Next.SAME:
                self._was_stale = True
                self._tries += 1
                self._tries_left = max(0, self._tries_left - 1)  # it may have been read: it counts where it can
                self._connect(self._context.pool(route))
                return True
            case Next.REPLY:
                return False
            case Next.OTHER_OR_REPLY:
                return self._take_another(lease)
            case Next.OTHER_OR_WAIT | Next.OTHER_OR_SAME:
                self._tried = (*self._tried, route.serial)
                if following is Next.OTHER_OR_WAIT:
                    self._barred = (*self._barred, route.serial)
                self._let_go()
                self._count_retry(lease)
                self._look_further()
            case Next.END:
                self._tried = (*self._tried, route.serial)
                self._refuse(self._last_words(seen, route, why))
        return True

    def _take_another(self, lease: Lease) -> bool:
        """Take the request to a worker that has not had it, if one is free now; return whether there was one."""
        tried = (*self._tried, lease.route.serial)
        another = self._context.routes.take(self._model, tried)
        if another is None:
            return False
        self._tried = tried
        self._let_go()
        self._count_retry(lease)
        self._use(another)
        return True

    def _last_words(self, seen: Seen, route: Route, why: str) -> Refused:
        """Return the answer to a request that is not tried any more."""
        worker = route.backend.worker
        if seen is Seen.OVERLOADED:
            return Refused(503, "overloaded", why)
        if seen is Seen.SILENT:
            return Refused(504, "worker_timeout", f"{worker} {why}; request {self._request_id.decode()}")
        if TABLE[seen].is_death and len(self._died) >= DEATHS_LIMIT:
            who = ", then ".join(self._died)
            what = f"{who} ended with this request and without a byte of an answer; it is not tried again"
            return Refused(502, "worker_failed", f"{what} ({worker}: {why})", should_retry=False)
        return Refused(502, "worker_failed", f"{len(self._tried)} tries failed; {worker}: {why}")

    def _note_death(self, route: Route) -> None:
        """Count an end of a worker that had not answered a byte: the request may be its cause."""
        poison, body = self._context.poison, memoryview(self._body)[self._body_at :]
        if not self._fingerprint:
            self._fingerprint = poison.fingerprint(self._target, body)
        now_s, earlier = self._context.now_s, self._earlier
        self._earlier = poison.note(self._fingerprint, len(body), route, now_s)
        if earlier is not None:
            self._context.routes.excuse(route.backend.worker, earlier.route, earlier.serial, now_s)
        self._died = (*self._died, route.backend.worker)

    def _count_retry(self, lease: Lease) -> None:
        self._tries_left -= 1
        lease.retried()
        self._context.metrics.tried_again()

    # The reply

    def on_head(self, head: ResponseHead, rest: bytes) -> Callable[[bytes], object] | None:
        """Pass on a reply's head, or use another worker instead; return where its body goes."""
        assert self._lease is not None
        assert self._upstream is not None
        if head.status in (502, 503):
            if self._leave(Seen.UNAVAILABLE, f"status {head.status}"):
                return None
        elif head.status == 500 and self._context.routes.on_doubt is not None:
            return self._hold(head, rest)
        elif head.status >= 500:
            self._lease.failed(FailureKind.STATUS)
        elif self._upstream.is_done and says_aborted(rest):
            self._leave(Seen.ABORTED, ABORTED)
            return None
        else:
            self._answered(self._lease)
        return self._pass_on(head, rest)

    def _hold(self, head: ResponseHead, rest: bytes) -> Callable[[bytes], object]:
        """Hold a 500 until it is known whether its worker is ending: an engine whose core died answers so first."""
        assert self._upstream is not None
        self._phase = Phase.HELD
        self._upstream.pause(is_paused=True)
        self._start_task(self._judging(head, rest))
        return bytearray().extend  # nothing comes while it is paused

    async def _judging(self, head: ResponseHead, rest: bytes) -> None:
        try:
            doubted, routes = self._lease, self._context.routes
            assert doubted is not None
            assert routes.on_doubt is not None
            is_ending = await routes.on_doubt(doubted.route.backend.worker)
            self._dial = None
            self._judged(head, rest, is_ending=is_ending)
        except Exception as error:  # noqa: BLE001 - a task that ends without a word would hold lease and client
            self.broke(error)

    def _judged(self, head: ResponseHead, rest: bytes, *, is_ending: bool) -> None:
        """Ask another worker, or pass the 500 on."""
        assert self._lease is not None
        assert self._upstream is not None
        if not is_ending:
            self._lease.failed(FailureKind.STATUS)
        elif self._leave(Seen.ENDING, "status 500, and it is ending"):
            return
        write = self._pass_on(head, rest)
        if self._upstream.is_done:
            self.on_complete()
        else:
            self._upstream.go_on(write, is_paused=self._client.is_paused)

    def _pass_on(self, head: ResponseHead, rest: bytes) -> Callable[[bytes], object]:
        """Pass on a reply's head and its first bytes; return where the others go."""
        assert self._upstream is not None
        client = self._client
        self._phase = Phase.REPLYING
        self._reply = head
        self.latest = rest
        self._body = b""  # nothing can be repeated from here on
        client.release_memory()
        self._first_byte_at_s = self._context.loop.time()
        client.expect(self._context.config.idle_timeout_s)
        write: Callable[[bytes], object] = client.transport.write
        unchunk = self._head.is_http10 and head.is_chunked
        lines = head.without_framing() if unchunk else head.lines
        if not head.is_framed:
            client.close_after_reply()
        line_end = lines.find(b"\r\n")
        cors = self._context.cors
        write_head = b"%b\r\nx-request-id: %b%b%b%b%b\r\n\r\n" % (
            lines[:line_end] if line_end >= 0 else lines,
            self._request_id,
            self._upstream.pool.reply_field,
            b"" if client.will_keep_alive() else b"\r\nconnection: close",
            b"" if cors is None else cors.reply_fields(self._head.origin),
            lines[line_end:] if line_end >= 0 else b"",
        )
        if unchunk:
            write(write_head)
            write = Unchunk(write)
            write(rest)
        else:
            write(write_head + rest)  # in one: the client wakes once
        if client.is_paused:
            self._upstream.pause(is_paused=True)
        length = head.content_length
        if self._upstream.is_done or length < 0:
            return write
        write = self._countdown = Countdown(write, length - len(rest))
        return write

    def on_whole(self, cached: CachedReplyHead, data: bytes) -> None:
        """Pass on a reply that is whole as it came; most of those that are no streams take this way and no other."""
        lease, upstream, client, context = self._lease, self._upstream, self._client, self._context
        assert lease is not None
        assert upstream is not None
        if says_aborted(data):
            self._leave(Seen.ABORTED, ABORTED)
            return
        self._answered(lease)
        client.transport.write(
            b"%b\r\nx-request-id: %b%b%b%b%b"
            % (
                data[: cached.line_end],
                self._request_id,
                upstream.pool.reply_field,
                b"" if client.will_keep_alive() else b"\r\nconnection: close",
                b"" if context.cors is None else context.cors.reply_fields(self._head.origin),
                data[cached.line_end :] if cached.passed_on is None else cached.rest_of(data),
            )
        )
        upstream.release(context.now_s)
        self._upstream = None
        now_s = self._first_byte_at_s = context.loop.time()
        context.metrics.answered_at_once(self._model, cached.status, now_s - self._started_at_s)
        if context.config.access_log:
            self._log("", cached.status)
        self._phase = Phase.ENDED
        lease.release()
        self._lease = None
        client.finished()

    def _answered(self, lease: Lease) -> None:
        lease.answered()
        if self._died:
            self._context.poison.forget(self._fingerprint)

    def on_complete(self) -> None:
        """The whole reply is written, or held."""
        assert self._upstream is not None
        if self._phase is Phase.HELD:
            return
        self._upstream.release(self._context.now_s)
        self._upstream = None
        self._whole()

    def on_lost(self, why: str, *, is_clean: bool) -> None:
        """The worker's connection is gone."""
        upstream = self._upstream
        assert upstream is not None
        if self._phase is Phase.HELD and upstream.is_done:
            return  # the reply that is held is whole
        self._upstream = None
        if self._phase is Phase.REPLYING:
            assert self._reply is not None
            if not is_clean or self._reply.is_framed:
                self._cut(FailureKind.CUT, why, upstream)
            elif says_aborted(self.latest):
                self._cut(FailureKind.CUT, ABORTED, upstream)
            elif ended_whole(self._reply, self._target, self.latest, upstream):
                self._whole()  # its end was to be the connection's
            else:
                self._cut(FailureKind.CUT, "the stream ended early", upstream)
        elif upstream.begun or self._phase is Phase.HELD:
            self._leave(Seen.GARBLED, why)
        elif upstream.reused and self._context.now_s - self._asked_at_s < STALE_WITHIN_S:
            self._leave(Seen.STALE, why)
        else:
            self._leave(Seen.CLOSED, why)

    def _cut(self, kind: FailureKind, why: str, upstream: WorkerConnection) -> None:
        """End a reply that has begun and will not be whole, so that the client can tell."""
        assert self._lease is not None
        assert self._reply is not None
        worker = self._lease.route.backend.worker
        self._lease.failed(kind)
        self._context.metrics.reply_cut()
        refused = Refused(502, "worker_failed", f"l40sd: the reply of {worker} broke off: {why}")
        seen = self._tail.data if self._tail else self.latest
        takes_chunks = not self._head.is_http10
        words = end_of_stream(self._reply, self._target, seen, refused, upstream, takes_chunks=takes_chunks)
        if words is not None:
            self._client.transport.write(words)
        self._end(f"cut: {why}", is_failed=True)
        if words is not None:
            self._client.close()  # without the last chunk
        else:
            self._client.reset()

    # The end

    def given_up(self, why: str, *, is_hung: bool) -> None:
        """Leave the worker, whose process is about to be told to end; what has begun is cut."""
        match self._phase:
            case Phase.CONNECTING:
                self._leave(Seen.STOPPED, why)
            case Phase.ASKED | Phase.HELD:
                self._leave(Seen.HUNG if is_hung else Seen.STOPPED, why)
            case Phase.REPLYING:
                assert self._upstream is not None
                upstream, self._upstream = self._upstream, None
                upstream.abort()
                self._cut(FailureKind.CUT, why, upstream)
            case Phase.WAITING | Phase.ENDED:
                pass

    def expired(self) -> None:
        """The deadline of the present phase has passed."""
        assert self._lease is not None, "who waits in line has the line's deadline"
        config = self._context.config
        if self._phase is Phase.CONNECTING:
            self._leave_unconnected(f"no connection within {config.connect_timeout_s:g} s")
        elif self._phase in (Phase.ASKED, Phase.HELD):
            self._leave(Seen.SILENT, f"did not begin to answer within {config.first_byte_timeout_s:g} s")
        elif self._client.is_paused:  # the client does not read: nobody's failure
            self._end("client does not read")
            self._client.reset()
        else:
            assert self._upstream is not None
            upstream, self._upstream = self._upstream, None
            upstream.abort()
            self._cut(FailureKind.IDLE, f"silent for {config.idle_timeout_s:g} s", upstream)

    def broke(self, error: Exception) -> None:
        """End a request that our own code fails on: with an answer while none has begun, and holding nothing."""
        if self._phase is Phase.ENDED:
            self._client.reset_unanswered(self)
            return
        if isinstance(error, Refused):
            self._refuse(error)
            return
        self._context.failures.note_own(self._request_id.decode(), error, self._context.now_s)
        what = f"l40sd failed on this request: {type(error).__name__}"
        if self._phase is Phase.REPLYING:
            self._end(what, is_failed=True)
            self._client.reset()
        else:
            self._refuse(Refused(500, "internal_error", f"{what}; its log has the rest"))

    def client_gone(self) -> None:
        """Stop at once; the worker sees its connection close."""
        if self._phase is not Phase.ENDED:
            self._context.metrics.client_gone()
            self._context.metrics.answered(self._model, self._reply.status if self._reply else CLIENT_GONE)
            self._end("client gone")

    def pause_reply(self, *, is_paused: bool) -> None:
        """Stop or go on reading the reply: the client takes it too slowly, or keeps up again."""
        self._swept = None  # for the sweep, something has moved
        if self._upstream is not None and self._phase is Phase.REPLYING:
            self._upstream.pause(is_paused=is_paused)

    def has_moved(self) -> bool:
        """Return whether something has moved since this was asked last."""
        has_moved = self.latest is not self._swept
        self._swept = self.latest
        return has_moved

    def _whole(self) -> None:
        assert self._reply is not None
        now_s = self._context.loop.time()
        metrics = self._context.metrics
        metrics.answered(self._model, self._reply.status)
        metrics.timed(self._model, self._first_byte_at_s - self._started_at_s, now_s - self._started_at_s)
        is_failed = self._reply.status >= 500
        self._end(f"{self.worker} answered so" if is_failed else "", is_failed=is_failed)
        self._client.finished()

    def _refuse(self, refused: Refused) -> None:
        self._context.metrics.answered(self._model, refused.status)
        self._end(refused.message, refused.status, is_failed=refused.status >= 500)
        self._client.refuse(refused, self._head, request_id=self._request_id)

    def _end(self, problem: str, status: int = 0, *, is_failed: bool = False) -> None:
        context = self._context
        status = self._reply.status if self._reply else status
        try:
            if context.config.access_log:
                self._log(problem, status)
            if is_failed:
                context.failures.note(problem, context.now_s, lambda: self._account(status))
        finally:
            self._phase = Phase.ENDED
            self._let_go()

    def _let_go(self) -> None:
        """Hold nothing any more: no place in line, no dial, no connection, no lease."""
        if self._waiter is not None:
            self._waiter.cancel()
            self._waiter = None
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    # From one daemon to the next

    @property
    def age(self) -> float:
        """When it began: the order in which requests that wait are to wait on."""
        return self._started_at_s

    @property
    def worker(self) -> str:
        """The worker that it is on, or is being connected to; empty: none."""
        return self._lease.route.backend.worker if self._lease is not None else ""

    @property
    def has_worker(self) -> bool:
        """Whether a worker has it, or some of it."""
        return self._upstream is not None

    @property
    def facts(self) -> dict[str, str]:
        """Return what names it in a log."""
        return {"request": self._request_id.decode(), "worker": self.worker}

    def is_settled(self) -> bool:
        """Whether it is at a point where another daemon could go on with it, as far as our side is concerned."""
        if self._phase is Phase.ASKED:
            assert self._upstream is not None
            return not self._upstream.has_unsent
        if self._phase is not Phase.REPLYING:
            return True
        assert self._reply is not None
        return self._is_between_chunks() if self._reply.is_chunked else self._left_bytes() is not None

    def come_to_rest(self) -> None:
        """Read no more of a reply than to the next point where it could be handed over."""
        if self._phase is not Phase.REPLYING:
            return
        assert self._upstream is not None
        if self.is_settled():
            self._upstream.pause(is_paused=True)
        elif self._tail is not None:
            self._tail.is_stopping = True

    def hand_over(self, *, keep_alive: bool) -> HandedExchange | bytes | None:
        """End here, for another daemon to go on.

        Returns:
            The request's bytes while no worker has them all; None where the next daemon could not tell where in the
            reply it stands: then nothing has ended.
        """
        upstream, lease = self._upstream, self._lease
        body = self._body[self._body_at :] if self._body_at else self._body
        head = plain_request(self._head, len(body))
        is_unread = self._phase is Phase.HELD or (
            self._phase is Phase.ASKED and upstream is not None and upstream.has_unsent
        )
        if upstream is None or lease is None or is_unread:
            self._stop()
            return head + body
        reply = None
        if self._phase is Phase.REPLYING:
            assert self._reply is not None
            left_bytes = self._left_bytes()
            if left_bytes is None or (self._reply.is_chunked and not upstream.is_between_chunks()):
                return None
            reply = HandedReply(
                status=self._reply.status,
                lines=self._reply.lines,
                left_bytes=left_bytes,
                first_byte_at_s=self._first_byte_at_s,
            )
        handed = HandedExchange(
            upstream=duplicate(upstream.transport),
            is_reused=upstream.reused,
            backend=lease.route.backend,
            head=head,
            target=self._target,
            body=body,
            name=self._name,
            model=self._model,
            request_id=self._request_id,
            keep_alive=keep_alive,
            tries_left=self._tries_left,
            died=self._died,
            started_at_s=self._started_at_s,
            asked_at_s=self._asked_at_s,
            begun=b"" if reply else upstream.begun,
            reply=reply,
        )
        self._stop()
        return handed

    @classmethod
    def take_up(
        cls, context: ProxyContext, client: Client, handed: HandedExchange, transport: asyncio.Transport
    ) -> tuple["Exchange", WorkerConnection]:
        """Go on with a request that an earlier daemon sent to a worker, over this connection to it."""
        head = parse_request(handed.head)
        exchange = cls(context, client, head, handed.target, handed.body, 0, handed.name)
        exchange._request_id = handed.request_id
        exchange._started_at_s = handed.started_at_s
        exchange._asked_at_s = handed.asked_at_s
        exchange._tries, exchange._tries_left = 1, handed.tries_left
        exchange._died = handed.died
        exchange._model = handed.model
        exchange._lease = context.routes.hold(handed.backend)
        exchange._phase = Phase.ASKED
        upstream = exchange._upstream = WorkerConnection(context.pool(exchange._lease.route))
        upstream.connection_made(transport)
        upstream.take_up(exchange, begun=handed.begun, is_reused=handed.is_reused)
        client.expect(context.config.first_byte_timeout_s)
        if handed.reply is not None:
            exchange._take_up_reply(handed.reply, upstream)
        transport.set_protocol(upstream)
        return exchange, upstream

    def _take_up_reply(self, handed: HandedReply, upstream: WorkerConnection) -> None:
        client = self._client
        head = self._reply = ResponseHead(handed.status, handed.lines)
        self._phase = Phase.REPLYING
        self.latest = b"" if head.is_chunked else b"\n"  # what stood before is not known, but that it was a whole part
        self._first_byte_at_s = handed.first_byte_at_s
        client.expect(self._context.config.idle_timeout_s)
        write: Callable[[bytes], object] = client.transport.write
        framing = b""
        if head.is_chunked:
            framing = b"transfer-encoding: chunked\r\n"
            write = Unchunk(write) if self._head.is_http10 else write
        elif handed.left_bytes >= 0:
            framing = b"content-length: %d\r\n" % handed.left_bytes
            write = self._countdown = Countdown(write, handed.left_bytes)
        upstream.take_up_reply(write, framing)

    def _is_between_chunks(self) -> bool:
        if ends_between_chunks(self._tail.data if self._tail else self.latest):
            return True
        if self._tail is None:
            assert self._upstream is not None
            self._tail = self._upstream.watch(self.latest)
        return False

    def _left_bytes(self) -> int | None:
        """Return what is still to come of a body with a length, -1 for one without, None where nobody counts."""
        assert self._reply is not None
        if self._countdown is not None:
            return self._countdown.left_bytes
        return -1 if self._reply.is_chunked or not self._reply.is_framed else None

    def _stop(self) -> None:
        """Hold nothing and say nothing: it goes on elsewhere."""
        self._phase = Phase.ENDED
        self._let_go()

    def _log(self, problem: str, status: int) -> None:
        log.info("proxy.request", **self._account(status), problem=problem)

    def _account(self, status: int) -> dict[str, object]:
        """Return what a log says of a request that ends."""
        return {
            "request": self._request_id.decode(),
            "model": self._model or self._name[:LOGGED_LIMIT],
            "path": self._target[:LOGGED_LIMIT].decode(),
            "worker": self.worker,
            "status": status,
            "tries": self._tries,
            "first_byte_s": round(self._first_byte_at_s - self._started_at_s, 4) if self._first_byte_at_s else None,
            "duration_s": round(self._context.loop.time() - self._started_at_s, 4),
        }
