"""The key between proxy and workers: a real daemon, real processes."""

import os
import signal

import psutil
from daemonkit import QUICK, SiteOf, worker_of

TOY = QUICK + '[daemon]\npattern = "C"\n[models.toy]\nengine = "simulated"\nattention_heads = 8\n'


def key_of(pid: int | None) -> str:
    assert pid is not None
    return psutil.Process(pid).environ()["L40SD_SIM_API_KEY"]


async def test_all_workers_of_a_model_have_one_key_over_their_restarts_and_the_daemons(site_of: SiteOf) -> None:
    """vLLM took the key into the name of what it compiled: a new key at each start, and it compiled at each start."""
    site = site_of(TOY)
    await site.start()
    status = await site.until_ready("C", 30)
    keys = {key_of(w.pid) for w in status.workers}
    assert len(keys) == 1
    first = status.workers[0]
    await site.kill()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    await site.start()
    status = await site.until(
        lambda s: all(w.phase == "ready" for w in s.workers) and worker_of(s, first.id).pid != first.pid, "again", 30
    )
    await site.post(f"/v1/workers/{status.workers[1].id}/restart")
    await site.until(lambda s: s.workers[1].pid not in (None, status.workers[1].pid), "restarted", 30)
    status = await site.until_ready("C", 30)
    assert {key_of(w.pid) for w in status.workers} == keys
