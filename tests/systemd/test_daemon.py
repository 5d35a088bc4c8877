"""The daemon under a real systemd: what a restart, a stop, a crash, a hang and a broken config do to its workers."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import CONFIG
from container import Container, until

pytestmark = pytest.mark.systemd

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
CHAT = (
    "curl -sS -m 20 http://127.0.0.1:8080/v1/chat/completions -H content-type:application/json "
    """-d '{"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}'"""
)


def status(host: Container) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.output("l40sctl -o json status"))
    return found


def main_pid(host: Container) -> int:
    return int(host.show("l40sd.service", "MainPID")["MainPID"])


def worker_pids(host: Container) -> dict[str, int]:
    return {worker["id"]: worker["pid"] for worker in status(host)["workers"]}


def all_ready(host: Container) -> bool:
    """Whether a daemon answers and each of its workers serves."""
    asked = host.run("l40sctl -o json status", check=False)
    if asked.returncode != 0:
        return False
    workers = json.loads(asked.stdout)["workers"]
    return bool(workers) and all(worker["phase"] == "ready" for worker in workers)


def wait_until_ready(host: Container) -> None:
    try:
        until(lambda: all_ready(host), "all workers are ready", READY_TIMEOUT_S)
    except TimeoutError as error:
        said = host.run("l40sctl status 2>&1; systemctl status --no-pager l40sd.service", check=False).stdout
        raise AssertionError(f"{error}\n{said}\n{host.journal(60, 'l40sd.service')}") from error


def processes_of_l40sd(host: Container) -> str:
    return host.run("ps -u l40sd -o pid,args --no-headers", check=False).stdout.strip()


@pytest.fixture
def serving(host: Container) -> Container:
    """The host with the daemon running and every worker of pattern A ready."""
    host.write("/etc/l40sd/l40sd.toml", CONFIG)
    host.run("systemctl start l40sd")
    wait_until_ready(host)
    return host


def drop_in(host: Container, text: str) -> None:
    """Change l40sd.service until the host is gone or the drop-in is taken away; empty text takes it away."""
    path = "/run/systemd/system/l40sd.service.d/test.conf"
    if text:
        host.write(path, text)
    else:
        host.run(f"rm -f {path}")
    host.run("systemctl daemon-reload")


def test_start_status_and_an_answer(serving: Container) -> None:
    unit = serving.show("l40sd.service", "ActiveState", "SubState", "StatusText", "User")
    assert (unit["ActiveState"], unit["SubState"], unit["User"]) == ("active", "running", "l40sd")
    assert unit["StatusText"].startswith("pattern A:")
    found = status(serving)
    assert found["provider"] == "unit"
    assert len(found["workers"]) == 12
    assert "tiny" in serving.output("l40sctl status")
    assert json.loads(serving.output(CHAT))["choices"]


def test_each_worker_is_a_unit_of_the_unprivileged_user(serving: Container) -> None:
    units = serving.output("systemctl list-units --no-legend --plain 'l40s-worker@*'").splitlines()
    assert len(units) == 12
    for pid in worker_pids(serving).values():
        assert serving.output(f"ps -o user= -p {pid}") == "l40sd"
        assert "/l40s.slice/l40s-workers.slice/l40s-worker@" in serving.output(f"cat /proc/{pid}/cgroup")
        assert serving.output(f"cat /proc/{pid}/oom_score_adj") == "0"
    # As asked for; a container within a container may not be allowed to lower it.
    assert serving.show("l40sd.service", "OOMScoreAdjust")["OOMScoreAdjust"] == "-500"


def test_switch_pattern_as_the_user_wrote_it(serving: Container) -> None:
    serving.run("l40sctl switch-pattern B", timeout_s=120)
    found = status(serving)
    assert found["pattern"] == "B"
    assert [worker["tp"] for worker in found["workers"]] == [2] * 6
    assert json.loads(serving.output(CHAT))["choices"]
    serving.run("l40sctl switch-pattern A", timeout_s=120)
    assert len(status(serving)["workers"]) == 12


def test_only_members_of_the_group_may_ask(serving: Container) -> None:
    assert serving.run("l40sctl status", user="nobody", check=False).returncode == 5
    serving.run("useradd --system --groups l40sd operator1")
    serving.run("l40sctl status", user="operator1")


def test_a_restart_touches_no_worker(serving: Container) -> None:
    before, daemon = worker_pids(serving), main_pid(serving)
    serving.run("systemctl restart l40sd")
    assert main_pid(serving) != daemon
    assert worker_pids(serving) == before
    wait_until_ready(serving)
    assert {worker["restarts"] for worker in status(serving)["workers"]} == {0}


def test_killing_the_daemon_touches_no_worker(serving: Container) -> None:
    before, daemon = worker_pids(serving), main_pid(serving)
    serving.run(f"kill -9 {daemon}")
    until(lambda: main_pid(serving) not in (0, daemon), "systemd has started another daemon")
    wait_until_ready(serving)
    assert worker_pids(serving) == before


def test_upgrade_turns_the_daemon_into_the_new_release_and_touches_no_worker(serving: Container) -> None:
    before, daemon = worker_pids(serving), main_pid(serving)
    old = serving.output("readlink /opt/l40sd/current")
    serving.run("/src/scripts/install --wheels /wheels", timeout_s=180)
    new = serving.output("readlink /opt/l40sd/current")
    assert old in serving.output(f"tr '\\0' ' ' < /proc/{daemon}/cmdline")
    serving.run("l40sctl upgrade", timeout_s=120)
    assert main_pid(serving) == daemon
    assert new in serving.output(f"tr '\\0' ' ' < /proc/{daemon}/cmdline")
    wait_until_ready(serving)
    assert worker_pids(serving) == before
    assert json.loads(serving.output(CHAT))["choices"]


def test_a_daemon_that_does_not_know_the_starter_starts_workers_until_it_is_upgraded(host: Container) -> None:
    """What an earlier release looks like: `start` in polkit's rule, no socket, and a daemon that asks systemctl."""
    earlier = "/etc/polkit-1/rules.d/49-l40sd-start.rules"
    process = "/opt/l40sd/current/lib/python3*/site-packages/l40sd/workers/process"
    host.run("systemctl stop l40sd; rm /usr/local/lib/systemd/system/l40s-start*; systemctl daemon-reload")
    host.run(f"sed -i s,/run/l40s-start.sock,/run/none, {process}/containment.py")
    host.run('sed -i \'s/\\["kill"/["start", "kill"/\' /etc/polkit-1/rules.d/50-l40sd.rules')
    host.write("/etc/l40sd/l40sd.toml", CONFIG)
    host.run("systemctl start l40sd")
    wait_until_ready(host)
    for _ in range(2):
        said = host.output("/src/scripts/install --wheels /wheels", timeout_s=180)
        assert "lets it start workers in the old way" in said
    host.run("l40sctl switch-pattern B", timeout_s=120)
    host.run(f"test -e {earlier}")
    host.run("l40sctl upgrade", timeout_s=120)
    wait_until_ready(host)
    until(lambda: host.run(f"test -e {earlier}", check=False).returncode == 1, "the old way is closed")
    host.run("l40sctl switch-pattern A", timeout_s=120)
    assert status(host)["provider"] == "unit"
    host.run("systemctl stop l40sd")


def test_an_upgrade_lets_a_stream_finish_that_takes_longer_than_the_watchdog(host: Container) -> None:
    """Seen: nobody fed the watchdog while the open streams finished, and systemd killed the daemon in mid upgrade."""
    host.run("systemctl stop l40sd")
    slow = CONFIG.replace('source = "tiny"', 'source = "tiny"\nargs = ["--tokens-per-s", "8"]')
    host.write("/etc/l40sd/l40sd.toml", slow.replace("drain_timeout_s = 2", "drain_timeout_s = 60"))
    drop_in(host, "[Service]\nWatchdogSec=2s\n")
    host.run("systemctl start l40sd")
    wait_until_ready(host)
    daemon = main_pid(host)
    stream = CHAT.replace("-sS -m 20", "-sSN -m 60").replace('"max_tokens": 4', '"max_tokens": 48, "stream": true')
    with host.background(stream) as asked:
        assert asked.stdout is not None
        assert asked.stdout.readline().startswith("data:")
        host.run("l40sctl upgrade", timeout_s=120)
        assert asked.communicate(timeout=60)[0].rstrip().endswith("data: [DONE]")
    assert main_pid(host) == daemon
    drop_in(host, "")
    host.run("systemctl stop l40sd")


def test_daemon_reload_touches_nothing(serving: Container) -> None:
    before, daemon = worker_pids(serving), main_pid(serving)
    serving.run("systemctl daemon-reload && systemctl daemon-reexec")
    assert main_pid(serving) == daemon
    assert worker_pids(serving) == before


KNOCK = r"""
import json, os, socket, time
body = json.dumps({"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}).encode()
head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
request = head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
refused = lost = answered = 0
other = {}
longest_s = 0.0
while not os.path.exists("/run/knocked-enough"):
    began_s = time.monotonic()
    try:
        with socket.create_connection(("127.0.0.1", 8080), timeout=30) as connection:
            connection.sendall(request)
            reply = connection.recv(100)
        if reply.startswith(b"HTTP/1.1 200"):
            answered += 1
        else:
            lost += 1
            words = reply.split(b"\r\n")[0].decode() or "closed without an answer"
            other[words] = other.get(words, 0) + 1
    except ConnectionRefusedError:
        refused += 1
    except OSError as error:
        lost += 1
        other[repr(error)] = other.get(repr(error), 0) + 1
    longest_s = max(longest_s, time.monotonic() - began_s)
print(json.dumps({"answered": answered, "refused": refused, "lost": lost, "longest_s": round(longest_s, 3), **other}))
"""


def test_no_connection_is_refused_over_restarts_and_kills(serving: Container, say: Callable[[str], None]) -> None:
    serving.run("rm -f /run/knocked-enough")
    serving.write("/run/knock.py", KNOCK)
    before = worker_pids(serving)
    with serving.background("exec python3 /run/knock.py") as knocking:
        for how in ("restart", "kill", "restart", "kill", "restart", "kill", "restart", "restart"):
            daemon = main_pid(serving)
            serving.run("systemctl restart l40sd" if how == "restart" else f"kill -9 {daemon}")
            until(lambda old=daemon: main_pid(serving) not in (0, old), "another daemon runs")
            wait_until_ready(serving)
        serving.run("touch /run/knocked-enough")
        found = json.loads(knocking.communicate(timeout=60)[0])
    say(f"5 restarts and 3 kills of the daemon: {found}")
    assert found["refused"] == 0
    assert found["lost"] <= 3, "at most the one that a killed daemon was answering"
    assert found["answered"] > 10
    assert worker_pids(serving) == before


def test_reload_with_a_broken_config_fails_visibly_and_keeps_the_old(serving: Container) -> None:
    before, daemon = worker_pids(serving), main_pid(serving)
    serving.write("/etc/l40sd/l40sd.toml", CONFIG + '[proxxy]\nlisten = ["127.0.0.1:9"]\n')
    failed = serving.run("systemctl reload l40sd", check=False)
    assert failed.returncode != 0
    assert "proxxy" in serving.journal(30, "l40sd.service")
    assert main_pid(serving) == daemon
    assert worker_pids(serving) == before
    assert serving.show("l40sd.service", "ActiveState")["ActiveState"] == "active"


def test_reload_applies_a_good_config(serving: Container) -> None:
    before = worker_pids(serving)
    serving.write("/etc/l40sd/l40sd.toml", CONFIG.replace("drain_timeout_s = 2", "drain_timeout_s = 3"))
    serving.run("systemctl reload l40sd")
    until(lambda: "drain_timeout_s = 3" in serving.output("l40sctl config show"), "the new value is in force")
    assert worker_pids(serving) == before


def test_a_daemon_that_hangs_is_replaced_and_its_workers_adopted(serving: Container) -> None:
    drop_in(serving, "[Service]\nWatchdogSec=2s\n")
    serving.run("systemctl restart l40sd")  # the watchdog's time is told to the daemon when it starts
    wait_until_ready(serving)
    before, daemon = worker_pids(serving), main_pid(serving)
    serving.run(f"kill -STOP {daemon}")
    until(lambda: main_pid(serving) not in (0, daemon), "the watchdog has replaced the daemon", 30)
    wait_until_ready(serving)
    assert worker_pids(serving) == before
    assert "watchdog" in serving.journal(60, "l40sd.service").lower()
    drop_in(serving, "")


def test_a_restart_with_a_broken_config_does_not_loop_and_loses_no_worker(serving: Container) -> None:
    before = worker_pids(serving)
    serving.write("/etc/l40sd/l40sd.toml", "[daemon]\npatern = 1\n")
    serving.run("systemctl restart l40sd", check=False)
    until(lambda: serving.show("l40sd.service", "ActiveState")["ActiveState"] == "failed", "the daemon has given up")
    until(lambda: serving.show("l40sd.socket", "ActiveState")["ActiveState"] == "inactive", "the listener is closed")
    unit = serving.show("l40sd.service", "ExecMainStatus", "NRestarts", "ActiveState")
    assert unit == {"ExecMainStatus": "78", "NRestarts": "0", "ActiveState": "failed"}
    assert "pattern" in serving.journal(30, "l40sd.service"), "the nearest known key is named"
    assert serving.run(CHAT, check=False).returncode == 7, "refused at once, and starts nothing"
    assert serving.show("l40sd.service", "ActiveState")["ActiveState"] == "failed"
    assert all(serving.run(f"test -d /proc/{pid}", check=False).returncode == 0 for pid in before.values())

    serving.write("/etc/l40sd/l40sd.toml", CONFIG)
    serving.run("systemctl start l40sd")
    wait_until_ready(serving)
    assert worker_pids(serving) == before
    assert json.loads(serving.output(CHAT))["choices"]


def test_stop_frees_everything_and_nothing_starts_it_again(serving: Container, say: Callable[[str], None]) -> None:
    """Requests keep coming all the while: a socket unit that woke the daemon would start it in mid stop."""
    serving.run("rm -f /run/knocked-enough")
    serving.write("/run/knock.py", KNOCK)
    with serving.background("exec python3 /run/knock.py") as knocking:
        began_s = time.monotonic()
        serving.run("systemctl stop l40sd", timeout_s=STOP_TIMEOUT_S)
        say(f"systemctl stop took {time.monotonic() - began_s:.1f} s for 12 workers")
        assert processes_of_l40sd(serving) == ""
        units = serving.show("l40sd.service", "ActiveState", "Result")
        assert units == {"ActiveState": "inactive", "Result": "success"}
        assert serving.run("test -e /run/l40sd", check=False).returncode == 1
        left = "systemctl list-units --all --no-legend --plain 'l40s-worker@*'"
        until(lambda: serving.output(left) == "", "no worker's unit is left")
        assert serving.run(CHAT, check=False).returncode == 7, "refused"
        serving.run("touch /run/knocked-enough")
        assert json.loads(knocking.communicate(timeout=60)[0])["refused"] > 0
    for unit in ("l40sd.service", "l40sd-up.service", "l40sd.socket"):
        assert serving.show(unit, "ActiveState")["ActiveState"] == "inactive", unit


def test_when_the_host_goes_down_the_daemon_drains_its_workers_itself(serving: Container) -> None:
    """systemd stops everything at once then, workers too; the order of the units keeps its hands off them.

    shutdown.target conflicts with every unit; the target here stands in for it. Seen without its Conflicts=: on about
    every other boot of systemd 252 `isolate` stopped the socket and the workers, and kept the daemon.
    """
    began = serving.output("date +%s.%N")
    target = "[Unit]\nAllowIsolate=yes\nRequires=basic.target\nConflicts=l40sd.service\n"
    serving.write("/run/systemd/system/nearly-down.target", target)
    serving.run("systemctl daemon-reload; systemctl isolate nearly-down.target")
    ended = ("inactive", "failed")
    until(lambda: serving.show("l40sd.service", "ActiveState")["ActiveState"] in ended, "the daemon has ended")
    unit = serving.show("l40sd.service", "ActiveState", "Result", "Conflicts")
    assert (unit["ActiveState"], unit["Result"]) == ("inactive", "success"), serving.journal(60)
    assert processes_of_l40sd(serving) == ""
    said = serving.output(f"journalctl --no-pager -o cat --since @{began}")
    assert "Stopping l40sd.service" in said
    assert "Stopped l40s-worker@" in said
    assert "Stopping l40s-worker@" not in said, "a job of systemd's own would have cut what was being answered"
    assert {"shutdown.target", "rescue.target", "emergency.target"} <= set(unit["Conflicts"].split())
    serving.run("systemctl isolate multi-user.target")


def test_without_polkit_rules_the_workers_survive_a_restart_as_well(host: Container) -> None:
    """Ubuntu 22.04's case: the drop-in that install adds there, and no rule."""
    rule = "/etc/polkit-1/rules.d/50-l40sd.rules"
    host.run(f"systemctl stop l40sd; mv {rule} /root/; systemctl mask --runtime l40s-start.socket")
    try:
        drop_in(host, host.output("cat /src/systemd/l40sd.service.d/no-polkit-rules.conf"))
        host.write("/etc/l40sd/l40sd.toml", CONFIG)
        host.run("systemctl start l40sd")
        wait_until_ready(host)
        assert status(host)["provider"] == "cgroup"
        before, daemon = worker_pids(host), main_pid(host)
        host.run("systemctl restart l40sd")
        wait_until_ready(host)
        assert worker_pids(host) == before
        host.run(f"kill -9 {main_pid(host)}")
        until(lambda: main_pid(host) not in (0, daemon), "systemd has started another daemon")
        wait_until_ready(host)
        assert worker_pids(host) == before
        host.run("systemctl stop l40sd", timeout_s=STOP_TIMEOUT_S)
        assert processes_of_l40sd(host) == ""
    finally:
        host.run(f"mv /root/50-l40sd.rules {rule}; systemctl unmask --runtime l40s-start.socket")
        drop_in(host, "")
