"""Talking to systemd: a real datagram socket in its place, real passed descriptors."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from l40sd import clock, systemd
from l40sd.systemd import Notifier, job_of, listen_sockets, own_unit


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        yield manager


def test_messages_arrive_as_systemd_reads_them(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    assert notifier.is_active
    assert notifier.ready("12 workers\nready")
    assert manager.recv(999) == b"READY=1\nSTATUS=12 workers ready"
    assert notifier.stopping("draining")
    assert manager.recv(999) == b"STOPPING=1\nSTATUS=draining"
    assert notifier.watchdog()
    assert manager.recv(999) == b"WATCHDOG=1"
    assert notifier.extend_timeout(1.5)
    assert manager.recv(999) == b"EXTEND_TIMEOUT_USEC=1500000"
    assert notifier.reloading()
    lines = manager.recv(999).decode().splitlines()
    assert lines[0] == "RELOADING=1"
    stamp_us = int(lines[1].removeprefix("MONOTONIC_USEC="))
    assert stamp_us / 1e6 == pytest.approx(clock.now_s(), abs=60)


def test_an_abstract_socket_works_too() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")  # the kernel chooses an abstract name
        name = manager.getsockname()
        assert Notifier({"NOTIFY_SOCKET": f"@{name[1:].decode()}"}).status("here")
        assert manager.recv(99) == b"STATUS=here"


def test_nobody_there_is_no_error(tmp_path: Path) -> None:
    assert not Notifier({}).ready()
    assert not Notifier({}).is_active
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


def test_a_manager_that_does_not_read_cannot_block_us(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    assert not all(notifier.watchdog() for _ in range(10_000))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "junk"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_asked(environ: dict[str, str], expected: float | None) -> None:
    assert Notifier(environ).watchdog_interval_s == expected


def test_passed_sockets_come_by_name_and_close_on_exec() -> None:
    code = """
import os
from l40sd.systemd import listen_sockets
os.environ["LISTEN_PID"] = str(os.getpid())
found = listen_sockets()
print({name: [s.getsockname()[1] for s in sockets] for name, sockets in found.items()})
inheritable = [os.get_inheritable(s.fileno()) for sockets in found.values() for s in sockets]
print(inheritable, [name for name in os.environ if "LISTEN" in name])
print(listen_sockets())
"""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listener.getsockname()[1] for listener in listeners]
    high = [os.dup2(listener.fileno(), 200 + index) for index, listener in enumerate(listeners)]
    moved = " ".join(f"{3 + index}<&{descriptor}" for index, descriptor in enumerate(high))
    done = subprocess.run(  # noqa: TID251 - a test may block
        ["/bin/bash", "-c", f'exec "$@" {moved}', "bash", sys.executable, "-c", code],
        env={**os.environ, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "proxy:control:proxy"},
        pass_fds=high,
        capture_output=True,
        check=True,
        text=True,
    )
    for descriptor in high:
        os.close(descriptor)
    for listener in listeners:
        listener.close()
    assert done.stdout.splitlines() == [
        str({"proxy": [ports[0], ports[2]], "control": [ports[1]]}),
        "[False, False, False] []",
        "{}",
    ]


def test_sockets_of_another_process_are_not_ours() -> None:
    assert listen_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "3"}) == {}
    assert listen_sockets({}) == {}


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/l40sd.service\n", "l40sd.service"),
        ("0::/system.slice/l40sd.service/daemon\n", "l40sd.service"),
        (
            "9:pids:/x.service\n1:name=systemd:/system.slice/l40sd.service\n0::/system.slice/l40sd.service\n",
            "l40sd.service",
        ),
        ("0::/user.slice/user-0.slice/user@0.service/app.slice/l40sd.service\n", "l40sd.service"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", None),
        ("0::/\n", None),
    ],
)
def test_our_unit_is_the_innermost_service(cgroup: str, unit: str | None) -> None:
    assert own_unit(cgroup) == unit


def test_the_job_says_whether_this_is_a_restart_or_a_stop() -> None:
    jobs = "  11 other.service stop running\n  12 l40sd.service restart running\n"
    assert job_of("l40sd.service", jobs) == "restart"
    assert job_of("other.service", jobs) == "stop"
    assert job_of("l40sd.service", "12 l40sd.service start waiting\n") is None
    assert job_of("l40sd.service", "No jobs running.\n") is None


def test_clocks() -> None:
    assert clock.now_s() <= clock.now_s()
    assert len(clock.boot_id()) == 36
    assert clock.wall_time_iso()[10] == "T"
    assert clock.wall_time_s() > 1_700_000_000


async def test_what_systemd_and_the_journal_know_of_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("systemctl", "LoadState=loaded\nResult=exit-code\nodd"),
        ("journalctl", "when l40sd[1]: bad\n"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert await systemd.unit_facts("l40sd.service") == {"LoadState": "loaded", "Result": "exit-code"}
    assert await systemd.last_error("l40sd.service") == "when l40sd[1]: bad"
    monkeypatch.setenv("PATH", "/none")
    assert (await systemd.unit_facts("l40sd.service"), await systemd.last_error("l40sd.service")) == ({}, "")
