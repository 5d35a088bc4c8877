"""The main job with real llama.cpp workers: a host, a pattern, one endpoint, and what may happen to them."""

import os
import signal
from pathlib import Path

import aiohttp
import psutil
import pytest
from daemonkit import SiteOf, pids
from harness import CHANGE_S, START_S, assert_no_gpu_has_two_owners, assert_nothing_lost, mix
from loadkit import load

from l40sd.control.messages import WorkerStatus

# 12 GPUs below switches of four and two on each socket: a third TP group of four would cross the sockets and is left
# out; a third pipeline of four may cross them.
WORKERS_OF = {"A": 12, "B": 6, "C": 2, "D": 3}

WHOLE = """
[[patterns.whole.replicas]]
model = "smollm2"
count = "fill"

[daemon]
pattern = "whole"
"""

FEW = """
[[patterns.few.replicas]]
model = "smollm2"
count = 2

[daemon]
pattern = "few"
"""


async def ask_worker_itself(worker: WorkerStatus) -> str:
    """One token from a worker, past the proxy; it wants the key that the daemon gave it."""
    assert worker.pid is not None
    key = psutil.Process(worker.pid).environ().get("LLAMA_API_KEY", "")
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
        session.post(
            f"http://{worker.address}/v1/completions",
            json={"model": worker.model, "prompt": "Hello", "max_tokens": 1},
            headers={"authorization": f"Bearer {key}"},
        ) as reply,
    ):
        assert reply.status == 200, await reply.text()
        return str((await reply.json())["choices"][0]["text"])


async def test_every_pattern_in_turn_under_a_steady_load_loses_nothing(site_of: SiteOf, smollm2: str) -> None:
    site = site_of(smollm2)
    await site.start()
    await site.until_ready("A", START_S)
    async with load(mix(await site.url())) as tally:
        for pattern in ("B", "C", "D", "A"):
            answered = tally.answered
            ended = await site.change(pattern, CHANGE_S)
            assert ended.state == "done", ended
            assert ended.lowest_ready > 0, "some capacity is kept ready all the way"
            status = await site.until_ready(pattern, CHANGE_S)
            assert len(status.workers) == WORKERS_OF[pattern]
            assert_no_gpu_has_two_owners(status)
            assert tally.answered > answered, f"nothing was answered on the way to {pattern}"
    assert_nothing_lost(tally)
    status = await site.status()
    assert status.proxy.in_flight == 0
    assert status.proxy.waiting == 0
    assert sum(worker.in_flight for worker in status.workers) == 0


async def test_a_pattern_whose_model_does_not_load_is_taken_back_by_itself(
    site_of: SiteOf, smollm2: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(4096))
    site = site_of(
        f"""{smollm2}
[models.broken]
engine = "llama-cpp"
source = "{broken}"
attention_heads = 64

[[patterns.half.replicas]]
model = "smollm2"
count = 6

[[patterns.half.replicas]]
model = "broken"
count = "fill"
{WHOLE}"""
    )
    await site.start()
    before = await site.until_ready("whole", START_S)
    async with load(mix(await site.url())) as tally:
        ended = await site.change("half", CHANGE_S)
        after = await site.until_ready("whole", CHANGE_S)
    assert ended.state == "rolled_back", ended
    assert "broken" in ended.why, "it says which worker failed"
    assert_nothing_lost(tally)
    assert {worker.id for worker in after.workers} == {worker.id for worker in before.workers}
    failed = [event for event in await site.events() if event.event == "pattern.apply.rolling_back"]
    assert len(failed) == 1
    said = failed[0].data["last_lines"]
    assert any("load" in line for line in said), f"the engine's own last words, not {said}"


async def test_killing_one_worker_loses_at_most_the_streams_on_it(site_of: SiteOf, smollm2: str) -> None:
    site = site_of(smollm2)
    await site.start()
    await site.until_ready("A", START_S)
    async with load(mix(await site.url(), streams=6)) as tally:
        status = await site.until(lambda now: any(w.in_flight for w in now.workers), "a worker is busy", 30)
        victim = max(status.workers, key=lambda worker: worker.in_flight)
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        await site.until(
            lambda now: any(w.id == victim.id and w.phase == "ready" and w.pid != victim.pid for w in now.workers),
            "the worker is back",
            START_S,
        )
        answered = tally.answered
        await site.until(lambda _: tally.answered > answered + 12, "the load goes on", 60)
    assert tally.failed == 0, tally.examples
    assert set(tally.truncated_on) <= {victim.id}, "only replies that had begun on the killed worker"
    assert tally.truncated <= 6, "at most one for each stream that was open"


async def test_killing_the_daemon_leaves_its_workers_serving_and_the_next_one_finds_them(
    site_of: SiteOf, smollm2: str
) -> None:
    site = site_of(smollm2)
    await site.start()
    before = await site.until_ready("A", START_S)
    await site.kill()
    await ask_worker_itself(before.workers[0])

    await site.start()
    after = await site.until_ready("A", 30)
    assert pids(after) == pids(before), "the same processes"
    assert [worker.restarts for worker in after.workers] == [0] * 12
    async with load(mix(await site.url())) as tally:
        await site.until(lambda _: tally.answered >= 12, "the endpoint answers", 60)
    assert_nothing_lost(tally)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param("[models.smollm2", id="not TOML"),
        pytest.param("[proxy]\nlisten_on = 1", id="unknown key"),
        pytest.param("[host]\ninventory = 'nowhere.toml'", id="no such host"),
    ],
)
async def test_a_broken_config_is_not_taken_over(site_of: SiteOf, smollm2: str, broken: str) -> None:
    site = site_of(f"{smollm2}\n{FEW}")
    await site.start()
    before = await site.until_ready("few", START_S)
    site.config_file.write_text(f"{site.config}\n{broken}\n")
    site.signal(signal.SIGHUP)
    await site.until_event("config.reload.failed", 10)
    after = await site.status()
    assert pids(after) == pids(before)
    assert after.pattern == "few"
    async with load(mix(await site.url(), streams=1, shorts=1)) as tally:
        await site.until(lambda _: tally.answered >= 2, "the endpoint answers", 30)
    assert_nothing_lost(tally)
