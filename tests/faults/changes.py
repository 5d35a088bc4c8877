"""What befalls a pattern change: GPUs that die meanwhile."""

import flaky
from daemonkit import Site

from faults.rig import Rig, check
from faults.suite import Outcome, fault
from l40sd.control.messages import Status

CHANGE_S = 60.0
PAIRS = """
[[patterns.pairs.replicas]]
model = "toy"
tp = 2
"""


def site_of(rig: Rig) -> Site:
    """Eight workers on eight GPUs, which ``let_die`` can take one by one."""
    host, model = {"inventory": "l40s-8"}, {"engine": "flaky"}
    return rig.site(count=8, host=host, model=model, extra=flaky.engine(rig.folder) + PAIRS)


def let_die(rig: Rig, status: Status, *numbers: int) -> None:
    """Have every engine that is started on these GPUs from now on die at once."""
    (rig.folder / "dead").write_text(" ".join(gpu.id for gpu in status.gpus if gpu.index in numbers))


@fault(
    74,
    "a GPU dies before the pattern is changed",
    how="every engine that is started on one of eight GPUs exits at once; eight TP1 become four pairs, under load",
    expected="The pair on that GPU is tried as ever and given up; the change ends with the others in place and names"
    " the one that is missing. After a reset it comes up.",
    promise="ends when the worker is given up, at the latest when the dry run says",
    within_s=20.0,
)
async def gpu_dead_forward(rig: Rig) -> Outcome:
    site = site_of(rig)
    status = await rig.serve(site)
    async with rig.loaded(site) as tally:
        let_die(rig, status, 7)
        ended = await site.change("pairs", CHANGE_S)
        check(ended.state == "incomplete", ended)
        check("toy-gpu6-7" in ended.why and (ended.done, ended.total) == (3, 4), ended)
    (rig.folder / "dead").unlink()
    await site.post("/v1/workers/toy-gpu6-7/reset")
    await site.until_ready("pairs", CHANGE_S)
    return Outcome(took_s=ended.duration_s, lost=tally.lost, note="in place but for the one")


@fault(
    75,
    "two GPUs die, and the way back is not whole either",
    how="the first worker of the new pattern dies at once, and so does an old one when it is started again, under load",
    expected="Everything goes back; the way back ends without the old worker that is dead, and names both.",
    promise="ends when the worker is given up, at the latest when the dry run says",
    within_s=20.0,
)
async def gpu_dead_backward(rig: Rig) -> Outcome:
    site = site_of(rig)
    status = await rig.serve(site)
    async with rig.loaded(site) as tally:
        let_die(rig, status, 1)
        ended = await site.change("pairs", CHANGE_S)
        check(ended.state == "rolled_back", ended)
        check("toy-gpu0-1" in ended.why and "back but for toy-gpu1: " in ended.why, ended)
        now = await site.status()
    check((now.pattern, now.operation) == ("few", None), now)
    check({w.id for w in now.workers if w.phase == "ready"} == {f"toy-gpu{n}" for n in range(8) if n != 1}, now.workers)
    return Outcome(took_s=ended.duration_s, lost=tally.lost, note="seven of eight serve on")
