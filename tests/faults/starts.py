"""What happens to a worker's start and health: it never comes, hangs, flaps, is slow, has no port or no memory."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from daemonkit import Site, pids

from faults.rig import (
    PACED,
    Mark,
    Rig,
    ask,
    busiest,
    check,
    engine_state,
    kill,
    now,
    set_faults,
    until,
    worker_of,
)
from faults.suite import Outcome, fault

FAKE_NVML = Path(__file__).resolve().parents[1] / "kit" / "fake_nvml.py"
GIB = 1 << 30


@fault(
    22,
    "a worker's port is taken by a stranger",
    how="a stranger listens on the only port there is",
    expected="The stranger is named with pid and command; nothing is started against it and nothing loops; other ports"
    " of the range are simply used instead.",
    promise="1 s",
    within_s=4.0,
)
async def port_taken(rig: Rig) -> Outcome:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        site = rig.site(count=1, workers={"quarantine_alike": 2})
        only = site.folder / "conf.d" / "the-only-port.toml"  # after site.toml, which has a range of its own
        only.parent.mkdir(parents=True)
        only.write_text(f"[workers]\nport_first = {port}\nport_last = {port}\n")
        began = time.monotonic()
        mark = Mark(seq=0, at=now())
        await site.start()
        event, _ = await rig.told(site, mark, "worker.backoff")
        took_s = time.monotonic() - began
        check(f"pid {os.getpid()}" in event.data["reason"], event.data)
        status = await site.until(lambda s: s.workers[0].phase == "quarantined", "it gives up", 20)
        check(f"pid {os.getpid()}" in status.workers[0].reason, status.workers[0].reason)
        check(not site.leftovers(), "no process was ever started")
    return Outcome(took_s=took_s, note="from the daemon's start; here after the second try it waits for a reset")


@fault(
    23,
    "a worker never opens its port",
    how="the engine lives and never binds; startup_timeout_s = 2",
    expected="At the deadline it is stopped; the event has its last lines; it is tried again later, and later still.",
    promise="startup_timeout_s",
    within_s=8.0,
)
async def never_binds(rig: Rig) -> Outcome:
    site = rig.site(count=1, args=("--fault", "never-bind"), model={"startup_timeout_s": 2.0})
    mark = Mark(seq=0, at=now())
    await site.start()
    event, took_s = await rig.told(site, mark, "worker.backoff")
    check("not up after 2 s" in event.data["reason"], event.data)
    check(any("model toy" in line for line in event.data["last_lines"]), event.data)
    return Outcome(took_s=took_s)


@fault(
    24,
    "a worker opens its port and answers 503 for ever",
    how="/health says 503; startup_timeout_s = 2",
    expected="It is never sent a request; at the deadline it is stopped and tried again later.",
    promise="startup_timeout_s",
    within_s=10.0,
)
async def unavailable(rig: Rig) -> Outcome:
    site = rig.site(
        count=1,
        args=("--fault", "unavailable"),
        model={"startup_timeout_s": 2.0},
        proxy={"queue_timeout_s": 1.0},
        health={"startup_stall_s": 1.0},
    )
    mark = Mark(seq=0, at=now())
    await site.start()
    status, text = await ask(site)
    check(status == 503, f"{status} {text}")
    event, took_s = await rig.told(site, mark, "worker.backoff")
    check("503" in event.data["reason"], event.data)
    check((await site.status()).proxy.served == 0, "no request was passed on")
    return Outcome(took_s=took_s, note="who asks meanwhile waits, then gets 503 with Retry-After")


@fault(
    25,
    "an idle worker hangs, its /health says 200",
    how="the engine makes no more tokens, nobody asks",
    expected="The canary, one token now and then for an idle worker, finds it; it is killed and started again.",
    promise="canary_interval_s and canary_timeout_s: 120 s",
    within_s=8.0,
)
async def hung_idle(rig: Rig) -> Outcome:
    site = rig.site()
    status = await rig.serve(site)
    victim, other = status.workers
    mark = await rig.mark(site)
    await set_faults(victim, hang_after=0)
    event, took_s = await rig.told(site, mark, "worker.stopping", victim.id)
    check("one token did not come" in event.data["reason"], event.data)
    await rig.told(site, mark, "worker.ready", victim.id)
    check(pids(await site.status())[other.id] == other.pid, "the other one was not touched")
    return Outcome(took_s=took_s)


@fault(
    26,
    "a worker hangs with requests in flight",
    how="the engine makes no more tokens in the middle of streams and of unstreamed requests; /health stays 200",
    expected="No token for stall_timeout_s: killed, started again; what had not begun is asked of another worker.",
    promise="stall_timeout_s and term_timeout_s: 140 s",
    within_s=9.0,
)
async def hung_busy(rig: Rig) -> Outcome:
    site = rig.site(count=2, args=PACED, workers={"term_timeout_s": 1.0})
    await rig.serve(site)
    async with rig.loaded(site, shorts=4, short_tokens=20) as tally:
        victim = await busiest(site)
        requests = (await engine_state(victim))["requests"]
        mark = await rig.mark(site)
        await set_faults(victim, hang_after=requests)
        event, took_s = await rig.told(site, mark, "worker.stopping", victim.id)
        check("no token" in event.data["reason"], event.data)
        await rig.told(site, mark, "worker.ready", victim.id)
    check(set(tally.truncated_on) <= {victim.id}, tally.examples)
    check(tally.failed == 0, tally.examples)
    check(not any(example.startswith("short") for example in tally.examples), tally.examples)  # aborted, as if whole
    return Outcome(took_s=took_s, lost=tally.truncated, note="lost are its open streams")


@fault(
    27,
    "a worker is saturated: /health answers too late, tokens come",
    how="health probes and scrapes answer after 60 s, all slots are busy",
    expected="As long as its replies come it is neither restarted nor taken out.",
    promise="0 kills",
)
async def saturated(rig: Rig) -> Outcome:
    soak_s = 8.0 if rig.is_quick else 60.0
    site = rig.site(count=2, args=(*PACED, "--slots", "4"))
    before = await rig.serve(site)
    async with rig.loaded(site, streams=12, shorts=2, timeout_s=60.0) as tally:
        for worker in before.workers:
            await set_faults(worker, slow_health=60, slow_metrics=60)
        began = time.monotonic()
        while time.monotonic() - began < soak_s:
            answered = tally.answered
            await until(lambda a=answered: tally.answered > a + 12, "requests are answered all the time", 10)
            check(pids(await site.status()) == pids(before), "no worker was restarted")
        for worker in before.workers:
            await set_faults(worker, slow_health=None, slow_metrics=None)
        await site.until(
            lambda s: bool(s.workers) and all(w.phase == "ready" for w in s.workers), "both are ready again", 30
        )
    check(tally.lost == 0, tally.examples)
    return Outcome(took_s=soak_s, lost=tally.lost, note="a soak; 0 kills")


@fault(
    28,
    "a worker exits at once, with 0 or with 1",
    how="two models, each with an engine that exits before it opens its port",
    expected="Tried again after a delay that doubles; after three starts that fail alike it is given"
    " up until `l40sctl reset`, but for one try an hour, and status says why.",
    promise="15 s, 30 s, then no more",
    within_s=20.0,
)
async def exits_at_once(rig: Rig) -> Outcome:
    extra = """
[models.nil]
engine = "simulated"
attention_heads = 64
args = ["--fault", "exit-at-once=0"]
[[patterns.both.replicas]]
model = "toy"
count = 1
[[patterns.both.replicas]]
model = "nil"
count = 1
"""
    site = rig.site(args=("--fault", "exit-at-once=1"), extra=extra, daemon={"pattern": "both"})
    mark = Mark(seq=0, at=now())
    await site.start()
    status = await site.until(
        lambda s: bool(s.workers) and all(w.phase == "quarantined" for w in s.workers), "both have given up", 40
    )
    took_s = (now() - mark.at).total_seconds()
    reasons = {worker.model: worker.reason for worker in status.workers}
    check("status 1" in reasons["toy"], reasons)
    check("status 0" in reasons["nil"], reasons)
    for worker in status.workers:
        events = [e for e in await site.events() if e.data.get("worker") == worker.id]
        delays = [event.data["delay_s"] for event in events if event.event == "worker.backoff"]
        check(len(delays) == 2, delays)
        check(0.4 <= delays[0] <= 0.6, delays)
        check(0.8 <= delays[1] <= 1.2, delays)
        check(sum(event.event == "worker.starting" for event in events) == 3, "three starts")
    await site.post(f"/v1/workers/{status.workers[0].id}/reset")
    await site.until(lambda s: any(w.phase != "quarantined" for w in s.workers), "a reset tries again", 10)
    return Outcome(took_s=took_s, note="delays 0.5 s, 1 s (a tenth of jitter), then quarantined")


@fault(
    29,
    "a worker's program is missing",
    how="the command of a model's engine names a program that is not there; a second one a file that may not be run",
    expected="failed, with the path; no restart until the configuration or the operator says so.",
    promise="1 s",
    within_s=4.0,
)
async def program_missing(rig: Rig) -> Outcome:
    program = rig.folder / "engine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o600)
    extra = f"""
[engines.gone]
command = ["/no/such/engine", "--port", "{{port}}"]
[engines.shut]
command = ["{program}", "--port", "{{port}}"]
[models.gone]
engine = "gone"
source = "-"
attention_heads = 64
[models.shut]
engine = "shut"
source = "-"
attention_heads = 64
[[patterns.both.replicas]]
model = "gone"
count = 1
[[patterns.both.replicas]]
model = "shut"
count = 1
"""
    site = rig.site(extra=extra, daemon={"pattern": "both"})
    began = time.monotonic()
    await site.start()
    status = await site.until(
        lambda s: bool(s.workers) and all(w.phase == "failed" for w in s.workers), "both have failed", 20
    )
    took_s = time.monotonic() - began
    reasons = {worker.model: worker.reason for worker in status.workers}
    check("/no/such/engine" in reasons["gone"], reasons)
    check(str(program) in reasons["shut"], reasons)
    mark = await rig.mark(site)
    await until(lambda: (now() - mark.at).total_seconds() > 1.5, "some time passes")
    started = [event for event in await site.events() if event.event == "worker.starting"]
    check(not started, started)
    return Outcome(took_s=took_s, note="from the daemon's start")


@fault(
    30,
    "a worker flaps: ready for a moment, then it dies, again and again",
    how="it dies 0.3 s after each start; quarantine_per_hour = 4",
    expected="Being ready for a moment clears nothing: after so many failures within an hour it is given up.",
    promise="at most 6 restarts an hour",
    within_s=25.0,
)
async def flaps(rig: Rig) -> Outcome:
    site = rig.site(
        count=1,
        args=("--fault", "die-after=0.3"),
        workers={"quarantine_per_hour": 4, "backoff_first_s": 0.2},
    )
    mark = Mark(seq=0, at=now())
    await site.start()
    event, took_s = await rig.told(site, mark, "worker.quarantined")
    events = await site.events()
    ready = sum(event.event == "worker.ready" for event in events)
    check(ready == 4, f"it was ready {ready} times")
    check("within an hour" in event.data["reason"], event.data)
    return Outcome(took_s=took_s, note="4 failures, then quarantined")


@fault(
    31,
    "all twelve workers die together, as after a driver reset",
    how="SIGKILL to twelve engines at once; start_parallel = 2",
    expected="All start again, never more than start_parallel at once.",
    promise="two at once",
    within_s=25.0,
)
async def all_die(rig: Rig) -> Outcome:
    site = rig.site(count=12, workers={"start_parallel": 2}, args=("--start-delay-s", "0.2"))
    before = await rig.serve(site)
    mark = await rig.mark(site)
    for worker in before.workers:
        kill(worker.pid)
    most = 0

    def back(status: Any) -> bool:
        nonlocal most
        most = max(most, sum(w.phase in ("spawning", "starting") for w in status.workers))
        return all(w.phase == "ready" and w.pid != pids(before)[w.id] for w in status.workers)

    await site.until(back, "all are back", 60)
    took_s = (now() - mark.at).total_seconds()
    coming: set[str] = set()
    at_once = 0
    for event in await site.events():
        if event.seq > mark.seq and "worker" in event.data:
            coming.discard(event.data["worker"])
            if event.event in ("worker.spawning", "worker.starting"):
                coming.add(event.data["worker"])
            at_once = max(at_once, len(coming))
    check(max(most, at_once) == 2, f"{at_once} were starting at once")
    return Outcome(took_s=took_s, note="never more than 2 at once")


def fake_host(rig: Rig, count: int = 2) -> tuple[Path, dict[str, Any]]:
    """Return the file that the fake NVML reads, and its content, written: so many idle L40S."""
    facts: dict[str, Any] = {
        "gpus": [
            {"uuid": f"GPU-{n:08d}", "busId": f"00000000:{0x3B + n:02X}:00.0", "total": 48 * GIB, "used": 0}
            for n in range(count)
        ]
    }
    path = rig.folder / "nvml.json"
    path.write_text(json.dumps(facts))
    return path, facts


def live_site(rig: Rig, path: Path, *, host_changes: Mapping[str, Any] | None = None, **changes: Any) -> Site:
    """Return a daemon that takes its inventory from the fake NVML."""
    return rig.site(
        host={"inventory": "auto", "nvml_timeout_s": 1.0, "numa_pinning": False, **(host_changes or {})},
        environ={"L40SD_NVML_LIBRARY": str(FAKE_NVML), "FAKE_NVML": str(path)},
        **changes,
    )


@fault(
    32,
    "a GPU's memory stays taken after a restart",
    how="fake NVML: 12 GiB stay in use when the worker is killed, by nobody that can be seen; freed later",
    expected="The next start waits for the memory; at its deadline it says which GPU and how much, and tries again.",
    promise="gpu_free_timeout_s: 60 s, then blocked",
    within_s=6.0,
)
async def memory_leaks(rig: Rig) -> Outcome:
    path, facts = fake_host(rig)
    site = live_site(rig, path, workers={"gpu_free_timeout_s": 1.0})
    status = await rig.serve(site)
    victim = status.workers[0]
    number = victim.gpus[0]
    facts["gpus"][number]["used"] = 12 * GIB
    path.write_text(json.dumps(facts))
    mark = await rig.mark(site)
    kill(victim.pid)
    event, took_s = await rig.told(site, mark, "worker.backoff", victim.id)
    check(f"GPU {number}" in event.data["reason"], event.data)
    check("12.0 GiB" in event.data["reason"], event.data)
    check(not worker_of(await site.status(), victim.id).restarts > 1, "waiting is not counted as a failure")
    facts["gpus"][number]["used"] = 0
    path.write_text(json.dumps(facts))
    await site.until(lambda s: worker_of(s, victim.id).phase == "ready", "it starts once the memory is free", 30)
    return Outcome(took_s=took_s)


@fault(
    33,
    "a stranger's process on our GPU",
    how="fake NVML: a stranger holds 20 GiB of GPU 0 when the daemon starts",
    expected="It is named with its pid and never touched; the worker waits; the other GPUs serve.",
    promise="gpu_free_timeout_s",
    within_s=10.0,
)
async def gpu_taken(rig: Rig) -> Outcome:
    path, facts = fake_host(rig)
    stranger = await asyncio.create_subprocess_exec("sleep", "1000")
    rig.at_end(stranger.kill)
    facts["gpus"][0] |= {"used": 20 * GIB, "processes": [[stranger.pid, 20 * GIB]]}
    path.write_text(json.dumps(facts))
    site = live_site(rig, path, workers={"gpu_free_timeout_s": 1.0})
    mark = Mark(seq=0, at=now())
    await site.start()
    status = await site.until(
        lambda s: sorted(w.phase for w in s.workers) == ["backoff", "ready"], "one waits, one serves", 30
    )
    took_s = (now() - mark.at).total_seconds()
    blocked = next(worker for worker in status.workers if worker.phase == "backoff")
    check(f"pid {stranger.pid} (sleep)" in blocked.reason, blocked.reason)
    check(stranger.returncode is None, "the stranger was not touched")
    check(psutil.pid_exists(stranger.pid), "the stranger lives")
    return Outcome(took_s=took_s, note="from the daemon's start")
