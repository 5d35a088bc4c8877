"""Connections opened without end while the daemon is upgraded, restarted and killed: none is refused, and few are cut.

The socket unit's part is ours: we hold the listening socket and pass it on as systemd does (sd_listen_fds(3)), so a
connection that finds no daemon waits in the socket's queue for the next one.
"""

import asyncio
import json
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loadkit import Mix, load

from soak.ground import Broken, Ground

LANES = 4
STREAMS = 3
STREAM_TOKENS = 60
"""At 50 tokens a second: longer than an upgrade takes, so every upgrade meets streams."""
TOKENS = 2
WAIT_S = 30.0
EACH_S = 2.0
BACKLOG = 4096
LISTEN_FD = 3
PASS_ON = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3);"
    "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='proxy');"
    "os.execv(sys.argv[2], sys.argv[2:])"
)
"""What systemd does between fork and exec; LISTEN_PID is the daemon's own pid, which an exec keeps."""


@dataclass(slots=True, kw_only=True)
class Account:
    """What became of the connections; ``cut``: after it was accepted, by a daemon that was killed."""

    answered: int = 0
    refused: int = 0
    longest_s: float = 0.0
    cut: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)


async def knock(port: int, account: Account, stop: asyncio.Event) -> None:
    """Open a connection, ask for a short reply and close it, again and again."""
    body = json.dumps({"model": "toy", "max_tokens": TOKENS, "messages": [{"role": "user", "content": "hi"}]})
    request = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\nconnection: close\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    ).encode()
    while not stop.is_set():
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(WAIT_S):
                reply = await _ask_once(port, request)
        except ConnectionRefusedError:
            account.refused += 1
        except (ConnectionError, EOFError) as error:
            account.cut[type(error).__name__] += 1
        except (TimeoutError, OSError) as error:
            account.failed[repr(error)] += 1
        else:
            head, _, text = reply.partition(b"\r\n\r\n")
            is_whole = head.startswith(b"HTTP/1.1 200") and _tokens(text) == TOKENS
            if is_whole:
                account.answered += 1
            elif not reply:
                account.cut["closed without a word"] += 1
            else:
                account.failed[reply[:200].decode("utf-8", "replace")] += 1
        account.longest_s = max(account.longest_s, time.monotonic() - began_s)


async def _ask_once(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        return await reader.read(1 << 20)
    finally:
        writer.close()


def _tokens(text: bytes) -> int:
    try:
        return int(json.loads(text)["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        return -1


async def connect(ground: Ground, listener: socket.socket, ways: tuple[str, ...], say: Callable[[str], None]) -> None:
    """Keep connecting while the daemon ends in each of these ways, one after the other.

    Raises:
        Broken: A connection was refused, something was cut that no kill cut, or a worker was touched.
    """
    port = listener.getsockname()[1]
    await ground.start()
    await ground.rest()
    account, stop = Account(), asyncio.Event()
    mix = Mix(url=f"http://127.0.0.1:{port}", models=("toy",), streams=STREAMS, shorts=0, stream_tokens=STREAM_TOKENS)
    try:
        async with load(mix) as tally, asyncio.TaskGroup() as lanes:
            try:
                for _ in range(LANES):
                    lanes.create_task(knock(port, account, stop))
                for way in ways:
                    answered, streamed, began_s = account.answered, tally.answered, time.monotonic()
                    await _until(lambda n=answered: account.answered > n + LANES, "connections are answered")
                    await _until(lambda n=streamed: tally.answered > n, "streams are answered")
                    lost, cut = tally.lost, account.cut.total()
                    ended_s = time.monotonic()
                    await _end(ground, way)
                    back_s = time.monotonic() - ended_s
                    await ground.rest()
                    say(
                        f"  {way}: answers again after {back_s:.2f} s; cut {account.cut.total() - cut} connections, "
                        f"{tally.lost - lost} streams ({ended_s - began_s:.1f} s of requests before)"
                    )
                await _until(lambda n=account.answered: account.answered > n + LANES, "connections are answered")
            finally:
                stop.set()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
    kills = ways.count("kill")
    cut = account.cut.total()
    say(f"connections: {account.answered} answered, {account.refused} refused, {cut} cut by {kills} kills")
    say(f"  longest wait {account.longest_s:.2f} s; streams: {tally.answered} whole, {tally.lost} cut")
    if account.refused or account.failed:
        raise Broken(f"{account.refused} refused; failed: {dict(account.failed)}")
    if cut > kills * LANES or tally.lost > kills * STREAMS:
        raise Broken(f"more was cut than {kills} kills can: {dict(account.cut)}, streams: {tally.examples}")


async def _end(ground: Ground, way: str) -> None:
    """End the daemon in this way and return when the next one answers."""
    match way:
        case "upgrade":
            await ground.upgrade()
        case "kill":
            await ground.kill()
            await ground.start()
        case _:
            raise ValueError(way)


async def _until(holds: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110 - what is awaited are counts of several lanes
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise Broken(f"not within {WAIT_S:g} s: {what}") from None


def listen() -> socket.socket:
    """Return the listening socket that outlives every daemon."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(BACKLOG)
    return listener


def soak(
    say: Callable[[str], None], *, ways: tuple[str, ...] = ("upgrade", "kill") * 3 + ("upgrade", "upgrade")
) -> None:
    """Connect without end over five upgrades and three kills of the daemon.

    Raises:
        Broken: A claim did not hold, or something is left behind.
    """
    with listen() as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        ground = Ground.make(Path(tempfile.mkdtemp(prefix="l40sd-soak-")), listen=address)
        ground.site.pass_fds = (listener.fileno(),)
        ground.site.prefix = (sys.executable, "-S", "-E", "-c", PASS_ON, str(listener.fileno()))

        async def run() -> None:
            await connect(ground, listener, ways, say)
            await ground.stop()

        try:
            asyncio.run(run())
        finally:
            left = ground.site.clear()
            say(f"left behind: {', '.join(left) or 'nothing'}")
    if left:
        raise Broken(f"left behind: {left}")
    shutil.rmtree(ground.folder)
