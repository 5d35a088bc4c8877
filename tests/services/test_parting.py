"""A daemon that hands over: what becomes of connections that were told they may be used again."""

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from l40sd.sim.site import Site

SiteOf = Callable[[str], Site]

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
FAKE_NVML = Path(__file__).resolve().parents[1] / "adapters" / "fake_nvml.py"
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


async def test_the_request_after_a_stream_that_an_upgrade_waited_for_is_answered(site_of: SiteOf) -> None:
    """The stream's head said that the connection stays; it was closed with the last byte, and clients that went
    straight on lost their next request: 23 of 65 streams in a long run over upgrades."""
    site = site_of(SLOW)
    await site.start()
    address = (await site.until_ready("wide", PATIENCE_S)).proxy.listen[0]
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request(tokens=40, stream=True))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head
        site.signal(signal.SIGUSR2)
        await reader.readuntil(b"data: [DONE]\n\n")
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(request(tokens=2, stream=False))
        reply = await reader.read()  # to the end: it is the connection's last
        writer.close()
    assert reply.startswith(b"HTTP/1.1 200")
    assert b"\r\nconnection: close\r\n" in reply


async def test_a_stop_while_an_upgrade_waits_for_a_stream_is_a_stop(site_of: SiteOf) -> None:
    """It was lost: a service manager would have waited for its timeout, and killed the daemon without its workers."""
    site = site_of(SLOW)
    await site.start()
    address = (await site.until_ready("wide", PATIENCE_S)).proxy.listen[0]
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request(tokens=120, stream=True))
        await reader.readuntil(b"\r\n\r\n")
        site.signal(signal.SIGUSR2)
        await site.until_event("daemon.upgrading", PATIENCE_S)
        assert (await site.status()).workers, "the operator is answered meanwhile"
        assert await site.stop(PATIENCE_S) == 0
        assert b"data: [DONE]" in await reader.read(), "a stop lets streams end as well"
        writer.close()
    assert site.leftovers() == []


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


def wait_for_line(site: Site, word: str) -> None:
    """Return once the daemon's log has this word; the control socket is closed by then."""
    deadline_s = time.monotonic() + PATIENCE_S
    while word not in site.log_file.read_text():
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
