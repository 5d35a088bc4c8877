"""Fake workers that misbehave on order, a client that speaks bytes, and a proxy between them."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from l40sd.config.options import ProxyConfig
from l40sd.model import ModelName, Outlook, WorkerId
from l40sd.proxy.server import Proxy
from l40sd.routing.routes import Backend, CatalogEntry, FailureKind, Routes

CHAT = ModelName("chat")
PATIENCE_S = 10.0
QUICK = {"upstream_idle_timeout_s": 0.4, "connect_timeout_s": 2.0}


@dataclass
class Request:
    head: bytes
    body: bytes

    @property
    def fields(self) -> dict[str, str]:
        lines = self.head.decode().split("\r\n")[1:-2]
        pairs = [line.split(": ", 1) for line in lines]
        assert len({name.lower() for name, _ in pairs}) == len(pairs), "a field stands twice"
        return {name.lower(): value for name, value in pairs}


class Conversation:
    """One connection that the proxy made to a fake worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> Request:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
        )
        return Request(head, await self.reader.readexactly(length))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def closed(self) -> None:
        """Return when the proxy has closed its side."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass

    def reset(self) -> None:
        self.writer.transport.abort()


Behaviour = Callable[[Conversation, Request], Awaitable[None]]


def plain(body: bytes, status: str = "200 OK", fields: bytes = b"content-type: application/json\r\n") -> bytes:
    return b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\n\r\n%b" % (status.encode(), fields, len(body), body)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def answer_ok(talk: Conversation, request: Request) -> None:
    await talk.send(plain(b'{"ok":true}'))


@dataclass
class FakeWorker:
    name: str
    behave: Behaviour = answer_ok
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    open: int = 0
    server: asyncio.Server | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    talks: list[Conversation] = field(default_factory=list)

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.connections += 1
        self.open += 1
        talk = Conversation(reader, writer)
        self.talks.append(talk)
        try:
            while True:
                request = await talk.request()
                self.requests.append(request)
                await self.behave(talk, request)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            self.tasks.discard(task)
            self.talks.remove(talk)
            writer.close()

    def die(self) -> None:
        """End as a process does: nobody listens any more, and every connection breaks."""
        assert self.server is not None
        self.server.close()
        for talk in self.talks:
            talk.reset()

    async def stop(self) -> None:
        if self.server is not None:
            self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@contextlib.contextmanager
def unaccepting() -> Iterator[int]:
    """Yield a port whose backlog is full: further SYNs are dropped, a connection is neither made nor refused."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield port


class Reply:
    """What a client read: status, fields and the body without its framing."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.raw_body = raw.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.status = int(lines[0].split(" ")[1])
        pairs = [line.split(": ", 1) for line in lines[1:]]
        self.fields = {name.lower(): value for name, value in pairs}
        assert len(pairs) == len(self.fields), f"a field stands twice: {pairs}"

    @property
    def body(self) -> bytes:
        return unchunked(self.raw_body) if "transfer-encoding" in self.fields else self.raw_body

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert self.fields["x-l40s-source"] == "l40sd"
        return error


def unchunked(data: bytes) -> bytes:
    """Return a chunked body's content; a ValueError where it breaks off."""
    out = b""
    while True:
        line, found, data = data.partition(b"\r\n")
        if not found:
            raise ValueError("cut")
        size = int(line, 16)
        if size == 0:
            return out
        if len(data) < size + 2:
            raise ValueError("cut")
        out += data[:size]
        data = data[size + 2 :]


def post(
    body: bytes | None = None, *, path: str = "/v1/chat/completions", extra: bytes = b"", model: str = "chat"
) -> bytes:
    body = json.dumps({"model": model, "messages": []}).encode() if body is None else body
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + extra + b"\r\n" + body


class Dialog:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self) -> Reply:
        """Read one whole reply, however it is framed."""
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"HTTP/1.1 100 "):
                return Reply(head)
            probe = Reply(head)
            if "content-length" in probe.fields:
                return Reply(head + await self.reader.readexactly(int(probe.fields["content-length"])))
            if "transfer-encoding" not in probe.fields:
                return Reply(head if probe.status == 204 else head + await self.reader.read())
            line, size = b"", -1
            while size:  # no byte further than its end: the next reply may be there already
                line = await self.reader.readuntil(b"\r\n")
                size = int(line.partition(b";")[0], 16)
                head += line + (await self.reader.readexactly(size + 2) if size else b"")
            while line != b"\r\n":
                line = await self.reader.readuntil(b"\r\n")
                head += line
            return Reply(head)

    async def rest(self) -> bytes:
        """Read until the proxy closes; a reset ends it as well."""
        data = b""
        async with asyncio.timeout(PATIENCE_S):
            try:
                while more := await self.reader.read(65536):
                    data += more
            except ConnectionError:
                self.was_reset = True
        return data

    was_reset = False

    async def ask(self, data: bytes) -> Reply:
        await self.send(data)
        return await self.reply()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


class Stand:
    """A proxy, its routes, fake workers and clients."""

    def __init__(self, *, workers: int = 1, api_keys: tuple[str, ...] = (), **config: Any) -> None:
        self.config = ProxyConfig(**{"listen": ("127.0.0.1:0",), **QUICK, **config})
        self.routes = Routes(queue_limit=self.config.queue_limit, in_flight_limit=self.config.in_flight_limit)
        self.failures: list[tuple[str, FailureKind]] = []
        self.routes.on_failure = lambda worker, kind: self.failures.append((worker, kind))
        self.routes.set_catalog({CHAT: CatalogEntry(aliases=("gpt",), outlook=Outlook(note="2 workers are loading"))})
        self.proxy = Proxy(self.config, self.routes, api_keys=api_keys)
        self.workers = [FakeWorker(f"w{number}") for number in range(workers)]
        self.dialogs: list[Dialog] = []

    async def start(self) -> None:
        for worker in self.workers:
            await worker.start()
            self.routes.add(self.backend(worker))
        await self.proxy.start()

    def backend(self, worker: FakeWorker, **changes: Any) -> Backend:
        fields = {"worker": WorkerId(worker.name), "model": CHAT, "host": "127.0.0.1", "port": worker.port}
        return Backend(**{**fields, **changes})

    @property
    def worker(self) -> FakeWorker:
        return self.workers[0]

    @property
    def port(self) -> int:
        return int(self.proxy.addresses[0].rpartition(":")[2])

    async def dial(self) -> Dialog:
        dialog = Dialog(*await asyncio.open_connection("127.0.0.1", self.port))
        self.dialogs.append(dialog)
        return dialog

    async def ask(self, data: bytes) -> Reply:
        dialog = await self.dial()
        reply = await dialog.ask(data)
        dialog.close()
        return reply

    def leases(self) -> int:
        return sum(self.routes.in_flight(WorkerId(worker.name)) for worker in self.workers)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - what is awaited lies in several objects without events
                await asyncio.sleep(0.002)

    async def finish(self) -> None:
        """Close the clients; then nobody may hold anything."""
        for dialog in self.dialogs:
            dialog.close()
        try:
            await self.until(lambda: self.leases() == 0 and self.routes.waiting(CHAT) == 0)
        finally:
            await self.proxy.stop(5.0)
            for worker in self.workers:
                await worker.stop()
