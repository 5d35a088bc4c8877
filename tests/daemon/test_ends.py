"""How a worker's end is told: a real daemon, real processes, the control socket."""

import pytest
from daemonkit import QUICK, SiteOf, worker_of

from l40sd.workers.ends import describe_exit
from l40sd.workers.process import ExitRecord

DYING = """
[daemon]
pattern = "C"
[engines.mine]
command = ["/bin/sh", "-c", '''{script}''', "{{port}}"]
[models.m]
engine = "mine"
source = "x"
attention_heads = 8
"""


async def test_the_reason_in_an_engines_output_is_told_and_not_only_its_status(site_of: SiteOf) -> None:
    """ "exited with status 0" and twelve lines of shutdown were all that was shown of a rank that had died."""
    script = (
        "echo 'ERROR Worker proc VllmWorker-1 died unexpectedly, shutting down executor.';"
        ' i=0; while [ $i -lt 200 ]; do echo "INFO shutdown $i"; i=$((i+1)); done; exit 0'
    )
    site = site_of(QUICK + DYING.format(script=script))
    await site.start()
    status = await site.until(
        lambda s: bool(s.workers) and all(w.phase == "quarantined" for w in s.workers), "given up", 60
    )
    for each in status.workers:
        assert "ended by itself with status 0" in each.reason
        assert "its rank VllmWorker-1 died" in each.reason
        assert "died unexpectedly" in each.last_lines[0], "the cause stands above the end"
        assert "INFO shutdown 199" in each.last_lines
        assert len(each.last_lines) <= 12
    event = await site.until_event("worker.quarantined", 10)
    assert "its rank VllmWorker-1 died" in event.data["reason"]


async def test_what_an_earlier_instance_said_is_not_the_reason_of_the_next(site_of: SiteOf) -> None:
    script = "if [ -e $HOME/again ]; then exit 4; fi; touch $HOME/again; echo 'fatal: No space left on device'; exit 3"
    site = site_of(QUICK + DYING.format(script=script).replace('"C"', '"one"') + ONE)
    site.environ = {**site.environ, "HOME": str(site.folder)}
    await site.start()
    first = await site.until_event("worker.backoff", 20)
    assert "is full" in first.data["reason"]
    status = await site.until(lambda s: "status 4" in s.workers[0].reason, "the second end", 20)
    assert "is full" not in status.workers[0].reason


ONE = """
[[patterns.one.replicas]]
model = "m"
tp = 4
"""


async def test_a_restart_by_the_operator_is_no_warning(site_of: SiteOf) -> None:
    """Who watches for warnings was called for each `l40sctl restart`."""
    site = site_of(QUICK + '[daemon]\npattern = "C"\n[models.toy]\nengine = "simulated"\nattention_heads = 8\n')
    await site.start()
    before = worker_of(await site.until_ready("C", 30), "toy-gpu0-1-2-3")
    await site.post(f"/v1/workers/{before.id}/restart")
    await site.until(lambda s: worker_of(s, before.id).pid not in (None, before.pid), "again", 30)
    event = await site.until_event("worker.exited", 10)
    assert event.level == "info"
    assert event.data["reason"] == "stopped as told"
    last_end = worker_of(await site.status(), before.id).last_end
    assert last_end is not None
    assert (last_end.how, last_end.why) == ("stopped as told", "restart by the operator")
    assert not [e for e in await site.events() if e.level not in ("info", "debug")]


COMPLAINING = """
[daemon]
pattern = "C"
[engines.mine]
base = "simulated"
command = ["/bin/sh", "-c", "echo 'ERROR CUDA out of memory'; exec \\"$@\\"", "sh",
           "{python}", "-m", "l40sd.sim.engine", "--model", "{names}", "--host", "{host}", "--port", "{port}"]
[models.toy]
engine = "mine"
attention_heads = 8
"""


async def test_of_an_end_that_was_asked_for_no_cause_is_looked_for(site_of: SiteOf) -> None:
    """Engines complain of much that they survive, and when they are stopped."""
    site = site_of(QUICK + COMPLAINING)
    await site.start()
    before = worker_of(await site.until_ready("C", 30), "toy-gpu0-1-2-3")
    await site.post(f"/v1/workers/{before.id}/restart")
    event = await site.until_event("worker.exited", 30)
    assert event.data["reason"] == "stopped as told"
    await site.until_ready("C", 30)


RECORD = {"instance": "w-1", "ended_at": "2026-11-28T13:00:00+00:00"}


@pytest.mark.parametrize(
    ("record", "kind", "says"),
    [
        (ExitRecord(**RECORD, cause="exited", code=0), "exit 0", "by itself with status 0"),
        (ExitRecord(**RECORD, cause="exited", code=3), "exit 3", "exited with status 3"),
        (ExitRecord(**RECORD, cause="stopped", code=0), "exit 0", "stopped as told"),
        (ExitRecord(**RECORD, cause="stopped", signal=15), "exit None", "stopped as told"),
        (ExitRecord(**RECORD, cause="stopped", signal=9), "signal 9", "ended by signal 9"),
        (ExitRecord(**RECORD, cause="exited", signal=9, oom=True), "oom", "out of memory"),
        (ExitRecord(**RECORD, cause="shim-lost"), "shim-lost", "its shim was killed"),
    ],
)
def test_an_end_is_named_as_what_it_was(record: ExitRecord, kind: str, says: str) -> None:
    assert describe_exit(record)[0] == kind
    assert says in describe_exit(record)[1]
