"""Requests that find no worker: who waits, who is answered at once, and what /ready means."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from proxykit import CHAT, Stand, post

from l40sd.model import ModelName, Outlook, WorkerId
from l40sd.routing.routes import CatalogEntry

StartStand = Callable[..., Awaitable[Stand]]

EMBED = ModelName("embed")
NOTHING = Outlook(is_coming=False, note="workers: 2 quarantined, next try in 1800 s", retry_after_s=1800)
COMING = Outlook(note="workers: 1 starting")


def say(stand: Stand, outlook: Outlook, **more: Outlook) -> None:
    entries = {ModelName(name): CatalogEntry(outlook=each) for name, each in more.items()}
    stand.routes.set_catalog({CHAT: CatalogEntry(aliases=("gpt",), outlook=outlook), **entries})


async def test_a_request_for_which_nothing_can_come_is_answered_at_once(stand: StartStand) -> None:
    """It waited 120 s, and with the retries of the client's library six minutes, for a worker that was given up."""
    s = await stand(workers=0, queue_timeout_s=3600.0)
    say(s, NOTHING)
    reply = await s.ask(post())
    assert (reply.status, reply.error["code"]) == (503, "no_worker")
    assert "none is on its way; workers: 2 quarantined" in reply.error["message"]
    assert (reply.fields["retry-after"], reply.fields["x-should-retry"]) == ("1800", "false")


async def test_who_waits_is_told_when_nothing_can_come_any_more(stand: StartStand) -> None:
    s = await stand(workers=0, queue_timeout_s=3600.0)
    say(s, COMING)
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: s.routes.waiting(CHAT) == 1)
    say(s, NOTHING)
    reply = await dialog.reply()
    assert (reply.status, reply.fields["retry-after"]) == (503, "1800")
    assert "none is on its way" in reply.error["message"]


async def test_who_waits_is_served_when_a_worker_comes_whatever_was_said_before(stand: StartStand) -> None:
    s = await stand(workers=1, queue_timeout_s=3600.0)
    s.routes.remove(WorkerId("w0"))
    say(s, COMING)
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: s.routes.waiting(CHAT) == 1)
    s.routes.add(s.backend(s.worker))
    assert (await dialog.reply()).status == 200
    say(s, NOTHING)  # older than the worker: it serves all the same
    assert (await s.ask(post())).status == 200


async def test_one_that_may_come_again_soon_is_not_told_to_stay_away(stand: StartStand) -> None:
    s = await stand(workers=0, queue_timeout_s=0.05)
    say(s, Outlook(note="workers: 1 starting", retry_after_s=42))
    reply = await s.ask(post())
    assert (reply.status, reply.fields["retry-after"]) == (503, "42")
    assert "x-should-retry" not in reply.fields


async def page(stand: Stand, target: str) -> tuple[int, dict[str, Any]]:
    dialog = await stand.dial()
    await dialog.send(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    async with asyncio.timeout(10):
        head, _, body = (await dialog.rest()).decode().partition("\r\n\r\n")
    return int(head.split(" ")[1]), json.loads(body)


async def test_ready_means_that_what_is_wanted_is_served(stand: StartStand) -> None:
    """A load balancer dropped the host for a model that was configured and not in the pattern."""
    s = await stand()
    say(s, COMING, embed=Outlook(is_wanted=False, is_coming=False, note="not in pattern A"))
    status, body = await page(s, "/ready")
    assert (status, body["models"]["embed"]["wanted"]) == (200, False)
    say(s, COMING, embed=COMING)
    assert (await page(s, "/ready"))[0] == 503
    say(s, Outlook(is_wanted=False))
    assert (await page(s, "/ready"))[0] == 503, "nothing is wanted"


async def test_ready_can_be_asked_for_one_model(stand: StartStand) -> None:
    s = await stand()
    say(s, COMING, embed=Outlook(is_wanted=False), **{"a b/ü": COMING})
    targets = ("?model=chat", "?x=1&model=gpt", "?model=embed", "?model=a+b%2F%C3%BC", "?model=", "?model=none")
    assert [(await page(s, f"/ready{target}"))[0] for target in targets] == [200, 200, 503, 503, 503, 404]
    _, body = await page(s, "/ready?model=none")
    assert body["error"]["code"] == "model_not_found"
    s.routes.add(replace(s.backend(s.worker), model=EMBED, worker=WorkerId("e")))
    assert (await page(s, "/ready?model=embed"))[0] == 200
    s.routes.remove(WorkerId("e"))
