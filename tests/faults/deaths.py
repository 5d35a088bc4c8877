"""Engines that end with requests on them, and requests that end engines."""

import asyncio
from collections import Counter
from typing import Any

import aiohttp
from daemonkit import Site, pids

from faults.rig import PACED, Rig, ask, busiest, check, set_faults
from faults.suite import Outcome, fault

LIBRARY_RETRIES = 2
"""Of the client libraries of OpenAI and Anthropic, by default."""


async def call(site: Site, text: str) -> tuple[int, str, int]:
    """Ask as those libraries do; return the last answer's status and error code, and how often it was sent."""
    body = {"model": "toy", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    url = f"{await site.url()}/v1/chat/completions"
    answer: dict[str, Any] = {}
    status, sent = 0, 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        while sent <= LIBRARY_RETRIES:
            sent += 1
            async with session.post(url, json=body) as reply:
                status, answer = reply.status, await reply.json()
                should_retry = reply.headers.get("x-should-retry", str(status >= 500).lower())
                if should_retry == "false":
                    break
            await asyncio.sleep(0.5)
    return status, answer.get("error", {}).get("code", ""), sent


@fault(
    67,
    "one request ends every engine that reads it, and is sent again and again",
    how="six calls of the same poisoned request, by a client that sends it three times unless it is told not to",
    expected="It is tried on one further worker; then 502, not to be sent again, and the same is refused at once (where"
    " others were aboard both times, after a third). The second engine's end is not counted against it.",
    promise="two engines, none in quarantine; refused for 5 minutes",
    within_s=6.0,
)
async def poison(rig: Rig) -> Outcome:
    site = rig.site(count=4, args=(*PACED, "--fault", "poison"))
    before = await rig.serve(site)
    mark = await rig.mark(site)
    answers = [await call(site, "a poisoned one") for _ in range(6)]
    check((await ask(site))[0] == 200, "others are served meanwhile")
    _, seen_s = await rig.told(site, mark, "worker.exited")
    after = await site.until_ready("few", 30)
    ended = [worker for worker, pid in pids(after).items() if pids(before)[worker] != pid]
    check(len(ended) == 2, f"{ended} were started again")
    check(Counter(answers) == {(502, "worker_failed", 1): 1, (502, "poison_request", 1): 5}, answers)
    events = [event for event in await site.events() if event.seq > mark.seq]
    reasons = [event.data["reason"] for event in events if event.event == "worker.exited"]
    check(sum("with a request that had ended" in reason for reason in reasons) == 1, reasons)
    back_s = max(mark.until(event) for event in events if event.event == "worker.ready")
    return Outcome(took_s=back_s, lost=6, note=f"lost are the six calls; seen after {seen_s:.1f} s, all serve again")


@fault(
    68,
    "an engine answers 500 in its last moments",
    how="its core is gone: requests get 500 and /health says 503 for 0.3 s, then it exits; streams and short requests"
    " in flight",
    expected="A 500 without a byte before it goes to another worker while its worker is ending; an open stream ends in"
    " an error event.",
    promise="none lost but open streams",
    within_s=4.0,
)
async def last_moments(rig: Rig) -> Outcome:
    site = rig.site(count=3, args=PACED)
    await rig.serve(site)
    async with rig.loaded(site, streams=4, shorts=8, short_tokens=1) as tally:
        victim = await busiest(site)
        mark = await rig.mark(site)
        await set_faults(victim, dead_core=0.3)
        await rig.told(site, mark, "worker.exited", victim.id)
        _, ready_s = await rig.told(site, mark, "worker.ready", victim.id)
        retried = (await site.status()).proxy.retried
    check(tally.failed == 0, tally.examples)
    check(set(tally.truncated_on) <= {victim.id}, tally.examples)
    check(retried > 0, "none was asked elsewhere: nothing was shown")
    note = f"{retried} asked elsewhere; lost are its open streams"
    return Outcome(took_s=ready_s, lost=tally.truncated, note=note)
