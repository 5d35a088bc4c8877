"""What happens to the daemon: killed at any moment, doubled, hung, upgraded; its files deleted or forged."""

import asyncio
import contextlib
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from daemonkit import Site, pids
from soak.living import doubly_owned
from soak.living import living as holders

from faults.rig import (
    PACED,
    PATIENCE_S,
    Mark,
    Rig,
    ask,
    check,
    forge,
    kill,
    living,
    now,
    tree_of,
    until,
)
from faults.suite import Outcome, fault
from l40sd.control.messages import Status
from l40sd.errors import L40sError

PAIRS = """
[[patterns.pairs.replicas]]
model = "toy"
count = 3
tp = 2
"""


@fault(
    9,
    "kill -9 of the daemon, workers ready",
    how="SIGKILL to the daemon with 12 workers ready, one of them after a restart; another daemon is started",
    expected="The workers serve on; the next daemon adopts all of them: same processes, no restart, counters kept.",
    promise="12 adopted in 2 s",
    within_s=2.0,
)
async def killed_when_ready(rig: Rig) -> Outcome:
    site = rig.site(count=12)
    before = await rig.serve(site)
    kill(before.workers[0].pid)
    await site.until(lambda s: s.workers[0].restarts == 1, "one has been restarted", PATIENCE_S)
    before = await site.until_ready("few", PATIENCE_S)
    await site.kill()
    check(len(site.leftovers()) == 24, "12 shims and 12 engines live on")
    began = time.monotonic()
    await site.start(PATIENCE_S)
    after = await site.until_ready("few", PATIENCE_S)
    took_s = time.monotonic() - began
    check(pids(after) == pids(before), "the same processes")
    check([w.restarts for w in after.workers] == [w.restarts for w in before.workers], after.workers)
    check(daemon_pids_note(site, "adopted=12"), site.tail())
    return Outcome(took_s=took_s, note="from the start of the process until all serve through the endpoint")


@fault(
    10,
    "kill -9 of the daemon in the middle of starting workers",
    how="SIGKILL at the moment an instance's directory lacks its record, and at 50 ms steps after; again and again",
    expected="The next daemon adopts what is whole and kills what is half-born; nobody is left, no GPU is used twice.",
    promise="at the next start",
)
async def killed_while_spawning(rig: Rig) -> Outcome:
    site = rig.site(count=6, args=("--start-delay-s", "0.1"))
    longest_s = 0.0
    rounds = 5 if rig.is_quick else 40
    for turn in range(rounds):
        site.spawn()
        instances = site.folder / "run" / "instances"
        await until(lambda at=instances: half_born(at) or all_born(at, 6), "an instance is being made")
        await asyncio.sleep(0.05 * (turn % 5))
        await site.kill()
    began = time.monotonic()
    status = await rig.serve(site)
    longest_s = time.monotonic() - began
    check_one_owner_each(site)
    check(len(list(instances.iterdir())) == 6, sorted(instances.iterdir()))
    check(len(site.leftovers()) == 12, site.leftovers())
    check(len(status.workers) == 6, status.workers)
    return Outcome(took_s=longest_s, note=f"{rounds} kills, then the start until all are ready")


def half_born(instances: Path) -> bool:
    """Whether an instance has its directory and not its run.json."""
    with contextlib.suppress(OSError):
        return any(not (path / "run.json").exists() for path in instances.iterdir())
    return False


def all_born(instances: Path, count: int) -> bool:
    """Whether so many instances are complete."""
    with contextlib.suppress(OSError):
        return sum((path / "run.json").exists() for path in instances.iterdir()) == count
    return False


def check_one_owner_each(site: Site) -> None:
    """Raise when a GPU is in two instances' hands at one moment, as their own environment says."""
    twice = doubly_owned(holders(site.folder / "run"))
    check(not twice, "; ".join(twice))


def daemon_pids_note(site: Site, text: str) -> bool:
    """Return whether the daemon's log holds this."""
    return text in site.log_file.read_text(errors="replace")


@fault(
    11,
    "kill -9 of the daemon in the middle of stopping a worker",
    how="a worker that needs its term_timeout_s is told to restart; SIGKILL to the daemon while it is stopping",
    expected="The stop goes on without the daemon and is completed; the next one starts the worker again.",
    promise="term_timeout_s",
    within_s=2.0,
)
async def killed_while_stopping(rig: Rig) -> Outcome:
    site = rig.site(args=("--fault", "ignore-term"), workers={"term_timeout_s": 1.0})
    status = await rig.serve(site)
    other = status.workers[1]
    longest_s = 0.0
    rounds = 3 if rig.is_quick else 20
    for _ in range(rounds):
        victim = (await site.status()).workers[0]
        tree = tree_of(victim.pid)
        mark = await rig.mark(site)
        await site.post(f"/v1/workers/{victim.id}/restart")
        await rig.told(site, mark, "worker.stopping", victim.id)
        began = time.monotonic()
        await site.kill()
        site.spawn()
        await until(lambda old=tree: not living(old), "the old process is gone", 10)
        longest_s = max(longest_s, time.monotonic() - began)
        after = await site.until(
            lambda s, old=victim: all(w.phase == "ready" for w in s.workers) and pids(s)[old.id] != old.pid,
            "it serves again",
            PATIENCE_S,
        )
        check(pids(after)[other.id] == other.pid, "the other one was not touched")
    return Outcome(took_s=longest_s, note=f"{rounds} kills; the longest; term_timeout_s was 1")


@fault(
    12,
    "kill -9 of the daemon in the middle of a pattern change",
    how="6 x TP1 to 3 x TP2; SIGKILL after the 1st, 2nd, 3rd, ... event of the change, then the next daemon",
    expected="The change is on disk and is carried on; at no moment has a GPU two owners.",
    promise="at the next start",
)
async def killed_while_changing(rig: Rig) -> Outcome:
    site = rig.site(count=6, extra=PAIRS, health={"canary_interval_s": 0})
    await rig.serve(site)
    goals = ("pairs", "few")
    steps = (1, 4, 9, 14) if rig.is_quick else tuple(range(1, 40))
    longest_s = 0.0
    for turn, step in enumerate(steps):
        goal = goals[turn % 2]
        mark = await rig.mark(site)
        operation = await site.request(goal)
        await until(lambda m=mark, n=step: told_or_done(site, m, n), f"event {step} of the change")
        await site.kill()
        check_one_owner_each(site)
        began = time.monotonic()
        await site.start(PATIENCE_S)
        await until_settled(site, goal)
        longest_s = max(longest_s, time.monotonic() - began)
        check_one_owner_each(site)
        check(operation, "an operation was named")
    return Outcome(took_s=longest_s, note=f"{len(steps)} kills; the longest way from a start to the whole pattern")


async def told_or_done(site: Site, mark: Mark, count: int) -> bool:
    """Whether so many events have been told, or the change is over before."""
    events = [event for event in await site.events() if event.seq > mark.seq and event.event != "control.request"]
    return len(events) > count or any(event.event == "pattern.apply.complete" for event in events)


async def until_settled(site: Site, pattern: str) -> Status:
    """Wait until the pattern is there whole, looking for GPUs with two owners all the way."""

    def is_there(status: Status) -> bool:
        check_one_owner_each(site)
        busy = status.operation is not None and status.operation.is_under_way
        return status.pattern == pattern and not busy and all(w.phase == "ready" for w in status.workers)

    return await site.until(is_there, f"pattern {pattern} is there", PATIENCE_S)


@fault(
    13,
    "a worker dies while no daemon runs",
    how="the daemon is killed, then a worker; then the next daemon",
    expected="The shim has written down when and how; the next daemon tells it as it was and starts the worker again.",
    promise="at the next start",
    within_s=5.0,
)
async def died_meanwhile(rig: Rig) -> Outcome:
    site = rig.site()
    before = await rig.serve(site)
    victim, other = before.workers
    await site.kill()
    died = now()
    kill(victim.pid)
    await until(lambda: list((site.folder / "run" / "instances").glob("*/exit.json")), "its end is on record")
    began = time.monotonic()
    await site.start(PATIENCE_S)
    event, _ = await rig.told(site, Mark(seq=0, at=died), "worker.ended_meanwhile", victim.id)
    after = await site.until_ready("few", PATIENCE_S)
    took_s = time.monotonic() - began
    ended_at = Mark(seq=0, at=died).at.fromisoformat(event.data["ended_at"])
    check(abs((ended_at - died).total_seconds()) < 2, f"{event.data} is not when it died, {died}")
    check(event.data.get("exit_signal") == signal.SIGKILL, f"the real status is told: {event.data}")
    check(pids(after)[other.id] == other.pid, "the other one was not touched")
    check({w.id: w.restarts for w in after.workers}[victim.id] == 1, "it counts as a failure")
    return Outcome(took_s=took_s)


@fault(
    15,
    "the daemon never comes back",
    how="SIGKILL to the daemon, orphan_grace_s = 1, nobody starts it again",
    expected="The shims' lease runs out; they stop their engines and end.",
    promise="orphan_grace_s and term_timeout_s",
    within_s=5.0,
)
async def never_back(rig: Rig) -> Outcome:
    site = rig.site(count=4, daemon={"orphan_grace_s": 1.0})
    await rig.serve(site)
    began = time.monotonic()
    await site.kill()
    await until(lambda: not site.leftovers(), "all shims and engines have ended", 20)
    took_s = time.monotonic() - began
    await site.start(PATIENCE_S)  # clears away their directories and cgroups
    await site.until_ready("few", PATIENCE_S)
    return Outcome(took_s=took_s)


@fault(
    17,
    "two daemons at once",
    how="a second one is started with the same configuration",
    expected="The second says who runs and exits with 1; the first is untouched, its socket too.",
    promise="1 s",
    within_s=2.0,
)
async def two_daemons(rig: Rig) -> Outcome:
    site = rig.site()
    before = await rig.serve(site)
    assert site.daemon is not None
    second = Site(folder=site.folder, config=site.config, settings=site.settings)
    began = time.monotonic()
    second.spawn()
    code = await second.ended(20)
    took_s = time.monotonic() - began
    check(code == 1, f"it exited with {code}")
    check(f"already running (pid {site.daemon.pid})" in site.log_file.read_text(), site.tail())
    check(pids(await site.status()) == pids(before), "the first one's workers are untouched")
    return Outcome(took_s=took_s)


@fault(
    18,
    "a socket's and a lock's file are left from before",
    how="SIGKILL to the daemon leaves both; a second time the socket's place is taken by an ordinary file",
    expected="They are removed once the lock is held; the daemon starts.",
    within_s=4.0,
)
async def stale_files(rig: Rig) -> Outcome:
    site = rig.site()
    before = await rig.serve(site)
    await site.kill()
    check(site.socket.exists(), "the socket's file is left")
    began = time.monotonic()
    check(pids(await site.start(PATIENCE_S)) == pids(before), "adopted")
    took_s = time.monotonic() - began
    await site.kill()
    site.socket.unlink()
    site.socket.write_text("not a socket")
    check(pids(await site.start(PATIENCE_S)) == pids(before), "adopted")
    await site.until_ready("few", PATIENCE_S)
    return Outcome(took_s=took_s)


@fault(
    19,
    "the control socket's file is deleted under a live daemon; the lock's too",
    how="rm of both",
    expected="It is noticed and made again, with an event; the workers' lease is not lost.",
    promise="30 s",
    within_s=30.0,
)
async def socket_deleted(rig: Rig) -> Outcome:
    site = rig.site(daemon={"orphan_grace_s": 8.0})
    before = await rig.serve(site)
    began = time.monotonic()
    site.socket.unlink()
    (site.folder / "run" / "l40sd.lock").unlink()
    await until(site.socket.exists, "the socket is back", 30)
    took_s = time.monotonic() - began
    await site.until(lambda s: pids(s) == pids(before), "it answers", 10)
    names = [event.event for event in await site.events()]
    check("control.rebound" in names, names)
    await until(lambda: time.monotonic() - began > 12, "orphan_grace_s has passed", 20)
    check(pids(await site.status()) == pids(before), "the workers did not take the daemon for dead")
    check(all(w.phase == "ready" for w in (await site.status()).workers), "all of them serve")
    return Outcome(took_s=took_s)


@contextlib.contextmanager
def stranger() -> Any:
    """Run a process that nobody may touch."""
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        yield process
        check(process.poll() is None, "a stranger was signalled")
    finally:
        process.kill()
        process.wait()


@fault(
    20,
    "a record names a pid that somebody else has now",
    how="daemon and workers are killed; run.json is forged to name a stranger; then the next daemon",
    expected="The stranger is never signalled; the record counts as a lost shim; the worker starts anew.",
    promise="at the next start",
    within_s=8.0,
)
async def stranger_pid(rig: Rig) -> Outcome:
    site = rig.site(count=1)
    before = await rig.serve(site)
    await site.kill()
    shim = psutil.Process(before.workers[0].pid).parent()
    tree = [shim, *shim.children(recursive=True)]
    kill(shim.pid)
    for process in tree[1:]:
        process.kill()
    await until(lambda: not living(tree), "all are gone")
    with stranger() as victim:
        forged = {"pid": victim.pid, "start_ticks": 1}
        forge(site, "run.json", shim=forged, engine=forged)
        began = time.monotonic()
        await site.start(PATIENCE_S)
        await site.until_ready("few", PATIENCE_S)
        took_s = time.monotonic() - began
    check(daemon_pids_note(site, "shim-lost"), site.tail())
    return Outcome(took_s=took_s)


@fault(
    78,
    "a record is forged to name a stranger rightly, start time and all",
    how="the daemon is killed; run.json names a stranger as shim, or as engine; its log's name leads elsewhere;"
    " then the next daemon",
    expected="The stranger is not adopted and not signalled, the record is set aside, the worker starts anew; nothing"
    " is written through the link.",
    promise="at the next start",
    within_s=15.0,
)
async def forged_record(rig: Rig) -> Outcome:
    site = rig.site(count=1)
    before = await rig.serve(site)
    began = time.monotonic()
    for names in (("shim", "engine"), ("engine",)):
        await site.kill()
        precious = rig.folder / "precious"
        precious.write_text("mine")
        with stranger() as victim:
            identity = {"pid": victim.pid, "start_ticks": int(stat_field(victim.pid, 22))}
            forge(site, "run.json", **dict.fromkeys(names, identity))
            log = site.folder / "log" / f"{before.workers[0].id}.log"
            log.unlink(missing_ok=True)
            log.symlink_to(precious)
            await site.start(PATIENCE_S)
            status = await site.until_ready("few", PATIENCE_S)
            check(status.workers[0].pid != victim.pid, "the stranger is our worker")
            kill(psutil.Process(status.workers[0].pid).parent().pid)
            await site.until(lambda s: s.workers[0].restarts > 0 and s.workers[0].phase == "ready", "anew", PATIENCE_S)
        check(precious.read_text() == "mine", "written through a link")
        log.unlink(missing_ok=True)
    return Outcome(took_s=time.monotonic() - began, note="two forged records, each with a killed shim after it")


@fault(
    21,
    "a reboot: the records are of another boot",
    how="all is killed, the records' boot id forged, their pids a stranger's; then the next daemon",
    expected="Nobody is adopted, nobody is signalled, everything starts afresh.",
    promise="at the next start",
    within_s=8.0,
)
async def another_boot(rig: Rig) -> Outcome:
    site = rig.site()
    before = await rig.serve(site)
    await site.kill()
    trees = [tree_of(worker.pid) for worker in before.workers]
    shims = [psutil.Process(worker.pid).parent() for worker in before.workers]
    everybody = [*shims, *(process for tree in trees for process in tree)]
    for process in everybody:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    await until(lambda: not living(everybody), "all are gone")
    with stranger() as victim:
        forged = {"pid": victim.pid, "start_ticks": int(stat_field(victim.pid, 22))}
        forge(site, "spec.json", boot_id="another")
        forge(site, "run.json", boot_id="another", shim=forged, engine=forged)
        began = time.monotonic()
        await site.start(PATIENCE_S)
        after = await site.until_ready("few", PATIENCE_S)
        took_s = time.monotonic() - began
    check({worker.restarts for worker in after.workers} == {0}, "no failure is counted")
    check(len(list((site.folder / "run" / "instances").iterdir())) == 2, "the old records are gone")
    return Outcome(took_s=took_s)


def stat_field(pid: int, number: int) -> str:
    """Return a field of /proc/PID/stat, counted as in proc(5)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()[number - 3]


@fault(
    16,
    "the daemon hangs",
    how="SIGSTOP to the daemon for some seconds; requests go to the workers' own ports meanwhile",
    expected="The workers do not mind; when it goes on, so does everything, and no worker is blamed for the pause."
    " Under systemd the watchdog ends it after WatchdogSec, and the next daemon adopts (fault 58).",
    promise="WatchdogSec and 5 s",
    within_s=8.0,
)
async def daemon_hangs(rig: Rig) -> Outcome:
    site = rig.site(args=PACED)
    before = await rig.serve(site)
    assert site.daemon is not None
    site.signal(signal.SIGSTOP)
    began = time.monotonic()
    pause_s = 5.0  # longer than stall_timeout_s, canary_interval_s and probe_timeout_s together
    await until(lambda: time.monotonic() - began > pause_s, "the pause is over", 20)
    site.signal(signal.SIGCONT)
    resumed = time.monotonic()
    check((await ask(site))[0] == 200, "it answers again")
    took_s = time.monotonic() - resumed
    with contextlib.suppress(L40sError):  # a worker that is blamed would go now
        await site.until(lambda s: pids(s) != pids(before), "a worker has gone", 3.0)
        check(False, f"a worker was blamed for the daemon's pause: {(await site.status()).workers}")
    check(site.daemon.poll() is None, "the daemon lives")
    return Outcome(took_s=took_s, note="after a pause of 5 s; the watchdog itself is shown in the container")
