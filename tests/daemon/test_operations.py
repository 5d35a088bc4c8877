"""The supervisor through its public door: a real daemon, real processes (simulated engines), the control socket."""

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import pytest
from daemonkit import QUICK, Site, SiteOf, worker_of

from l40sd.control.messages import OperationStatus
from l40sd.errors import L40sError

TOY = (
    QUICK
    + """
[daemon]
pattern = "wide"
[models.toy]
engine = "simulated"
attention_heads = 8
[[patterns.wide.replicas]]
model = "toy"
tp = 4
[[patterns.pairs.replicas]]
model = "toy"
tp = 2
"""
)


async def operation(site: Site, operation_id: str) -> OperationStatus:
    return await site.get(f"/v1/operations/{operation_id}", OperationStatus)


def with_model(config: str, name: str, lines: str) -> str:
    return f'{config}\n[models.{name}]\n{lines}\n[[patterns.{name}.replicas]]\nmodel = "{name}"\ntp = 2\n'


async def test_a_worker_that_dies_comes_back_at_once_and_says_why(site_of: SiteOf) -> None:
    site = site_of(TOY)
    await site.start()
    before = worker_of(await site.until_ready("wide", 30), "toy-gpu0-1-2-3")
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    event = await site.until_event("worker.exited", 10)
    assert event.data["worker"] == before.id
    assert event.data["exit_signal"] == signal.SIGKILL
    status = await site.until(
        lambda s: worker_of(s, before.id).phase == "ready" and worker_of(s, before.id).pid != before.pid, "back", 30
    )
    assert worker_of(status, before.id).restarts == 1
    assert worker_of(status, before.id).gpu_ids == before.gpu_ids


async def test_the_endpoint_lists_a_model_as_its_engine_does(site_of: SiteOf) -> None:
    """Clients found no ``max_model_len`` at the endpoint, though every worker says it."""
    site = site_of(TOY.replace("attention_heads = 8", 'attention_heads = 8\nargs = ["--max-model-len", "4096"]'))
    await site.start()
    await site.until_ready("wide", 30)
    async with aiohttp.ClientSession() as http, http.get(f"{await site.url()}/v1/models") as reply:
        (listed,) = (await reply.json())["data"]
    assert (listed["id"], listed["max_model_len"], listed["owned_by"]) == ("toy", 4096, "simulated")


async def test_a_worker_that_never_comes_up_is_given_up_with_its_last_words(site_of: SiteOf) -> None:
    """Fault 28 of docs/what-happens-when.md."""
    site = site_of(
        QUICK + '[models.bad]\nengine = "simulated"\nattention_heads = 8\nargs = ["--fault", "exit-at-once=3"]\n'
        '[daemon]\npattern = "C"\n'
    )
    await site.start()
    status = await site.until(
        lambda s: bool(s.workers) and all(w.phase == "quarantined" for w in s.workers), "given up", 60
    )
    assert len(status.workers) == 2
    assert all("3 starts in a row failed alike (exit 3)" in w.reason for w in status.workers)
    assert any("quarantined" in sentence for sentence in status.degraded)
    await site.post(f"/v1/workers/{status.workers[0].id}/reset")
    await site.until(lambda s: worker_of(s, status.workers[0].id).phase != "quarantined", "tried again", 10)


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ('engine = "llama-cpp"\nsource = "/nowhere/model.gguf"', "no checkpoint at /nowhere/model.gguf"),
        ('engine = "mine"\nsource = "x"', "no program 'no-such-program'"),
    ],
)
async def test_what_cannot_be_started_is_one_clear_error_and_no_restart_loop(
    site_of: SiteOf, lines: str, word: str
) -> None:
    """Fault 29 of docs/what-happens-when.md."""
    mine = '[engines.mine]\ncommand = ["no-such-program", "--port", "{port}"]\n'
    site = site_of(f'{QUICK}{mine}[daemon]\npattern = "C"\n[models.m]\nattention_heads = 8\n{lines}\n')
    await site.start()
    status = await site.until(lambda s: bool(s.workers) and all(w.phase == "failed" for w in s.workers), "refused", 20)
    assert all(word in w.reason and w.restarts == 0 for w in status.workers)


async def test_a_pattern_whose_first_worker_fails_is_taken_back_and_the_rest_was_never_touched(site_of: SiteOf) -> None:
    site = site_of(
        with_model(TOY, "bad", 'engine = "simulated"\nattention_heads = 8\nargs = ["--fault", "exit-at-once=1"]')
    )
    await site.start()
    before = {w.id: w.pid for w in (await site.until_ready("wide", 30)).workers}
    asked = await site.request("bad")
    await site.until_event("pattern.apply.rolled_back", 60)
    status = await site.until_ready("wide", 30)
    after = {w.id: w.pid for w in status.workers}
    ended = await operation(site, asked)
    assert ended.state == "rolled_back"
    assert "exited with status 1" in ended.why
    assert after.keys() == before.keys()
    assert after["toy-gpu4-5-6-7"] == before["toy-gpu4-5-6-7"]


async def test_a_second_change_replaces_the_first(site_of: SiteOf) -> None:
    slow = with_model(TOY, "slow", 'engine = "simulated"\nattention_heads = 8\nargs = ["--start-delay-s", "60"]')
    site = site_of(slow)
    await site.start()
    await site.until_ready("wide", 30)
    first = await site.request("slow")
    await site.until(lambda s: any(w.model == "slow" and w.phase == "starting" for w in s.workers), "under way", 30)
    second = await site.request("pairs")
    status = await site.until_ready("pairs", 60)
    assert {w.model for w in status.workers} == {"toy"}
    assert (await operation(site, first)).state == "replaced"
    assert (await operation(site, second)).state == "done"


async def test_a_pattern_that_does_not_fit_changes_nothing_and_says_what_would(site_of: SiteOf) -> None:
    site = site_of(TOY + '[[patterns.huge.replicas]]\nmodel = "toy"\ntp = 8\ncount = 2\n')
    await site.start()
    before = await site.until_ready("wide", 30)
    with pytest.raises(L40sError) as refusal:
        await site.request("huge")
    assert refusal.value.hint
    with pytest.raises(L40sError, match="there is no pattern 'pears'") as unknown:
        await site.request("pears")
    assert unknown.value.code == "unknown_pattern"
    after = await site.status()
    assert after.operation is None
    assert [w.pid for w in after.workers] == [w.pid for w in before.workers]


async def test_a_reload_rolls_only_what_it_changes(site_of: SiteOf) -> None:
    """Invariant 5 over a reload; the new launch is tried like a new pattern."""
    both = TOY.replace("tp = 4\n", "tp = 4\ncount = 1\n") + (
        '[models.other]\nengine = "simulated"\nattention_heads = 8\n'
        '[[patterns.wide.replicas]]\nmodel = "other"\ntp = 4\ncount = 1\n'
    )
    site = site_of(both)
    await site.start()
    before = {w.model: w for w in (await site.until_ready("wide", 30)).workers}
    changed = both.replace(
        '[models.other]\nengine = "simulated"', '[models.other]\nargs = ["--tokens-per-s", "900"]\nengine = "simulated"'
    )
    assert changed != both
    site.config_file.write_text(changed)
    answer = await site.post("/v1/reload")
    assert any("other" in sentence for sentence in answer["changed"])
    await site.until_event("pattern.apply.complete", 60)
    after = {w.model: w for w in (await site.until_ready("wide", 30)).workers}
    assert after["toy"].pid == before["toy"].pid
    assert after["other"].pid != before["other"].pid


async def test_drain_undrain_and_restart(site_of: SiteOf) -> None:
    site = site_of(TOY)
    await site.start()
    one = (await site.until_ready("wide", 30)).workers[0]
    await site.post(f"/v1/workers/{one.id}/drain")
    await site.until(lambda s: worker_of(s, one.id).phase == "drained", "drained", 10)
    await site.post(f"/v1/workers/{one.id}/undrain")
    await site.until(lambda s: worker_of(s, one.id).phase == "ready", "back", 10)
    await site.post(f"/v1/workers/{one.id}/restart")
    after = await site.until(
        lambda s: worker_of(s, one.id).phase == "ready" and worker_of(s, one.id).pid != one.pid, "restarted", 30
    )
    assert worker_of(after, one.id).restarts == 0  # a wish is no failure
    with pytest.raises(L40sError) as unknown:
        await site.post("/v1/workers/nobody/restart")
    assert unknown.value.code == "unknown_worker"
    assert one.id in unknown.value.hint


async def test_a_worker_that_does_not_serve_yet_cannot_be_drained(site_of: SiteOf) -> None:
    """It was answered with 202, and forgotten."""
    site = site_of(TOY.replace('engine = "simulated"', 'engine = "simulated"\nargs = ["--start-delay-s", "60"]'))
    await site.start()
    status = await site.until(lambda s: any(w.phase == "starting" for w in s.workers), "starting", 20)
    starting = next(w.id for w in status.workers if w.phase == "starting")
    with pytest.raises(L40sError, match="nothing to drain") as refusal:
        await site.post(f"/v1/workers/{starting}/drain")
    assert refusal.value.code == "not_serving"


async def test_a_daemon_killed_in_the_middle_of_a_change_is_carried_on_by_the_next(site_of: SiteOf) -> None:
    """Fault 12 of docs/what-happens-when.md."""
    site = site_of(TOY)
    await site.start()
    await site.until_ready("wide", 30)
    await site.request("pairs")
    await site.until_event("pattern.apply.proven", 30)
    await site.kill()
    await site.start()
    status = await site.until_ready("pairs", 60)
    owned = [gpu for w in status.workers for gpu in w.gpu_ids]
    assert len(owned) == len(set(owned)) == 8


async def test_a_hung_worker_is_found_by_its_counters_and_restarted(site_of: SiteOf) -> None:
    """Faults 25 and 26 of docs/what-happens-when.md: /health says 200 all the while."""
    hung = TOY.replace('engine = "simulated"', 'engine = "simulated"\nargs = ["--fault", "hang-after=1"]')
    site = site_of(
        hung.replace("[health]", "[health]\nstall_timeout_s = 1\ncanary_interval_s = 0.5\ncanary_timeout_s = 1")
    )
    await site.start()
    await site.until(lambda s: any("hung" in w.reason or w.restarts > 0 for w in s.workers), "noticed", 30)
    events = [e for e in await site.events() if e.event == "worker.stopping"]
    assert any("token" in str(e.data.get("reason")) for e in events)


async def test_a_second_daemon_is_refused_and_the_first_goes_on(site_of: SiteOf, tmp_path: Path) -> None:
    """Fault 17 of docs/what-happens-when.md."""
    site = site_of(TOY)
    await site.start()
    before = await site.until_ready("wide", 30)
    second = Site(folder=site.folder, config=TOY)
    second.spawn()
    assert await second.ended(20) == 1
    assert f"already running (pid {site.daemon.pid if site.daemon else 0})" in second.tail()
    assert [w.pid for w in (await site.status()).workers] == [w.pid for w in before.workers]


async def test_a_request_that_waits_when_the_daemon_is_stopped_is_told_so(site_of: SiteOf) -> None:
    site = site_of(TOY.replace('engine = "simulated"', 'engine = "simulated"\nargs = ["--start-delay-s", "60"]'))
    await site.start()
    host, port = (await site.status()).proxy.listen[0].rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"model": "toy", "prompt": "x"}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    await site.until(lambda s: s.proxy.waiting == 1, "it waits", 10)
    site.signal(signal.SIGTERM)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"this host is being stopped" in answer
    assert await site.ended(30) == 0
