"""A daemon that hands over to the next: what becomes of its connections, its workers, and a stop meanwhile."""

import asyncio
import json
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemonkit import Site, SiteOf
from loadkit import Mix, load

from l40sd.errors import L40sError

SLOW = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "wide"
[models.toy]
engine = "simulated"
attention_heads = 8
args = ["--tokens-per-s", "40"]
[[patterns.wide.replicas]]
model = "toy"
tp = 4
count = 1
"""
ONE = """
[host]
numa_pinning = false
[workers]
gpu_free_timeout_s = 60
[daemon]
pattern = "A"
[models.toy]
engine = "simulated"
"""
FAKE_NVML = Path(__file__).resolve().parents[1] / "kit" / "fake_nvml.py"
PATIENCE_S = 30.0
PASS_ON = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3);"
    "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='proxy');"
    "os.execv(sys.argv[2], sys.argv[2:])"
)
"""What systemd does between fork and exec."""


def request(*, tokens: int, stream: bool) -> bytes:
    body = json.dumps({"model": "toy", "max_tokens": tokens, "stream": stream, "messages": []}).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


async def begin(site: Site) -> tuple[str, int]:
    """Start a site; return where its endpoint is."""
    await site.start()
    host, _, port = (await site.until_ready("wide", PATIENCE_S)).proxy.listen[0].rpartition(":")
    return host, int(port)


async def upgrade(site: Site, *, times: int = 1) -> None:
    """Let the daemon become the next one; return once that is ready."""
    ready = site.log_file.read_text().count("event=daemon.ready")
    for number in range(times):
        site.signal(signal.SIGUSR2)
        await asyncio.to_thread(wait_for_line, site, "event=daemon.ready", ready + number + 1)


def said(site: Site, event: str) -> list[str]:
    return [line for line in site.log_file.read_text().splitlines() if f"event={event} " in f"{line} "]


async def test_nobody_can_tell_that_the_daemon_became_another_three_times(site_of: SiteOf) -> None:
    site = site_of(SLOW)
    await site.start()
    before = await site.until_ready("wide", PATIENCE_S)
    assert site.daemon is not None
    pid, url = site.daemon.pid, await site.url()
    async with load(
        Mix(url=url, models=("toy",), streams=20, shorts=4, stream_tokens=60, timeout_s=PATIENCE_S)
    ) as tally:
        for _ in range(3):
            answered = tally.answered
            await until(lambda n=answered: tally.answered > n + 10 and tally.open == 24)
            await upgrade(site)
    after = await site.until_ready("wide", PATIENCE_S)
    assert site.daemon.poll() is None
    assert (site.daemon.pid, tally.lost, tally.examples) == (pid, 0, [])
    assert [worker.pid for worker in after.workers] == [worker.pid for worker in before.workers]
    assert [worker.in_flight for worker in after.workers] == [0]
    assert all("lost=0" in line for line in said(site, "daemon.handing_over"))
    carried = [re.findall(r"in_flight=(\d+)", line) for line in said(site, "daemon.handing_over")]
    assert len(carried) == 3
    assert all(int(count) >= 20 for [count] in carried), "the streams went through the exec"


async def test_a_connection_that_was_told_it_stays_does_so_over_an_upgrade(site_of: SiteOf) -> None:
    """It was closed with the last byte of the stream at hand, and clients that went straight on lost their next
    request: 23 of 65 streams in a long run over upgrades."""
    site = site_of(SLOW)
    address = await begin(site)
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request(tokens=40, stream=True))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head
        await upgrade(site)
        await reader.readuntil(b"data: [DONE]\n\n")
        await reader.readuntil(b"\r\n0\r\n\r\n")
        await upgrade(site)
        writer.write(request(tokens=2, stream=False))
        reply = await reader.readuntil(b"\r\n\r\n")
        writer.close()
    assert reply.startswith(b"HTTP/1.1 200")
    assert b"connection: close" not in reply


async def test_a_stop_during_an_upgrade_is_a_stop(site_of: SiteOf) -> None:
    """It was lost: a service manager would have waited for its timeout, and killed the daemon without its workers."""
    site = site_of(SLOW)
    address = await begin(site)
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request(tokens=120, stream=True))
        await reader.readuntil(b"\r\n\r\n")
        site.signal(signal.SIGUSR2)
        await asyncio.to_thread(wait_for_line, site, "event=daemon.upgrading")
        assert await site.stop(PATIENCE_S) == 0
        assert b"data: [DONE]" in await reader.read(), "a stop lets streams end as well"
        writer.close()
    assert site.leftovers() == []


async def test_an_upgrade_to_a_release_that_would_not_start_changes_nothing(site_of: SiteOf) -> None:
    site = site_of(SLOW)
    address = await begin(site)
    good = site.config_file.read_text()
    site.config_file.write_text(good.replace("tp = 4", "tp = -4"))
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request(tokens=40, stream=True))
        await reader.readuntil(b"\r\n\r\n")
        with pytest.raises(L40sError) as refused:
            await site.post("/v1/upgrade")
        assert b"data: [DONE]" in await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()
    assert refused.value.code == "upgrade_refused"
    assert "tp" in refused.value.what
    assert (await site.until_event("daemon.upgrade.failed", PATIENCE_S)).level == "error"
    assert len(said(site, "daemon.starting")) == 1
    site.config_file.write_text(good)
    await upgrade(site)
    assert len(said(site, "daemon.starting")) == 2


async def test_a_client_that_never_reads_is_named_as_lost_and_bounds_the_upgrade(site_of: SiteOf) -> None:
    site = site_of(SLOW.replace("[host]", "[proxy]\nhandover_timeout_s = 0.5\n[host]").replace('"40"', '"0"'))
    host, port = await begin(site)
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect((host, port))
    deaf.sendall(request(tokens=200_000, stream=True))
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(is_stuck, deaf):
            assert (await site.status()).proxy.in_flight == 1
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(request(tokens=2, stream=False))
        await reader.readuntil(b"\r\n\r\n")
        await upgrade(site)
        writer.close()
    deaf.close()
    [line] = said(site, "proxy.connection_lost")
    assert "its client does not read" in line
    [handed] = said(site, "daemon.handing_over")
    assert "connections=1" in handed
    assert "lost=1" in handed
    [took] = re.findall(r"took_s=([0-9.]+)", handed)
    assert 0.4 < float(took) < 5


def is_stuck(client: socket.socket) -> bool:
    """Whether what the daemon has for this client stays with its kernel: then more of it is in the daemon itself."""
    ours, theirs = client.getsockname()[1], client.getpeername()[1]
    sizes = set()
    for _ in range(5):
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, queues, *_ = line.split()
            if local.endswith(f":{theirs:04X}") and remote.endswith(f":{ours:04X}"):
                sizes.add(int(queues.partition(":")[0], 16))
        time.sleep(0.1)
    return len(sizes) == 1 and sizes != {0}


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - what is awaited are counts of many lanes
            await asyncio.sleep(0.01)


async def test_a_stop_in_the_middle_of_an_exec_is_a_stop(site_of: SiteOf) -> None:
    site = site_of(SLOW)
    await site.start()
    await site.until_ready("wide", PATIENCE_S)
    site.signal(signal.SIGUSR2)
    await asyncio.to_thread(wait_for_line, site, "daemon.handing_over")
    assert await site.stop(PATIENCE_S) == 0
    assert site.leftovers() == []


async def test_a_pattern_that_was_accepted_is_not_lost_with_the_daemon(site_of: SiteOf) -> None:
    site = site_of(SLOW + '[[patterns.pair.replicas]]\nmodel = "toy"\ntp = 2\ncount = 1\n')
    await site.start()
    for pattern in ("pair", "wide", "pair"):
        await site.request(pattern)
        await site.kill()
        await site.start()
        assert (await site.status()).pattern == pattern
    await site.until_ready("pair", PATIENCE_S)


def free_address() -> str:
    """Return an address that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def models_at(address: str) -> bytes:
    """Ask for the models; return the first line of the answer."""
    async with asyncio.timeout(PATIENCE_S):
        if address.startswith("unix:"):
            reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n")
        line = await reader.readline()
        writer.close()
    return line


async def upgraded(site: Site) -> tuple[str, ...]:
    """Upgrade the daemon in place; return where it listens then."""
    asked_at_s = time.monotonic()
    site.signal(signal.SIGUSR2)
    await site.until(lambda s: s.uptime_s < time.monotonic() - asked_at_s, "it is another", PATIENCE_S)
    return (await site.status()).proxy.listen


async def test_an_upgrade_listens_where_the_configuration_says_by_then(site_of: SiteOf) -> None:
    """The old address went on being served, and was reported beside the new one."""
    site = site_of(SLOW)
    old, new = free_address(), free_address()
    site.listen = old
    await site.start()
    await site.until_ready("wide", PATIENCE_S)
    site.listen = new
    site.write_config()
    assert await upgraded(site) == (new,)
    assert (await models_at(new)).startswith(b"HTTP/1.1 200")
    with pytest.raises(ConnectionRefusedError):
        await models_at(old)
    assert (await site.until_event("proxy.listener_closed", 5)).data["address"] == old


async def test_an_upgrade_leaves_a_unix_socket_where_it_is(site_of: SiteOf, tmp_path: Path) -> None:
    """Its file was removed with the old daemon, and nobody could reach the new one, which said that it listened."""
    site = site_of(SLOW)
    path = tmp_path / "proxy.sock"
    site.listen = f"unix:{path}"
    await site.start()
    await site.until_ready("wide", PATIENCE_S)
    assert await upgraded(site) == (site.listen,)
    assert (await models_at(site.listen)).startswith(b"HTTP/1.1 200")
    assert await site.stop() == 0
    assert not path.exists()


async def test_a_listener_of_systemd_is_served_whatever_the_configuration_says_and_that_is_said(
    site_of: SiteOf,
) -> None:
    """It cannot be closed: systemd has it, too, and clients would wait in a line that nobody reads."""
    site = site_of(SLOW)
    with socket.create_server(("127.0.0.1", 0)) as lent:
        address = f"127.0.0.1:{lent.getsockname()[1]}"
        site.listen = address
        site.pass_fds = (lent.fileno(),)
        site.prefix = (sys.executable, "-S", "-E", "-c", PASS_ON, str(lent.fileno()))
        await site.start()
        await site.until_ready("wide", PATIENCE_S)
        assert (await site.status()).proxy.listen == (address,)
        new = free_address()
        site.listen = new
        site.write_config()
        for _ in range(2):  # whose it is, is known after another upgrade as well
            assert await upgraded(site) == (address, new)
            assert (await models_at(address)).startswith(b"HTTP/1.1 200")
            assert (await models_at(new)).startswith(b"HTTP/1.1 200")
            warning = await site.until_event("proxy.listener_not_configured", 5)
            assert warning.data["address"] == address
            assert "l40sd.socket" in str(warning.data["hint"])


def wait_for_line(site: Site, word: str, times: int = 1) -> None:
    """Return once the daemon's log has this word so often; the control socket may be closed by then."""
    deadline_s = time.monotonic() + PATIENCE_S
    while site.log_file.read_text().count(word) < times:
        assert time.monotonic() < deadline_s, site.tail()
        time.sleep(0.001)


async def test_a_stop_does_not_wait_for_a_start_under_way(site_of: SiteOf, tmp_path: Path) -> None:
    """A stop right after a start took spawn_timeout_s, or here gpu_free_timeout_s. Seen under systemd, which starts no
    worker's unit while it stops the daemon: the daemon waited for shims that were to come after its end.
    """
    facts = tmp_path / "nvml.json"
    taken = {"uuid": "GPU-0", "busId": "00000000:3B:00.0", "total": 48 << 30, "used": 12 << 30}
    facts.write_text(json.dumps({"gpus": [taken]}))
    site = site_of(ONE)
    site.environ = {"L40SD_NVML_LIBRARY": str(FAKE_NVML), "FAKE_NVML": str(facts)}
    await site.start()
    await site.until_event("worker.spawning", PATIENCE_S)
    began_s = time.monotonic()
    assert await site.stop(PATIENCE_S) == 0
    assert time.monotonic() - began_s < 10
    assert site.leftovers() == []
