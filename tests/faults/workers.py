"""What happens to a worker's processes: killed, hung, hidden, too many, not to be killed at all."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
from daemonkit import pids

from faults import machine
from faults.rig import (
    PACED,
    Rig,
    ask,
    busiest,
    check,
    engine_state,
    kill,
    living,
    now,
    set_faults,
    tree_of,
    until,
    worker_of,
)
from faults.suite import NotHereError, Outcome, fault

FREEZER = Path("/sys/fs/cgroup/freezer")


@fault(
    1,
    "kill -9 of a worker under load",
    how="SIGKILL to the engine's leader through a pidfd, streams and short requests in flight",
    expected="It gets no more requests; what had not begun is asked of another worker, an open stream ends in an error"
    " event; the rest of its processes is killed; it starts again at once.",
    promise="seen within 50 ms, starts again within 2 s",
    within_s=2.0,
)
async def leader_killed(rig: Rig) -> Outcome:
    site = rig.site(count=3, args=PACED)
    await rig.serve(site)
    async with rig.loaded(site) as tally:
        victim = await busiest(site)
        mark = await rig.mark(site)
        kill(victim.pid)
        _, seen_s = await rig.told(site, mark, "worker.exited", victim.id)
        _, again_s = await rig.told(site, mark, "worker.starting", victim.id)
        _, ready_s = await rig.told(site, mark, "worker.ready", victim.id)
        answered = tally.answered
        await until(lambda: tally.answered > answered + 6, "the load goes on")
    check(tally.failed == 0, tally.examples)
    check(set(tally.truncated_on) <= {victim.id}, tally.examples)
    note = f"gone after {seen_s * 1000:.0f} ms, serves again after {ready_s:.1f} s; lost are its open streams"
    return Outcome(took_s=again_s, lost=tally.truncated, note=note)


@fault(
    2,
    "an engine's core dies, its front stays and says that it is well",
    how="SIGKILL to one rank's process; /health stays 200, no token comes any more",
    expected="The missing token counts, not /health: the whole worker is killed and started again.",
    promise="130 s; at once when it answers with 500",
    within_s=12.0,
)
async def core_killed(rig: Rig) -> Outcome:
    site = rig.site(count=2, tp=2, args=(*PACED, "--fault", "rank-death-unnoticed"), workers={"term_timeout_s": 1.0})
    await rig.serve(site)
    async with rig.loaded(site, streams=4, shorts=0) as tally:
        victim = await busiest(site)
        ranks = (await engine_state(victim))["ranks"]
        mark = await rig.mark(site)
        kill(ranks[0])
        event, _ = await rig.told(site, mark, "worker.stopping", victim.id)
        _, ready_s = await rig.told(site, mark, "worker.ready", victim.id)
    check("token" in event.data.get("reason", ""), event)
    check(tally.failed == 0, tally.examples)
    check(set(tally.truncated_on) <= {victim.id}, tally.examples)
    return Outcome(took_s=ready_s, lost=tally.truncated, note="lost are its open streams")


@fault(
    3,
    "an engine's front dies, its core stays and holds the GPU",
    how="SIGKILL to the leader of a worker whose ranks live on",
    expected="Its process tree is emptied before its port and its GPUs count as free.",
    promise="1 s",
    within_s=1.0,
)
async def front_killed(rig: Rig) -> Outcome:
    site = rig.site(count=2, tp=4)
    status = await rig.serve(site)
    victim = status.workers[0]
    tree = tree_of(victim.pid)
    check(len(tree) == 5, tree)
    mark = await rig.mark(site)
    kill(victim.pid)
    await until(lambda: not living(tree), "its ranks are gone", 10)
    emptied_s = (now() - mark.at).total_seconds()
    event, exited_s = await rig.told(site, mark, "worker.exited", victim.id)
    check(not living(tree), "a rank outlived the worker")
    await rig.told(site, mark, "worker.ready", victim.id)
    check(event.data["exit_signal"] == signal.SIGKILL, event)
    return Outcome(took_s=min(emptied_s, exited_s))


@fault(
    4,
    "a worker's child hides: twice forked, own session, empty environment",
    how="such children started by the engine; then the worker is restarted by l40sctl",
    expected="Nothing of it survives the stop.",
    promise="1 s after the kill",
    within_s=3.0,
)
async def hidden_children(rig: Rig) -> Outcome:
    site = rig.site(args=("--fault", "daemon-child=3"))
    status = await rig.serve(site)
    victim = status.workers[0]
    tree = tree_of(victim.pid)
    check(len(tree) >= 4, f"the engine and three hidden children, not {tree}")
    mark = await rig.mark(site)
    await site.post(f"/v1/workers/{victim.id}/restart")
    await rig.told(site, mark, "worker.stopping", victim.id)
    _, exited_s = await rig.told(site, mark, "worker.exited", victim.id)
    check(not living(tree), living(tree))
    await rig.told(site, mark, "worker.ready", victim.id)
    return Outcome(took_s=exited_s)


@fault(
    5,
    "a fork bomb in a worker",
    how="600 children in sessions of their own, pids_limit 200; then the worker is restarted; in the virtual machine"
    " with the pids controller as well",
    expected="Where the kernel lends the pids controller it ends at the limit; killing the worker empties it; the host"
    " stays usable.",
    promise="2 s",
    within_s=4.0,
)
async def fork_bomb(rig: Rig) -> Outcome:
    site = rig.site(workers={"pids_limit": 200})
    status = await rig.serve(site)
    victim = status.workers[0]
    await set_faults(victim, fork_bomb=600)
    tree = tree_of(victim.pid)
    mark = await rig.mark(site)
    await site.post(f"/v1/workers/{victim.id}/restart")
    _, exited_s = await rig.told(site, mark, "worker.exited", victim.id)
    check(not living(tree), f"{len(living(tree))} are left")
    await rig.told(site, mark, "worker.ready", victim.id)
    if "pids" in status.provider_note or status.provider == "none":
        limit = "no pids controller here: the limit was not applied"
    else:
        limit = f"the limit held at {len(tree)}"
        check(len(tree) <= 200, limit)
    return await machine.inject_too(rig, 5, Outcome(took_s=exited_s, note=f"{len(tree)} processes; {limit}"))


@fault(
    6,
    "a worker is stopped (kill -STOP)",
    how="SIGSTOP to the engine, with the default probe timeouts; then it is told to restart",
    expected="It gets no more requests after three failed probes; a stop still works on it.",
    promise="8 s",
    within_s=8.0,
)
async def stopped_worker(rig: Rig) -> Outcome:
    default = {"probe_interval_s": 2.0, "probe_timeout_s": 2.0, "stall_timeout_s": 120.0, "canary_interval_s": 60.0}
    site = rig.site(health=default)
    status = await rig.serve(site)
    victim, other = status.workers
    mark = await rig.mark(site)
    kill(victim.pid, signal.SIGSTOP)
    _, out_s = await rig.told(site, mark, "worker.unready", victim.id)
    for _ in range(6):
        check((await ask(site, timeout_s=5.0))[0] == 200, "only the other one is asked")
    asked = await rig.mark(site)
    await site.post(f"/v1/workers/{victim.id}/restart")
    _, stopped_s = await rig.told(site, asked, "worker.exited", victim.id)
    await rig.told(site, asked, "worker.ready", victim.id)
    after = await site.status()
    check(pids(after)[other.id] == other.pid, "the other one was not touched")
    return Outcome(took_s=out_s, note=f"restarted in {stopped_s:.1f} s")


@fault(
    7,
    "a worker ignores SIGTERM",
    how="the engine takes no notice; restarted by l40sctl, term_timeout_s = 1",
    expected="After term_timeout_s everything of it is killed.",
    promise="term_timeout_s and 1 s",
    within_s=2.0,
)
async def term_ignored(rig: Rig) -> Outcome:
    site = rig.site(args=("--fault", "ignore-term"), workers={"term_timeout_s": 1.0})
    status = await rig.serve(site)
    victim = status.workers[0]
    mark = await rig.mark(site)
    await site.post(f"/v1/workers/{victim.id}/restart")
    _, exited_s = await rig.told(site, mark, "worker.exited", victim.id)
    check(exited_s >= 1.0, f"it had its term_timeout_s, not {exited_s} s")
    await rig.told(site, mark, "worker.ready", victim.id)
    return Outcome(took_s=exited_s)


@fault(
    8,
    "a worker cannot be killed (state D, a lost GPU)",
    how="the engine is frozen in a cgroup v1 freezer, where SIGKILL waits; then the worker and the daemon are stopped",
    expected="It is shown as stuck and its GPUs are out of use; other workers serve on and stop; the daemon ends in"
    " its time and says what it left.",
    promise="stop_timeout_s",
    within_s=20.0,
)
async def unkillable(rig: Rig) -> Outcome:
    if not (FREEZER / "cgroup.procs").exists() or os.geteuid() != 0:
        raise NotHereError("needs root and a cgroup v1 freezer to make a process that SIGKILL does not end")
    site = rig.site(
        workers={"term_timeout_s": 0.3, "kill_timeout_s": 0.7, "drain_timeout_s": 1.0},
        daemon={"stop_timeout_s": 6.0},
    )
    status = await rig.serve(site)
    victim, other = status.workers
    ice = FREEZER / f"l40sd-fault8-{os.getpid()}"
    ice.mkdir()
    frozen = psutil.Process(victim.pid)

    def thaw() -> None:
        if ice.exists():
            (ice / "freezer.state").write_text("THAWED")
            frozen.wait(10)
            ice.rmdir()

    rig.at_end(thaw)
    (ice / "cgroup.procs").write_text(str(victim.pid))
    (ice / "freezer.state").write_text("FROZEN")
    mark = await rig.mark(site)
    await site.post(f"/v1/workers/{victim.id}/restart")
    _, stuck_s = await rig.told(site, mark, "worker.stuck", victim.id)
    status = await site.status()
    states = {gpu.index: gpu.state for gpu in status.gpus}
    check(states[victim.gpus[0]] == "stuck", states)
    check(any(victim.id in line for line in status.degraded), status.degraded)
    check((await ask(site))[0] == 200, "the other one answers")
    check(worker_of(status, other.id).phase == "ready", status.workers)
    began = now()
    code = await site.stop(20)
    took_s = (now() - began).total_seconds()
    check(code == 0, f"the daemon ended with {code}")
    check("daemon.workers_left" in site.log_file.read_text(), "the log names what was left")
    check(living([frozen]), "the process was unkillable all the time")
    thaw()
    await until(lambda: not site.leftovers(), "the shim ends once its engine has gone")
    await rig.serve(site)  # and the next daemon clears away what is left of it on disk
    return Outcome(took_s=took_s, note=f"stuck after {stuck_s:.1f} s; stop_timeout_s was 6")


@fault(
    14,
    "kill -9 of a worker's shim",
    how="SIGKILL to the shim",
    expected="Its engine is killed with all its children and started again as shim-lost; nobody is left.",
    promise="2 s",
    within_s=2.0,
)
async def shim_killed(rig: Rig) -> Outcome:
    site = rig.site(count=2, tp=2)
    status = await rig.serve(site)
    victim = status.workers[0]
    tree = tree_of(victim.pid)
    shim = psutil.Process(victim.pid).parent()
    mark = await rig.mark(site)
    kill(shim.pid)
    event, _ = await rig.told(site, mark, "worker.exited", victim.id)
    check(not living(tree), living(tree))
    check("shim" in event.data.get("reason", ""), event)
    _, again_s = await rig.told(site, mark, "worker.starting", victim.id)
    await rig.told(site, mark, "worker.ready", victim.id)
    return Outcome(took_s=again_s)


@fault(
    51,
    "one rank of a worker is killed for memory",
    how="SIGKILL to one rank's process, as the OOM killer does; in the virtual machine by the OOM killer itself, at"
    " memory.max",
    expected="The whole worker is ended and started again; with the memory controller status names it an OOM kill and"
    " waits longer.",
    promise="5 s",
    within_s=5.0,
)
async def rank_killed(rig: Rig) -> Outcome:
    site = rig.site(count=2, tp=4)
    status = await rig.serve(site)
    victim = status.workers[0]
    tree = tree_of(victim.pid)
    mark = await rig.mark(site)
    kill((await engine_state(victim))["ranks"][2])
    await rig.told(site, mark, "worker.exited", victim.id)
    check(not living(tree), living(tree))
    _, ready_s = await rig.told(site, mark, "worker.ready", victim.id)
    here = Outcome(took_s=ready_s, note="no memory controller lent here: killed by SIGKILL, not named as OOM")
    return await machine.inject_too(rig, 51, here)


@fault(
    65,
    "a worker answers every request with an error at once, its /health says 200",
    how="500 for every request but those for one token, under load; later it is well again",
    expected="After five failed in a row it gets no more requests (never the last worker of a model), with an event;"
    " status says why; once its time out is over and it made a token it comes back, slowly.",
    promise="out within 1 s under load; back after 10 s, doubling to 300 s",
    within_s=2.0,
)
async def errors_at_once(rig: Rig) -> Outcome:
    site = rig.site(count=3, args=PACED, health={"eject_first_s": 1.0, "slow_start_s": 1.0})
    await rig.serve(site)
    async with rig.loaded(site) as tally:
        victim = await busiest(site)
        mark = await rig.mark(site)
        await set_faults(victim, error_but_one=1e9)
        event, out_s = await rig.told(site, mark, "worker.ejected", victim.id)
        answered, failed = tally.answered, tally.failed
        await until(lambda: tally.answered > answered + 12, "the load goes on")
        during = tally.failed - failed
        await set_faults(victim, error_but_one=None)
        _, back_s = await rig.told(site, mark, "worker.ready", victim.id)
        served = worker_of(await site.status(), victim.id).served

        async def serves() -> bool:
            return worker_of(await site.status(), victim.id).served > served

        await until(serves, "it serves again")
    check("requests on it failed" in event.data["reason"], event)
    check(during <= 6, f"{during} requests failed while it was out: those that it still had")
    check(pids(await site.status())[victim.id] == victim.pid, "it was not restarted")
    return Outcome(took_s=out_s, lost=tally.failed, note=f"back after {back_s:.1f} s; eject_first_s was 1")


@fault(
    66,
    "a worker that somebody else runs makes no token for a while, its /health says 200",
    how="a simulated engine of its own as an external worker; it hangs, then goes on",
    expected="Its canary finds it: it gets no more requests, and who asks waits, then gets 503; it comes back by itself"
    " when it answers a canary.",
    promise="out after canary_interval_s and canary_timeout_s: 120 s; back within probe_interval_s of a good canary",
    within_s=8.0,
)
async def external_hangs(rig: Rig) -> Outcome:
    command = (sys.executable, "-m", "l40sd.sim.engine", "--model", "far", "--host", "127.0.0.1", "--port", "0")
    engine = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    rig.at_end(engine.kill)
    assert engine.stdout is not None
    await engine.stdout.readuntil(b"listening on ")
    port = int((await engine.stdout.readuntil(b"\n")).rpartition(b":")[2])
    far = f'[models.far]\nengine = "external"\nendpoints = ["http://127.0.0.1:{port}"]\n'
    site = rig.site(extra=far, proxy={"queue_timeout_s": 0.5})
    status = await rig.serve(site)
    worker = next(w for w in status.workers if w.model == "far")
    check((await ask(site, model="far"))[0] == 200, "it serves")
    mark = await rig.mark(site)
    await set_faults(worker, hang_after=0)
    event, out_s = await rig.told(site, mark, "worker.unready", worker.id)
    check("token" in event.data["reason"], event)
    check((await ask(site, model="far"))[0] == 503, "nobody is sent there")
    check((await ask(site))[0] == 200, "others serve")
    well = await rig.mark(site)
    await set_faults(worker, hang_after=None)
    _, back_s = await rig.told(site, well, "worker.ready", worker.id)
    check((await ask(site, model="far"))[0] == 200, "it serves again")
    return Outcome(took_s=out_s, note=f"back {back_s:.1f} s after it was well")
