"""Workers that are told to end with requests still on them."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from proxykit import (
    CHAT,
    STREAM_HEAD,
    Conversation,
    FakeWorker,
    Request,
    Stand,
    answer_ok,
    chunk,
    plain,
    post,
    unaccepting,
    unchunked,
)

from l40sd.model import WorkerId

StartStand = Callable[..., Awaitable[Stand]]
ABORTED_WHOLE = json.dumps({"choices": [{"message": {"content": ""}, "finish_reason": "abort"}]}).encode()
ABORTED_EVENT = b'data: {"choices":[{"delta":{},"finish_reason":"abort"}]}\n\n'


def vllm_like(s: Stand, worker: FakeWorker, *, is_stream: bool) -> asyncio.Event:
    """Answer nothing, or the beginning of a stream, until told to stop; then end it as if it were whole."""
    told = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        if is_stream:
            await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
        await told.wait()
        await talk.send(
            chunk(ABORTED_EVENT) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n" if is_stream else plain(ABORTED_WHOLE)
        )

    worker.behave = behave
    return told


def give_up(s: Stand, worker: FakeWorker, *, is_hung: bool = False) -> None:
    s.routes.give_up(WorkerId(worker.name), f"{worker.name} is being stopped: no token for 120 s", is_hung=is_hung)


@pytest.mark.parametrize("is_hung", [False, True])
async def test_an_unstreamed_request_goes_elsewhere_when_its_worker_is_given_up(
    stand: StartStand, is_hung: bool
) -> None:
    """A hung worker was sent SIGTERM with requests on it: they came back with status 200 and no content."""
    s = await stand(workers=2)
    told = [vllm_like(s, worker, is_stream=False) for worker in s.workers]
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: s.leases() == 1 and bool(s.workers[0].requests or s.workers[1].requests))
    victim, other = sorted(s.workers, key=lambda worker: -len(worker.requests))
    other.behave = answer_ok
    give_up(s, victim, is_hung=is_hung)
    for each in told:
        each.set()
    reply = await dialog.reply()
    assert (reply.status, reply.body, reply.fields["x-l40s-worker"]) == (200, b'{"ok":true}', other.name)
    assert s.failures == [], "a worker that is stopped is not blamed through its requests"


async def test_without_another_worker_it_waits_for_the_next(stand: StartStand) -> None:
    s = await stand(workers=1)
    told = vllm_like(s, s.worker, is_stream=False)
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: len(s.worker.requests) == 1)
    give_up(s, s.worker)
    told.set()
    assert s.routes.waiting(CHAT) == 1
    fresh = FakeWorker("fresh")
    s.workers.append(fresh)
    await fresh.start()
    s.routes.add(s.backend(fresh))
    assert (await dialog.reply()).fields["x-l40s-worker"] == "fresh"


async def test_a_request_that_hangs_two_workers_is_tried_on_no_third(stand: StartStand) -> None:
    s = await stand(workers=3)
    told = [vllm_like(s, worker, is_stream=False) for worker in s.workers]
    dialog = await s.dial()
    await dialog.send(post())
    for count in (1, 2):
        await s.until(lambda count=count: sum(len(worker.requests) for worker in s.workers) == count)
        victim = next(w for w in s.workers if s.routes.in_flight(WorkerId(w.name)))
        give_up(s, victim, is_hung=True)
    reply = await dialog.reply()
    assert (reply.status, reply.fields["x-should-retry"]) == (502, "false")
    for each in told:
        each.set()


async def test_a_stream_on_a_worker_that_is_given_up_ends_as_cut(stand: StartStand) -> None:
    """At the drain's deadline streams ended as if they were finished."""
    s = await stand(workers=2)
    told = [vllm_like(s, worker, is_stream=True) for worker in s.workers]
    dialog = await s.dial()
    await dialog.send(post())
    await dialog.reader.readuntil(b"data: 1\n\n\r\n")
    for worker in s.workers:
        give_up(s, worker)
    for each in told:
        each.set()
    raw = await dialog.rest()
    assert b"abort" not in raw
    assert b"[DONE]" not in raw
    with pytest.raises(ValueError, match="cut"):
        unchunked(raw)
    assert b"is being stopped: no token for 120 s" in raw
    await s.until(lambda: s.leases() == 0)


async def test_a_request_that_is_being_connected_leaves_as_well(stand: StartStand) -> None:
    with unaccepting() as port:
        s = await stand(workers=1, connect_timeout_s=30.0)
        full = FakeWorker("full")
        s.workers.append(full)
        s.routes.add(s.backend(full, port=port, weight=100))
        dialog = await s.dial()
        await dialog.send(post())
        await s.until(lambda: s.routes.in_flight(WorkerId("full")) == 1)
        give_up(s, full)
        assert (await dialog.reply()).fields["x-l40s-worker"] == "w0"


async def test_a_whole_reply_that_says_it_was_aborted_is_asked_for_elsewhere(stand: StartStand) -> None:
    """Somebody else sent the engine SIGTERM: nobody here knew."""
    s = await stand(workers=2)

    async def abort(talk: Conversation, request: Request) -> None:
        await talk.send(plain(ABORTED_WHOLE))

    s.workers[0].behave = abort
    for _ in range(6):  # a head that is known takes another way than one that is new
        reply = await s.ask(post())
        assert (reply.status, reply.fields["x-l40s-worker"]) == (200, "w1")
    assert s.workers[0].requests
    s.workers[1].behave = abort
    s.routes.remove(WorkerId("w0"))
    reply = await s.ask(post())
    assert (reply.status, len(s.workers[1].requests) > 6) == (502, True)


async def test_a_stream_that_ends_with_an_abort_is_cut(stand: StartStand) -> None:
    s = await stand(workers=1)
    told = vllm_like(s, s.worker, is_stream=True)
    dialog = await s.dial()
    await dialog.send(post())
    await dialog.reader.readuntil(b"data: 1\n\n\r\n")
    told.set()
    raw = await dialog.rest()
    assert b"[DONE]" not in raw


async def test_a_stream_whose_abort_was_passed_on_before_its_end_is_cut(stand: StartStand) -> None:
    """The reason and the end came in two reads: the first could still have been anything."""
    s = await stand(workers=1)
    is_passed_on = asyncio.Event()

    async def abort(talk: Conversation, request: Request) -> None:
        await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n") + chunk(ABORTED_EVENT))
        await is_passed_on.wait()
        await talk.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    s.worker.behave = abort
    dialog = await s.dial()
    await dialog.send(post())
    await dialog.reader.readuntil(ABORTED_EVENT)
    is_passed_on.set()
    raw = await dialog.rest()
    assert b"[DONE]" not in raw
    assert b"aborted this request" in raw


async def test_a_stream_without_framing_that_ends_with_an_abort_is_told_as_cut(stand: StartStand) -> None:
    """Its end is its connection's, so that all of it is passed on before anybody knows."""
    s = await stand(workers=1)

    async def abort(talk: Conversation, request: Request) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        await talk.send(head + b"data: 1\n\n" + ABORTED_EVENT + b"data: [DONE]\n\n")
        talk.writer.close()

    s.worker.behave = abort
    dialog = await s.dial()
    await dialog.send(post())
    raw = await dialog.rest()
    assert b"aborted this request" in raw
    assert s.failures, "and its worker is asked how it is"


async def test_a_text_about_aborts_is_passed_on(stand: StartStand) -> None:
    s = await stand(workers=1)
    text = json.dumps({"text": '"finish_reason": "abort"', "finish_reason": "stop", "kind": "abort"}).encode()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(plain(text))

    s.worker.behave = behave
    for _ in range(2):
        assert (await s.ask(post())).body == text
