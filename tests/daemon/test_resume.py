"""A change that the next daemon carries on is judged as it would have been by the first."""

import asyncio
import os
import signal

import psutil
from daemonkit import SiteOf

MUTE = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "good"
[workers]
backoff_first_s = 0.1
backoff_limit_s = 0.2
backoff_never_ready_first_s = 0.1
backoff_never_ready_limit_s = 0.2
quarantine_alike = 100
quarantine_per_hour = 1000
[health]
startup_timeout_s = 1
startup_stall_s = 1
[models.toy]
engine = "simulated"
attention_heads = 8
[models.mute]
engine = "simulated"
attention_heads = 8
args = ["--fault", "never-bind"]
[[patterns.good.replicas]]
model = "toy"
tp = 4
count = 1
[[patterns.bad.replicas]]
model = "mute"
tp = 4
count = 1
"""


async def test_a_worker_on_trial_that_died_with_the_daemon_is_still_on_trial(site_of: SiteOf) -> None:
    """The resumed change counted only those that lived as its own: what had died was started for ever, and the change
    never went back. Kill 115 of 300 in a long run."""
    site = site_of(MUTE.replace("startup_timeout_s = 1", "startup_timeout_s = 60"))
    await site.start()
    await site.until_ready("good", 30)
    await site.request("bad")
    status = await site.until(
        lambda s: any(w.model == "mute" and w.phase == "starting" and w.pid for w in s.workers), "on trial", 30
    )
    mute = next(w for w in status.workers if w.model == "mute")
    assert mute.pid is not None
    shim = psutil.Process(mute.pid).parent()
    assert shim is not None
    await site.kill()
    os.kill(mute.pid, signal.SIGKILL)
    await asyncio.to_thread(psutil.wait_procs, [shim], 10)
    site.config = MUTE
    await site.start()
    await site.until_event("worker.ended_meanwhile", 10)
    await site.until_event("pattern.apply.rolled_back", 30)
    await site.until_ready("good", 30)


async def test_a_worker_on_trial_is_still_on_trial_when_its_pattern_is_asked_for_again(site_of: SiteOf) -> None:
    """It was there, on its way out, and counted as one that has nothing to prove: the second time, a pattern that
    cannot come up was tried until its workers were quarantined."""
    site = site_of(MUTE.replace("startup_timeout_s = 1", "startup_timeout_s = 3"))
    await site.start()
    await site.until_ready("good", 30)
    await site.request("bad")
    await site.until(lambda s: any(w.model == "mute" and w.phase == "starting" for w in s.workers), "on trial", 30)
    await site.request("good")
    asked = await site.request("bad")
    assert (await site.operation(asked, 30)).state == "rolled_back"
    status = await site.until_ready("good", 30)
    assert {w.model for w in status.workers} == {"toy"}
