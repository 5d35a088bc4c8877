"""One proxy leaves its connections to another, as over an upgrade: nobody at either end can tell."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from proxykit import (
    CHAT,
    STREAM_HEAD,
    Conversation,
    Request,
    Stand,
    answer_ok,
    chunk,
    plain,
    post,
)

from l40sd.core.handed import Handed
from l40sd.services.proxy import Proxy
from l40sd.services.routes import CatalogEntry, Routes

StandOf = Callable[..., Awaitable[Stand]]


async def hand_over(stand: Stand, *, add_first: bool = False) -> int:
    """Let another proxy, with routes of its own, take the stand's place; its workers are routed to a moment later."""
    kept = stand.proxy.sockets[0].dup()
    handed, lost = await stand.proxy.hand_over()
    assert stand.leases() == 0, "nothing is held on the side that is left"
    assert stand.routes.waiting(CHAT) == 0
    routes = Routes(queue_limit=stand.config.queue_limit, in_flight_limit=stand.config.in_flight_limit)
    routes.on_failure = lambda worker, kind: stand.failures.append((worker, kind))
    routes.set_catalog({CHAT: CatalogEntry(aliases=("gpt",), note="the daemon has just started")})
    stand.routes = routes
    stand.proxy = Proxy(stand.config, routes)
    if add_first:
        add_workers(stand)
    await stand.proxy.start([kept], msgspec.msgpack.decode(msgspec.msgpack.encode(handed), type=Handed))
    if not add_first:
        add_workers(stand)
    return lost


def add_workers(stand: Stand) -> None:
    for worker in stand.workers:
        stand.routes.add(stand.backend(worker))


def pieces(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in at})
    return [piece for piece in (data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)) if piece]


def chunked_post(body: bytes, at: list[int]) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(chunk(piece) for piece in pieces(body, at)) + b"0\r\nX-Trailer: 1\r\n\r\n"


cuts = st.lists(st.integers(0, 100_000), max_size=8)
events = st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=8)
KINDS = ("chunked", "length", "until close")


@settings(max_examples=150, deadline=None)
@given(
    exchanges=st.lists(st.tuples(events, st.sampled_from(KINDS), cuts), min_size=1, max_size=3),
    request_cuts=cuts,
    is_chunked=st.booleans(),
    is_http10=st.booleans(),
    moments=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    add_first=st.booleans(),
)
def test_nobody_can_tell_at_which_moment_a_proxy_was_replaced(
    exchanges: list[tuple[list[bytes], str, list[int]]],
    request_cuts: list[int],
    is_chunked: bool,
    is_http10: bool,
    moments: list[int],
    add_first: bool,
) -> None:
    """Requests one after the other in one go, cut anywhere, replies of every framing, cut anywhere."""
    if is_http10:
        exchanges, is_chunked = exchanges[:1], False
    last = next((n for n, (_, kind, _) in enumerate(exchanges) if kind == "until close"), len(exchanges) - 1)
    exchanges = exchanges[: last + 1]
    bodies = [b'{"model":"chat","n":"%d%b"}' % (n, b"y" * (n * 700)) for n in range(len(exchanges))]

    def wire(parts: list[bytes], kind: str) -> bytes:
        match kind:
            case "chunked":
                return STREAM_HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n"
            case "length":
                return plain(b"".join(parts))
            case _:
                return b"HTTP/1.1 200 OK\r\nx: 1\r\n\r\n" + b"".join(parts)

    async def converse() -> None:
        stand = Stand(handover_timeout_s=5.0)
        steps, wanted = 0, set(moments)
        turn = asyncio.Lock()
        changing: set[asyncio.Task[Any]] = set()

        async def change() -> None:
            async with turn:
                await hand_over(stand, add_first=add_first)

        async def step() -> None:
            nonlocal steps
            if steps in wanted:
                changing.add(asyncio.get_running_loop().create_task(change()))
            steps += 1
            await asyncio.sleep(0)

        async def behave(talk: Conversation, request: Request) -> None:
            parts, kind, reply_cuts = exchanges[bodies.index(request.body)]
            for piece in pieces(wire(parts, kind), reply_cuts):
                await talk.send(piece)
                await step()
            if kind == "until close":
                talk.writer.close()

        stand.worker.behave = behave
        try:
            await stand.start()
            dialog = await stand.dial()
            requests = b"".join(chunked_post(body, request_cuts) if is_chunked else post(body) for body in bodies)
            if is_http10:
                requests = requests.replace(b"HTTP/1.1", b"HTTP/1.0")
            for piece in pieces(requests, request_cuts):
                await dialog.send(piece)
                await step()
            for parts, kind, _ in exchanges:
                reply = await dialog.reply()
                whole = b"".join(parts)
                is_framed = kind == "chunked" and not is_http10
                assert reply.status == 200
                assert reply.raw_body == (b"".join(map(chunk, parts)) + b"0\r\n\r\n" if is_framed else whole)
            await asyncio.gather(*changing)
            assert [request.body for request in stand.worker.requests] == bodies
            assert stand.failures == []
            if is_http10 or exchanges[-1][1] == "until close":
                assert await dialog.rest() == b""
            else:
                stand.worker.behave = answer_ok
                assert (await dialog.ask(post())).status == 200, "the connection goes on"
        finally:
            await asyncio.gather(*changing, return_exceptions=True)
            await stand.finish()

    uvloop.run(converse())
