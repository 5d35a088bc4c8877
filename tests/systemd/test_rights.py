"""The unit files, and what the unprivileged user may do with them: exactly his own workers, nothing else."""

import re
import shlex
from collections.abc import Callable, Iterator

import pytest
from container import Container, until

pytestmark = pytest.mark.systemd

UNITS = (
    "l40sd.service",
    "l40sd-up.service",
    "l40sd.socket",
    "l40sd-down.target",
    "l40s-start.socket",
    "l40s-start@.service",
    "l40s-worker@.service",
    "l40s-workers.slice",
)
STAND_IN_DAEMON = """\
[Service]
Type=exec
ExecStart=
ExecStart=/bin/sleep 1000
WatchdogSec=0
"""
CONNECT = 'import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect("/run/l40s-start.sock"); '
ANSWER = 'print(s.recv(4096).decode(), end="")'
ASK = f"python3 -c '{CONNECT} s.sendall(sys.stdin.buffer.read()); s.shutdown(1); {ANSWER}'"
ASK_NOTHING = f"python3 -c '{CONNECT} {ANSWER}' </dev/null"
MANY = """python3 -c '
import socket
open = []
for _ in range(300):
    open.append(socket.socket(socket.AF_UNIX))
    open[-1].connect("/run/l40s-start.sock")
'"""
STAND_IN = """\
[Service]
ExecStart=
ExecStart=/bin/sh -c 'trap "exit 0" TERM; while :; do sleep 1000 & wait; done'
"""


@pytest.fixture
def stand_in(host: Container) -> Iterator[Container]:
    """The host, with a worker unit that runs without a daemon to prepare it."""
    folder = "/run/systemd/system/l40s-worker@.service.d"
    host.write(f"{folder}/stand-in.conf", STAND_IN)
    host.run("systemctl daemon-reload")
    yield host
    host.run(f"systemctl stop l40s-workers.slice; rm -r {folder}; systemctl daemon-reload")


def test_systemd_finds_nothing_to_say_about_the_units(host: Container) -> None:
    folder = "/usr/local/lib/systemd/system"
    done = host.run(f"cd {folder} && systemd-analyze verify --man=no --recursive-errors=one {' '.join(UNITS)} 2>&1")
    assert done.stdout == ""


def test_the_daemon_is_exposed_no_more_than_its_work_asks_for(host: Container, say: Callable[[str], None]) -> None:
    scores = {}
    for unit in ("l40sd.service", "l40s-start@.service", "l40s-worker@.service"):
        report = host.run(f"systemd-analyze security --offline=yes --no-pager {unit}", check=False).stdout
        found = re.search(r"Overall exposure level for \S+: ([\d.]+)", report)
        assert found, report
        scores[unit] = float(found[1])
    say("systemd-analyze security (0 best, 10 worst): " + ", ".join(f"{unit} {s}" for unit, s in scores.items()))
    assert scores["l40sd.service"] <= 2.5
    assert scores["l40s-start@.service"] <= 2.0
    assert scores["l40s-worker@.service"] <= 7.5


@pytest.fixture
def asking(stand_in: Container) -> Iterator[Container]:
    """The host, with a process in place of the daemon, and its starter open.

    Its drop-in is read last: the one that install adds for systemd 253 and newer sets the type, too.
    """
    folder = "/run/systemd/system/l40sd.service.d"
    stand_in.run("systemctl stop l40sd")
    stand_in.write(f"{folder}/zz-stand-in.conf", STAND_IN_DAEMON)
    stand_in.run("systemctl daemon-reload && systemctl start l40sd")
    yield stand_in
    stand_in.run(f"systemctl stop l40sd; rm {folder}/zz-stand-in.conf; systemctl daemon-reload")


def within_the_daemon(command: str) -> str:
    """Return a command of root's that runs this one as a process of l40sd.service."""
    group = "/sys/fs/cgroup$(systemctl show --property=ControlGroup --value l40sd.service)"
    become = "exec setpriv --reuid=l40sd --regid=l40sd --init-groups"
    return f"echo $$ > {group}/cgroup.procs && {become} sh -c {shlex.quote(command)}"


def answer_to(host: Container, given: str) -> str:
    """Return what the starter answers to a process of the daemon's; nothing when it has too many connections."""
    return host.run(within_the_daemon(ASK), given=given, check=False).stdout


def worker_units(host: Container) -> str:
    return host.output("systemctl list-units --all --no-legend --plain 'l40s-worker@*' | cut -d' ' -f1")


def test_the_daemon_has_its_workers_started_and_kills_them(asking: Container) -> None:
    unit = "l40s-worker@tiny-gpu0-1-01h0.service"
    assert answer_to(asking, "tiny-gpu0-1-01h0\n") == "0 \n"
    until(lambda: asking.show(unit, "ActiveState")["ActiveState"] == "active", "the worker has been started")
    assert asking.show(unit, "User", "Slice") == {"User": "l40sd", "Slice": "l40s-workers.slice"}
    asking.run(within_the_daemon(f"systemctl kill --signal=CONT {unit}"))
    asking.run(within_the_daemon(f"systemctl kill --signal=KILL {unit}"))
    until(lambda: asking.show(unit, "ActiveState")["ActiveState"] != "active", "the killed worker has ended")


@pytest.mark.parametrize("mode", ["", "--job-mode=flush", "--job-mode=replace-irreversibly"])
def test_the_daemon_starts_no_worker_itself_in_whatever_mode(asking: Container, mode: str) -> None:
    """Seen: a process of the daemon's user cancelled the host's other jobs by ``--job-mode=flush``."""
    refused = asking.run(within_the_daemon(f"systemctl start {mode} l40s-worker@b.service </dev/null"), check=False)
    assert refused.returncode != 0
    assert REFUSED.search(refused.stdout + refused.stderr), refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("A\n", "not the name"),
        ("../x\n", "not the name"),
        ("a b\n", "not the name"),
        ("a.service\n", "not the name"),
        ("a\nb\n", "not the name"),
        ("a", "not the name"),
        ("\n", "not the name"),
        ("", "not the name"),
        ("--job-mode=flush a\n", "not the name"),
        ("$(touch /tmp/x)\n", "not the name"),
        ("\u00e4\n", "not the name"),
        ("a" * 236 + "\n", "longer than 235"),
        ("a" * 100_000 + "\n", "not the name"),
    ],
)
def test_the_starter_starts_nothing_but_an_instance(asking: Container, given: str, said: str) -> None:
    assert answer_to(asking, given).startswith(f"1 refused: {said}")
    assert worker_units(asking) == ""


def test_the_longest_name_that_systemd_can_give_a_unit_is_started(asking: Container) -> None:
    assert answer_to(asking, "a" * 235 + "\n") == "0 \n"


def test_what_systemd_refuses_is_passed_on(asking: Container) -> None:
    asking.run("systemctl mask --runtime l40s-worker@masked.service")
    assert re.fullmatch(r"1 Failed to start .*masked.*\n", answer_to(asking, "masked\n"))
    asking.run("systemctl unmask --runtime l40s-worker@masked.service")


def test_one_that_asks_nothing_is_sent_away(asking: Container) -> None:
    said = asking.run(within_the_daemon(ASK_NOTHING)).stdout
    assert said == "1 refused: nothing came within 5 s\n"
    until(lambda: asking.output("systemctl list-units --all --no-legend 'l40s-start@*'") == "", "its unit is gone")


def test_the_daemon_user_outside_its_service_is_not_heard(asking: Container) -> None:
    """An engine is one."""
    assert asking.run(ASK, user="l40sd", given="a\n").stdout == "1 refused: only l40sd.service may ask\n"
    assert worker_units(asking) == ""


def test_another_user_cannot_connect_to_the_starter(asking: Container) -> None:
    refused = asking.run(ASK, user="nobody", given="a\n", check=False)
    assert "PermissionError" in refused.stderr
    assert asking.output("stat -c '%a %U %G' /run/l40s-start.sock") == "600 l40sd l40sd"


def test_many_connections_close_the_starter_for_nobody(asking: Container) -> None:
    """More than MaxConnections= at once, and more than systemd's own limit of 200 in 2 s."""
    asking.run(MANY, user="l40sd")
    assert asking.show("l40s-start.socket", "ActiveState")["ActiveState"] == "active"
    until(lambda: answer_to(asking, "a\n") == "0 \n", "the daemon is heard again")


def test_the_starter_is_open_from_start_to_stop(asking: Container) -> None:
    asking.run("systemctl restart l40sd")
    assert answer_to(asking, "a\n") == "0 \n"
    asking.run("systemctl stop l40sd")
    until(lambda: asking.show("l40s-start.socket", "ActiveState")["ActiveState"] == "inactive", "the starter is closed")
    asking.run("test ! -e /run/l40s-start.sock")


def test_the_daemon_user_owns_its_workers_cgroup(stand_in: Container) -> None:
    unit = "l40s-worker@owned.service"
    stand_in.run(f"systemctl start {unit}")
    cgroup = "/sys/fs/cgroup" + stand_in.show(unit, "ControlGroup")["ControlGroup"]
    stand_in.run(
        f"mkdir {cgroup}/engine && echo 1 > {cgroup}/engine/cgroup.kill && rmdir {cgroup}/engine", user="l40sd"
    )


FORBIDDEN = (
    "systemctl start l40s-worker@b.service",
    "systemctl start --job-mode=flush l40s-worker@b.service",
    "systemctl start l40s-start@0-1-0.service",
    "systemctl start l40s-start.socket",
    "systemctl start dbus.service",
    "systemctl stop l40sd.service",
    "systemctl restart systemd-journald.service",
    "systemctl kill --signal=TERM dbus.service",
    "systemctl stop l40s-worker@a.service",
    "systemctl restart l40s-worker@a.service",
    "systemctl reload l40s-worker@a.service",
    "systemctl start l40s-worker@a.socket",
    "systemctl start l40s-worker@A.service",
    "systemctl start 'l40s-worker@..\\x2fx.service'",
    "systemctl start 'l40s-worker@a b.service'",
    "systemctl start l40s-worker@../x.service",
    "systemctl start xl40s-worker@a.service",
    "systemctl start l40s-worker@a.service.service",
    "systemctl stop l40s-workers.slice",
    "systemctl set-property --runtime l40s-worker@a.service CPUWeight=1",
    "systemctl enable l40sd.service",
    "systemctl disable l40sd.service",
    "systemctl mask l40s-worker@a.service",
    "systemctl link /tmp/evil.service",
    "systemctl daemon-reload",
    "systemctl daemon-reexec",
    "systemctl isolate rescue.target",
    "systemctl start --job-mode=isolate l40s-worker@b.service",  # would stop everything else
    "systemctl poweroff",
    "systemctl set-environment A=b",
    "script -qec 'EDITOR=true systemctl edit l40s-worker@a.service' /dev/null",  # edit wants a terminal
    "script -qec 'EDITOR=true systemctl edit --full --runtime l40sd.service' /dev/null",
    "systemd-run --unit=l40s-worker@b.service /bin/true",
    "systemd-run --uid=0 /bin/true",
    "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager "
    "StartTransientUnit 'ssa(sv)a(sa(sv))' l40s-worker@c.service fail 0 0",
    "touch /etc/systemd/system/l40s-worker@.service",
    "touch /usr/local/lib/systemd/system/l40sd.service",
    "touch /opt/l40sd/current/bin/l40sd",
    "touch /etc/l40sd/l40sd.toml",
)


# `edit` has its own way to say that a folder is not ours, and systemd to say that a unit may not be isolated.
REFUSED = re.compile(
    "denied|authentication required|already loaded or has a fragment file|may not be isolated"
    "|failed to create directories",
    re.IGNORECASE,
)


@pytest.mark.parametrize("command", FORBIDDEN)
def test_the_daemon_user_may_do_nothing_else(stand_in: Container, command: str) -> None:
    stand_in.run("systemctl start l40s-worker@a.service")
    before = stand_in.output("systemctl list-units --all --no-legend --plain | awk '{print $1, $3}' | sort")
    refused = stand_in.run(f"{command} </dev/null", user="l40sd", check=False)
    assert refused.returncode != 0, refused.stdout
    assert REFUSED.search(refused.stdout + refused.stderr), refused
    after = stand_in.output("systemctl list-units --all --no-legend --plain | awk '{print $1, $3}' | sort")
    assert after == before


def test_another_user_may_not_touch_the_workers(stand_in: Container) -> None:
    refused = stand_in.run("systemctl start l40s-worker@a.service --no-ask-password", user="nobody", check=False)
    assert refused.returncode != 0
    assert stand_in.show("l40s-worker@a.service", "ActiveState")["ActiveState"] == "inactive"
