"""The control socket: HTTP/1.1 on a Unix socket, /v1 of the control API.

Who may connect is settled before anything is read: the socket is 0660 and belongs to the control group from its
first instant, and the peer's credentials are asked of the kernel for each connection. Every change is logged with them.

What a connection may take is bounded, for it takes from the endpoint's descriptors and memory: so many at once, so
long without a word, so much of a body.
"""

import asyncio
import grp
import os
import pwd
import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog
from aiohttp import web

from l40sd import __version__
from l40sd.codec import decode, encode
from l40sd.control import report
from l40sd.control.events import Events, Wanted
from l40sd.control.messages import Accepted, Check, ErrorBody, LogPart, PatternRequest, RestartRequest, Status
from l40sd.errors import L40sError
from l40sd.supervisor.supervisor import Supervisor
from l40sd.workers.process import Position

BODY_LIMIT_BYTES = 1 << 16
CONNECTION_LIMIT = 64
"""At once, followers included; one more is closed as it comes."""
SILENCE_TIMEOUT_S = 10.0
"""For a connection's first request to be whole, for the next one to begin, and for a body."""
NUMBER_DIGITS = 15
"""Of a number in a query: a number of events, of lines."""
WRITE_TIMEOUT_S = 30.0
TAIL_AT_MOST = 10_000

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


class ControlHandlers(Protocol):
    """What the control API asks of the daemon besides its supervisor."""

    async def status(self) -> Status:
        """Return everything of `l40sctl status`."""

    def metrics_text(self) -> str:
        """Return the metrics as Prometheus text."""

    async def examine(self) -> list[Check]:
        """Return what `l40sctl doctor` shows."""

    async def reload(self, *, forget_gpus: bool) -> list[str]:
        """Read the configuration again; return what changed. Raises L40sError: it is bad, and nothing has changed."""

    async def upgrade(self) -> None:
        """Become the release now installed. Raises L40sError: it would not start, and nothing has changed."""

    def config_toml(self) -> str:
        """Return the configuration in force."""

    def config_files(self) -> tuple[str, ...]:
        """Return the files that it was read from."""

    def config_diff(self) -> str:
        """Return how these files differ from it by now. Raises L40sError: they are bad."""


class Control:
    """Serves the control API until it is closed."""

    def __init__(
        self, path: Path, group: str, supervisor: Supervisor, events: Events, handlers: ControlHandlers
    ) -> None:
        self.path = path
        self._group = group
        self._supervisor = supervisor
        self._events = events
        self._handlers = handlers
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._log: structlog.stdlib.BoundLogger = supervisor.context.log

    async def start(self) -> None:
        """Open the socket; call only while holding the daemon's lock: a socket file found there is a dead daemon's.

        Raises:
            L40sError: The socket cannot be made.
        """
        app = web.Application(client_max_size=BODY_LIMIT_BYTES, middlewares=[self._guard])
        app.add_routes(self._routes())
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

    def _routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/version", self._version),
            web.get("/v1/status", self._status),
            web.get("/v1/patterns", self._patterns),
            web.get("/v1/topology", self._topology),
            web.get("/v1/workers", self._workers),
            web.get("/v1/workers/{id}", self._worker),
            web.get("/v1/workers/{id}/logs", self._logs),
            web.post("/v1/workers/{id}/{verb}", self._command),
            web.get("/v1/config", self._config),
            web.get("/v1/config/diff", self._config_diff),
            web.get("/v1/doctor", self._doctor),
            web.get("/v1/metrics", self._metrics),
            web.get("/v1/events", self._follow_events),
            web.post("/v1/pattern", self._apply),
            web.post("/v1/restart", self._restart),
            web.get("/v1/operations/{id}", self._operation),
            web.post("/v1/reload", self._reload),
            web.post("/v1/upgrade", self._upgrade),
        ]

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

    # -- questions -------------------------------------------------------------------------------------------------

    async def _version(self, _: web.Request) -> web.Response:
        return _json({"version": __version__})

    async def _status(self, _: web.Request) -> web.Response:
        return _json(await self._handlers.status())

    async def _patterns(self, _: web.Request) -> web.Response:
        return _json(report.patterns(self._supervisor))

    async def _topology(self, _: web.Request) -> web.Response:
        return _json(report.topology(self._supervisor))

    async def _workers(self, _: web.Request) -> web.Response:
        return _json((await self._handlers.status()).workers)

    async def _worker(self, request: web.Request) -> web.Response:
        worker = self._supervisor.workers.named(request.match_info["id"])
        return _json(report.worker_status(worker, self._supervisor))

    async def _config(self, _: web.Request) -> web.Response:
        return _json({"toml": self._handlers.config_toml(), "files": self._handlers.config_files()})

    async def _config_diff(self, _: web.Request) -> web.Response:
        return _json({"diff": self._handlers.config_diff()})

    async def _doctor(self, _: web.Request) -> web.Response:
        return _json(await self._handlers.examine())

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self._handlers.metrics_text(), content_type="text/plain")

    async def _operation(self, request: web.Request) -> web.Response:
        operation = self._supervisor.operations.get(request.match_info["id"])
        if operation is None:
            raise L40sError("there is no such operation", where=request.match_info["id"], code="unknown_operation")
        return _json(report.operation_status(operation))

    async def _follow_events(self, request: web.Request) -> web.StreamResponse:
        wanted = Wanted(
            since=_number(request, "since", 0), after=_moment(request, "after"), worker=_text(request, "worker")
        )
        count = _number(request, "last", 0) if "last" in request.query else None
        if not _flag(request, "follow"):
            return _ndjson(b"".join(encode(event) + b"\n" for event in self._events.last(wanted, count)))
        lines = (encode(event) + b"\n" async for event in self._events.follow(wanted, count))
        return await _stream(request, lines, "application/x-ndjson")

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        """Show a worker's output; of one that is gone what is left on disk.

        With ``follow`` it goes on. With ``parts`` as well it comes as LogPart, one a line; ``from`` is a position that
        one of them named, and takes the place of ``tail``.
        """
        worker = await self._logged(request.match_info["id"])
        processes = self._supervisor.context.processes
        tail = min(TAIL_AT_MOST, _number(request, "tail", 100))
        if not _flag(request, "follow"):
            return web.Response(text=_as_text(await processes.tail(worker, tail)), content_type="text/plain")
        asked = _position(request, "from")
        lines, begin = await processes.tail_to_resume(worker, 0 if asked else tail)
        begin = asked or begin

        async def parts() -> AsyncIterator[LogPart]:
            yield LogPart(text=_as_text(lines), position=str(begin))
            async for text, position in processes.follow(worker, begin):
                yield LogPart(text=text, position=str(position))

        if _flag(request, "parts"):
            framed = (encode(part) + b"\n" async for part in parts())
            return await _stream(request, framed, "application/x-ndjson")
        plain = (part.text.encode("utf-8", "replace") async for part in parts())
        return await _stream(request, plain, "text/plain")

    async def _logged(self, name: str) -> str:
        """Return the name again if this worker is here, or its output still is.

        Raises:
            L40sError: Neither; the hint names the nearest.
        """
        known = {str(worker): None for worker in self._supervisor.workers}
        if name not in known:
            known |= dict.fromkeys(await self._supervisor.context.processes.logged())
        if name in known:
            return name
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none yet'}"
        raise L40sError(f"there is no worker {name!r}, nor output of a former one", hint=hint, code="unknown_worker")

    # -- wishes ----------------------------------------------------------------------------------------------------

    async def _command(self, request: web.Request) -> web.Response:
        self._supervisor.commands.command(request.match_info["id"], request.match_info["verb"])
        await self._supervisor.write_down()  # a drain that is accepted holds, whatever becomes of this daemon
        return _json({}, 202)

    async def _apply(self, request: web.Request) -> web.Response:
        try:
            wish = decode(PatternRequest, await request.read())
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise L40sError(f"not a pattern request: {error}", code="bad_request") from error
        want = self._supervisor.designer.design(wish.name, self._supervisor.config, force=wish.force)
        if wish.dry_run:
            return _json(report.change_preview(want, self._supervisor))
        notes = report.notes_on(want, self._supervisor)
        operation = self._supervisor.apply(want, user_of(request))
        await self._supervisor.write_down()  # what is accepted is not lost with this daemon
        return _json(Accepted(operation=operation.id, notes=notes), 202)

    async def _restart(self, request: web.Request) -> web.Response:
        try:
            wish = decode(RestartRequest, await request.read())
        except msgspec.MsgspecError as error:
            raise L40sError(f"not a restart request: {error}", code="bad_request") from error
        operation = self._supervisor.commands.restart(wish.workers, user_of(request))
        await self._supervisor.write_down()
        return _json(Accepted(operation=operation.id), 202)

    async def _reload(self, request: web.Request) -> web.Response:
        return _json({"changed": await self._handlers.reload(forget_gpus=_flag(request, "forget_gpus"))})

    async def _upgrade(self, _: web.Request) -> web.Response:
        await self._handlers.upgrade()
        return _json({}, 202)


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


def peer_of(request: web.Request) -> tuple[int, int]:
    """Return the uid and pid at the other end of the socket, as the kernel knows them."""
    connection = request.transport.get_extra_info("socket") if request.transport else None
    if connection is None:
        return -1, 0
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid, pid


def user_of(request: web.Request) -> str:
    """Return the name of the user at the other end; their number where nobody has it."""
    uid, _ = peer_of(request)
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def may_control(uid: int, group: str) -> bool:
    """Return whether this user may use the control API: root, the daemon's own user, or a member of the group."""
    if uid in (0, os.geteuid()):
        return True

    try:
        user = pwd.getpwuid(uid)
        return grp.getgrnam(group).gr_gid in os.getgrouplist(user.pw_name, user.pw_gid)
    except KeyError:
        return False


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=encode(value), status=status, content_type="application/json")


def _ndjson(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/x-ndjson")


def _refusal(error: L40sError, status: int | None = None) -> web.Response:
    body = ErrorBody(code=error.code, what=error.what, where=error.where, hint=error.hint)
    return _json({"error": body}, status or STATUS_OF.get(error.code, 409))


async def _stream(request: web.Request, parts: AsyncIterator[bytes], content_type: str) -> web.StreamResponse:
    """Send parts as they come until the reader leaves; one that does not read for a while is dropped."""
    answer = web.StreamResponse(headers={"Content-Type": content_type})
    await answer.prepare(request)
    with suppress(ConnectionError, TimeoutError):
        async for part in parts:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await answer.write(part)
    return answer


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


def _number(request: web.Request, key: str, default: int) -> int:
    text = request.query.get(key, str(default))
    if not re.fullmatch(f"[0-9]{{1,{NUMBER_DIGITS}}}", text):
        raise L40sError(f"{key} = {text[:40]!r} is not a number", where=request.path, code="bad_request")
    return int(text)


def _text(request: web.Request, key: str) -> str:
    return request.query.get(key, "")


def _moment(request: web.Request, key: str) -> datetime | None:
    """Return a date and time; one without an offset is UTC."""
    text = _text(request, key)
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        what = f"{key} = {text[:40]!r} is no date and time"
        raise L40sError(
            what, where=request.path, hint="ISO 8601, e.g. 2026-11-23T21:04:43Z", code="bad_request"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _position(request: web.Request, key: str) -> Position | None:
    text = _text(request, key)
    try:
        return Position.parse(text) if text else None
    except ValueError as error:
        raise L40sError(f"{key}: {error}", where=request.path, code="bad_request") from error


def _as_text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _flag(request: web.Request, key: str) -> bool:
    return request.query.get(key, "") in ("1", "true", "yes")
