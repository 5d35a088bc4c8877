"""/v1 of the control API: which paths there are, and what each answers."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any, Protocol

import msgspec
from aiohttp import web

from l40sd import __version__
from l40sd.codec import decode, encode
from l40sd.control import report
from l40sd.control.events import Events, Wanted
from l40sd.control.messages import Accepted, Check, LogPart, PatternRequest, RestartRequest, Status
from l40sd.control.peers import user_of
from l40sd.errors import L40sError
from l40sd.supervisor.supervisor import Supervisor
from l40sd.workers.process import Position

NUMBER_DIGITS = 15
"""Of a number in a query: a number of events, of lines."""
WRITE_TIMEOUT_S = 30.0
TAIL_AT_MOST = 10_000


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


class ControlApi:
    """Answers what is asked, passes on what is wished; who asks was checked before."""

    def __init__(self, supervisor: Supervisor, events: Events, handlers: ControlHandlers) -> None:
        self._supervisor = supervisor
        self._events = events
        self._handlers = handlers

    def routes(self) -> list[web.RouteDef]:
        """Return every path with what answers it."""
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

    # -- questions -------------------------------------------------------------------------------------------------

    async def _version(self, _: web.Request) -> web.Response:
        return json_of({"version": __version__})

    async def _status(self, _: web.Request) -> web.Response:
        return json_of(await self._handlers.status())

    async def _patterns(self, _: web.Request) -> web.Response:
        return json_of(report.patterns(self._supervisor))

    async def _topology(self, _: web.Request) -> web.Response:
        return json_of(report.topology(self._supervisor))

    async def _workers(self, _: web.Request) -> web.Response:
        return json_of((await self._handlers.status()).workers)

    async def _worker(self, request: web.Request) -> web.Response:
        worker = self._supervisor.workers.named(request.match_info["id"])
        return json_of(report.worker_status(worker, self._supervisor))

    async def _config(self, _: web.Request) -> web.Response:
        return json_of({"toml": self._handlers.config_toml(), "files": self._handlers.config_files()})

    async def _config_diff(self, _: web.Request) -> web.Response:
        return json_of({"diff": self._handlers.config_diff()})

    async def _doctor(self, _: web.Request) -> web.Response:
        return json_of(await self._handlers.examine())

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self._handlers.metrics_text(), content_type="text/plain")

    async def _operation(self, request: web.Request) -> web.Response:
        operation = self._supervisor.operations.get(request.match_info["id"])
        if operation is None:
            raise L40sError("there is no such operation", where=request.match_info["id"], code="unknown_operation")
        return json_of(report.operation_status(operation))

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
        return json_of({}, 202)

    async def _apply(self, request: web.Request) -> web.Response:
        try:
            wish = decode(PatternRequest, await request.read())
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise L40sError(f"not a pattern request: {error}", code="bad_request") from error
        want = self._supervisor.designer.design(wish.name, self._supervisor.config, force=wish.force)
        if wish.dry_run:
            return json_of(report.change_preview(want, self._supervisor))
        notes = report.notes_on(want, self._supervisor)
        operation = self._supervisor.apply(want, user_of(request))
        await self._supervisor.write_down()  # what is accepted is not lost with this daemon
        return json_of(Accepted(operation=operation.id, notes=notes), 202)

    async def _restart(self, request: web.Request) -> web.Response:
        try:
            wish = decode(RestartRequest, await request.read())
        except msgspec.MsgspecError as error:
            raise L40sError(f"not a restart request: {error}", code="bad_request") from error
        operation = self._supervisor.commands.restart(wish.workers, user_of(request))
        await self._supervisor.write_down()
        return json_of(Accepted(operation=operation.id), 202)

    async def _reload(self, request: web.Request) -> web.Response:
        return json_of({"changed": await self._handlers.reload(forget_gpus=_flag(request, "forget_gpus"))})

    async def _upgrade(self, _: web.Request) -> web.Response:
        await self._handlers.upgrade()
        return json_of({}, 202)


def json_of(value: Any, status: int = 200) -> web.Response:
    """Return a record, or plain data, as an answer."""
    return web.Response(body=encode(value), status=status, content_type="application/json")


def _ndjson(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/x-ndjson")


async def _stream(request: web.Request, parts: AsyncIterator[bytes], content_type: str) -> web.StreamResponse:
    """Send parts as they come until the reader leaves; one that does not read for a while is dropped."""
    answer = web.StreamResponse(headers={"Content-Type": content_type})
    await answer.prepare(request)
    with suppress(ConnectionError, TimeoutError):
        async for part in parts:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await answer.write(part)
    return answer


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
