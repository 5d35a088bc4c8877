"""Requests that end the workers that read them, and requests that our own code fails on."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from proxykit import CHAT, STREAM_HEAD, Conversation, FakeWorker, Request, Stand, answer_ok, chunk, post

from l40sd.model import WorkerId
from l40sd.proxy import exchange, request_reader, tries
from l40sd.proxy.reply import Reply
from l40sd.routing.routes import FailureKind

StartStand = Callable[..., Awaitable[Stand]]
POISON = post(b'{"model":"chat","messages":["poison"]}')
OTHER = post(b'{"model":"chat","messages":["other!"]}')


def die(s: Stand, worker: FakeWorker) -> None:
    """End it, and have it leave the routes as the supervisor does then."""
    worker.die()
    s.routes.remove(WorkerId(worker.name))


def mortal(s: Stand, worker: FakeWorker) -> None:
    async def behave(talk: Conversation, request: Request) -> None:
        if b"poison" not in request.body:
            await answer_ok(talk, request)
            return
        die(s, worker)

    worker.behave = behave


@pytest.mark.parametrize("is_kept", [False, True])
async def test_a_request_that_ends_two_workers_is_tried_on_no_third_and_refused_from_then_on(
    stand: StartStand, is_kept: bool
) -> None:
    """One poisoned request was tried on three workers and by the client's library three times: nine ended.

    Over a kept connection a worker that dies at once looks like one whose connection was only stale.
    """
    s = await stand(workers=4, upstream_idle_timeout_s=30.0)
    for worker in s.workers:
        mortal(s, worker)
    if is_kept:
        dialogs = [await s.dial() for _ in s.workers]
        await asyncio.gather(*(dialog.ask(OTHER) for dialog in dialogs))
    reply = await s.ask(POISON)
    assert (reply.status, reply.error["code"]) == (502, "worker_failed")
    assert reply.fields["x-should-retry"] == "false"
    assert "ended with this request" in reply.error["message"]
    alive = [worker for worker in s.workers if worker.server is not None and worker.server.is_serving()]
    assert len(alive) == 2
    again = await s.ask(POISON)
    assert (again.status, again.error["code"]) == (502, "poison_request")
    assert again.fields["x-should-retry"] == "false"
    assert all(b"poison" not in request.body for worker in alive for request in worker.requests)
    assert (await s.ask(OTHER)).status == 200, "another request of the same length"
    longer = await s.ask(post(b'{"model":"chat","messages":["not the same length"]}'))
    assert longer.status == 200


async def test_a_refusal_ends_after_its_time(stand: StartStand) -> None:
    s = await stand(workers=2, poison_refused_s=0.2)
    for worker in s.workers:
        mortal(s, worker)
    assert (await s.ask(POISON)).status == 502
    fresh = FakeWorker("fresh")
    s.workers.append(fresh)
    await fresh.start()
    s.routes.add(s.backend(fresh))

    async with asyncio.timeout(10):
        while (await s.ask(POISON)).status != 200:
            pass


async def test_the_table_is_bounded_and_the_oldest_goes_first(stand: StartStand) -> None:
    s = await stand(workers=0, poison_limit=1)
    bodies = [post(b'{"model":"chat","messages":["poison %d"]}' % n) for n in range(2)]
    for body in bodies:
        pair = [FakeWorker(f"{body[-4:-3].decode()}{n}") for n in range(2)]
        for worker in pair:
            mortal(s, worker)
            s.workers.append(worker)
            await worker.start()
            s.routes.add(s.backend(worker))
        assert (await s.ask(body)).error["code"] == "worker_failed"
    assert (await s.ask(bodies[1])).error["code"] == "poison_request"
    last = FakeWorker("last")
    s.workers.append(last)
    await last.start()
    s.routes.add(s.backend(last))
    assert (await s.ask(bodies[0])).status == 200


async def test_those_aboard_by_chance_are_ended_with_it_but_served_when_they_come_again(stand: StartStand) -> None:
    """Nine of ten that were on both workers are innocent: nobody may refuse them for minutes."""
    s = await stand(workers=2)
    ended: list[str] = []
    for worker in s.workers:

        async def behave(talk: Conversation, request: Request, worker: FakeWorker = worker) -> None:
            if b"poison" not in request.body:
                await talk.closed()
                return
            await s.until(lambda: s.routes.in_flight(WorkerId(worker.name)) == (6 if ended else 3))
            ended.append(worker.name)
            die(s, worker)

        worker.behave = behave
    bodies = [post(b'{"model":"chat","messages":["innocent%d"]}' % n) for n in range(5)]
    dialogs = [await s.dial() for _ in range(6)]
    for dialog, body in zip(dialogs, [*bodies, POISON], strict=True):
        await dialog.send(body)
    await s.until(lambda: len(ended) == 2 and s.leases() == 0)
    fresh = FakeWorker("fresh")
    s.workers.append(fresh)
    await fresh.start()
    s.routes.add(s.backend(fresh))
    statuses = [(await dialog.reply()).status for dialog in dialogs]
    assert sorted(statuses[:5]) == [200, 200, 200, 502, 502]
    assert statuses[5] == 502
    for body in bodies:
        assert (await s.ask(body)).status == 200


async def test_a_failed_connection_is_no_death(stand: StartStand) -> None:
    """A request that met two dead workers has done nothing: it was never read."""
    s = await stand(workers=3)
    for worker in s.workers[:2]:
        await worker.stop()
    for _ in range(3):
        reply = await s.ask(POISON)
        assert reply.status == 200
    assert {kind for _, kind in s.failures} == {FailureKind.CONNECT}


async def test_no_body_is_hashed_while_no_worker_fails(stand: StartStand, monkeypatch: pytest.MonkeyPatch) -> None:
    s = await stand(workers=2)

    def fail(*_: object) -> bytes:
        raise AssertionError("hashed")

    monkeypatch.setattr("l40sd.proxy.poison_table.Poison.fingerprint", fail)
    for _ in range(3):
        assert (await s.ask(POISON)).status == 200


# -- our own code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_kept", [False, True])
async def test_a_request_that_our_code_fails_on_is_answered_and_its_lease_returned(
    stand: StartStand, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    """An exception in the task that dials ended it without a word: lease and client were held for 600 s."""
    s = await stand(workers=1, upstream_idle_timeout_s=30.0)
    dialog = await s.dial()
    if is_kept:
        assert (await dialog.ask(post())).status == 200
    with monkeypatch.context() as broken:
        broken.setattr(exchange, "format_request", lambda *_: b"\xff".decode())
        reply = await dialog.ask(post())
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert s.leases() == 0
    assert s.failures == [], "no worker is to blame"
    assert (await dialog.ask(post())).status == 200


async def test_a_head_that_our_code_fails_on_is_answered(stand: StartStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop would close the connection without a word."""
    s = await stand(workers=1)
    with monkeypatch.context() as broken:
        broken.setattr(request_reader, "admit", lambda *_: b"\xff".decode())
        reply = await s.ask(post())
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert (await s.ask(post())).status == 200


async def test_a_reply_that_our_code_fails_on_before_its_first_byte_is_answered(
    stand: StartStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = await stand(workers=1)
    dialog = await s.dial()
    with monkeypatch.context() as broken:
        broken.setattr(tries.Asked, "on_head", lambda *_: b"\xff".decode())
        assert (await dialog.ask(post())).status == 500
    assert s.leases() == 0
    assert (await dialog.ask(post())).status == 200


async def test_a_stream_that_our_code_fails_on_is_cut(stand: StartStand, monkeypatch: pytest.MonkeyPatch) -> None:
    s = await stand(workers=1)
    go_on = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
        await go_on.wait()
        await talk.send(b"0\r\n\r\n")

    s.worker.behave = behave
    dialog = await s.dial()
    await dialog.send(post())
    await dialog.reader.readuntil(b"data: 1\n\n\r\n")
    monkeypatch.setattr(Reply, "on_complete", lambda *_: b"\xff".decode())
    go_on.set()
    await dialog.rest()
    await s.until(lambda: s.leases() == 0)


async def test_one_request_that_fails_in_its_turn_takes_nobody_else_along(
    stand: StartStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns are given by whoever releases a lease or adds a worker: the exception would have been theirs."""
    s = await stand(workers=0)
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: s.routes.waiting(CHAT) == 1)
    worker = FakeWorker("late")
    s.workers.append(worker)
    await worker.start()
    with monkeypatch.context() as broken:
        broken.setattr(tries.Connecting, "dial", lambda *_: b"\xff".decode())
        s.routes.add(s.backend(worker))
    assert (await dialog.reply()).status == 500
    assert s.leases() == 0


async def test_a_deadline_that_our_code_fails_on_does_not_stop_the_clock_of_the_others(
    stand: StartStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer that looks at every deadline is one: an exception ended it for all."""
    s = await stand(workers=1, first_byte_timeout_s=0.1)

    async def silent(talk: Conversation, request: Request) -> None:
        await talk.closed()

    s.worker.behave = silent
    with monkeypatch.context() as broken:
        broken.setattr(tries.Asked, "expired", lambda *_: b"\xff".decode())
        assert (await s.ask(post())).status == 500
    reply = await s.ask(post())
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (504, "worker_timeout")


async def test_even_an_end_that_our_code_fails_on_holds_nobody(
    stand: StartStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = await stand(workers=1, retries=0)

    async def reset(talk: Conversation, request: Request) -> None:
        talk.reset()

    s.worker.behave = reset
    dialog = await s.dial()
    with monkeypatch.context() as broken:
        broken.setattr("l40sd.proxy.failures.Failures.note", lambda *_: b"\xff".decode())
        await dialog.send(post())
        assert await dialog.rest() == b""
    assert s.leases() == 0
    await s.until(lambda: s.proxy.stats.connections == 0)
