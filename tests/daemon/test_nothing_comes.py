"""A real daemon's answer to requests that find no worker."""

from typing import Any

import aiohttp
from daemonkit import Site, SiteOf

HOST = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "day"
[proxy]
queue_timeout_s = 3600
[workers]
quarantine_alike = 1
[models.toy]
engine = "simulated"
attention_heads = 8
[models.dies]
engine = "simulated"
attention_heads = 8
args = ["--fault", "exit-at-once"]
[models.nowhere]
engine = "lost"
source = "any"
attention_heads = 8
[engines.lost]
command = ["/no/such/program", "{port}"]
[[patterns.day.replicas]]
model = "toy"
count = 1
[[patterns.day.replicas]]
model = "dies"
count = 1
[[patterns.day.replicas]]
model = "nowhere"
count = 1
[[patterns.night.replicas]]
model = "toy"
count = 1
"""


async def ask(site: Site, model: str) -> tuple[int, str, str]:
    """Ask; return status, ``retry-after`` and the error's message. One that had to wait would never return."""
    question = {"model": model, "messages": [], "max_tokens": 2}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http,
        http.post(f"{await site.url()}/v1/chat/completions", json=question) as reply,
    ):
        answer: dict[str, Any] = await reply.json()
        return reply.status, reply.headers.get("retry-after", ""), answer.get("error", {}).get("message", "")


async def ready(site: Site, query: str = "") -> int:
    async with aiohttp.ClientSession() as http, http.get(f"{await site.url()}/ready{query}") as reply:
        return reply.status


async def test_a_request_that_nothing_can_serve_is_answered_at_once_and_says_why(site_of: SiteOf) -> None:
    """Each of these waited 120 s, and a client's library asked three times."""
    site = site_of(HOST)
    await site.start()
    phases = {"toy": "ready", "dies": "quarantined", "nowhere": "failed"}
    status = await site.until(lambda s: {w.model: w.phase for w in s.workers} == phases, "all has been tried", 30)
    assert (await ask(site, "toy"))[0] == 200
    code, _, message = await ask(site, "dies")
    assert (code, "1 quarantined" in message) == (503, True), message
    code, _, message = await ask(site, "nowhere")
    assert (code, "1 failed" in message) == (503, True), message
    assert (await ready(site), await ready(site, "?model=toy"), await ready(site, "?model=dies")) == (503, 200, 503)
    toy = next(w.id for w in status.workers if w.model == "toy")
    await site.post(f"/v1/workers/{toy}/drain")
    await site.until(lambda s: any(w.phase == "drained" for w in s.workers), "it rests", 30)
    code, _, message = await ask(site, "toy")
    assert (code, "1 drained" in message) == (503, True), message
    await site.post(f"/v1/workers/{toy}/undrain")
    await site.until(lambda s: any(w.phase == "ready" for w in s.workers), "it serves", 30)
    await site.change("night", 30)
    code, _, message = await ask(site, "dies")
    assert (code, "not in pattern night" in message) == (503, True), message
    assert await ready(site) == 200, "what is configured and not in the pattern does not matter"


async def test_a_request_for_what_a_change_brings_waits_for_it(site_of: SiteOf) -> None:
    coming = HOST.replace("dies", "late").replace('args = ["--fault", "exit-at-once"]', "")
    coming = coming.replace('[[patterns.day.replicas]]\nmodel = "nowhere"\ncount = 1\n', "")
    site = site_of(coming.replace('pattern = "day"', 'pattern = "night"'))
    await site.start()
    await site.until_ready("night", 30)
    assert (await ask(site, "late"))[0] == 503
    await site.request("day")
    assert (await ask(site, "late"))[0] == 200
