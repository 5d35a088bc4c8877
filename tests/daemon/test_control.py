"""The control socket of a real daemon: who may ask, what is refused, what can be followed."""

import asyncio
import http.client
import json
import os
import socket
import stat
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from daemonkit import Site, SiteOf
from stranger import BECOME, passable

from l40sd.control.messages import Check, PatternView, Topology
from l40sd.control.server import CONNECTION_LIMIT
from l40sd.errors import L40sError

TOY = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "C"
[models.toy]
engine = "simulated"
attention_heads = 8
"""


class OverUnix(http.client.HTTPConnection):
    """Plain HTTP on a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("l40sd", timeout=10)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(self._path)


def ask(path: Path, method: str, target: str, body: bytes | None = None) -> tuple[int, dict[str, object]]:
    """Return the status and the JSON of one request."""
    connection = OverUnix(path)
    try:
        connection.request(method, target, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


async def refused(site: Site, method: str, target: str, body: bytes | None = None) -> tuple[int, str]:
    """Return the status and the error's code of a request that must be refused."""
    status, answer = await asyncio.to_thread(ask, site.socket, method, target, body)
    error = answer["error"]
    assert isinstance(error, dict)
    assert error["what"]
    return status, str(error["code"])


def has_ended(connection: OverUnix) -> bool:
    """Whether the daemon has closed a connection; what it said is read and dropped."""
    connection.sock.setblocking(False)
    try:
        while connection.sock.recv(65536):
            pass
    except BlockingIOError:
        return False
    return True


@pytest.fixture
async def site(site_of: SiteOf) -> Site:
    site = site_of(TOY)
    await site.start()
    return site


async def test_what_is_not_understood_is_refused_with_a_reason(site: Site) -> None:
    assert await refused(site, "GET", "/v1/nothing") == (404, "not_found")
    assert await refused(site, "PUT", "/v1/status") == (405, "not_found")
    assert await refused(site, "POST", "/v1/pattern", b"{") == (400, "bad_request")
    assert await refused(site, "POST", "/v1/pattern", b'{"name": 7}') == (400, "bad_request")
    assert await refused(site, "POST", "/v1/pattern", b'{"name": "Z"}') == (404, "unknown_pattern")
    assert await refused(site, "GET", "/v1/operations/none") == (404, "unknown_operation")
    assert await refused(site, "GET", "/v1/workers/none") == (404, "unknown_worker")
    assert await refused(site, "GET", "/v1/events?since=soon") == (400, "bad_request")
    for number in ("%C2%B2", "%D9%A3", "9" * 5000, "-1", "+1", ""):
        assert await refused(site, "GET", f"/v1/events?since={number}") == (400, "bad_request"), number
    assert await refused(site, "POST", "/v1/pattern", b"[" * 30_000) == (400, "bad_request")
    assert await refused(site, "POST", "/v1/pattern", b'{"name": "\xff"}') == (400, "bad_request")
    assert await refused(site, "POST", "/v1/reload", b" " * 70_000) == (413, "bad_request")
    status = await site.until_ready("C", 30)
    assert await refused(site, "GET", f"/v1/workers/{status.workers[0].id}/logs?tail=%C2%B2") == (400, "bad_request")
    assert await refused(site, "POST", f"/v1/workers/{status.workers[0].id}/dance") == (400, "bad_verb")


async def test_what_is_shown_of_a_host_is_complete(site: Site) -> None:
    topology = await site.get("/v1/topology", Topology)
    assert len(topology.gpus) == len(topology.matrix) == 8
    assert all(row[n] == "X" for n, row in enumerate(topology.matrix))
    views = {view.name: view for view in await site.get("/v1/patterns", list[PatternView])}
    assert {"A", "B", "C", "D"} <= views.keys()
    assert views["C"].is_current
    assert views["B"].summary == "4 x toy TP2"
    checks = await site.get("/v1/doctor", list[Check])
    assert {check.state for check in checks} <= {"ok", "warning", "failed"}
    assert any(check.name == "provider" for check in checks)


async def test_the_socket_is_private_from_the_first_instant(site: Site) -> None:
    assert stat.S_IMODE(site.socket.stat().st_mode) == 0o660


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
async def test_a_stranger_who_reaches_the_socket_all_the_same_is_told_to_go(site: Site) -> None:
    """Credentials are the kernel's word, whatever the file's mode lets through.

    Fault 63 of docs/what-happens-when.md.
    """
    site.socket.chmod(0o666)
    program = (
        f"import socket, sys; {BECOME}"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "s.sendall(b'POST /v1/reload HTTP/1.1\\r\\nhost: x\\r\\ncontent-length: 0\\r\\n\\r\\n'); print(s.recv(4096))"
    )
    with passable(site.socket):
        said = await asyncio.to_thread(
            subprocess.check_output, [sys.executable, "-c", program, str(site.socket)], text=True, timeout=20
        )
    assert "403" in said
    assert "may not control" in said


async def test_a_deleted_socket_comes_back(site: Site) -> None:
    """Fault 19 of docs/what-happens-when.md."""
    site.socket.unlink()
    await site.until(lambda _: site.socket.exists(), "bound again", 30)


async def test_events_are_numbered_without_gaps_and_can_be_followed(site: Site) -> None:
    await site.until_ready("C", 30)
    events = await site.events()
    assert [e.seq for e in events] == list(range(events[0].seq, events[0].seq + len(events)))
    last = events[-1].seq

    def next_event() -> dict[str, object]:
        connection = OverUnix(site.socket)
        connection.request("GET", f"/v1/events?since={last}&follow=1")
        line = connection.getresponse().readline()
        connection.close()
        return dict(json.loads(line))

    waiting = asyncio.create_task(asyncio.to_thread(next_event))  # noqa: TID251  awaited below
    os.kill((await site.status()).workers[0].pid or 0, 9)
    event = await asyncio.wait_for(waiting, 20)
    assert event["seq"] == last + 1


async def test_a_follower_that_never_reads_does_not_hold_the_daemon_up(site: Site) -> None:
    """Fault 62 of docs/what-happens-when.md."""
    idle = [OverUnix(site.socket) for _ in range(20)]
    for connection in idle:
        connection.connect()
        connection.sock.sendall(b"GET /v1/events?follow=1 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await site.until_ready("C", 30)).pattern == "C"
    for connection in idle:
        connection.close()


async def test_connections_that_say_nothing_end_and_a_follower_stays(site: Site) -> None:
    """Seen: a thousand silent connections stayed for ever, until the endpoint had no descriptor left."""
    said = [
        b"",
        b"GET /v1/status HTTP/1.1\r\nhost: x",
        b"POST /v1/pattern HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n{",
        b"GET /v1/version HTTP/1.1\r\nhost: x\r\n\r\n",
    ]
    follower, *silent = [OverUnix(site.socket) for _ in range(1 + len(said))]
    for connection, words in zip(
        (follower, *silent), (b"GET /v1/events?follow=1 HTTP/1.1\r\nhost: x\r\n\r\n", *said), strict=True
    ):
        connection.connect()
        connection.sock.sendall(words)
        connection.sock.settimeout(40)

    def read_to_the_end(connection: OverUnix) -> bytes:
        return b"".join(iter(lambda: connection.sock.recv(65536), b""))

    ended = await asyncio.gather(*(asyncio.to_thread(read_to_the_end, each) for each in silent))
    assert ended[:2] == [b"", b""]
    assert ended[2].startswith(b"HTTP/1.1 400")
    assert b"did not come within" in ended[2]
    assert ended[3].startswith(b"HTTP/1.1 200")
    assert not has_ended(follower)
    for connection in (follower, *silent):
        connection.close()


async def test_so_many_connections_and_no_more(site: Site) -> None:
    many = [OverUnix(site.socket) for _ in range(CONNECTION_LIMIT + 20)]
    for connection in many:
        connection.connect()

    async with asyncio.timeout(20):
        while sum(map(has_ended, many)) < 20:  # noqa: ASYNC110  another process: there is no event to wait for
            await asyncio.sleep(0.01)
    assert sum(map(has_ended, many)) <= 21, "one place may have been the site's own"
    many[0].close()
    await site.until(lambda _: True, "there is a place again", 30)
    for connection in many:
        connection.close()


async def test_logs_are_shown_and_followed(site: Site) -> None:
    worker = (await site.until_ready("C", 30)).workers[0]
    text = b"".join(await asyncio.to_thread(lambda: list(site.client.stream(f"/v1/workers/{worker.id}/logs", tail=50))))
    assert text


async def test_what_happened_and_what_a_worker_said_outlive_the_daemon(site: Site) -> None:
    """`events` began at 1 again, `logs -f` ended, and the worker's last end was known to the log only."""
    worker = (await site.until_ready("C", 30)).workers[0].id
    before = await asyncio.to_thread(lambda: list(site.client.events()))
    [part] = await asyncio.to_thread(lambda: [next(site.client.log(worker, tail=50))])
    assert "listening on" in part.text
    await site.post(f"/v1/workers/{worker}/restart")
    await site.until(lambda s: s.workers[0].last_end is not None and s.workers[0].phase == "ready", "restarted", 30)
    await site.kill()
    await site.start()
    after = await asyncio.to_thread(lambda: list(site.client.events()))
    assert [e.seq for e in after] == list(range(1, len(after) + 1))
    assert after[: len(before)] == before
    rest = await asyncio.to_thread(lambda: next(site.client.log(worker, **{"from": part.position})))
    assert rest.text == ""
    rest = await asyncio.to_thread(lambda: list(islice(site.client.log(worker, **{"from": part.position}), 2))[1])
    assert "ended: stopped" in rest.text
    assert part.text not in rest.text
    end = (await site.until_ready("C", 30)).workers[0].last_end
    assert end is not None
    assert (end.how, end.why) == ("stopped as told", "restart by the operator")


async def test_the_output_of_a_worker_that_is_gone_can_still_be_read(site: Site) -> None:
    gone = (await site.until_ready("C", 30)).workers[0].id
    await site.change("B", 60)
    assert gone not in [worker.id for worker in (await site.status()).workers]
    text = b"".join(await asyncio.to_thread(lambda: list(site.client.stream(f"/v1/workers/{gone}/logs"))))
    assert b"ended: stopped" in text
    for name in ("none", "..%2Fsecret", "%2e%2e"):
        assert await refused(site, "GET", f"/v1/workers/{name}/logs") == (404, "unknown_worker")
    assert await refused(site, "GET", f"/v1/workers/{gone}/logs?follow=1&from=here") == (400, "bad_request")
    assert await refused(site, "GET", "/v1/events?after=yesterday") == (400, "bad_request")


async def test_the_doctor_sees_what_is_wrong_with_the_files(site: Site) -> None:
    """A broken configuration on disk, keys for everybody to read, an open door: doctor said ok to all of them."""

    async def checks() -> dict[str, Check]:
        return {check.name: check for check in await site.get("/v1/doctor", list[Check])}

    found = await checks()
    assert (found["config"].state, found["access"].state, "keys" in found) == ("ok", "ok", False)
    keys = site.folder / "keys"
    keys.write_text("secret\n")
    keys.chmod(0o644)
    good = site.config_file.read_text()
    site.config_file.write_text(f"{good}[proxy]\napi_keys_file = '{keys}'\n")
    found = await checks()
    assert (found["config"].state, "1 differences" in found["config"].found) == ("warning", True)
    assert (found["keys"].state, "every user" in found["keys"].found) == ("warning", True)
    site.config_file.write_text(good + "[proxy]\nlistenn = []\n")
    found = await checks()
    assert (found["config"].state, "unknown key" in found["config"].found) == ("failed", True)
    site.config_file.write_text(good.replace('pattern = "C"', 'pattern = "C"\n[patterns.x]\n[[patterns.x.replicas]]\n'))
    with pytest.raises(L40sError):
        await site.post("/v1/reload")
    site.config_file.write_text(good)
    found = await checks()
    assert (found["config"].state, "latest reload was refused" in found["config"].found) == ("failed", True)
    await site.post("/v1/reload")
    assert (await checks())["config"].state == "ok"
