"""Pattern changes with the simulated engine: more shapes and more interruptions than real workers leave time for."""

from collections import Counter

import pytest
from daemonkit import SiteOf, pids
from harness import CHANGE_S, SIMULATED, START_S, assert_no_gpu_has_two_owners, assert_nothing_lost, mix
from loadkit import load

from l40sd.control.messages import Status

START_SMALL = '\n[daemon]\npattern = "small"\n'
START_MIXED = '\n[daemon]\npattern = "mixed"\n'


def shapes(status: Status) -> Counter[tuple[str, int]]:
    """How many workers of each model and width there are."""
    return Counter((worker.model, worker.tp) for worker in status.workers)


async def test_two_models_side_by_side_are_reshaped_under_load(site_of: SiteOf) -> None:
    site = site_of(SIMULATED + START_MIXED)
    await site.start()
    status = await site.until_ready("mixed", START_S)
    assert shapes(status) == {("small", 1): 4, ("large", 4): 2}
    async with load(mix(await site.url(), "small", "large", streams=8, shorts=4)) as tally:
        assert (await site.change("wide", CHANGE_S)).state == "done"
        status = await site.until_ready("wide", CHANGE_S)
        assert shapes(status) == {("large", 4): 1, ("small", 2): 4}
        assert_no_gpu_has_two_owners(status)
        assert (await site.change("mixed", CHANGE_S)).state == "done"
    assert_nothing_lost(tally)
    assert {name.split("-")[0] for name in tally.by_worker} == {"small", "large"}


async def test_a_second_change_replaces_one_that_is_under_way(site_of: SiteOf) -> None:
    site = site_of(SIMULATED + START_SMALL)
    await site.start()
    await site.until_ready("small", START_S)
    async with load(mix(await site.url(), "small", streams=8)) as tally:
        first = await site.request("pairs")
        await site.until(lambda now: any(w.tp == 2 for w in now.workers), "the first change has begun", 60)
        second = await site.request("mixed")
        assert (await site.operation(first, CHANGE_S)).state == "replaced"
        assert (await site.operation(second, CHANGE_S)).state == "done"
        status = await site.until_ready("mixed", CHANGE_S)
    assert shapes(status) == {("small", 1): 4, ("large", 4): 2}
    assert_nothing_lost(tally)


@pytest.mark.parametrize("at_done", [0, 1, 3], ids="killed with {} new workers ready".format)
async def test_a_daemon_killed_in_the_middle_of_a_change_is_followed_by_one_that_carries_on(
    site_of: SiteOf, at_done: int
) -> None:
    site = site_of(SIMULATED + START_SMALL)
    await site.start()
    await site.until_ready("small", START_S)
    await site.request("pairs")
    before = await site.until(
        lambda now: sum(w.tp == 2 and w.phase == "ready" for w in now.workers) >= at_done, "so far", 60
    )
    await site.kill()

    await site.start()
    status = await site.until_ready("pairs", CHANGE_S)
    assert shapes(status) == {("small", 2): 6}
    assert_no_gpu_has_two_owners(status)
    kept = {worker.id: worker.pid for worker in before.workers if worker.tp == 2 and worker.phase == "ready"}
    assert kept.items() <= pids(status).items(), "what was ready before was not started again"
    async with load(mix(await site.url(), "small")) as tally:
        await site.until(lambda _: tally.answered >= 12, "the endpoint answers", 30)
    assert_nothing_lost(tally)


async def test_a_worker_that_never_comes_up_takes_the_change_back(site_of: SiteOf) -> None:
    site = site_of(
        f"""{SIMULATED}{START_SMALL}
[models.mute]
engine = "simulated"
args = ["--fault", "never-bind"]
startup_timeout_s = 2.0

[health]
startup_stall_s = 2.0

[[patterns.half.replicas]]
model = "small"
count = 6

[[patterns.half.replicas]]
model = "mute"
count = "fill"
"""
    )
    await site.start()
    before = await site.until_ready("small", START_S)
    async with load(mix(await site.url(), "small")) as tally:
        ended = await site.change("half", CHANGE_S)
        after = await site.until_ready("small", CHANGE_S)
    assert ended.state == "rolled_back", ended
    assert "mute" in ended.why
    assert_nothing_lost(tally)
    untouched = [id for id, pid in pids(before).items() if pids(after).get(id) == pid]
    assert len(untouched) >= 10, "only the GPUs on trial were touched"


async def test_a_stop_in_the_middle_of_a_change_leaves_nothing(site_of: SiteOf) -> None:
    site = site_of(SIMULATED + START_SMALL)
    await site.start()
    await site.until_ready("small", START_S)
    await site.request("pairs")
    await site.until(lambda now: any(w.tp == 2 for w in now.workers), "the change has begun", 60)
    assert await site.stop(60) == 0, site.tail()
    assert site.leftovers() == []


async def test_a_stop_before_anything_is_ready_leaves_nothing(site_of: SiteOf) -> None:
    site = site_of(SIMULATED + START_SMALL)
    await site.start()
    await site.until(lambda now: any(w.phase == "starting" for w in now.workers), "a worker starts", 30)
    assert await site.stop(60) == 0, site.tail()
    assert site.leftovers() == []


async def test_where_there_is_no_time_to_drain_the_log_says_what_was_cut(site_of: SiteOf) -> None:
    """Also shows that the load is hard to please: without draining it does lose streams."""
    hasty = SIMULATED.replace(', "--drain-s", "30"', "") + START_SMALL + "\n[workers]\ndrain_timeout_s = 0\n"
    site = site_of(hasty)
    await site.start()
    await site.until_ready("small", START_S)
    async with load(mix(await site.url(), "small", streams=12)) as tally:
        assert (await site.change("pairs", CHANGE_S)).state == "done"
    assert tally.truncated > 0
    assert tally.failed == 0, tally.examples
    cut = sum(event.data["in_flight"] for event in await site.events() if event.event == "worker.drain_deadline")
    assert cut >= tally.truncated
