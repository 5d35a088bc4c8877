"""GPUs that are not there: at boot, for a while, or all of them."""

import asyncio
import json
import time

from daemonkit import pids

from faults.rig import PATIENCE_S, Rig, ask, check
from faults.starts import fake_host, live_site
from faults.suite import Outcome, fault

CHECKS = {"gpu_check_interval_s": 0.1, "gpu_rescan_interval_s": 0.1}


@fault(
    76,
    "a GPU is missing at boot, and comes back",
    how="fake NVML that lists three of the four GPUs at the daemon's second start, then all four; `l40sctl reload`",
    expected="The other three serve under the same names, status and doctor name the lost one; when it is back it is"
    " offered, and a reload takes it in without touching the others.",
    promise="offered within gpu_rescan_interval_s: 60 s",
    within_s=5.0,
)
async def gpu_missing_at_boot(rig: Rig) -> Outcome:
    path, facts = fake_host(rig, count=4)
    site = live_site(rig, path, count=4, host_changes=CHECKS)
    await rig.serve(site)
    check(await site.stop(60) == 0, "stopped")
    path.write_text(json.dumps({**facts, "gpus": [facts["gpus"][0], *facts["gpus"][2:]]}))
    await site.start()
    few = await site.until(lambda s: sum(w.phase == "ready" for w in s.workers) == 3, "three serve", PATIENCE_S)
    check(any("lost: GPU1" in line for line in few.degraded), few.degraded)
    check((await ask(site))[0] == 200, "it serves")
    path.write_text(json.dumps(facts))
    began = time.monotonic()
    await site.until(lambda s: any("l40sctl reload" in line for line in s.degraded), "it is offered", PATIENCE_S)
    took_s = time.monotonic() - began
    await site.post("/v1/reload")
    full = await site.until_ready("few", PATIENCE_S)
    check(len(full.workers) == 4, f"{len(full.workers)} workers")
    check(pids(few).items() <= pids(full).items(), "the three were not touched")
    check(not full.degraded, full.degraded)
    return Outcome(took_s=took_s, note="until it is offered")


@fault(
    77,
    "no NVIDIA driver when the daemon starts; it is loaded later",
    how="fake NVML that says Driver Not Loaded, then answers",
    expected="The daemon runs, endpoint and control socket answer, status says why there is no GPU; the pattern is"
    " placed by itself once there are GPUs.",
    promise="asked again with a growing delay: 60 s at most",
    within_s=20.0,
)
async def driver_comes_later(rig: Rig) -> Outcome:
    path, facts = fake_host(rig)
    path.write_text(json.dumps({**facts, "fail": "Driver Not Loaded"}))
    site = live_site(rig, path, host_changes=CHECKS)
    status = await site.start()
    check(any("Driver Not Loaded" in line for line in status.degraded), status.degraded)
    check((await asyncio.to_thread(site.client.get, "/v1/version", dict[str, str])), "the control socket answers")
    path.write_text(json.dumps(facts))
    began = time.monotonic()
    full = await site.until_ready("few", PATIENCE_S)
    check(not full.degraded, full.degraded)
    check((await ask(site))[0] == 200, "it serves")
    return Outcome(took_s=time.monotonic() - began, note="until both workers serve")
