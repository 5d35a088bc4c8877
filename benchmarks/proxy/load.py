"""Keeps connections busy for a while and says how much came back.

python -m benchmarks.proxy.load requests|events PORT CONNECTIONS RATE WARM_S MEASURE_S PID...

One line of JSON: items, the CPU seconds that the processes PID spent meanwhile, and events per read (above 1 the
proxy fell behind and events merged).
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import uvloop

BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 960 + b'"}]}'
FIELDS = (
    b"Host: 127.0.0.1\r\nConnection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
    b"User-Agent: OpenAI/Python 2.0.0\r\nAuthorization: Bearer sk-none\r\n"
)


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it was answered, with a body a little longer or shorter each time."""

    requests = 0
    events = 0
    reads = 0

    def __init__(self, extra: bytes) -> None:
        self.extra = extra
        self.turn = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first time."""
        self.transport = transport
        self.tail = b""
        self.left = 0
        self.ask()

    def ask(self) -> None:
        """Send a request."""
        self.turn += 1
        body = BODY + b" " * (self.turn % 97)
        self.transport.write(
            b"POST /v1/chat/completions HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b"
            % (FIELDS, self.extra, len(body), body)
        )

    def data_received(self, data: bytes) -> None:
        """Count; ask again at the end of a reply. A refusal ends the measurement."""
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            sys.exit(f"refused: {data[:300]!r}")
        if self.extra:
            Client.reads += 1
            Client.events += data.count(b"data: ")
            self.tail = (self.tail + data)[-5:]
            if self.tail == b"0\r\n\r\n":
                self.ask()
            return
        if not self.left:
            self.left = 1024 + data.index(b"\r\n\r\n") + 4
        self.left -= len(data)
        if not self.left:
            Client.requests += 1
            self.ask()


def cpu_s(pids: list[str]) -> float:
    """Return the CPU seconds that these processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def main(
    kind: str, port: int, connections: int, rate: int, warm_s: float, measure_s: float, pids: list[str]
) -> None:
    """Run one measurement."""
    loop = asyncio.get_running_loop()
    extra = b"x-events: 1000000\r\nx-rate: %d\r\n" % rate if kind == "events" else b""
    for _ in range(connections):
        await loop.create_connection(lambda: Client(extra), "127.0.0.1", port)
    await asyncio.sleep(warm_s)
    items, reads, used = Client.requests + Client.events, Client.reads, cpu_s(pids)
    await asyncio.sleep(measure_s)
    used = cpu_s(pids) - used
    items = Client.requests + Client.events - items
    per_read = items / max(1, Client.reads - reads) if kind == "events" else 1.0
    sys.stdout.write(json.dumps({"items": items, "cpu_s": used, "events_per_read": per_read}) + "\n")


if __name__ == "__main__":
    kind, *numbers = sys.argv[1:7]
    port, connections, rate, warm, measure = map(float, numbers)
    uvloop.run(main(kind, int(port), int(connections), int(rate), warm, measure, sys.argv[7:]))
