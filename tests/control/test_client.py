"""The client against a real Unix socket: records, refusals, streams, and every way of not answering."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakecontrol import refusal, serving
from stranger import as_stranger, passable

from l40sd.control import client
from l40sd.control.client import Client, socket_path, worker_path
from l40sd.control.messages import Check, Event, PatternRequest
from l40sd.errors import L40sError


def failure_of(path: Path, timeout_s: float = 5.0) -> L40sError:
    with pytest.raises(L40sError) as failure:
        Client(str(path), timeout_s=timeout_s).get("/v1/version", dict[str, str])
    return failure.value


def test_a_reply_becomes_its_record(tmp_path: Path) -> None:
    checks = [Check(name="cgroup", state="ok", found="delegated")]
    with serving(tmp_path / "s", {"GET /v1/doctor": (200, checks)}) as fake:
        assert Client(fake.path).get("/v1/doctor", tuple[Check, ...]) == tuple(checks)


def test_a_request_carries_its_body_and_its_query(tmp_path: Path) -> None:
    with serving(tmp_path / "s", {"POST /v1/pattern": (202, {"operation": "op1"})}) as fake:
        assert Client(fake.path).post("/v1/pattern", PatternRequest(name="B")) == {"operation": "op1"}
        assert fake.asked == [("POST /v1/pattern", b'{"name":"B","dry_run":false,"force":false}')]


def test_a_refusal_keeps_code_place_and_hint(tmp_path: Path) -> None:
    answer = refusal(404, "unknown_worker", "no worker x", where="workers", hint="did you mean y?")
    with serving(tmp_path / "s", {"POST /v1/workers/a%2Fb/drain": answer}) as fake, pytest.raises(L40sError) as failure:
        Client(fake.path).post(worker_path("a/b", "drain"))
    assert (failure.value.code, failure.value.where) == ("unknown_worker", "workers")
    assert str(failure.value) == "workers: no worker x\n  hint: did you mean y?"


def test_a_refusal_of_another_shape_is_told_by_its_status(tmp_path: Path) -> None:
    with serving(tmp_path / "s", {"GET /v1/version": (503, b"<html>")}) as fake:
        assert failure_of(Path(fake.path)).code == "http_503"


def test_a_reply_of_another_shape_is_told_as_such(tmp_path: Path) -> None:
    with serving(tmp_path / "s", {"GET /v1/version": (200, b"[1]")}) as fake:
        assert failure_of(Path(fake.path)).code == "bad_reply"


def test_events_arrive_one_by_one_however_the_bytes_are_cut(tmp_path: Path) -> None:
    lines = b"".join(
        b'{"seq":%d,"time":"t","level":"info","event":"worker.ready","data":{"port":1}}\n' % seq for seq in range(3)
    )

    def parts() -> Iterator[bytes]:
        for cut in (slice(0, 10), slice(10, 90), slice(90, None)):
            yield lines[cut]

    with serving(tmp_path / "s", {"GET /v1/events": lambda: (200, parts())}) as fake:
        events = list(Client(fake.path).events(since=0, follow=1))
        assert fake.asked[0][0] == "GET /v1/events?since=0&follow=1"
    assert [event.seq for event in events] == [0, 1, 2]
    assert events[0] == Event(seq=0, time="t", level="info", event="worker.ready", data={"port": 1})


def test_a_stream_that_follows_may_be_silent_for_longer_than_the_deadline(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"first"
        threading.Event().wait(0.3)  # the silence that is under test
        yield b"second"

    with serving(tmp_path / "s", {"GET /v1/logs": lambda: (200, parts())}) as fake:
        hasty = Client(fake.path, timeout_s=0.1)
        assert b"".join(hasty.stream("/v1/logs", follow=1)) == b"firstsecond"
        with pytest.raises(L40sError, match=r"no answer within 0\.1 s"):
            list(hasty.stream("/v1/logs"))


def test_no_socket_says_that_the_daemon_does_not_run(tmp_path: Path) -> None:
    error = failure_of(tmp_path / "none")
    assert error.code == client.UNREACHABLE
    assert "not running" in error.what
    assert "systemctl status l40sd" in error.hint


def test_a_socket_that_nobody_listens_on_says_the_same(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "s"))
    error = failure_of(tmp_path / "s")
    assert (error.code, "nobody listens" in error.what) == (client.UNREACHABLE, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_socket_that_is_forbidden_names_the_group(tmp_path: Path) -> None:
    with serving(tmp_path / "s", {}) as fake, passable(Path(fake.path)):
        Path(fake.path).chmod(0o660)
        with as_stranger():
            error = failure_of(Path(fake.path))
    assert error.code == client.UNREACHABLE
    assert "group l40sd" in error.hint


@pytest.mark.parametrize(
    ("bytes_sent", "said"),
    [
        (b"", "went away"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "went away"),
        (b"junk\r\n\r\n", "no answer"),
    ],
)
def test_a_daemon_that_dies_in_mid_answer_is_unreachable(tmp_path: Path, bytes_sent: bytes, said: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(bytes_sent)

        thread = threading.Thread(target=answer)
        thread.start()
        error = failure_of(tmp_path / "s")
        thread.join(10)
    assert (error.code, said in error.what) == (client.UNREACHABLE, True), error


def test_a_daemon_that_is_silent_is_given_up_after_the_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        error = failure_of(tmp_path / "s", timeout_s=0.1)
    assert (error.code, error.what) == (client.UNREACHABLE, "no answer within 0.1 s")


def test_the_socket_is_chosen_by_option_then_environment_then_default() -> None:
    assert socket_path("/a", {"L40SD_SOCKET": "/b"}) == "/a"
    assert socket_path(None, {"L40SD_SOCKET": "/b"}) == "/b"
    assert socket_path(None, {}) == "/run/l40sd/control.sock"
