"""What the operator wished and what the workers went through is not forgotten when the daemon is killed."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from daemonkit import Site, SiteOf

from l40sd.control.messages import Status, WorkerStatus

TWO = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "two"
[workers]
backoff_first_s = 0.2
backoff_never_ready_first_s = 0.2
backoff_never_ready_limit_s = 0.4
start_parallel = 2
[health]
probe_interval_s = 0.2
startup_interval_s = 0.05
startup_timeout_s = 20
[models.toy]
engine = "simulated"
attention_heads = 8
[[patterns.two.replicas]]
model = "toy"
tp = 4
[[patterns.pairs.replicas]]
model = "toy"
tp = 2
"""


async def tell(site: Site, worker: str, verb: str) -> None:
    await site.post(f"/v1/workers/{worker}/{verb}")


def of(status: Status, worker: str) -> WorkerStatus:
    return next(w for w in status.workers if w.id == worker)


def end(pid: int | None) -> psutil.Process:
    """Kill an engine; return its shim."""
    assert pid is not None
    shim = psutil.Process(pid).parent()
    assert shim is not None
    os.kill(pid, signal.SIGKILL)
    return shim


def is_up(worker: str, other: str) -> Callable[[Status], bool]:
    """Return whether one is drained and the other ready."""
    return lambda s: [of(s, w).phase for w in (worker, other)] == ["drained", "ready"]


async def happened(site: Site, name: str, worker: str) -> list[Any]:
    return [e for e in await site.events() if e.event == name and e.data.get("worker") == worker]


# -- drained until undrain -------------------------------------------------------------------------------------------


async def killed_once_written(site: Site) -> None:
    """Kill the daemon once what it shows of its workers is on disk too: it writes a moment later."""
    shown = {w.id: (w.phase, w.restarts) for w in (await site.status()).workers}

    def is_written() -> bool:
        workers = json.loads((site.folder / "state" / "state.json").read_text())["pasts"]["workers"]
        return shown == {name: (past.get("phase"), past.get("restarts", 0)) for name, past in workers.items()}

    await site.until(lambda _: is_written(), "it is on disk", 20)
    await site.kill()


async def test_a_drained_worker_is_drained_for_the_next_daemon_and_never_ready_in_between(site_of: SiteOf) -> None:
    """`systemctl restart l40sd` sent requests to a worker that somebody was looking at."""
    site = site_of(TWO)
    await site.start()
    before = await site.until_ready("two", 30)
    one, other = before.workers
    await tell(site, one.id, "drain")
    await site.kill()  # at once: what was accepted holds
    await site.start()
    after = await site.until(is_up(one.id, other.id), "as they were", 30)
    assert [w.pid for w in after.workers] == [one.pid, other.pid]
    assert not await happened(site, "worker.ready", one.id)
    await tell(site, one.id, "undrain")
    await site.until_ready("two", 10)
    await site.kill()
    await site.start()
    await site.until_ready("two", 30)


async def test_a_drained_worker_that_dies_is_started_again_and_still_drained(site_of: SiteOf) -> None:
    site = site_of(TWO)
    await site.start()
    one, other = (await site.until_ready("two", 30)).workers
    await tell(site, one.id, "drain")
    await site.until(is_up(one.id, other.id), "drained", 10)
    end(one.pid)
    await site.until(lambda s: is_up(one.id, other.id)(s) and of(s, one.id).pid != one.pid, "again", 30)
    await tell(site, one.id, "restart")
    status = await site.until(lambda s: is_up(one.id, other.id)(s) and of(s, one.id).restarts == 0, "once more", 30)
    assert len(await happened(site, "worker.ready", one.id)) == 1
    await site.kill()
    shim = end(of(status, one.id).pid)
    await asyncio.to_thread(psutil.wait_procs, [shim], 10)
    await site.start()
    await site.until(is_up(one.id, other.id), "died meanwhile, and still drained", 30)
    assert not await happened(site, "worker.ready", one.id)
    await tell(site, one.id, "undrain")
    await site.until_ready("two", 10)


async def test_undrained_while_it_comes_up_again_it_serves(site_of: SiteOf) -> None:
    site = site_of(TWO.replace("attention_heads = 8", 'attention_heads = 8\nargs = ["--start-delay-s", "1"]'))
    await site.start()
    one, _ = (await site.until_ready("two", 30)).workers
    await tell(site, one.id, "drain")
    end(one.pid)
    status = await site.until(lambda s: of(s, one.id).phase == "starting", "coming", 30)
    assert "drained" in of(status, one.id).reason
    await tell(site, one.id, "undrain")
    await site.until_ready("two", 30)
    assert not await happened(site, "worker.drained", one.id) or of(await site.status(), one.id).phase == "ready"


async def test_a_drain_ends_with_its_worker_and_outlives_a_new_launch_of_it(site_of: SiteOf) -> None:
    site = site_of(TWO)
    await site.start()
    one, other = (await site.until_ready("two", 30)).workers
    await tell(site, one.id, "drain")
    site.config_file.write_text(
        TWO.replace("attention_heads = 8", 'attention_heads = 8\nargs = ["--tokens-per-s", "900"]')
    )
    await site.post("/v1/reload")
    await site.until_event("pattern.apply.complete", 60)
    status = await site.until(is_up(one.id, other.id), "rolled, and still drained", 30)
    assert of(status, one.id).pid != one.pid
    assert (await site.change("pairs", 60)).state == "done"
    assert (await site.change("two", 60)).state == "done"
    await site.until_ready("two", 30)


# -- failures --------------------------------------------------------------------------------------------------------


async def test_restarts_are_counted_over_a_kill_of_the_daemon(site_of: SiteOf) -> None:
    """Fault 9 of docs/what-happens-when.md: counters kept."""
    site = site_of(TWO)
    await site.start()
    one, other = (await site.until_ready("two", 30)).workers
    for n in (1, 2):
        end(of(await site.status(), one.id).pid)
        await site.until(lambda s, n=n: of(s, one.id).restarts == n and of(s, one.id).phase == "ready", "again", 30)
    await site.until(lambda s: of(s, other.id).ready_s is not None and of(s, other.id).ready_s > 1, "for a while", 30)
    await tell(site, other.id, "drain")
    drained = await site.until(lambda s: of(s, other.id).phase == "drained" and of(s, other.id).since_s > 1, "long", 9)
    age_s = of(drained, other.id).since_s
    await site.kill()
    await site.start()
    status = await site.until(is_up(other.id, one.id), "as they were", 30)
    assert of(status, other.id).since_s > age_s
    await tell(site, other.id, "undrain")
    await site.until_ready("two", 30)
    await site.kill()
    await site.start()
    status = await site.until_ready("two", 30)
    assert [of(status, w.id).restarts for w in (one, other)] == [2, 0]
    ready_s = of(status, other.id).ready_s
    assert ready_s is not None
    assert ready_s > of(status, other.id).since_s + age_s, "since the undrain"
    assert of(status, one.id).since_s == pytest.approx(of(status, one.id).ready_s, abs=0.5)
    shim = end(of(status, one.id).pid)
    await site.kill()
    await asyncio.to_thread(psutil.wait_procs, [shim], 10)
    await site.start()
    assert of(await site.until_ready("two", 30), one.id).restarts == 3


async def test_a_back_off_goes_on_where_it_was(site_of: SiteOf) -> None:
    """A flapping worker was tried afresh by every crash of the daemon."""
    slow = TWO.replace("backoff_first_s = 0.2", "backoff_first_s = 100").replace("limit_s = 0.4", "limit_s = 200")
    site = site_of(slow)
    await site.start()
    one, _ = (await site.until_ready("two", 30)).workers
    end(one.pid)  # the first time it is started again at once
    again = await site.until(lambda s: of(s, one.id).restarts == 1 and of(s, one.id).phase == "ready", "again", 30)
    end(of(again, one.id).pid)
    before = of(await site.until(lambda s: of(s, one.id).phase == "backoff", "waits", 30), one.id)
    await killed_once_written(site)
    after = of(await site.start(), one.id)
    assert after.phase == "backoff"
    assert (after.restarts, after.reason, after.last_lines) == (2, before.reason, before.last_lines)
    assert after.next_start_s is not None
    assert before.next_start_s is not None
    assert before.next_start_s - 30 < after.next_start_s < before.next_start_s
    await tell(site, one.id, "reset")
    ready = of(await site.until_ready("two", 30), one.id)
    assert ready.restarts == 0
    end(ready.pid)
    await site.until(lambda s: of(s, one.id).restarts == 1 and of(s, one.id).phase == "ready", "once more", 30)
    await tell(site, one.id, "reset")
    status = await site.until(lambda s: of(s, one.id).restarts == 0, "also while it is ready", 30)
    assert (of(status, one.id).phase, of(status, one.id).reason) == ("ready", ""), "and its run goes on"


async def test_given_up_is_given_up_until_the_reset(site_of: SiteOf) -> None:
    site = site_of(TWO.replace("attention_heads = 8", 'attention_heads = 8\nargs = ["--fault", "exit-at-once=3"]'))
    await site.start()
    before = await site.until(
        lambda s: bool(s.workers) and all(w.phase == "quarantined" for w in s.workers), "given up", 60
    )
    await killed_once_written(site)
    after = await site.start()
    assert [(w.id, w.phase, w.reason, w.restarts) for w in after.workers] == [
        (w.id, "quarantined", w.reason, 3) for w in before.workers
    ]
    assert any("3 starts in a row failed alike (exit 3)" in sentence for sentence in after.degraded)
    assert await site.stop() == 0  # a stop and a start are no reset either
    assert {w.phase for w in (await site.start()).workers} == {"quarantined"}
    await tell(site, after.workers[0].id, "reset")
    await site.until(lambda s: of(s, after.workers[0].id).phase != "quarantined", "tried again", 10)


async def test_another_boot_forgets_the_failures_but_not_who_is_drained(site_of: SiteOf) -> None:
    site = site_of(TWO)
    await site.start()
    one, other = (await site.until_ready("two", 30)).workers
    end(other.pid)
    await site.until(lambda s: of(s, other.id).restarts == 1 and of(s, other.id).phase == "ready", "again", 30)
    await tell(site, one.id, "drain")
    await site.until(is_up(one.id, other.id), "drained", 10)
    assert await site.stop() == 0
    file = site.folder / "state" / "state.json"
    state = json.loads(file.read_text())
    assert state["pasts"]["workers"][other.id]["restarts"] == 1
    state["pasts"]["boot_id"] = "another"
    file.write_text(json.dumps(state))
    await site.start()
    status = await site.until(is_up(one.id, other.id), "as wished", 30)
    assert {w.restarts for w in status.workers} == {0}


async def test_what_is_saved_and_unreadable_is_said_and_costs_nothing_else(site_of: SiteOf, tmp_path: Path) -> None:
    site = site_of(TWO)
    await site.start()
    before = await site.until_ready("two", 30)
    await site.kill()
    file = site.folder / "state" / "state.json"
    state = json.loads(file.read_text())
    state["pasts"]["workers"] = {"toy": {"restarts": "many"}}
    state["drained"] = 7
    file.write_text(json.dumps(state))
    await site.start()
    await site.until_event("state.unreadable", 10)
    assert [w.pid for w in (await site.until_ready("two", 30)).workers] == [w.pid for w in before.workers]


FREEZER = Path("/sys/fs/cgroup/freezer")


@pytest.fixture
def ice(tmp_path: Path) -> Iterator[Path]:
    """A cgroup in which SIGKILL waits."""
    if not (FREEZER / "cgroup.procs").exists() or os.geteuid() != 0:
        pytest.skip("needs root and a cgroup v1 freezer to make a process that SIGKILL does not end")
    group = FREEZER / f"l40sd-saved-{os.getpid()}"
    group.mkdir()
    yield group
    thaw(group)
    group.rmdir()


def thaw(group: Path) -> None:
    pids = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    (group / "freezer.state").write_text("THAWED")
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], 10)


async def test_stuck_is_stuck_until_it_is_gone_also_for_the_next_daemon(site_of: SiteOf, ice: Path) -> None:
    """Five seconds later it counted as gone, and a second worker was started on the same GPUs."""
    site = site_of(TWO.replace("[workers]", "[workers]\nterm_timeout_s = 0.3\nkill_timeout_s = 0.7"))
    await site.start()
    one, other = (await site.until_ready("two", 30)).workers
    (ice / "cgroup.procs").write_text(str(one.pid))
    (ice / "freezer.state").write_text("FROZEN")
    await tell(site, one.id, "restart")
    await site.until(lambda s: of(s, one.id).phase == "stuck", "stuck", 20)
    await site.until(lambda s: of(s, one.id).phase != "stuck" or of(s, one.id).since_s > 7, "longer than 5 s", 20)
    assert of(await site.status(), one.id).phase == "stuck"
    await site.kill()
    status = await site.start()
    assert (of(status, one.id).phase, of(status, one.id).pid) == ("stuck", one.pid)
    assert any("cannot be killed" in line or "SIGKILL" in line for line in status.degraded)
    assert {gpu.state for gpu in status.gpus if gpu.index in one.gpus} == {"stuck"}
    await site.until(lambda s: of(s, other.id).phase == "ready", "the other serves", 20)
    thaw(ice)
    status = await site.until_ready("two", 30)
    assert of(status, one.id).restarts == 0, "it was to be restarted all the time"


async def test_an_adopted_worker_serves_without_an_interval_between_its_answers(site_of: SiteOf) -> None:
    """Health, model, token: each passed answer was followed by a pause; requests of a whole second had to wait."""
    site = site_of(TWO)
    await site.start()
    await site.until_ready("two", 30)
    await site.kill()
    site.config = TWO.replace("startup_interval_s = 0.05", "startup_interval_s = 60")
    await site.start()
    await site.until_ready("two", 20)
