"""What clients and engines do on the wire: slow, huge, gone, too many, broken; and who may use the control socket."""

import asyncio
import contextlib
import json
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import psutil
from daemonkit import Site, pids
from ssekit import decode

from faults.rig import PACED, Broken, Rig, ask, check, engine_state, kill, until, worker_of
from faults.suite import NotHereError, Outcome, fault
from l40sd.proxy.descriptors import share
from l40sd.sim.api import BREAKS


async def connect(site: Site) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a connection to the endpoint."""
    host, port = (await site.url()).removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def until_closed(reader: asyncio.StreamReader, timeout_s: float) -> bytes:
    """Return all that comes until the other side closes."""
    async with asyncio.timeout(timeout_s):
        with contextlib.suppress(ConnectionError):
            return await reader.read()
    return b""


@contextlib.asynccontextmanager
async def connected(site: Site) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection for as long as the block runs."""
    reader, writer = await connect(site)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(body: bytes, *fields: str, length: int | None = None) -> bytes:
    """Return a request's bytes."""
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(body) if length is None else length}",
        *fields,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def chat(tokens: int, *, stream: bool = False) -> bytes:
    """Return the body of a chat request."""
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"model": "toy", "messages": messages, "max_tokens": tokens, "stream": stream}).encode()


@fault(
    45,
    "clients that send their head or body a byte at a time, or without end",
    how="20 clients drip heads, 20 drip bodies (deadlines 1 s), one announces a body larger than the limit",
    expected="408 and closed at the deadline; 413 for a body over the limit; others are served meanwhile.",
    promise="head 10 s, body's silence 30 s",
    within_s=4.0,
)
async def slowloris(rig: Rig) -> Outcome:
    limits = {"client_header_timeout_s": 1.0, "client_body_timeout_s": 1.0, "body_limit_bytes": 100_000}
    site = rig.site(proxy=limits)
    await rig.serve(site)
    began = time.monotonic()

    async def drip(start: bytes) -> bytes:
        async with connected(site) as (reader, writer):
            writer.write(start)
            return await until_closed(reader, 15)

    starts = [b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-slow: "] * 20
    starts += [request(b'{"model": "toy", ', length=5000)] * 20
    async with asyncio.TaskGroup() as group:
        dripping = [group.create_task(drip(start)) for start in starts]
        check((await ask(site))[0] == 200, "others are served")
    took_s = time.monotonic() - began
    answers = [task.result()[:12] for task in dripping]
    check(set(answers) == {b"HTTP/1.1 408"}, set(answers))
    async with connected(site) as (reader, writer):
        writer.write(request(b"x" * 1000, length=10_000_000))
        check((await until_closed(reader, 10)).startswith(b"HTTP/1.1 413"), "a body over the limit is refused")
    return Outcome(took_s=took_s, note="40 clients")


@fault(
    46,
    "huge heads, 10,000 header fields",
    how="a head of 200 KB in one field; 10,000 fields",
    expected="431, closed; others are served.",
    within_s=3.0,
)
async def huge_heads(rig: Rig) -> Outcome:
    site = rig.site()
    await rig.serve(site)
    began = time.monotonic()
    heads = (
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-huge: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x-many: 1\r\n" * 10_000 + b"\r\n",
    )
    for head in heads:
        async with connected(site) as (reader, writer):
            writer.write(head)
            answer = await until_closed(reader, 10)
            check(answer.startswith(b"HTTP/1.1 431"), answer[:100])
    check((await ask(site))[0] == 200, "others are served")
    return Outcome(took_s=time.monotonic() - began)


@fault(
    47,
    "a client leaves in the middle of its stream: FIN, RST, half-closed",
    how="three streams of 100 s each, left in three ways",
    expected="The request to the engine is cancelled, its slot is free again.",
    promise="1 s",
    within_s=1.0,
)
async def client_leaves(rig: Rig) -> Outcome:
    site = rig.site(count=1, args=("--tokens-per-s", "20"))
    status = await rig.serve(site)
    longest_s = 0.0
    for turn, how in enumerate(("FIN", "RST", "half-closed")):
        reader, writer = await connect(site)
        writer.write(request(chat(2000, stream=True)))
        async with asyncio.timeout(10):
            await reader.readuntil(b"data: ")
        began = time.monotonic()
        match how:
            case "RST":
                sock: socket.socket = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            case "FIN":
                writer.close()
            case _:
                writer.write_eof()

        async def is_cut(cut: int = turn + 1) -> bool:
            state = await engine_state(status.workers[0])
            return state["cut"] == cut and state["running"] == 0

        await until(is_cut, f"the engine is rid of it: {how}", 10)
        longest_s = max(longest_s, time.monotonic() - began)
        writer.close()
        await site.until(lambda s: worker_of(s, s.workers[0].id).in_flight == 0, "no lease is left", 5)
    return Outcome(took_s=longest_s, note="the slowest of three ways to leave")


CROWD = """
import socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
crowd = []
for _ in range(count):
    crowd.append(socket.create_connection((host, port)))
print(len(crowd), flush=True)
sys.stdin.read()
"""


@fault(
    48,
    "10,000 idle connections",
    how="another process opens them and says nothing",
    expected="Memory stays bounded, the control socket answers; they are closed after their idle time.",
    promise="control socket: 99 of 100 below 100 ms",
    within_s=None,
)
async def idle_crowd(rig: Rig) -> Outcome:
    affordable = share(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 20_000).clients - 100
    count = min(2000 if rig.is_quick else 10_000, affordable)
    if count < 1000:
        raise NotHereError("needs a limit of 3000 file descriptors")
    stay_s = 6.0 if rig.is_quick else 20.0
    deadlines = {"client_header_timeout_s": stay_s, "client_idle_timeout_s": stay_s}
    site = rig.site(proxy={"address_connection_limit": 20_000, **deadlines})
    await rig.serve(site)
    assert site.daemon is not None
    process = psutil.Process(site.daemon.pid)
    before = process.memory_info().rss
    host, port = (await site.url()).removeprefix("http://").split(":")
    crowd = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CROWD,
        host,
        port,
        str(count),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert crowd.stdout is not None
    try:
        async with asyncio.timeout(60):
            check(int(await crowd.stdout.readline()) == count, "all are connected")
        began = time.monotonic()
        await site.until(lambda s: s.proxy.connections >= count, "all are accepted", 30)
        waits = []
        for _ in range(100):
            asked = time.monotonic()
            await asyncio.to_thread(site.client.get, "/v1/version", dict)
            waits.append(time.monotonic() - asked)
        grown = process.memory_info().rss - before
        check((await ask(site))[0] == 200, "a request is answered")
        await site.until(lambda s: s.proxy.connections < 10, "they are closed after their time", 40)
        took_s = time.monotonic() - began
    finally:
        crowd.kill()
        await crowd.wait()
    slow_ms = sorted(waits)[98] * 1000
    check(slow_ms < 300, f"the control socket's 99th of 100 took {slow_ms:.0f} ms")
    check(grown < 20_000 * count, f"{grown} bytes for {count} connections")
    note = f"{count} connections, {grown / count / 1024:.1f} KiB each, control socket's 99th of 100: {slow_ms:.0f} ms"
    return Outcome(took_s=took_s, note=note)


@fault(
    49,
    "file descriptors run out",
    how="a limit of 128 for the daemon, 200 clients that stay; a worker is killed meanwhile",
    expected="Some are kept for our own needs: who is over gets 503, probes, control socket and restarts go on;"
    " all is well when the clients leave.",
    promise="recovers by itself",
    within_s=None,
)
async def out_of_descriptors(rig: Rig) -> Outcome:
    site = rig.site(count=2, prefix=("prlimit", "--nofile=128:128"))
    before = await rig.serve(site)
    began = time.monotonic()
    crowd = [await connect(site) for _ in range(200)]
    mark = await rig.mark(site)
    kill(before.workers[0].pid)
    await rig.told(site, mark, "worker.ready", before.workers[0].id)
    status = await site.status()
    check(status.proxy.connections < 128, status.proxy)
    check(all(w.phase == "ready" for w in status.workers), "the other worker's probes went on")
    for _, writer in crowd:
        writer.close()

    async def is_served() -> bool:
        with contextlib.suppress(Exception):
            return (await ask(site, timeout_s=2))[0] == 200
        return False

    await until(is_served, "requests are answered again", 20)
    check(pids(await site.status())[before.workers[1].id] == before.workers[1].pid, "the other one was not touched")
    return Outcome(took_s=time.monotonic() - began)


@fault(
    50,
    "an engine's reply is cut, its chunks are broken, its connection is reset",
    how="a request that brings the break along, so that every try breaks: streamed and not, in three ways",
    expected="502 or an error event, never a hang, never a reply that looks whole; the worker is looked at.",
    promise="at once",
    within_s=10.0,
)
async def broken_replies(rig: Rig) -> Outcome:
    site = rig.site(count=1, args=PACED)
    await rig.serve(site)
    began = time.monotonic()
    for how in BREAKS:
        for stream in (False, True):
            await is_told_as_broken(site, how, stream=stream)
    await site.until(lambda s: s.workers[0].phase == "ready" and not s.workers[0].in_flight, "it serves on", 20)
    check((await ask(site))[0] == 200, "and answers")
    lost = 2 * len(BREAKS)
    return Outcome(
        took_s=time.monotonic() - began, lost=lost, note=f"each of the {lost} broken replies is told as broken"
    )


async def is_told_as_broken(site: Site, how: str, *, stream: bool) -> None:
    """Ask for a reply that will be broken, and see that the client is told.

    Raises:
        Broken: It was not.
    """
    try:
        code, text = await ask(site, tokens=6, stream=stream, timeout_s=10, simulate=how)
    except TimeoutError:
        raise Broken(f"{how}, streamed {stream}: a hang") from None
    except aiohttp.ClientError:
        return  # cut, and told as cut
    check(code != 200 or '"error"' in text, f"{how}, streamed {stream}: looks whole: {text}")


@fault(
    80,
    "an engine dies within an event, within a chunk, within a character",
    how="a request that brings it along; the same bytes are read by a client that knows no mercy",
    expected="The stream goes on with what makes the half event whole, with the error in it, then the error event; the"
    " last chunk does not come.",
    promise="at once",
    within_s=5.0,
)
async def half_an_event(rig: Rig) -> Outcome:
    site = rig.site(count=1, args=PACED)
    await rig.serve(site)
    began = time.monotonic()
    body = json.dumps({"model": "toy", "messages": [], "stream": True, "max_tokens": 6, "simulate": "half-event"})
    async with connected(site) as (reader, writer):
        writer.write(request(body.encode()))
        said = (await until_closed(reader, 10)).partition(b"\r\n\r\n")[2]
    took_s = time.monotonic() - began
    check(not said.endswith(b"0\r\n\r\n"), "it does not look whole")
    events = [event.json for event in decode(chunks_so_far(said))]
    codes = [event.get("error", {}).get("code") for event in events]
    check(codes == [None, None, "worker_failed", "worker_failed"], f"two tokens, then the error: {events}")
    await site.until(lambda s: s.workers[0].phase == "ready" and not s.workers[0].in_flight, "it serves on", 20)
    return Outcome(took_s=took_s, lost=1, note="every event is JSON, and the error is in the half one too")


def chunks_so_far(data: bytes) -> bytes:
    """Return what is in the chunks of a body that does not end."""
    body = b""
    while data:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        body, data = body + data[:size], data[size + 2 :]
    return body


@fault(
    62,
    "a client of the control socket dies in the middle, or never reads",
    how="half a request, a request whose answer nobody reads, 50 followers of the events that do not read",
    expected="What was asked for goes on; a reader that does not read is dropped; others are answered.",
    promise="within 30 s of silence",
    within_s=20.0,
)
async def bad_admins(rig: Rig) -> Outcome:
    extra = '[[patterns.pairs.replicas]]\nmodel = "toy"\ncount = 2\ntp = 2\n'
    site = rig.site(extra=extra)
    await rig.serve(site)
    began = time.monotonic()

    def half() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(site.socket))
        return sock

    first = half()
    first.sendall(b"POST /v1/pattern HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    first.close()
    second = half()
    body = b'{"name": "pairs"}'
    second.sendall(b"POST /v1/pattern HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    second.close()
    followers = [half() for _ in range(50)]
    for follower in followers:
        follower.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        follower.sendall(b"GET /v1/events?follow=1&since=0 HTTP/1.1\r\nhost: x\r\n\r\n")
    await site.until_ready("pairs", 30)
    for turn in range(10):
        await site.post(f"/v1/workers/{(await site.status()).workers[0].id}/restart")
        await asyncio.sleep(0.01 * turn)
    await site.until_ready("pairs", 30)
    took_s = time.monotonic() - began
    for follower in followers:
        follower.close()
    return Outcome(took_s=took_s, note="the change that a dead client asked for was made")


INTRUDER = """
import http.client, os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    print("EACCES"); sys.exit()
sock.sendall(b"POST /v1/reload HTTP/1.1\\r\\nhost: x\\r\\ncontent-length: 0\\r\\nconnection: close\\r\\n\\r\\n")
print(sock.makefile("rb").readline().split()[1].decode())
"""


@fault(
    63,
    "an unprivileged user at the control socket",
    how="uid 65534; a second time with the file's mode opened by somebody's chmod",
    expected="The kernel does not let them in; where it would, they get 403: the peer's uid is asked of the kernel.",
    within_s=3.0,
)
async def intruder(rig: Rig) -> Outcome:
    if os.geteuid() != 0:
        raise NotHereError("needs root to become somebody else")
    site = rig.site(count=1)
    await rig.serve(site)
    for path in (rig.folder, site.folder, site.socket.parent):
        path.chmod(0o755)
    began = time.monotonic()
    check(await intrude(site) == "EACCES", "the mode keeps them out")
    site.socket.chmod(0o666)
    said = await intrude(site)
    check(said == "403", said)
    took_s = time.monotonic() - began
    mode: Any = site.socket.stat().st_mode
    check(mode, "it is there")
    return Outcome(took_s=took_s)


async def intrude(site: Site) -> str:
    """Return what uid 65534 gets."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTRUDER, str(site.socket), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return said.decode().strip()
