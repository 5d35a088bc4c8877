"""The faults that need a machine of one's own to be injected for real; by their numbers in `scripts/faults`.

Each leaves the daemon serving, as it found it.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bootedhost import until
from vmdaemon import BACKOFF_FIRST_S, PIDS_LIMIT, SILENCE_LIMIT_S, SPAWN_TIMEOUT_S, Daemon

NO_POLKIT = "/run/systemd/system/l40sd.service.d/no-polkit-rules.conf"
RULE = "/etc/polkit-1/rules.d/50-l40sd.rules"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survived:
    """What was measured: seconds until what was promised had happened, requests without their whole answer."""

    took_s: float
    note: str
    lost: int = 0


def fork_bomb(daemon: Daemon) -> Survived:
    """Fault 5 of docs/what-happens-when.md: pids.max holds, the host stays usable, and a restart empties the cgroup."""
    machine = daemon.machine
    victim, other = daemon.serve().values()
    group = daemon.group(victim)
    assert machine.output(f"cat {group}/pids.max") == str(PIDS_LIMIT)
    daemon.inject(victim, "fork-bomb", 4 * PIDS_LIMIT)
    until(lambda: machine.output(f"cat {group}/pids.events") != "max 0", "the limit was met", 60)
    count = int(machine.output(f"cat {group}/pids.current"))
    assert count <= PIDS_LIMIT
    assert count > PIDS_LIMIT - 20, "it was a bomb"
    assert daemon.answers()
    machine.run("sh -c 'for n in $(seq 50); do /bin/true; done'", user="nobody")
    mark, began_s = daemon.mark(), time.monotonic()
    daemon.post(f"/v1/workers/{victim['id']}/restart")
    until(lambda: machine.run(f"test -e {group}", check=False).returncode != 0, "its cgroup is gone", 60)
    took_s = time.monotonic() - began_s
    daemon.told(mark, "worker.ready", victim["id"])
    assert daemon.pids()[other["id"]] == other["pid"], "the other one was not touched"
    left = int(machine.output("pgrep -c -u l40sd -x sleep"))
    assert left == 8, f"the ranks of two workers, not {left} processes"
    return Survived(took_s=took_s, note=f"pids.max held at {count} of {4 * PIDS_LIMIT} processes")


def rank_out_of_memory(daemon: Daemon) -> Survived:
    """One of a worker's processes grows past memory.max; all of it goes, and it is called by its name.

    Fault 51 of docs/what-happens-when.md.
    """
    machine = daemon.machine
    victim, other = daemon.serve().values()
    group, shims = daemon.group(victim), daemon.shims()
    assert machine.output(f"cat {group}/memory.oom.group") == "1"
    machine.run(f"systemctl set-property --runtime l40s-worker@{victim['instance']}.service MemoryMax=256M")
    members = machine.output(f"cat {group}/cgroup.procs").split()
    assert len(members) == 5, "the engine and its four ranks"
    mark, began_s = daemon.mark(), time.monotonic()
    grow = "held = [b'x' * (1 << 20) for _ in range(1000)]"
    rank = f'setpriv --reuid l40sd --regid l40sd --clear-groups python3 -c "{grow}"'
    grown = machine.run(f"echo $$ > {group}/cgroup.procs && exec {rank}", check=False)
    assert grown.returncode != 0, "it was killed"
    told = daemon.told(mark, "worker.backoff", victim["id"])
    took_s = time.monotonic() - began_s
    assert told["oom"] is True
    assert "out of memory" in told["reason"]
    assert 2 * BACKOFF_FIRST_S * 0.85 < told["delay_s"] < 2 * BACKOFF_FIRST_S * 1.15, "twice what others wait"
    assert "out of memory" in machine.run(f"l40sctl status {victim['id']}", check=False).stdout
    assert machine.run(f"ps -o pid,args -p {','.join(members)} --no-headers", check=False).stdout == ""
    daemon.told(mark, "worker.ready", victim["id"])
    assert daemon.pids()[other["id"]] == other["pid"], "the other one was not touched"
    assert set(shims) & set(daemon.shims()), "nor its shim"
    return Survived(
        took_s=took_s, note=f"all five processes went with the sixth; named OOM, next start after {told['delay_s']} s"
    )


HOG = """
import pathlib, signal
def kills():
    return [line for line in pathlib.Path("/proc/vmstat").read_text().splitlines() if line.startswith("oom_kill ")]
before, held = kills(), []
while kills() == before:
    held.append(b"x" * (2 << 20))
signal.pause()
"""


def host_out_of_memory(daemon: Daemon) -> Survived:
    """First an engine eats up the host's memory, then somebody whom the kernel may not kill.

    Fault 52 of docs/what-happens-when.md.
    """
    daemon.configure(canary_timeout_s=120)  # an engine that eats memory answers nobody, and must not be ended for that
    try:
        return memory_eaten_up(daemon)
    finally:
        daemon.count = 0  # the next fault gets the usual configuration


def memory_eaten_up(daemon: Daemon) -> Survived:
    """Eat up the host's memory, twice."""
    machine = daemon.machine
    victim, other = daemon.serve().values()
    before, shims = daemon.pid(), daemon.shims()
    for pid in (before, *shims):
        assert machine.output(f"cat /proc/{pid}/oom_score_adj") == "-500"
    assert machine.output(f"cat /proc/{victim['pid']}/oom_score_adj") == "0"
    locked = machine.output(f"awk '/VmLck/ {{print $2}}' /proc/{before}/status")
    assert int(locked) > 0, "the daemon keeps its pages in memory"
    mark, began_s = daemon.mark(), time.monotonic()
    daemon.inject(victim, "memory", 1900)
    told = daemon.told(mark, "worker.backoff", victim["id"])
    took_s = time.monotonic() - began_s
    assert told["oom"] is True
    assert daemon.answers(), "the other one serves"
    daemon.told(mark, "worker.ready", victim["id"])
    assert (daemon.pid(), daemon.pids()[other["id"]]) == (before, other["pid"])

    count = len(killed_for_memory(daemon))
    machine.write("/run/hog.py", HOG)
    machine.run("systemd-run --collect --unit=hog -p OOMScoreAdjust=-1000 python3 /run/hog.py")
    try:
        until(lambda: killed_for_memory(daemon)[count:], "somebody is killed for it", 300)
    finally:
        machine.run("systemctl kill -s KILL hog", check=False)
    daemon.until_ready()
    assert daemon.answers()
    killed = killed_for_memory(daemon)[count:]
    assert all("oom_score_adj:0" in line for line in killed), killed  # all that is l40sd's own is at -500
    assert any("(python)" in line for line in killed), "an engine"
    # Before the kernel gives up looking for memory it drops every program's pages from it, and reads them again and
    # again: for half a minute and more nobody gets anywhere, which systemd's watchdog may call a hang.
    restarts = machine.show("l40sd.service", "NRestarts")["NRestarts"]
    return Survived(
        took_s=took_s,
        note="the engine that ate it is killed and named OOM; with an eater that cannot be killed another goes, daemon"
        f" and shims never (restarts of the daemon by its watchdog meanwhile: {restarts})",
    )


def killed_for_memory(daemon: Daemon) -> list[str]:
    """Return the kernel's lines on whom it killed."""
    return daemon.machine.run("journalctl -k -o cat | grep 'Killed process'", check=False).stdout.splitlines()


KNOCK = r"""
import json, os, time, urllib.request
body = json.dumps({"model": "toy", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}).encode()
answered, lost = 0, []
while not os.path.exists("/run/knocked-enough"):
    request = urllib.request.Request(
        "http://127.0.0.1:8080/v1/chat/completions", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            answered += b"finish_reason" in reply.read()
    except OSError as error:
        lost.append(repr(error))
    with open("/run/knocked", "w") as file:
        file.write(str(answered))
print(json.dumps({"answered": answered, "lost": lost}))
"""


@contextmanager
def knocking(daemon: Daemon) -> Iterator[Callable[[], tuple[int, list[str]]]]:
    """Ask for completions one after the other; what is given ends that and returns how many were answered and lost."""
    machine = daemon.machine
    machine.run("rm -f /run/knocked-enough /run/knocked")
    machine.write("/run/knock.py", KNOCK)
    with machine.background("exec python3 /run/knock.py") as process:

        def end() -> tuple[int, list[str]]:
            machine.run("touch /run/knocked-enough")
            found = json.loads(process.communicate(timeout=120)[0])
            return found["answered"], found["lost"]

        until(lambda: answered_so_far(daemon) > 0, "somebody is asking", 60)
        yield end


def answered_so_far(daemon: Daemon) -> int:
    return int(daemon.machine.output("cat /run/knocked 2>/dev/null || echo 0") or 0)


def pass_time(daemon: Daemon, seconds: float) -> None:
    """Let the daemon's timers run, asking it how it is meanwhile."""
    began_s = time.monotonic()
    until(lambda: daemon.status() and time.monotonic() - began_s > seconds, "some time passes", seconds + 120)


def clock_jumps(daemon: Daemon) -> Survived:
    """Fault 41 of docs/what-happens-when.md: `date -s`, an hour back and then a year ahead, under load."""
    machine = daemon.machine
    daemon.serve()
    before, workers = daemon.pid(), daemon.pids()
    mark, began_s = daemon.mark(), time.monotonic()
    with knocking(daemon) as end:
        for jump in ("-1 hour", "+1 year"):
            answered = answered_so_far(daemon)
            machine.run(f"date -s '{jump}'")
            pass_time(daemon, SILENCE_LIMIT_S)
            assert answered_so_far(daemon) > answered, "the load goes on"
            status = daemon.status()
            ages_s = [status["uptime_s"], *(worker["since_s"] for worker in status["workers"])]
            assert all(0 <= age_s < 3000 for age_s in ages_s), ages_s
        machine.run("date -s '-1 year' && date -s '+1 hour'")
        answered, lost = end()
    told = [event["event"] for event in daemon.events(mark)]
    assert not [name for name in told if name.startswith("worker.")], told
    assert (daemon.pid(), daemon.pids()) == (before, workers)
    assert machine.show("l40sd.service", "NRestarts")["NRestarts"] == "0", "nor did systemd's watchdog bite"
    assert lost == []
    return Survived(
        took_s=time.monotonic() - began_s, note=f"date -s twice, nothing restarted; {answered} requests answered"
    )


def loopback_down(daemon: Daemon) -> Survived:
    """No loopback for longer than any timeout, and a name server that answers nobody.

    Fault 61 of docs/what-happens-when.md.
    """
    machine = daemon.machine
    daemon.serve()
    before, workers = daemon.pid(), daemon.pids()
    resolved = machine.run("timeout 30 getent ahosts name.test", check=False)
    assert resolved.returncode != 0, "there is no DNS"
    mark = daemon.mark()
    machine.run("ip link set lo down")
    try:
        until(lambda: not any(w["phase"] == "ready" for w in daemon.workers().values()), "no worker is ready", 60)
        pass_time(daemon, SILENCE_LIMIT_S)
        assert daemon.pids() == workers, "no worker was killed"
    finally:
        machine.run("ip link set lo up")
    back_s = time.monotonic()
    daemon.until_ready()
    took_s = time.monotonic() - back_s
    assert (daemon.pid(), daemon.pids()) == (before, workers)
    told = {event["event"] for event in daemon.events(mark) if event["event"].startswith("worker.")}
    assert told <= {"worker.unready", "worker.ready"}, told
    assert daemon.answers()
    return Survived(took_s=took_s, note=f"down for {SILENCE_LIMIT_S:g} s and more, then from up until all are ready")


def systemctl(daemon: Daemon) -> Survived:
    """Restart, daemon-reload, reload, kill and stop, with controllers enabled below the delegated units.

    Fault 58 of docs/what-happens-when.md.
    """
    machine = daemon.machine
    daemon.serve()
    workers = daemon.workers()
    for worker in workers.values():
        unit = daemon.group(worker).removesuffix("/engine")
        assert {"pids", "memory"} <= set(machine.output(f"cat {unit}/cgroup.subtree_control").split())
    _restarted_in_every_way(daemon)
    machine.run("systemctl stop l40sd")
    began_s = time.monotonic()
    machine.run("systemctl start l40sd && systemctl stop l40sd")
    assert time.monotonic() - began_s < SPAWN_TIMEOUT_S, "a stop waits for no worker that is being started"
    daemon.serve()
    began_s = time.monotonic()
    machine.run("systemctl stop l40sd")
    took_s = time.monotonic() - began_s
    assert machine.run("ps -u l40sd -o pid,args --no-headers", check=False).stdout == ""
    assert machine.show("l40sd.service", "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}

    # Without polkit's rules the workers' cgroups are below the daemon's own, whose controllers must stay off.
    machine.run("systemctl mask --runtime l40s-start.socket")
    machine.run(f"mv {RULE} /root/ && cp /opt/test/no-polkit-rules.conf {NO_POLKIT} && systemctl daemon-reload")
    try:
        daemon.serve()
        assert daemon.status()["provider"] == "cgroup"
        _restarted_in_every_way(daemon)
        machine.run("systemctl stop l40sd")
        assert machine.run("ps -u l40sd -o pid,args --no-headers", check=False).stdout == ""
    finally:
        machine.run("systemctl unmask --runtime l40s-start.socket")
        machine.run(f"systemctl stop l40sd; mv /root/50-l40sd.rules {RULE}; rm -f {NO_POLKIT}; systemctl daemon-reload")
    daemon.serve()
    return Survived(
        took_s=took_s, note="the stop; restart, reload and kill left the workers alone, as units and without"
    )


def _restarted_in_every_way(daemon: Daemon) -> None:
    machine, workers = daemon.machine, daemon.pids()
    old = daemon.pid()
    machine.run("systemctl restart l40sd")
    daemon.until_ready()
    assert (daemon.pid() != old, daemon.pids()) == (True, workers)
    old = daemon.pid()
    machine.run("systemctl daemon-reload && systemctl daemon-reexec && systemctl reload l40sd")
    assert (daemon.pid(), daemon.pids()) == (old, workers)
    machine.run(f"kill -9 {old}")
    until(lambda: daemon.pid() not in (0, old), "systemd has started another daemon", 60)
    daemon.until_ready()
    assert daemon.pids() == workers
    assert machine.show("l40sd.service", "ExecMainStatus")["ExecMainStatus"] == "0", "not 219/CGROUP"


FAULTS: dict[int, Callable[[Daemon], Survived]] = {
    5: fork_bomb,
    41: clock_jumps,
    51: rank_out_of_memory,
    52: host_out_of_memory,
    58: systemctl,
    61: loopback_down,
}
