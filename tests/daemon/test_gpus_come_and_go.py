"""A real daemon on a host whose GPUs are missing, fail and come back: it serves on what is there, and says the rest."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from daemonkit import Site, SiteOf

from l40sd.control.messages import Check, Status

FAKE = Path(__file__).parents[1] / "kit/fake_nvml.py"
PATIENCE_S = 40.0

TOY = """
[host]
nvml_timeout_s = 5.0
numa_pinning = false
gpu_check_interval_s = 0.1
gpu_rescan_interval_s = 0.1
[daemon]
pattern = "four"
[workers]
start_parallel = 4
drain_timeout_s = 2.0
[models.toy]
engine = "simulated"
attention_heads = 8
[[patterns.four.replicas]]
model = "toy"
count = 4
"""
FOUR: list[dict[str, Any]] = [
    {"uuid": f"GPU-{n}", "busId": f"00000000:1{n}:00.0", "total": 48 << 30, "used": 0} for n in range(4)
]
LOST = {"errors": {"*": "GPU is lost"}}


class Nvml:
    """What the fake library answers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environ = {"L40SD_NVML_LIBRARY": str(FAKE), "FAKE_NVML": str(path)}

    def says(self, *gpus: dict[str, Any], **more: Any) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps({"gpus": gpus, **more}))
        fresh.replace(self.path)


@pytest.fixture
def nvml(tmp_path: Path) -> Nvml:
    fake = Nvml(tmp_path / "nvml.json")
    fake.says(*FOUR)
    return fake


def on(nvml: Nvml, site_of: SiteOf, config: str = TOY) -> Site:
    site = site_of(config)
    site.environ = nvml.environ
    return site


def ready(status: Status) -> list[str]:
    return sorted(worker.id for worker in status.workers if worker.phase == "ready")


async def doctor(site: Site) -> Check:
    return next(check for check in await site.get("/v1/doctor", list[Check]) if check.name == "host")


async def reloaded(site: Site, query: str = "") -> list[str]:
    changed: list[str] = (await site.post(f"/v1/reload{query}"))["changed"]
    return changed


async def ask(site: Site) -> int:
    body = {"model": "toy", "prompt": "hi", "max_tokens": 1}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        session.post(f"{await site.url()}/v1/completions", json=body) as reply,
    ):
        return reply.status


async def test_a_gpu_missing_at_boot_costs_its_worker_and_is_offered_when_it_is_back(
    site_of: SiteOf, nvml: Nvml
) -> None:
    """Seen: exit status 78 for good; a GPU that came back neither used nor mentioned; doctor said ok."""
    site = on(nvml, site_of)
    await site.start()
    everyone = ready(await site.until_ready("four", PATIENCE_S))
    assert await site.stop(60) == 0
    nvml.says(FOUR[0], *FOUR[2:])
    await site.start()
    few = await site.until(lambda s: len(ready(s)) == 3, "three serve", PATIENCE_S)
    assert ready(few) == [name for name in everyone if not name.endswith("gpu1")], "the others keep their names"
    assert any("lost: GPU1 (0000:11:00.0): NVML does not list it" in line for line in few.degraded)
    assert any("pattern four does not fit" in line and "4 GPUs" in line for line in few.degraded)
    assert await ask(site) == 200
    found = await doctor(site)
    assert found.state == "failed"
    assert "GPU1 (0000:11:00.0) is lost" in found.found
    assert (await site.until_event("inventory.gpu_lost", 20)).data["gpu"] == "GPU1 (0000:11:00.0)"
    assert await reloaded(site) == []
    assert len(ready(await site.status())) == 3, "a reload on a host that lacks a GPU takes nothing away"
    nvml.says(*FOUR)
    offered = await site.until_event("inventory.gpu_offered", 20)
    assert "l40sctl reload" in str(offered.data["hint"])
    assert await reloaded(site) == ["host: GPU1 (0000:11:00.0) is taken in"]
    full = await site.until_ready("four", PATIENCE_S)
    assert ready(full) == everyone
    assert full.degraded == ()
    assert (await doctor(site)).state == "ok"


async def test_no_driver_at_boot_is_one_clear_state_and_over_when_there_is_one(site_of: SiteOf, nvml: Nvml) -> None:
    """Seen: a daemon that started before the driver had loaded ended, once a second or for good."""
    nvml.says(fail="Driver Not Loaded")
    site = on(nvml, site_of)
    status = await site.start()
    assert status.gpus == status.workers == ()
    assert any("no NVIDIA GPU on this machine (NVML: NVMLError: Driver Not Loaded)" in line for line in status.degraded)
    assert (await doctor(site)).state == "failed"
    assert await site.get("/v1/patterns", list[dict[str, Any]])
    assert await site.get("/v1/topology", dict[str, Any])
    nvml.says(*FOUR)
    full = await site.until_ready("four", PATIENCE_S)
    assert len(ready(full)) == 4
    assert full.degraded == ()


async def test_a_gpu_that_is_lost_while_it_serves_is_told_and_its_worker_left_alone(
    site_of: SiteOf, nvml: Nvml
) -> None:
    """Seen: doctor and status said ok while one was lost."""
    site = on(nvml, site_of, TOY.replace("count = 4", 'count = "fill"'))
    await site.start()
    before = await site.until_ready("four", PATIENCE_S)
    nvml.says(*FOUR[:3], {**FOUR[3], **LOST})
    status = await site.until(lambda s: any(gpu.state == "lost" for gpu in s.gpus), "it is told", 20)
    assert [gpu.state for gpu in status.gpus] == ["ok", "ok", "ok", "lost"]
    assert status.degraded == ("lost: GPU3 (0000:13:00.0): GPU is lost",)
    assert "GPU3 (0000:13:00.0) is lost: GPU is lost" in (await doctor(site)).found
    assert await reloaded(site) == []
    after = await site.until_ready("four", PATIENCE_S)
    assert [worker.pid for worker in after.workers] == [worker.pid for worker in before.workers]
    await site.until_event("inventory.gpu_lost", 20)  # status looks for itself, and may know it first
    nvml.says(*FOUR)
    assert (await site.until_event("inventory.gpu_back", 20)).data["gpu"] == "GPU3 (0000:13:00.0)"
    assert (await site.status()).degraded == ()


async def test_a_worker_on_a_lost_gpu_waits_for_it_instead_of_being_given_up(site_of: SiteOf, nvml: Nvml) -> None:
    """Seen: three starts on a lost GPU, then quarantine until somebody reset it, although the GPU was back."""
    quick = "[workers]\nbackoff_never_ready_first_s = 0.2\nbackoff_first_s = 0.2\n"
    site = on(nvml, site_of, TOY.replace("[workers]\n", quick))
    await site.start()
    before = await site.until_ready("four", PATIENCE_S)
    nvml.says(*FOUR[:3], {**FOUR[3], **LOST})
    victim = next(worker for worker in before.workers if worker.id.endswith("gpu3"))
    assert victim.pid
    os.kill(victim.pid, signal.SIGKILL)

    def waits(status: Status) -> bool:
        worker = next(each for each in status.workers if each.id == victim.id)
        return worker.phase == "backoff" and "GPU3 (0000:13:00.0) is lost: GPU is lost" in worker.reason

    await site.until(waits, "it waits for its GPU", PATIENCE_S)

    async def tries() -> int:
        return sum(e.event == "worker.backoff" and e.data["worker"] == victim.id for e in await site.events())

    async with asyncio.timeout(PATIENCE_S):
        while await tries() < 8:  # noqa: ASYNC110  another process: there is no event to wait for
            await asyncio.sleep(0.05)
    await site.until(waits, "more often than a failing worker may", 20)
    nvml.says(*FOUR)
    after = await site.until_ready("four", PATIENCE_S)
    assert next(each for each in after.workers if each.id == victim.id).pid != victim.pid


async def test_one_gpus_failing_call_costs_that_gpu_and_removed_ones_are_forgotten(site_of: SiteOf, nvml: Nvml) -> None:
    """Seen: the memory of one GPU may not be read, and the daemon found no GPU at all."""
    nvml.says(*FOUR[:2], {**FOUR[2], "errors": {"nvmlDeviceGetMemoryInfo": "Insufficient Permissions"}}, FOUR[3])
    site = on(nvml, site_of, TOY.replace("count = 4", 'count = "fill"'))
    await site.start()
    status = await site.until_ready("four", PATIENCE_S)
    assert [gpu.index for gpu in status.gpus] == [0, 1, 3]
    assert status.degraded == ("lost: GPU2: Insufficient Permissions",)
    nvml.says(FOUR[0])
    await site.until(lambda s: len(s.degraded) == 2, "two are lost", 20)
    assert await site.stop(60) == 0
    await site.start()
    status = await site.until_ready("four", PATIENCE_S)
    assert len(status.degraded) == 2, "still missed after a restart"
    assert await reloaded(site, "?forget_gpus=1") == []
    assert (await site.status()).degraded == ()
