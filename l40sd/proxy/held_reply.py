"""A 500 that is held until it is known whether its worker is ending: an engine whose core died answers so first."""

import asyncio
from collections.abc import Awaitable, Callable

from l40sd.model import WorkerId
from l40sd.proxy.http1.heads import ResponseHead
from l40sd.proxy.interfaces import Request, Stage
from l40sd.proxy.reply import pass_on
from l40sd.proxy.retry_policy import Seen
from l40sd.proxy.worker_connection import WorkerConnection
from l40sd.routing.routes import FailureKind, Lease


class HeldReply(Stage):
    """The head of such a reply and the first bytes after it; nothing of it is passed on yet."""

    __slots__ = ("_head", "_lease", "_request", "_rest", "_task", "_upstream", "latest", "write")

    has_worker = True

    def __init__(
        self, request: Request, lease: Lease, upstream: WorkerConnection, head: ResponseHead, rest: bytes
    ) -> None:
        self._request = request
        self._lease = lease
        self._upstream = upstream
        self._head = head
        self._rest = rest
        self._task: asyncio.Task[None] | None = None
        self.latest = b""
        self.write: Callable[[bytes], object] = bytearray().extend  # nothing comes while it is paused

    def hold(self, is_ending: Callable[[WorkerId], Awaitable[bool]]) -> None:
        """Read no further and ask whether the worker is ending."""
        self._request.enter(self)
        self._upstream.pass_to(self)
        self._upstream.pause(is_paused=True)
        self._task = self._request.context.start_task(self._judging(is_ending))

    async def _judging(self, is_ending: Callable[[WorkerId], Awaitable[bool]]) -> None:
        try:
            answer = await is_ending(self._lease.route.backend.worker)
            self._task = None
            self._judged(is_ending=answer)
        except Exception as error:  # noqa: BLE001 - a task that ends without a word would hold lease and client
            self._request.broke(error)

    def _judged(self, *, is_ending: bool) -> None:
        """Ask another worker, or pass the 500 on."""
        request, upstream = self._request, self._upstream
        if not is_ending:
            self._lease.failed(FailureKind.STATUS)
        elif request.leave(self._lease, Seen.ENDING, "status 500, and it is ending"):
            return
        reply = pass_on(request, self._lease, upstream, self._head, self._rest)
        if upstream.is_done:
            reply.on_complete()
        else:
            upstream.pause(is_paused=request.client.is_paused)

    def on_complete(self) -> None:
        """The whole reply is held."""

    def on_lost(self, why: str, *, is_clean: bool) -> None:
        """The worker's connection is gone; a reply that is whole is held on."""
        if not self._upstream.is_done:
            self._request.leave(self._lease, Seen.GARBLED, why)

    def broke(self, error: Exception) -> None:
        """Our own code failed on it."""
        self._request.broke(error)

    def expired(self) -> None:
        """The worker has not answered well for too long."""
        timeout_s = self._request.context.config.first_byte_timeout_s
        self._request.leave(self._lease, Seen.SILENT, f"did not begin to answer within {timeout_s:g} s")

    def given_up(self, why: str, *, is_hung: bool) -> None:
        """Leave the worker, whose process is about to be told to end."""
        self._request.leave(self._lease, Seen.HUNG if is_hung else Seen.STOPPED, why)

    def let_go(self) -> None:
        """Wait for no judgement, and hold no connection any more."""
        if self._task is not None:
            self._task.cancel()
        self._upstream.abort_for(self)
