"""What becomes of the requests of workers that end: a real daemon, real processes (simulated engines), the endpoint."""

import asyncio
import json

import aiohttp
from daemonkit import Site, SiteOf

from l40sd.control.messages import WorkerStatus

PATIENCE_S = 30.0
TWO = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "two"
[workers]
drain_timeout_s = 0.3
term_timeout_s = 2
start_parallel = 4
[health]
probe_interval_s = 0.2
[models.toy]
engine = "simulated"
args = ["--tokens-per-s", "40"]
[[patterns.two.replicas]]
model = "toy"
count = 2
"""


async def ask(site: Site, *, tokens: int = 2, stream: bool = False, text: str = "hi") -> tuple[int, str, str]:
    """Ask for a completion; return status, text and the worker it came from."""
    body = {"model": "toy", "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": stream}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session,
        session.post(f"{await site.url()}/v1/chat/completions", json=body) as reply,
    ):
        parts = []
        try:
            async for part in reply.content:
                parts.append(part)
        except aiohttp.ClientPayloadError:
            parts.append(b"(cut)")
        return reply.status, b"".join(parts).decode(), reply.headers.get("x-l40s-worker", "")


async def busy(site: Site, count: int) -> WorkerStatus:
    """Return a worker with so many requests."""
    status = await site.until(lambda s: any(w.in_flight == count for w in s.workers), "requests run", PATIENCE_S)
    return next(w for w in status.workers if w.in_flight == count)


async def set_fault(worker: WorkerStatus, **faults: float) -> None:
    body = {name.replace("_", "-"): number for name, number in faults.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{worker.address}/sim/fault", json=body) as reply,
    ):
        assert reply.status == 200


async def test_at_the_drains_deadline_what_has_no_byte_yet_goes_elsewhere_and_a_stream_is_cut(site_of: SiteOf) -> None:
    """SIGTERM reached the engine with requests on it: it ended them as if they were whole, with the reason "abort"."""
    site = site_of(TWO)
    await site.start()
    await site.until_ready("two", PATIENCE_S)
    async with asyncio.TaskGroup() as group:
        whole = group.create_task(ask(site, tokens=60))
        victim = await busy(site, 1)
        others = [group.create_task(ask(site, tokens=60, stream=True)) for _ in range(3)]
        await site.until(
            lambda s: bool(s.workers) and all(w.in_flight == 2 for w in s.workers), "two on each", PATIENCE_S
        )
        await site.post(f"/v1/workers/{victim.id}/restart")
        event = await site.until_event("worker.drain_deadline", PATIENCE_S)
        assert event.data["in_flight"] == 2
    status, text, _ = whole.result()
    assert (status, json.loads(text)["usage"]["completion_tokens"]) == (200, 60)
    texts = [task.result()[1] for task in others]
    assert not any("abort" in text for text in texts)
    assert {("[DONE]" in text, '"error"' in text) for text in texts} == {(True, False), (False, True)}


async def test_no_request_is_lost_to_an_engine_that_answers_500_until_it_has_ended(site_of: SiteOf) -> None:
    """An engine whose core had died answered 500 for 0.3 s: 48 requests were lost while another worker was well."""
    site = site_of(TWO)
    await site.start()
    status = await site.until_ready("two", PATIENCE_S)
    victim = status.workers[0]
    await set_fault(victim, dead_core=0.3)
    died = asyncio.Event()
    statuses: list[int] = []

    async def keep_asking(*, stream: bool) -> None:
        while not died.is_set():
            statuses.append((await ask(site, stream=stream))[0])

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(keep_asking(stream=bool(number % 2)))
        event = await site.until_event("worker.exited", PATIENCE_S)
        died.set()
    assert event.data["worker"] == victim.id
    assert set(statuses) == {200}
    status = await site.status()
    assert status.proxy.retried > 0


async def test_a_request_that_ends_workers_ends_two_and_counts_once(site_of: SiteOf) -> None:
    """One poisoned request ended nine engines, and six of them put a host into quarantine until somebody reset it."""
    args = 'args = ["--tokens-per-s", "40", "--fault", "poison"]'
    config = TWO.replace('args = ["--tokens-per-s", "40"]', args).replace("count = 2", "count = 4")
    site = site_of(config.replace("[workers]", "[workers]\nquarantine_per_hour = 1"))
    await site.start()
    before = await site.until_ready("two", PATIENCE_S)
    for _ in range(3):
        status, text, _ = await ask(site, text="a poisoned one")
        assert (status, json.loads(text)["error"]["code"]) in ((502, "worker_failed"), (502, "poison_request"))
    assert json.loads(text)["error"]["code"] == "poison_request"
    after = await site.until(
        lambda s: sorted(w.phase for w in s.workers) == ["quarantined", "ready", "ready", "ready"], "back", PATIENCE_S
    )
    pids = {w.id: w.pid for w in before.workers}
    assert sum(w.pid == pids[w.id] for w in after.workers) == 2, "two were never asked"
    exited = [event.data for event in await site.events() if event.event == "worker.exited"]
    assert len(exited) == 1
    assert "with a request that had ended toy-" in exited[0]["reason"]
    assert (await ask(site, text="another one"))[0] == 200


async def test_a_request_that_hangs_two_workers_is_tried_on_no_third(site_of: SiteOf) -> None:
    """A worker is stopped because it hangs: what it was at may be the cause, and goes to one further worker only."""
    config = TWO.replace("count = 2", "count = 3").replace("[health]", "[health]\nstall_timeout_s = 1")
    site = site_of(config)
    await site.start()
    before = await site.until_ready("two", PATIENCE_S)
    for worker in before.workers:
        await set_fault(worker, hang_after=1)
    status, text, _ = await ask(site)
    error = json.loads(text)["error"]
    assert (status, error["code"]) == (502, "worker_failed")
    assert "it is not tried again" in error["message"]
    stopping = [event.data["worker"] for event in await site.events() if event.event == "worker.stopping"]
    assert len(stopping) == len(set(stopping)) == 2
