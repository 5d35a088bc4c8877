"""How a worker's end leaves things: in order where it is told, and nothing behind in any case."""

import json
import os
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from daemonkit import Site

from faults.rig import Rig, check, kill, now, until
from faults.suite import Outcome, fault
from l40sd.control.messages import WorkerStatus

IN_ORDER = "all is in order"


def wrapped(rig: Rig) -> Site:
    """Return a site whose engines run behind a shell that waits for them, and take a second to clean up."""
    engine = ["{python}", "-m", "l40sd.sim.engine", "--model", "{names}", "--host", "{host}", "--port", "{port}"]
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", *engine, "--ranks", "{ranks}"]
    extra = f'[engines.wrapped]\nbase = "simulated"\ncommand = {json.dumps(command)}\n'
    return rig.site(
        tp=2, args=("--fault", "clean-up=1"), model={"engine": "wrapped"}, workers={"term_timeout_s": 10.0}, extra=extra
    )


def log_of(site: Site, worker: WorkerStatus) -> str:
    return next(site.folder.rglob(f"{worker.id}.log")).read_text()


@fault(
    72,
    "an engine behind a wrapper that does not exec, with things to put in order",
    how="engines run by a shell that waits for them need a second after SIGTERM; one is restarted, then all stop",
    expected="SIGTERM reaches the engine and not the shell, and it has its term_timeout_s, at a restart and at a stop.",
    promise="nothing is killed within term_timeout_s",
    within_s=10.0,
)
async def wrapper(rig: Rig) -> Outcome:
    site = wrapped(rig)
    status = await rig.serve(site)
    first, second = status.workers
    mark = await rig.mark(site)
    await site.post(f"/v1/workers/{first.id}/restart")
    event, exited_s = await rig.told(site, mark, "worker.exited", first.id)
    check(event.data["reason"] == "stopped as told", event)
    check(log_of(site, first).count(IN_ORDER) == 1, "killed before it was done")
    await rig.told(site, mark, "worker.ready", first.id)
    check(await site.stop(60) == 0, "stops")
    check(log_of(site, first).count(IN_ORDER) == 2, "the restarted one was killed at the stop")
    check(log_of(site, second).count(IN_ORDER) == 1, "the other one was killed at the stop")
    return Outcome(took_s=exited_s, note="a second of it is the engine's own")


def left_behind(worker: WorkerStatus) -> list[Path]:
    """Return what a run has made, segments of shared memory and temporary files, and its folder for these."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"l40sd-{worker.instance.rsplit('-', 1)[1]}"
    return [path for place in (Path("/dev/shm"), folder) for path in place.glob(f"*l40sd_sim_{worker.pid}_*")]


@fault(
    73,
    "an engine dies and leaves shared memory and temporary files",
    how="SIGKILL to engines that have made both; of the second one the shim is killed too",
    expected="Both are gone when it is started again. A segment of somebody else, in use, stays.",
    promise="gone with its last process",
    within_s=5.0,
)
async def leavings(rig: Rig) -> Outcome:
    site = rig.site(args=("--fault", "leave=3"))
    status = await rig.serve(site)
    strangers = SharedMemory(f"psm_l40sd_stranger_{os.getpid()}", create=True, size=64)
    rig.at_end(strangers.unlink)
    rig.at_end(strangers.close)
    took_s = 0.0
    for worker, with_shim in zip(status.workers, (False, True), strict=True):
        assert worker.pid is not None
        made = left_behind(worker)
        check(len(made) == 6, f"it has made three of each: {made}")
        mark = await rig.mark(site)
        if with_shim:
            kill(int(Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()[1]))
        else:
            kill(worker.pid)
        await until(lambda worker=worker: not left_behind(worker), "they are gone", 10)
        took_s = max(took_s, (now() - mark.at).total_seconds())
        await rig.told(site, mark, "worker.ready", worker.id)
    check(Path(f"/dev/shm/{strangers.name}").exists(), "what a stranger uses is let be")
    check(await site.stop(60) == 0, "stops")
    check(not list(Path("/dev/shm").glob("psm_l40sd_sim_*")), "nothing is left after the stop")
    return Outcome(took_s=took_s)
