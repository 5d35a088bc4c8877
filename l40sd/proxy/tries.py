"""The stages of a request before the first byte of a reply: in line for a worker, being connected to one, asked."""

import asyncio
import errno

from l40sd.proxy.held_reply import HeldReply
from l40sd.proxy.http1.cached_heads import CachedReplyHead
from l40sd.proxy.http1.heads import ResponseHead
from l40sd.proxy.interfaces import NOWHERE, Request, Stage
from l40sd.proxy.pages import no_worker, unknown_model
from l40sd.proxy.reply import pass_on
from l40sd.proxy.retry_policy import Seen
from l40sd.proxy.worker_connection import ABORTED, ConnectionPool, WorkerConnection, says_aborted
from l40sd.routing.routes import FailureKind, Lease, Waiter

STALE_WITHIN_S = 1.0  # a kept connection that closes later than this was closed over the request itself
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

NO_DESCRIPTOR = "no file descriptor is left for a connection to a worker"
CLOSING = "this host is being stopped"
NOTHING_COMES = "none is on its way"


class Waiting(Stage):
    """In the model's line: no worker that it may go to is free."""

    __slots__ = ("_request", "_waiter")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._waiter: Waiter | None = None

    def join(self, tried: tuple[int, ...]) -> None:
        """Get in line, or refuse the request where that is of no use.

        Args:
            tried: Serials of routes whose turn is not this request's.
        """
        request = self._request
        context, routes, model = request.context, request.context.routes, request.model
        if context.is_closing:
            request.refuse(no_worker(routes, model, CLOSING))
            return
        if not routes.may_wait(model):
            request.refuse(no_worker(routes, model, NOTHING_COMES))
            return
        request.client.expect(None)  # the line has its own deadline
        deadline_s = context.now_s + context.config.queue_timeout_s
        self._waiter = routes.wait(model, self._on_turn, deadline_s=deadline_s, tried=tried)
        if self._waiter is None:
            request.refuse(no_worker(routes, model, "its waiting line is full"))
        else:
            request.enter(self)

    def _on_turn(self, lease: Lease | None) -> None:
        try:
            self._turn(lease)
        except Exception as error:  # noqa: BLE001 - whoever gives turns is another request or a worker: not theirs
            self._request.broke(error)

    def _turn(self, lease: Lease | None) -> None:
        request, routes = self._request, self._request.context.routes
        self._waiter = None  # it knows whom to call, which would keep both of them
        request.enter(NOWHERE)
        if lease is not None:
            request.use(lease)
        elif routes.resolve(request.name) is None:
            request.refuse(unknown_model(routes, request.name))
        else:
            request.refuse(no_worker(routes, request.model, self._why_no_turn()))

    def _why_no_turn(self) -> str:
        context = self._request.context
        if context.is_closing:
            return CLOSING
        if not context.routes.may_wait(self._request.model):
            return NOTHING_COMES
        return f"none was free within {context.config.queue_timeout_s:g} s"

    def let_go(self) -> None:
        """Leave the line."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.cancel()


class Connecting(Stage):
    """A connection to a worker is being made."""

    __slots__ = ("_lease", "_pool", "_request", "_task", "_was_stale")

    def __init__(self, request: Request, lease: Lease, pool: ConnectionPool, *, was_stale: bool) -> None:
        self._request = request
        self._lease = lease
        self._pool = pool
        self._was_stale = was_stale  # this worker closed a kept connection over the request
        self._task: asyncio.Task[None] | None = None

    def dial(self) -> None:
        """Make the connection and ask; leave the worker where there cannot be one."""
        context = self._request.context
        self._request.enter(self)
        if not context.make_room_for_upstream():
            self._request.leave(self._lease, Seen.OVERLOADED, NO_DESCRIPTOR)
            return
        self._request.client.expect(context.config.connect_timeout_s)
        self._task = context.start_task(self._dialling())

    async def _dialling(self) -> None:
        try:
            await self._dial_and_ask()
        except Exception as error:  # noqa: BLE001 - a task that ends without a word would hold lease and client
            self._request.broke(error)

    async def _dial_and_ask(self) -> None:
        backend, loop = self._pool.route.backend, self._request.context.loop
        try:
            _, upstream = await loop.create_connection(lambda: WorkerConnection(self._pool), backend.host, backend.port)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be encoded
            self._task = None
            if isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS:
                self._request.leave(self._lease, Seen.OVERLOADED, NO_DESCRIPTOR)
            else:
                self._leave(f"no connection: {error}")
            return
        self._task = None
        self._request.ask(self._lease, upstream)

    def _leave(self, why: str) -> None:
        self._request.leave(self._lease, Seen.VANISHED if self._was_stale else Seen.CONNECT, why)

    def expired(self) -> None:
        """There is no connection in time."""
        self._leave(f"no connection within {self._request.context.config.connect_timeout_s:g} s")

    def given_up(self, why: str, *, is_hung: bool) -> None:
        """Leave the worker, whose process is about to be told to end."""
        self._request.leave(self._lease, Seen.STOPPED, why)

    def let_go(self) -> None:
        """Make no connection any more."""
        if self._task is not None:
            self._task.cancel()


class Asked(Stage):
    """A worker has been sent the request, and has not begun to answer."""

    __slots__ = ("_request", "asked_at_s", "lease", "upstream")

    has_worker = True

    def __init__(self, request: Request, lease: Lease, upstream: WorkerConnection, asked_at_s: float) -> None:
        self._request = request
        self.lease = lease
        self.upstream = upstream
        self.asked_at_s = asked_at_s

    def on_whole(self, cached: CachedReplyHead, data: bytes) -> None:
        """Pass on a reply that is whole as it came; most of those that are no streams take this way and no other."""
        request, lease, upstream = self._request, self.lease, self.upstream
        client, context = request.client, request.context
        if says_aborted(data):
            request.leave(lease, Seen.ABORTED, ABORTED)
            return
        request.answered(lease)
        client.transport.write(
            b"%b\r\nx-request-id: %b%b%b%b%b"
            % (
                data[: cached.line_end],
                request.request_id,
                upstream.pool.reply_field,
                b"" if client.will_keep_alive() else b"\r\nconnection: close",
                b"" if context.cors is None else context.cors.reply_fields(request.head.origin),
                data[cached.line_end :] if cached.passed_on is None else cached.rest_of(data),
            )
        )
        upstream.release(context.now_s)
        request.end_whole(lease, cached.status)

    def on_head(self, head: ResponseHead, rest: bytes) -> None:
        """Pass on a reply's head, or hold it, or use another worker instead."""
        request, lease = self._request, self.lease
        is_ending = request.context.routes.on_doubt
        if head.status in (502, 503):
            if request.leave(lease, Seen.UNAVAILABLE, f"status {head.status}"):
                return
        elif head.status == 500 and is_ending is not None:
            HeldReply(request, lease, self.upstream, head, rest).hold(is_ending)
            return
        elif head.status >= 500:
            lease.failed(FailureKind.STATUS)
        elif self.upstream.is_done and says_aborted(rest):
            request.leave(lease, Seen.ABORTED, ABORTED)
            return
        else:
            request.answered(lease)
        pass_on(request, lease, self.upstream, head, rest)

    def on_lost(self, why: str, *, is_clean: bool) -> None:
        """The worker's connection is gone."""
        request, upstream = self._request, self.upstream
        if upstream.begun:
            request.leave(self.lease, Seen.GARBLED, why)
        elif upstream.reused and request.context.now_s - self.asked_at_s < STALE_WITHIN_S:
            request.leave(self.lease, Seen.STALE, why)
        else:
            request.leave(self.lease, Seen.CLOSED, why)

    def broke(self, error: Exception) -> None:
        """Our own code failed on the reply."""
        self._request.broke(error)

    def expired(self) -> None:
        """The worker has been silent for too long."""
        timeout_s = self._request.context.config.first_byte_timeout_s
        self._request.leave(self.lease, Seen.SILENT, f"did not begin to answer within {timeout_s:g} s")

    def given_up(self, why: str, *, is_hung: bool) -> None:
        """Leave the worker, whose process is about to be told to end."""
        self._request.leave(self.lease, Seen.HUNG if is_hung else Seen.STOPPED, why)

    def is_settled(self) -> bool:
        """Whether all of the request is with the worker."""
        return not self.upstream.has_unsent

    def let_go(self) -> None:
        """Hold no connection any more."""
        self.upstream.abort()
