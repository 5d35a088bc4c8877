"""Changes that cannot wholly succeed, and who is told what: a real daemon, real processes, the control socket."""

import asyncio
from pathlib import Path

import pytest
from daemonkit import Site, SiteOf
from flaky import engine

from l40sd.control.messages import Accepted, ChangePreview, OperationStatus, PatternRequest, RestartRequest
from l40sd.errors import L40sError


def flaky(folder: Path, workers: str = "") -> str:
    """A model whose workers die on the GPUs that stand in a file, and start as slowly as another file says."""
    return f"""
[host]
inventory = "l40s-8"
[daemon]
pattern = "A"
[workers]
backoff_first_s = 0.1
backoff_never_ready_first_s = 0.1
backoff_never_ready_limit_s = 0.2
term_timeout_s = 1
{workers}
[health]
startup_interval_s = 0.05
[models.toy]
engine = "flaky"
attention_heads = 8
[models.other]
engine = "simulated"
attention_heads = 8
[[patterns.other.replicas]]
model = "other"
tp = 4
{engine(folder)}
"""


async def gpus_of(site: Site, *numbers: int) -> str:
    return " ".join(gpu.id for gpu in (await site.status()).gpus if gpu.index in numbers)


async def ask(site: Site, path: str, body: object, kind: type[Accepted]) -> Accepted:
    return await asyncio.to_thread(site.client.ask, path, body, kind)


async def test_one_dead_gpu_neither_undoes_a_change_nor_holds_it_up(site_of: SiteOf, tmp_path: Path) -> None:
    """Seen: everything went back because of one worker, and the way back never ended because of another."""
    site = site_of(flaky(tmp_path))
    await site.start()
    await site.until_ready("A", 30)
    (tmp_path / "dead").write_text(await gpus_of(site, 7))
    forward = await site.change("B", 60)
    assert (forward.state, forward.done, forward.total) == ("incomplete", 3, 4)
    assert "toy-gpu6-7: 3 starts in a row failed alike" in forward.why
    (tmp_path / "dead").write_text(await gpus_of(site, 0, 4, 7))
    back = await site.change("C", 60)
    assert back.state == "rolled_back"
    assert "back but for" in back.why
    status = await site.status()
    assert status.operation is None
    assert {w.id for w in status.workers if w.phase == "ready"} >= {"toy-gpu2-3"}
    (tmp_path / "dead").unlink()
    for worker in status.workers:
        if worker.phase == "quarantined":
            await site.post(f"/v1/workers/{worker.id}/reset")
    await site.until_ready("B", 60)


async def test_when_a_change_is_over_at_the_latest_is_known_before_it_begins(site_of: SiteOf, tmp_path: Path) -> None:
    site = site_of(flaky(tmp_path, workers="drain_timeout_s = 1\nkill_timeout_s = 1\ngpu_free_timeout_s = 1"))
    await site.start()
    await site.until_ready("A", 30)
    wish = PatternRequest(name="B", dry_run=True)
    preview = await asyncio.to_thread(site.client.ask, "/v1/pattern", wish, ChangePreview)
    accepted = await ask(site, "/v1/pattern", PatternRequest(name="B"), Accepted)
    now = await site.get(f"/v1/operations/{accepted.operation}", OperationStatus)
    assert 0 < now.ends_within_s <= preview.ends_within_s + 1
    assert (await site.operation(accepted.operation, 60)).state == "done"


async def test_a_model_that_leaves_service_is_named_before_and_after(site_of: SiteOf, tmp_path: Path) -> None:
    site = site_of(flaky(tmp_path))
    await site.start()
    await site.until_ready("A", 30)
    wish = PatternRequest(name="other", dry_run=True)
    preview = await asyncio.to_thread(site.client.ask, "/v1/pattern", wish, ChangePreview)
    assert (preview.leaving, preview.lowest_ready) == (("toy",), {})
    assert {step.ready_after for step in preview.steps} == {None}
    accepted = await ask(site, "/v1/pattern", PatternRequest(name="other"), Accepted)
    assert accepted.notes == ("toy leaves service with pattern other",)
    ended = await site.operation(accepted.operation, 60)
    assert (ended.state, ended.leaving) == ("done", ("toy",))


async def test_the_first_operator_is_told_who_replaced_the_change(site_of: SiteOf, tmp_path: Path) -> None:
    site = site_of(flaky(tmp_path))
    await site.start()
    await site.until_ready("A", 30)
    (tmp_path / "delay").write_text("30")
    first = await ask(site, "/v1/pattern", PatternRequest(name="B"), Accepted)
    await site.until(lambda s: any(w.phase == "starting" for w in s.workers), "under way", 30)
    (tmp_path / "delay").unlink()
    second = await ask(site, "/v1/pattern", PatternRequest(name="C"), Accepted)
    assert any("replaces the change to B that" in note for note in second.notes)
    ended = await site.operation(first.operation, 10)
    assert ended.state == "replaced"
    assert f"asked for pattern C, operation {second.operation}" in ended.why
    assert (await site.operation(second.operation, 60)).state == "done"


async def test_all_workers_are_restarted_without_falling_below_the_floor(site_of: SiteOf, tmp_path: Path) -> None:
    """Seen: a restart of all workers told them all at once."""
    site = site_of(flaky(tmp_path))
    await site.start()
    before = {w.id: w.pid for w in (await site.until_ready("A", 30)).workers}
    accepted = await ask(site, "/v1/restart", RestartRequest(workers=tuple(before)), Accepted)
    with pytest.raises(L40sError, match="under way"):
        await ask(site, "/v1/restart", RestartRequest(workers=tuple(before)), Accepted)
    ended = await site.operation(accepted.operation, 60)
    assert (ended.state, ended.kind, ended.done, ended.total) == ("done", "restart", 8, 8)
    assert ended.lowest_ready >= 0.5
    after = {w.id: w.pid for w in (await site.until_ready("A", 30)).workers}
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())


async def test_a_restart_stops_at_the_first_worker_that_does_not_come_back(site_of: SiteOf, tmp_path: Path) -> None:
    site = site_of(flaky(tmp_path, workers="start_parallel = 1"))
    await site.start()
    status = await site.until_ready("A", 30)
    (tmp_path / "dead").write_text(await gpus_of(site, 1))
    names = tuple(w.id for w in status.workers)
    accepted = await ask(site, "/v1/restart", RestartRequest(workers=names), Accepted)
    ended = await site.operation(accepted.operation, 60)
    assert ended.state == "failed"
    assert ended.why.startswith("toy-gpu1 did not come back: ")
    assert "not restarted: toy-gpu2, toy-gpu3" in ended.why
    pids = {w.id: w.pid for w in status.workers}
    assert {w.id: w.pid for w in (await site.status()).workers}["toy-gpu7"] == pids["toy-gpu7"]


async def test_the_next_daemon_goes_on_with_a_restart_and_knows_how_the_last_change_ended(
    site_of: SiteOf, tmp_path: Path
) -> None:
    site = site_of(flaky(tmp_path, workers="start_parallel = 1"))
    await site.start()
    before = {w.id: w.pid for w in (await site.until_ready("A", 30)).workers}
    changed = await site.change("A", 30)
    (tmp_path / "delay").write_text("0.3")
    accepted = await ask(site, "/v1/restart", RestartRequest(workers=tuple(before)), Accepted)
    await site.until(lambda s: s.operation is not None and s.operation.done >= 2, "some are back", 30)
    await site.kill()
    await site.start()
    assert (await site.operation(changed.id, 10)).state == "done"
    assert (await site.operation(accepted.operation, 60)).state == "done"
    after = {w.id: w.pid for w in (await site.until_ready("A", 30)).workers}
    assert not set(after.values()) & set(before.values())


@pytest.mark.parametrize("pattern", ["B", "C", "D", "other"])
async def test_a_dry_run_shows_the_steps_that_the_change_then_takes(
    site_of: SiteOf, tmp_path: Path, pattern: str
) -> None:
    """One at a time, for then it is no matter who is quicker."""
    site = site_of(flaky(tmp_path, workers="start_parallel = 1"))
    await site.start()
    await site.until_ready("A", 30)
    wish = PatternRequest(name=pattern, dry_run=True)
    preview = await asyncio.to_thread(site.client.ask, "/v1/pattern", wish, ChangePreview)
    shown = [(step.action.split()[0], step.worker) for step in preview.steps]
    mark = (await site.events())[-1].seq
    assert (await site.change(pattern, 60)).state == "done"
    words = {"worker.draining": "drain", "worker.spawning": "start"}
    happened = [
        (words[event.event], event.data["worker"])
        for event in await site.events()
        if event.seq > mark and event.event in words
    ]
    assert happened == shown


async def test_what_served_a_while_ago_is_not_tried_again_also_for_the_next_daemon(
    site_of: SiteOf, tmp_path: Path
) -> None:
    """Seen: back from D to A one GPU stood empty for a minute, although A had served minutes ago."""
    site = site_of(flaky(tmp_path))
    await site.start()
    await site.until_ready("A", 30)
    assert (await site.change("B", 60)).state == "done"
    await site.kill()
    await site.start()
    await site.until_ready("B", 30)
    wish = PatternRequest(name="A", dry_run=True)
    preview = await asyncio.to_thread(site.client.ask, "/v1/pattern", wish, ChangePreview)
    first = [step.action.split()[0] for step in preview.steps[:2]]
    assert first == ["drain", "drain"], "two pairs go before the first new worker has answered"
    assert preview.expected_s is not None, "loads are remembered, too"
    assert (await site.change("A", 60)).state == "done"
