"""Workers that say they are well while requests fail on them, and workers that are well again."""

import asyncio
from collections import Counter

import aiohttp
from aiohttp import web
from daemonkit import Site, SiteOf

from l40sd.control.messages import Status, WorkerStatus

TOY = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "toys"
[health]
probe_interval_s = 0.2
eject_first_s = 0.5
slow_start_s = 0.2
[models.toy]
engine = "simulated"
attention_heads = 8
[[patterns.toys.replicas]]
model = "toy"
count = {count}
"""


async def set_faults(worker: WorkerStatus, **faults: float | None) -> None:
    named = {name.replace("_", "-"): number for name, number in faults.items()}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"http://{worker.address}/sim/fault", json=named) as reply,
    ):
        assert reply.status == 200


async def ask(site: Site, requests: int, *, model: str = "toy") -> Counter[int]:
    """Ask one request after the other; return how often each status was the answer."""
    url = f"{await site.url()}/v1/chat/completions"
    question = {"model": model, "messages": [], "max_tokens": 3}
    answers: Counter[int] = Counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http:
        for _ in range(requests):
            async with http.post(url, json=question) as reply:
                answers[reply.status] += 1
    return answers


async def until_out(site: Site, worker: str) -> Status:
    return await site.until(lambda s: phase_of(s, worker) == "unready", f"{worker} is out", 20)


def phase_of(status: Status, worker: str) -> str:
    return next(w.phase for w in status.workers if w.id == worker)


async def test_a_worker_on_which_requests_fail_is_out_after_a_handful_and_back_when_it_is_well(site_of: SiteOf) -> None:
    """A worker that answered every request with 500 at once took 93 % of them and stayed ready for ever: its probes
    were fine. Here the canary of one token is, too, so that nothing but the requests tells."""
    site = site_of(TOY.format(count=2))
    await site.start()
    failing, _ = (await site.until_ready("toys", 30)).workers
    await set_faults(failing, error_but_one=1e6)
    answers = await ask(site, 40)
    assert answers[500] <= 6, answers
    event = await site.until_event("worker.ejected", 10)
    assert event.data["worker"] == failing.id
    assert event.data["for_s"] <= 0.5
    status = await until_out(site, failing.id)
    shown = next(w for w in status.workers if w.id == failing.id)
    assert "requests on it failed" in shown.reason
    assert "back" in shown.reason, "and when it may come back"
    assert shown.pid == failing.pid, "it is left alone, not restarted"
    await set_faults(failing, error_but_one=None)
    status = await site.until_ready("toys", 20)
    assert next(w for w in status.workers if w.id == failing.id).pid == failing.pid
    async with aiohttp.ClientSession() as http, http.get(f"{await site.url()}/metrics") as reply:
        assert f'l40sd_worker_ejections_total{{worker="{failing.id}"}} ' in await reply.text()
    assert (await ask(site, 20))[200] == 20


async def test_one_that_is_back_is_given_few_requests_first(site_of: SiteOf) -> None:
    """Its share grows slowly, so that one that fails again at once takes few requests with it."""
    site = site_of(TOY.format(count=2).replace("slow_start_s = 0.2", "slow_start_s = 3600"))
    await site.start()
    failing, _ = (await site.until_ready("toys", 30)).workers
    await set_faults(failing, error_but_one=1e6)
    await ask(site, 40)
    await until_out(site, failing.id)
    await set_faults(failing, error_but_one=None)
    before = await site.until_ready("toys", 20)
    assert (await ask(site, 20))[200] == 20
    after = await site.status()
    served = {w.id: w.served for w in after.workers}
    assert served[failing.id] == next(w.served for w in before.workers if w.id == failing.id), "one idle is before it"


async def test_the_only_worker_is_kept_although_requests_fail_on_it_and_that_is_said(site_of: SiteOf) -> None:
    site = site_of(TOY.format(count=1))
    await site.start()
    (failing,) = (await site.until_ready("toys", 30)).workers
    await set_faults(failing, error_but_one=1e6)
    assert await ask(site, 20) == {500: 20}
    event = await site.until_event("worker.failing", 10)
    assert event.data["worker"] == failing.id
    status = await site.until(lambda s: bool(s.degraded), "it is said", 10)
    assert "it is kept" in status.degraded[0]
    assert "it is kept" in status.workers[0].reason
    await set_faults(failing, error_but_one=None)
    assert await ask(site, 20) == {200: 20}
    await site.until(lambda s: not s.degraded and not s.workers[0].reason, "all is well", 10)


async def test_a_worker_whose_every_answer_is_an_error_is_restarted(site_of: SiteOf) -> None:
    """Promised for a core that died behind a front that says that it is well: at once when it answers with 500."""
    site = site_of(TOY.format(count=2))
    await site.start()
    failing, _ = (await site.until_ready("toys", 30)).workers
    await set_faults(failing, error=1e6)
    await ask(site, 20)
    event = await site.until_event("worker.exited", 20)
    assert event.data["worker"] == failing.id
    assert "one token did not come: status 500" in event.data["reason"]
    await site.until_ready("toys", 20)


class External:
    """A worker that somebody else runs: its /health says 200 throughout, its tokens come or do not."""

    def __init__(self) -> None:
        self.makes_tokens = asyncio.Event()
        self.makes_tokens.set()

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "far"}]})

    async def complete(self, _: web.Request) -> web.Response:
        await self.makes_tokens.wait()
        return web.json_response({"choices": [{"message": {"content": "1"}, "finish_reason": "stop"}]})

    async def start(self) -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_get("/health", self.models)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        listener = web.TCPSite(runner, "127.0.0.1", 0)
        await listener.start()
        return runner, runner.addresses[0][1]


async def test_an_external_worker_that_was_taken_out_by_its_canary_is_back_when_it_answers_one(site_of: SiteOf) -> None:
    """It never received a request again, although it answered every canary after the one that it had failed."""
    external = External()
    runner, port = await external.start()
    site = site_of(
        f"""
[host]
inventory = "l40s-8"
[health]
probe_interval_s = 0.1
canary_interval_s = 0.3
canary_timeout_s = 0.3
[models.far]
engine = "external"
endpoints = ["http://127.0.0.1:{port}"]
"""
    )
    await site.start()
    (worker,) = (await site.until(lambda s: bool(s.workers) and s.workers[0].phase == "ready", "it serves", 30)).workers
    external.makes_tokens.clear()
    status = await until_out(site, worker.id)
    assert "one token did not come" in status.workers[0].reason
    external.makes_tokens.set()
    await site.until(lambda s: s.workers[0].phase == "ready", "it serves again", 20)
    assert await ask(site, 3, model="far") == {200: 3}
    await runner.cleanup()
