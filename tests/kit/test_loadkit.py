"""The load generator must be hard to please: what it calls answered is what every other test relies on."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from loadkit import Mix, Tally, load

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
TOKENS = 3


@asynccontextmanager
async def endpoint(handler: Handler) -> AsyncIterator[str]:
    """An OpenAI-like endpoint with one handler, on a port of its own."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return await handler(request, await request.json())

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def chunk(number: int, *, content: str | None = "x", finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content} if content else {}, "finish_reason": finish}
    return b"data: " + json.dumps({"id": f"chat-{number}", "choices": [choice]}).encode() + b"\n\n"


WHOLE = [chunk(1), chunk(1), chunk(1), chunk(1, content=None, finish="length"), b"data: [DONE]\n\n"]


async def one_stream_of(parts: list[bytes]) -> Tally:
    """What the generator says about a stream of exactly these bytes, then about nothing more."""
    served = asyncio.Event()

    async def handler(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"x-l40s-worker": "tiny-gpu0"})
        await reply.prepare(request)
        for part in parts:
            await reply.write(part)
        served.set()
        return reply

    async with endpoint(handler) as url:
        mix = Mix(url=url, models=("tiny",), streams=1, shorts=0, stream_tokens=TOKENS)
        async with asyncio.timeout(10), load(mix) as tally:
            await served.wait()
    return tally


async def test_a_whole_stream_is_answered() -> None:
    tally = await one_stream_of(WHOLE)
    assert tally.lost == 0, tally.examples
    assert tally.answered >= 1
    assert tally.by_worker["tiny-gpu0"] == tally.answered
    assert tally.tokens == TOKENS * tally.answered
    assert tally.open == 0


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(WHOLE[:-1], id="no [DONE]"),
        pytest.param(WHOLE[1:], id="a token is missing"),
        pytest.param([chunk(1), *WHOLE], id="a token too many"),
        pytest.param([*WHOLE[:3], WHOLE[4]], id="no finish_reason"),
        pytest.param([*WHOLE[:3], chunk(1, content=None, finish="abort"), WHOLE[4]], id="aborted"),
        pytest.param([WHOLE[0], chunk(2), *WHOLE[2:]], id="spliced from two replies"),
        pytest.param([WHOLE[0], b'data: {"error": {"message": "worker died"}}\n\n'], id="an error in the middle"),
        pytest.param([], id="empty"),
    ],
)
async def test_a_stream_with_anything_missing_is_truncated(parts: list[bytes]) -> None:
    tally = await one_stream_of(parts)
    assert tally.answered == 0
    assert tally.truncated >= 1
    assert tally.truncated_on["tiny-gpu0"] == tally.truncated
    assert tally.examples


async def test_a_refusal_is_failed_and_a_short_reply_of_wrong_length_truncated() -> None:
    replies = [
        web.json_response({"usage": {"completion_tokens": TOKENS}}),
        web.json_response({"error": {"message": "no"}}, status=503),
        web.json_response({"usage": {"completion_tokens": TOKENS - 1}}),
    ]
    all_served = asyncio.Event()

    async def handler(_: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert body["max_tokens"] == TOKENS
        reply = replies.pop(0)
        if not replies:
            all_served.set()
            replies.append(web.json_response({"usage": {"completion_tokens": TOKENS}}))
        return reply

    async with endpoint(handler) as url:
        mix = Mix(url=url, models=("tiny",), streams=0, shorts=1, short_tokens=TOKENS)
        async with asyncio.timeout(10), load(mix) as tally:
            await all_served.wait()
    assert (tally.failed, tally.truncated) == (1, 1), tally.examples
    assert tally.answered >= 1


async def test_an_endpoint_that_is_not_there_is_failed_and_not_hammered() -> None:
    mix = Mix(url="http://127.0.0.1:9", models=("tiny",), streams=1, shorts=0)
    async with asyncio.timeout(10), load(mix) as tally:
        while not tally.failed:  # noqa: ASYNC110  a tally is read, it tells nobody
            await asyncio.sleep(0)
    assert tally.answered == 0
    assert tally.failed <= 2
