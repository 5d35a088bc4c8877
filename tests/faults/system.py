"""What happens to the host around it: NVML, cgroups, network, systemd, time."""

import asyncio
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from daemonkit import pids

from faults import machine, workers
from faults.output import run
from faults.rig import PATIENCE_S, Rig, ask, check, descriptors, kill, until
from faults.starts import fake_host, live_site
from faults.suite import NotHereError, Outcome, fault

SYSTEMD_TESTS = Path(__file__).resolve().parents[1] / "systemd"


@fault(
    52,
    "the host runs out of memory",
    how="in the virtual machine: an engine that takes all there is; then a stranger whom the OOM killer may not touch",
    expected="Daemon and shims are spared (OOMScoreAdjust=-500), an engine goes, named an OOM kill, and starts again.",
    promise="the OOM killer never takes daemon or shims",
    within_s=None,
)
async def host_out_of_memory(rig: Rig) -> Outcome:
    return await machine.inject(rig, 52)


@fault(
    53,
    "NVML hangs for ever, fails, comes back",
    how="fake NVML that hangs in every call; then fails; then answers again",
    expected="The daemon serves on, GPU data is unknown and says why; asked again with a growing delay; a stop does not"
    " wait for it.",
    promise="nvml_timeout_s; stop within 2 s",
    within_s=3.0,
)
async def nvml_hangs(rig: Rig) -> Outcome:
    path, facts = fake_host(rig)
    site = live_site(rig, path)
    before = await rig.serve(site)
    path.write_text(json.dumps({**facts, "hang": True}))
    status = await site.until(lambda s: bool(s.degraded), "it says that NVML is silent", 20)
    check(any("NVML" in line for line in status.degraded), status.degraded)
    check({gpu.used_bytes for gpu in status.gpus} == {None}, "unknown, not zero")
    check((await ask(site))[0] == 200, "it serves")
    mark = await rig.mark(site)
    kill(before.workers[0].pid)
    await rig.told(site, mark, "worker.ready", before.workers[0].id)
    path.write_text(json.dumps(facts))
    await site.until(lambda s: not s.degraded, "it answers again", 30)
    path.write_text(json.dumps({**facts, "hang": True}))
    await site.until(lambda s: bool(s.degraded), "it hangs again", 20)
    began = time.monotonic()
    code = await site.stop(30)
    check(code == 0, f"it ended with {code}")
    return Outcome(took_s=time.monotonic() - began, note="the stop, with NVML hanging")


@fault(
    56,
    "no cgroups: read-only, not delegated, or version 1 only",
    how="the daemon in a mount namespace where cgroup2 is read-only; faults 1, 3, 4, 7 and 14 again without cgroups",
    expected="The shim alone holds the processes; status and doctor say so and what it cannot do.",
    within_s=None,
)
async def no_cgroups(rig: Rig) -> Outcome:
    if os.geteuid() != 0:
        raise NotHereError("needs root for a mount namespace")
    mounts = [part.mountpoint for part in psutil.disk_partitions(all=True) if part.fstype == "cgroup2"]
    began = time.monotonic()
    for mount in mounts[:1]:
        script = f'mount -o remount,bind,ro "{mount}" && exec "$@"'
        site = rig.site(prefix=("unshare", "--mount", "sh", "-c", script, "sh"))
        status = await rig.serve(site)
        check(status.provider == "none", status.provider)
        check("no cgroups" in status.provider_note, status.provider_note)
        doctor = await asyncio.to_thread(site.client.get, "/v1/doctor", list[dict[str, Any]])
        check(any("none" in json.dumps(line) or "no cgroup" in json.dumps(line) for line in doctor), doctor)
    rig.provider = "none"
    again = (
        workers.leader_killed,
        workers.front_killed,
        workers.hidden_children,
        workers.term_ignored,
        workers.shim_killed,
    )
    lost = 0
    for one in again:
        lost += (await one(rig)).lost
    return Outcome(took_s=time.monotonic() - began, lost=lost, note="lost are the open streams of the killed leader")


@fault(
    57,
    "a cgroup is left from before, with a process in it",
    how="such a group is made where the daemon keeps its workers'; then the daemon starts",
    expected="It is emptied and removed, never used again.",
    promise="at the start",
    within_s=3.0,
)
async def cgroup_left(rig: Rig) -> Outcome:
    site = rig.site()
    status = await rig.serve(site)
    if status.provider != "cgroup":
        raise NotHereError(f"the daemon uses provider {status.provider} here, not cgroup")
    base = Path(site.cgroups()[0]).parent
    await site.stop()
    left = base / "toy-gpu0-old" / "engine"
    left.mkdir(parents=True)
    process = await asyncio.create_subprocess_exec("sleep", "1000")
    rig.at_end(lambda: process.returncode is None and process.kill())
    (left / "cgroup.procs").write_text(str(process.pid))
    began = time.monotonic()
    await site.start(PATIENCE_S)
    async with asyncio.timeout(10):
        check(await process.wait() == -9, "what was in it is killed")
    took_s = time.monotonic() - began
    check(not left.parent.exists(), "it is removed")
    await site.until_ready("few", PATIENCE_S)
    return Outcome(took_s=took_s)


@fault(
    58,
    "systemctl restart, stop, reload, daemon-reload, kill; a hanging daemon",
    how="tests/systemd/test_daemon.py in a container with systemd as PID 1; a short form of it in the virtual machine,"
    " with cgroup controllers enabled",
    expected="restart and kill leave the workers running; stop ends all in time; a broken reload fails visibly; the"
    " watchdog replaces a daemon that hangs; no connection is refused over restarts.",
    promise="TimeoutStopSec; WatchdogSec and 5 s",
    within_s=None,
)
async def under_systemd(rig: Rig) -> Outcome:
    sys.path.insert(0, str(SYSTEMD_TESTS))
    from image import CACHE, missing_tools

    if reason := missing_tools():
        raise NotHereError(f"needs the container: {reason}")
    if rig.is_quick:
        raise NotHereError("needs the container: left out with --quick")
    if not CACHE.is_dir():
        raise NotHereError("needs the container's image: `scripts/test` builds it")
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(SYSTEMD_TESTS / "test_daemon.py")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=SYSTEMD_TESTS.parents[1],
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
    lines = said.decode(errors="replace").strip().splitlines()
    check(process.returncode == 0, "\n".join(lines[-30:]))
    knocked = next((line.strip() for line in lines if "'refused'" in line), "").translate(str.maketrans("", "", "{}'"))
    return await machine.inject_too(rig, 58, Outcome(took_s=time.monotonic() - began, note=f"{lines[-1]}; {knocked}"))


@fault(
    61,
    "the loopback interface goes down, no DNS",
    how="the daemon in a network namespace whose lo goes down for 6 s; no resolver there at all; in the virtual machine"
    " the host's own lo, for longer than any timeout",
    expected="All probes fail alike, so no worker is to blame: none is killed; all serve again when it is back.",
    promise="no kill",
    within_s=None,
)
async def loopback_down(rig: Rig) -> Outcome:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise NotHereError("needs root and ip for a network namespace")
    site = rig.site(count=3, prefix=("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"))
    before = await rig.serve(site)
    assert site.daemon is not None
    enter = ("nsenter", "-t", str(site.daemon.pid), "-n")
    await run(*enter, "ip", "link", "set", "lo", "down")
    began = time.monotonic()
    await until(lambda: time.monotonic() - began > 6.0, "some time passes", 20)
    check(pids(await site.status()) == pids(before), "no worker was killed")
    await run(*enter, "ip", "link", "set", "lo", "up")
    back = time.monotonic()
    after = await site.until(
        lambda s: bool(s.workers) and all(w.phase == "ready" for w in s.workers), "all serve again", 20
    )
    check(pids(after) == pids(before), "the same processes")
    here = Outcome(took_s=time.monotonic() - back, note="down for 6 s, then from up until all are ready")
    return await machine.inject_too(rig, 61, here)


@fault(
    64,
    "a thousand starts and stops",
    how="workers are restarted again and again",
    expected="Descriptors, threads, memory and cgroups of the daemon stay as they were.",
    promise="0 descriptors more",
    within_s=None,
)
async def many_cycles(rig: Rig) -> Outcome:
    cycles = 48 if rig.is_quick else 1000
    count = 8 if rig.is_quick else 12
    site = rig.site(count=count, workers={"start_parallel": 6})
    await rig.serve(site)
    assert site.daemon is not None
    process = psutil.Process(site.daemon.pid)

    async def restart_all() -> None:
        before = pids(await site.status())
        for worker in before:
            await site.post(f"/v1/workers/{worker}/restart")

        def are_back(status: Any) -> bool:
            return all(w.phase == "ready" and w.pid != before[w.id] for w in status.workers)

        await site.until(are_back, "all are back", PATIENCE_S)

    await restart_all()
    base = min([await descriptors(site) for _ in range(10)])
    threads, memory = process.num_threads(), process.memory_info().rss
    began = time.monotonic()
    for _ in range(-(-cycles // count)):
        await restart_all()
    took_s = time.monotonic() - began
    await until(lambda: process.num_fds() <= base, f"descriptors are back to {base}, now {process.num_fds()}", 20)
    grown = process.memory_info().rss - memory
    # The pool for blocking calls fills up to its bound of 8, whatever is asked of it.
    check(process.num_threads() <= threads + 8, f"{process.num_threads()} threads, {threads} before")
    check(grown < 15_000_000, f"memory grew by {grown} bytes")
    check(len(site.leftovers()) == 2 * count, f"{len(site.leftovers())} processes")
    groups = site.cgroups()
    check(len(groups) in (0, count), f"{len(groups)} cgroups")
    note = f"{cycles} starts and stops: 0 descriptors more, memory {grown / (1 << 20):+.1f} MiB"
    return Outcome(took_s=took_s, note=note)
