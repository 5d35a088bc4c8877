"""One proxy leaves its connections to another, as over an upgrade: nobody at either end can tell."""

import asyncio
import errno
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from proxykit import (
    CHAT,
    PATIENCE_S,
    STREAM_HEAD,
    Conversation,
    Dialog,
    Request,
    Stand,
    answer_ok,
    chunk,
    plain,
    post,
)

from l40sd.model import Outlook
from l40sd.proxy.handed import Handed
from l40sd.proxy.server import Proxy
from l40sd.routing.routes import CatalogEntry, Routes

StandOf = Callable[..., Awaitable[Stand]]


async def hand_over(stand: Stand, *, add_first: bool = False) -> int:
    """Let another proxy, with routes of its own, take the stand's place; its workers are routed to a moment later."""
    kept = stand.proxy.sockets[0].dup()
    handed, lost = await stand.proxy.export_connections()
    assert stand.leases() == 0, "nothing is held on the side that is left"
    assert stand.routes.waiting(CHAT) == 0
    routes = Routes(queue_limit=stand.config.queue_limit, in_flight_limit=stand.config.in_flight_limit)
    routes.on_failure = lambda worker, kind: stand.failures.append((worker, kind))
    routes.set_catalog({CHAT: CatalogEntry(aliases=("gpt",), outlook=Outlook(note="the daemon has just started"))})
    stand.routes = routes
    stand.proxy = Proxy(stand.config, routes)
    if add_first:
        add_workers(stand)
    await stand.proxy.start((), [kept], msgspec.msgpack.decode(msgspec.msgpack.encode(handed), type=Handed))
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


def wire(parts: list[bytes], kind: str) -> bytes:
    """Return a worker's reply on the wire."""
    match kind:
        case "chunked":
            return STREAM_HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n"
        case "length":
            return plain(b"".join(parts))
        case _:
            return b"HTTP/1.1 200 OK\r\nx: 1\r\n\r\n" + b"".join(parts)


cuts = st.lists(st.integers(0, 100_000), max_size=8)
events = st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=8)
KINDS = ("chunked", "length", "until close")


@settings(max_examples=examples(150), deadline=None)
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
                as_sent = wire(parts, "until close" if is_http10 else kind).partition(b"\r\n\r\n")[2]
                assert (await until_read(dialog, b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
                async with asyncio.timeout(PATIENCE_S):
                    assert await dialog.reader.readexactly(len(as_sent)) == as_sent
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


class Steps:
    """A worker whose reply comes in parts, each when it is asked for."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[bytes] = asyncio.Queue()
        self.asked = asyncio.Event()

    async def __call__(self, talk: Conversation, request: Request) -> None:
        self.asked.set()
        while part := await self.parts.get():
            await talk.send(part)

    def say(self, *parts: bytes) -> None:
        for part in parts:
            self.parts.put_nowait(part)

    def end(self) -> None:
        self.parts.put_nowait(b"")


async def until_read(dialog: Dialog, data: bytes) -> bytes:
    """Return what the client reads up to and with these bytes."""
    async with asyncio.timeout(PATIENCE_S):
        return await dialog.reader.readuntil(data)


async def test_an_idle_connection_is_handed_over(stand: StandOf) -> None:
    here = await stand()
    dialog = await here.dial()
    assert (await dialog.ask(post())).status == 200
    assert await hand_over(here) == 0
    assert (await dialog.ask(post())).status == 200
    assert here.worker.connections == 2, "connections to workers that nobody uses are not worth keeping"


async def test_a_stream_goes_on_and_its_lease_counts(stand: StandOf) -> None:
    here = await stand()
    here.worker.behave = steps = Steps()
    dialog = await here.dial()
    await dialog.send(post())
    steps.say(STREAM_HEAD, chunk(b"data: 1\n\n"))
    await until_read(dialog, b"data: 1\n\n\r\n")
    for number in (2, 3):
        assert await hand_over(here, add_first=number == 3) == 0
        assert here.leases() == 1
        assert here.proxy.stats.in_flight == 1
        steps.say(chunk(b"data: %d\n\n" % number))
        await until_read(dialog, b"data: %d\n\n\r\n" % number)
    steps.say(b"0\r\n\r\n")
    steps.end()
    await until_read(dialog, b"0\r\n\r\n")
    await here.until(lambda: here.leases() == 0)
    here.worker.behave = answer_ok
    assert (await dialog.ask(post())).status == 200
    assert here.failures == []


async def test_a_client_that_cannot_read_chunks_is_spared_them_after_the_hand_over_too(stand: StandOf) -> None:
    here = await stand()
    here.worker.behave = steps = Steps()
    dialog = await here.dial()
    await dialog.send(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
    steps.say(STREAM_HEAD, chunk(b"one "))
    await until_read(dialog, b"one ")
    assert await hand_over(here) == 0
    steps.say(chunk(b"two") + b"0\r\n\r\n")
    steps.end()
    assert await dialog.rest() == b"two"


async def test_a_drain_waits_for_a_stream_that_was_handed_over(stand: StandOf) -> None:
    here = await stand()
    here.worker.behave = steps = Steps()
    dialog = await here.dial()
    await dialog.send(post())
    steps.say(STREAM_HEAD)
    await until_read(dialog, b"\r\n\r\n")
    await hand_over(here)
    worker = here.backend(here.worker).worker
    here.routes.remove(worker)
    drained = asyncio.ensure_future(here.routes.drained(worker))
    await asyncio.sleep(0)
    assert not drained.done()
    steps.say(b"0\r\n\r\n")
    steps.end()
    async with asyncio.timeout(PATIENCE_S):
        await drained


async def test_a_request_that_a_worker_has_is_tried_elsewhere_when_that_worker_dies_after_the_hand_over(
    stand: StandOf,
) -> None:
    here = await stand(workers=2)
    first = Steps()
    for worker in here.workers:
        worker.behave = first
    dialog = await here.dial()
    await dialog.send(post(b'{"model":"chat","n":1}'))
    async with asyncio.timeout(PATIENCE_S):
        await first.asked.wait()
    assert await hand_over(here) == 0
    asked = next(worker for worker in here.workers if worker.requests)
    other = next(worker for worker in here.workers if worker is not asked)
    other.behave = answer_ok
    for task in list(asked.tasks):
        task.cancel()
    reply = await dialog.reply()
    assert reply.status == 200
    assert reply.fields["x-l40s-worker"] == other.name
    assert [request.body for request in other.requests] == [b'{"model":"chat","n":1}']


async def test_a_stream_that_breaks_after_the_hand_over_ends_in_an_error_event(stand: StandOf) -> None:
    here = await stand()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
        await broken.wait()
        talk.reset()

    broken = asyncio.Event()
    here.worker.behave = behave
    dialog = await here.dial()
    await dialog.send(post())
    await until_read(dialog, b"data: 1\n\n\r\n")
    await hand_over(here)
    broken.set()
    rest = await dialog.rest()
    assert b'"code":"worker_failed"' in rest
    assert not rest.endswith(b"0\r\n\r\n")


async def test_requests_that_wait_in_line_keep_their_order(stand: StandOf) -> None:
    here = await stand(in_flight_limit=1)
    here.worker.behave = steps = Steps()
    dialogs = [await here.dial() for _ in range(4)]
    for number, dialog in enumerate(dialogs):
        await dialog.send(post(b'{"model":"chat","n":%d}' % number))
        await here.until(lambda n=number: here.proxy.stats.in_flight == n + 1)
    assert here.routes.waiting(CHAT) == 3
    assert await hand_over(here) == 0
    await here.until(lambda: here.routes.waiting(CHAT) == 3)
    here.worker.behave = answer_ok
    steps.say(plain(b"first"))
    steps.end()
    for dialog in dialogs:
        assert (await dialog.reply()).status == 200
    assert [json.loads(request.body)["n"] for request in here.worker.requests] == [0, 1, 2, 3]


async def test_who_waits_in_line_does_not_get_the_place_of_a_stream_that_was_taken_along(stand: StandOf) -> None:
    """Its worker would have had more requests than it may have."""
    here = await stand(in_flight_limit=2)
    both = asyncio.Barrier(2)

    async def together(talk: Conversation, request: Request) -> None:
        await both.wait()
        await answer_ok(talk, request)

    here.worker.behave = together
    dialogs = [await here.dial() for _ in range(2)]
    for reply in await asyncio.gather(*(dialog.ask(post()) for dialog in dialogs)):
        assert reply.status == 200
    here.worker.behave = steps = Steps()
    await dialogs[0].send(post())
    steps.say(STREAM_HEAD)
    await until_read(dialogs[0], b"\r\n\r\n")
    here.routes.configure(queue_limit=10, in_flight_limit=1)
    here.config = replace(here.config, in_flight_limit=1)
    await dialogs[1].send(post())
    await here.until(lambda: here.routes.waiting(CHAT) == 1)
    assert here.worker.connections == 2, "one of them is idle"
    assert await hand_over(here) == 0
    await here.until(lambda: here.routes.waiting(CHAT) == 1)
    assert len(here.worker.requests) == 3
    here.worker.behave = answer_ok
    steps.say(b"0\r\n\r\n")
    steps.end()
    assert (await dialogs[1].reply()).status == 200


async def test_a_request_that_waits_for_its_model_is_answered_by_the_next_daemon(stand: StandOf) -> None:
    here = await stand()
    here.routes.remove(here.backend(here.worker).worker)
    dialog = await here.dial()
    await dialog.send(post())
    await here.until(lambda: here.routes.waiting(CHAT) == 1)
    assert await hand_over(here) == 0
    assert (await dialog.reply()).status == 200


async def test_a_large_reply_with_a_length_goes_on(stand: StandOf) -> None:
    here = await stand()
    here.worker.behave = steps = Steps()
    body = bytes(range(256)) * 40_000
    whole = plain(body)
    dialog = await here.dial()
    await dialog.send(post())
    steps.say(whole[:3_000_000])
    read = await dialog.reader.readexactly(1_000_000)
    handing = asyncio.ensure_future(hand_over(here))
    steps.say(whole[3_000_000:])
    steps.end()
    head, _, begin = read.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head
    async with asyncio.timeout(PATIENCE_S):
        rest = await dialog.reader.readexactly(len(body) - len(begin))
    assert begin + rest == body
    assert await handing == 0
    here.worker.behave = answer_ok
    assert (await dialog.ask(post())).status == 200


async def test_chunks_larger_than_a_read_are_handed_over_between_two_of_them(stand: StandOf) -> None:
    """Their size line is in another read than their end."""
    here = await stand(handover_timeout_s=5.0)
    here.worker.behave = steps = Steps()
    parts = [bytes([number]) * 700_001 for number in range(12)]
    dialog = await here.dial()
    await dialog.send(post())
    whole = STREAM_HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n"
    steps.say(whole[:1_000_000])
    head = await until_read(dialog, b"\r\n\r\n")
    handing = asyncio.ensure_future(hand_over(here))
    steps.say(*(whole[at : at + 100_000] for at in range(1_000_000, len(whole), 100_000)))
    steps.end()
    length = len(whole) - len(STREAM_HEAD)
    async with asyncio.timeout(PATIENCE_S):
        assert await dialog.reader.readexactly(length) == whole[-length:]
    assert b"transfer-encoding: chunked" in head
    assert await handing == 0


async def test_a_reply_that_stops_in_the_middle_of_a_chunk_is_lost_and_named(
    stand: StandOf, capfd: pytest.CaptureFixture[str]
) -> None:
    here = await stand(handover_timeout_s=0.1)
    here.worker.behave = steps = Steps()
    silent, lively = await here.dial(), await here.dial()
    await silent.send(post(extra=b"x-request-id: mine\r\n"))
    steps.say(STREAM_HEAD + b"40\r\nhalf of it")
    await until_read(silent, b"half of it")
    assert (await lively.ask(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")).status == 200
    assert await hand_over(here) == 1
    await silent.rest()
    assert silent.was_reset
    said = capfd.readouterr()
    line = next(line for line in (said.out + said.err).splitlines() if "proxy.connection_lost" in line)
    assert "middle of a chunk" in line
    assert "mine" in line
    assert (await lively.ask(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")).status == 200
    steps.end()


async def test_a_client_that_does_not_read_is_lost_and_delays_nobody_else_for_long(
    stand: StandOf, capfd: pytest.CaptureFixture[str]
) -> None:
    here = await stand(handover_timeout_s=0.3)
    fill = plain(b"x" * 64_000_000)

    async def flood(talk: Conversation, request: Request) -> None:
        await talk.send(fill)

    here.worker.behave = flood
    deaf = await here.dial()
    deaf.writer.transport.pause_reading()
    await deaf.send(post())
    await here.until(lambda: any(client.is_paused for client in here.proxy.clients.open))
    here.worker.behave = answer_ok
    idle = await here.dial()
    assert (await idle.ask(post())).status == 200
    began_s = asyncio.get_running_loop().time()
    assert await hand_over(here) == 1
    assert asyncio.get_running_loop().time() - began_s < 2.0
    said = capfd.readouterr()
    assert "its client does not read" in said.out + said.err
    assert (await idle.ask(post())).status == 200
    assert here.proxy.stats.connections == 1
    deaf.reset()


async def test_a_client_that_leaves_during_the_hand_over_holds_nothing(stand: StandOf) -> None:
    here = await stand()
    here.worker.behave = steps = Steps()
    dialog = await here.dial()
    await dialog.send(post())
    steps.say(STREAM_HEAD)
    await until_read(dialog, b"\r\n\r\n")
    handing = asyncio.ensure_future(hand_over(here))
    dialog.reset()
    assert await handing == 0
    steps.end()
    await here.until(lambda: here.leases() == 0 and here.worker.open == 0)


async def test_a_refused_client_can_still_read_why(stand: StandOf) -> None:
    here = await stand()
    dialog = await here.dial()
    await dialog.send(b"NONSENSE\r\n\r\n")
    await here.until(lambda: any(client.is_closing for client in here.proxy.clients.open))
    assert await hand_over(here) == 0
    assert (await dialog.reply()).status == 400
    assert await dialog.rest() == b""


async def test_a_unix_path_is_still_there_for_the_next_daemon(stand: StandOf, tmp_path: Path) -> None:
    """It was removed, so that clients found nothing after an upgrade."""
    path = tmp_path / "proxy.sock"
    here = await stand(listen=(f"unix:{path}",))
    await hand_over(here)
    reader, writer = await asyncio.open_unix_connection(str(path))
    dialog = Dialog(reader, writer)
    assert (await dialog.ask(post())).status == 200
    writer.close()


async def test_a_connection_of_which_no_description_can_be_made_is_lost_alone(
    stand: StandOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is left: two are open for a moment."""
    here = await stand()
    first, second = await here.dial(), await here.dial()
    for dialog in (first, second):
        assert (await dialog.ask(post())).status == 200
    copy = os.dup
    left = iter((True, False))

    def dup(descriptor: int) -> int:
        if next(left, True):
            return copy(descriptor)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("l40sd.proxy.sockets.os.dup", dup)
    assert await hand_over(here) == 1
    monkeypatch.undo()
    assert here.proxy.stats.connections == 1
