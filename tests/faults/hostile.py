"""What a client can send to hold up the others: descriptors, turns of the loop, memory."""

import asyncio
import contextlib
import time

import psutil
from daemonkit import Site, pids

from faults.clients import chat, connect, connected, request, until_closed
from faults.rig import PACED, Rig, ask, check, until
from faults.suite import Outcome, fault
from l40sd.proxy.descriptors import RESERVED

DESCRIPTORS = 1024
PRESSED_S = 8.0
HELD_S = 3.0
MIB = 1 << 20


@fault(
    69,
    "as many requests and unfinished heads as there are file descriptors",
    how="a limit of 1024 for the daemon, 460 streams at once, then for 8 s 700 connections at a time that send half a"
    " head and stay",
    expected="Who is over gets 503 or is closed; the streams that were begun go on; control socket, probes and state"
    " find their descriptors, and the daemon stays.",
    promise="at once",
    within_s=None,
)
async def requests_for_all_descriptors(rig: Rig) -> Outcome:
    site = rig.site(
        count=2,
        args=("--tokens-per-s", "10"),
        proxy={"address_connection_limit": 100_000, "client_header_timeout_s": 600.0},
        prefix=("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"),
    )
    before = await rig.serve(site)
    assert site.daemon is not None
    daemon = psutil.Process(site.daemon.pid)
    began = time.monotonic()
    streams = [await connect(site) for _ in range(460)]
    for _, writer in streams:
        writer.write(request(chat(60, stream=True)))
    answers = await asyncio.gather(*(reader.read(12) for reader, _ in streams), return_exceptions=True)
    served = [at for at, answer in enumerate(answers) if answer == b"HTTP/1.1 200"]
    refused = [answer for answer in answers if answer == b"HTTP/1.1 503"]
    check(len(served) >= 300, f"{len(served)} served, {len(refused)} refused")
    async with asyncio.TaskGroup() as group:
        pressing = [group.create_task(press(site)) for _ in range(700)]
        until_s = time.monotonic() + PRESSED_S
        most = 0
        while time.monotonic() < until_s:
            status = await site.status()
            most = max(most, daemon.num_fds())
            check(all(worker.phase == "ready" for worker in status.workers), "probes go on")
            check(not status.degraded, status.degraded)
        for task in pressing:
            task.cancel()
    check(most < DESCRIPTORS - RESERVED // 2, f"{most} of {DESCRIPTORS} descriptors were taken")
    ends = await asyncio.gather(*(until_closed(streams[at][0], 60) for at in served[:100]), return_exceptions=True)
    # They end whole although the connection stays: the last chunk is what says so, and the idle time closes it.
    check(all(isinstance(end, bytes) and end.endswith(b"0\r\n\r\n") for end in ends), "a stream was cut")
    for _, writer in streams:
        writer.close()

    async def is_served() -> bool:
        with contextlib.suppress(Exception):
            return (await ask(site, timeout_s=2))[0] == 200
        return False

    await until(is_served, "requests are answered again", 20)
    after = await site.status()
    check(pids(after) == pids(before), "no worker was touched")
    note = f"{len(served)} of 460 served, {len(refused)} refused with 503, {most} descriptors at most"
    return Outcome(took_s=time.monotonic() - began, lost=460 - len(served), note=note)


async def press(site: Site) -> None:
    """Hold a connection with half a head, whatever it is told, and then another one."""
    while True:
        with contextlib.suppress(OSError):
            async with connected(site) as (_, writer):
                writer.write(b"GET /")
                await asyncio.sleep(HELD_S)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"


def with_length(head: bytes, body: bytes) -> bytes:
    """Return a request."""
    return HEAD + head + b"content-length: %d\r\n\r\n" % len(body) + body


HOSTILE = (
    with_length(
        b"content-type: multipart/form-data; boundary=b\r\n",
        b"--b\r\n" + b"content-disposition:" * 21_000 + b"\r\n\r\nx\r\n--b--\r\n",
    ),
    HEAD + b"connection: " + b",".join(b"%d" % number for number in range(5000)) + b"\r\n\r\n",
    HEAD + b"x:\r\n" * 3000 + b"\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"2\r\naa\r\n" * 100_000,
    with_length(b"", b'{"a":' + b"[" * 2000 + b"]" * 2000 + b',"model":"toy","b":{"c":{"d":1}}}'),
    with_length(b"", b'{"model":"' + b"n" * (4 * MIB) + b'"}'),
    b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 67108864\r\n\r\n" + b"x" * MIB,
)
"""Each once stopped the loop for 0.6 to over 30 s, ended without an answer, or was held whole."""


@fault(
    70,
    "requests that are made to keep the daemon busy",
    how="a form's head of 420 KB that repeats its field, 5000 names in Connection, 100,000 chunks of two bytes, 2,000"
    " levels of JSON, a name of 4 MiB, 2,000 requests in one go; streams meanwhile",
    expected="Each is refused with a reason (400, 404, 413, 431); no stream is lost, others are served meanwhile.",
    promise="at once",
    within_s=10.0,
)
async def busy_making(rig: Rig) -> Outcome:
    site = rig.site(count=2, args=PACED)
    await rig.serve(site)
    longest_s = 0.0
    async with rig.loaded(site) as tally, asyncio.TaskGroup() as group:
        began = time.monotonic()
        attack = group.create_task(all_hostile(site))
        while not attack.done():
            asked = time.monotonic()
            async with connected(site) as (reader, writer):
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                check((await until_closed(reader, 20)).startswith(b"HTTP/1.1 200"), "/health is answered")
            longest_s = max(longest_s, time.monotonic() - asked)
        took_s = time.monotonic() - began
    check(tally.lost == 0, f"{tally.lost} lost")
    return Outcome(took_s=took_s, note=f"the longest wait of another client for /health: {longest_s * 1000:.0f} ms")


async def all_hostile(site: Site) -> None:
    """Send each, one after the other, and see that it is answered."""
    for data in HOSTILE:
        async with connected(site) as (reader, writer):
            writer.write(data)
            async with asyncio.timeout(20):
                answer = await reader.readexactly(12)
            check(answer[:10] == b"HTTP/1.1 4", f"{data[:60]!r}: {answer!r}")
    count = 2000
    async with connected(site) as (reader, writer):
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * count)
        for _ in range(count):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))


@fault(
    71,
    "more bodies at once than there is memory for",
    how="40 clients send 7 MB each of 8 and stop; body_memory_bytes = 32 MiB",
    expected="As many as fit are kept, the others get 503 with Retry-After; small requests are served meanwhile, and"
    " all when the clients have gone.",
    promise="at once",
    within_s=None,
)
async def bodies_beyond_memory(rig: Rig) -> Outcome:
    site = rig.site(count=1, proxy={"body_memory_bytes": 32 * MIB, "body_limit_bytes": 8 * MIB})
    await rig.serve(site)
    assert site.daemon is not None
    process = psutil.Process(site.daemon.pid)
    before = process.memory_info().rss
    began = time.monotonic()
    clients = [await connect(site) for _ in range(40)]
    body = b'{"model": "toy", "prompt": "' + b"x" * (7 * MIB)
    for _, writer in clients:
        writer.write(request(body, length=8 * MIB))

    async def answer_of(reader: asyncio.StreamReader) -> bytes:
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(5):
                return await reader.readuntil(b"\r\n\r\n")
        return b""

    answers = await asyncio.gather(*(answer_of(reader) for reader, _ in clients))
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503") and b"retry-after:" in answer]
    held = process.memory_info().rss - before
    check(len(refused) >= 30, f"{len(refused)} of 40 were told to come again")
    check((await ask(site))[0] == 200, "a small request is served meanwhile")
    check(held < 3 * 32 * MIB, f"{held // MIB} MiB held")
    for _, writer in clients:
        writer.close()
    check((await ask(site))[0] == 200, "all is well again")
    note = f"{40 - len(refused)} of 40 kept, {held // MIB} MiB held"
    return Outcome(took_s=time.monotonic() - began, note=note)
