"""The control socket: HTTP/1.1 on a Unix socket, /v1 of the control API.

Who may connect is settled before anything is read: the socket is 0660 and belongs to the control group from its
first instant, and the peer's credentials are asked of the kernel for each connection. Every change is logged with them.

What a connection may take is bounded, for it takes from the endpoint's descriptors and memory: so many at once, so
long without a word, so much of a body.
"""

import asyncio
import grp
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import structlog
from aiohttp import web

from l40sd.control.api import ControlApi, ControlHandlers, json_of
from l40sd.control.events import Events
from l40sd.control.messages import ErrorBody
from l40sd.control.peers import may_control, peer_of
from l40sd.errors import L40sError
from l40sd.supervisor.supervisor import Supervisor

BODY_LIMIT_BYTES = 1 << 16
CONNECTION_LIMIT = 64
"""At once, followers included; one more is closed as it comes."""
SILENCE_TIMEOUT_S = 10.0
"""For a connection's first request to be whole, for the next one to begin, and for a body."""

STATUS_OF = {
    "unknown_worker": 404,
    "unknown_pattern": 404,
    "unknown_operation": 404,
    "not_found": 404,
    "forbidden": 403,
    "bad_request": 400,
    "bad_verb": 400,
}
"""HTTP status of an error's code; everything else is 409: understood, and refused as things stand."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Control:
    """Serves the control API until it is closed."""

    def __init__(
        self, path: Path, group: str, supervisor: Supervisor, events: Events, handlers: ControlHandlers
    ) -> None:
        self.path = path
        self._group = group
        self._api = ControlApi(supervisor, events, handlers)
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._log: structlog.stdlib.BoundLogger = supervisor.context.log

    async def start(self) -> None:
        """Open the socket; call only while holding the daemon's lock: a socket file found there is a dead daemon's.

        Raises:
            L40sError: The socket cannot be made.
        """
        app = web.Application(client_max_size=BODY_LIMIT_BYTES, middlewares=[self._guard])
        app.add_routes(self._api.routes())
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=SILENCE_TIMEOUT_S, lingering_time=1.0
        )
        await self._runner.setup()
        await self._listen()

    async def rebind_if_lost(self) -> bool:
        """Open the socket anew when somebody deleted its file; return whether that was so."""
        if self.path.is_socket() or self._runner is None:
            return False
        former = self._listener
        await self._listen()
        if former is not None:  # nobody can reach it any more
            former.close()
        self._log.warning("control.rebound", path=str(self.path))
        return True

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._accepted, sock=bind_private(self.path, self._group))

    def _accepted(self) -> asyncio.Protocol:
        """Return what a new connection is served by: aiohttp, or nobody when there are too many."""
        server = self._runner.server if self._runner is not None else None
        if server is None or len(server.connections) >= CONNECTION_LIMIT:
            return _TurnedAway()
        return server()

    async def close(self) -> None:
        """Stop serving and remove the socket's file."""
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            await self._runner.cleanup()
            with suppress(OSError):
                self.path.unlink()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check who asks, turn our errors into answers, and log every change with its author."""
        uid, pid = peer_of(request)
        try:
            if not may_control(uid, self._group):
                raise L40sError(  # noqa: TRY301  one place turns errors into answers
                    f"user {uid} may not control l40sd",
                    hint=f"become root or join group {self._group}",
                    code="forbidden",
                )
            await _read_body(request)
            answer = await handler(request)
        except L40sError as error:
            answer = _refusal(error)
        except web.HTTPException as error:
            code = "not_found" if error.status in (404, 405) else "bad_request"
            answer = _refusal(L40sError(f"{request.method} {request.path}: {error.reason}", code=code), error.status)
        if request.method == "POST":
            self._log.info("control.request", path=request.path[:200], uid=uid, pid=pid, status=answer.status)
        return answer


class _TurnedAway(asyncio.Protocol):
    """A connection above the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def bind_private(path: Path, group: str) -> socket.socket:
    """Return a listening Unix socket that nobody could open before its mode and group were right.

    It is made with mode 0600 (umask), given its group, then opened to the group; a leftover file is removed first.

    Raises:
        L40sError: The directory is missing or not ours to write, or the path is too long (107 bytes).
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        with suppress(KeyError, PermissionError):
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        path.chmod(0o660)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise L40sError(
            f"cannot make the control socket: {error.strerror or error}",
            where=str(path),
            hint="check runtime_dir and control_socket in [daemon]",
            code="no_control_socket",
        ) from error
    return listener


def _refusal(error: L40sError, status: int | None = None) -> web.Response:
    body = ErrorBody(code=error.code, what=error.what, where=error.where, hint=error.hint)
    return json_of({"error": body}, status or STATUS_OF.get(error.code, 409))


async def _read_body(request: web.Request) -> None:
    """Take in the whole body, which the request then keeps.

    Raises:
        L40sError: It did not come in time.
        HTTPRequestEntityTooLarge: It is larger than ``BODY_LIMIT_BYTES``.
    """
    try:
        async with asyncio.timeout(SILENCE_TIMEOUT_S):
            await request.read()
    except TimeoutError as error:
        raise L40sError(
            f"the request's body did not come within {SILENCE_TIMEOUT_S:g} s", where=request.path, code="bad_request"
        ) from error
