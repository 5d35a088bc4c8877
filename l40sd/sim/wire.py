"""Just enough HTTP/1.1 for the simulated engine: heads, bodies, chunks, and how to break each of them."""

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, whole; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle_s: float) -> Request | None:
    """Return the connection's next request; None when it has ended, said nothing for too long, or made no sense."""
    try:
        async with asyncio.timeout(idle_s):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.rstrip("\r\n").split("\r\n")
            method, target, _ = first.split(" ")
            pairs = (line.partition(":") for line in lines)
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            if headers.get("expect", "").lower() == "100-continue":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await _read_body(reader, headers)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, TimeoutError, ValueError):
        return None
    return Request(method=method, path=target.partition("?")[0], headers=headers, body=body)


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    body = bytearray()
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    while (await reader.readline()).strip():
        pass
    return bytes(body)


class Reply:
    """Writes one reply. ``text`` and ``json`` are whole; ``start``, ``event``... and ``end`` stream."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def json(self, status: int, value: Any) -> None:
        """Send a whole JSON reply."""
        await self.text(status, json.dumps(value), "application/json")

    async def error(self, status: int, message: str, code: str) -> None:
        """Send an error in OpenAI's shape."""
        kind = "invalid_request_error" if status < 500 else "internal_server_error"
        await self.json(status, {"error": {"message": message, "type": kind, "param": None, "code": code}})

    async def text(self, status: int, text: str, content_type: str = "text/plain; charset=utf-8") -> None:
        """Send a whole reply."""
        body = text.encode()
        await self._send(_head(status, content_type, f"content-length: {len(body)}") + body)

    async def start(self) -> None:
        """Send the head of a stream of events."""
        await self._send(_head(200, "text/event-stream; charset=utf-8", "transfer-encoding: chunked"))

    async def event(self, text: str) -> None:
        """Send one event, as one chunk."""
        data = f"data: {text}\n\n".encode()
        await self._send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        """End a stream as it should end."""
        await self._send(b"0\r\n\r\n")

    async def half(self) -> None:
        """Promise a body and leave in the middle of it."""
        await self._send(_head(200, "application/json", "content-length: 1000") + b'{"id": "half')
        self._writer.close()

    async def half_event(self) -> None:
        """Send half an event in half a chunk, within a character, in a stream that has begun."""
        half = 'data: {"id": "half", "choices": [{"index": 0, "delta": {"content": "\u00fc'.encode()[:-1]
        await self._send(b"%x\r\n%s" % (2 * len(half), half))

    async def bad_chunk(self) -> None:
        """Send a chunk whose size is no number, in a stream that has begun."""
        await self._send(b"zz\r\nnot a chunk\r\n")

    def leave(self) -> None:
        """Close the connection where it stands."""
        self._writer.close()

    def reset(self) -> None:
        """Close the connection with a RST instead of a FIN."""
        transport_socket = self._writer.get_extra_info("socket")
        transport_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


def _head(status: int, content_type: str, framing: str) -> bytes:
    reason = _REASONS.get(status, "Status")
    return f"HTTP/1.1 {status} {reason}\r\ncontent-type: {content_type}\r\n{framing}\r\n\r\n".encode()
