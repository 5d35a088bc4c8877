"""Workers in one process that answer at once, or stream events at a steady rate.

python -m benchmarks.proxy.stub PORT...

A request's ``x-events: N`` and ``x-rate: R`` ask for N events, R a second.
"""

import asyncio
import re
import sys

import uvloop

PAD = b"y" * 150
PLAIN = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: 1024\r\n"
    b"content-type: application/json\r\n\r\n" + b'{"object":"chat.completion","x":"' + b"y" * 989 + b'"}'
)
STREAM = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
length = re.compile(rb"content-length: *(\d+)", re.IGNORECASE).search
asked = re.compile(rb"x-events: *(\d+)\r\nx-rate: *(\d+)", re.IGNORECASE).search


class Worker(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with nothing read."""
        self.transport = transport
        self.data = b""
        self.left = 0
        self.timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Answer every whole request."""
        self.data += data
        while (end := self.data.find(b"\r\n\r\n") + 4) > 3:
            found = length(self.data, 0, end)
            whole = end + (int(found[1]) if found else 0)
            if len(self.data) < whole:
                return
            wish = asked(self.data, 0, end)
            self.data = self.data[whole:]
            if wish is None:
                self.transport.write(PLAIN)
            else:
                self.transport.write(STREAM)
                self.left = int(wish[1])
                self.pause_s = 1 / int(wish[2])
                self.due_s = asyncio.get_running_loop().time()
                self.event()

    def event(self) -> None:
        """Send one event, and the next when it is due."""
        loop = asyncio.get_running_loop()
        event = b'data: {"t":%.6f,"x":"%b"}\n\n' % (loop.time(), PAD)
        self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        self.left -= 1
        if self.left:
            self.due_s += self.pause_s
            self.timer = loop.call_at(self.due_s, self.event)
        else:
            self.transport.write(b"0\r\n\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the stream."""
        if self.timer is not None:
            self.timer.cancel()


async def main(ports: list[int]) -> None:
    """Listen until killed."""
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(Worker, "127.0.0.1", port, backlog=4096)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main([int(port) for port in sys.argv[1:]]))
