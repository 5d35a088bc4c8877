"""A 500 is held until it is known whether its worker is ending."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from proxykit import CHAT, Behaviour, Conversation, Request, Stand, answer_ok, chunk, post

from l40sd.core.model import WorkerId
from l40sd.services.routes import FailureKind

StartStand = Callable[..., Awaitable[Stand]]

DEAD = b'{"error":{"message":"EngineDeadError"}}'
HEAD = b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: application/json\r\n"
WHOLE = HEAD + b"content-length: %d\r\n\r\n%b" % (len(DEAD), DEAD)
WAYS = {
    "in one": [WHOLE],
    "head first": [WHOLE[:-10], WHOLE[-10:]],
    "in chunks": [HEAD + b"transfer-encoding: chunked\r\n\r\n", chunk(DEAD), b"0\r\n\r\n"],
    "until it closes": [HEAD + b"connection: close\r\n\r\n", DEAD, b""],
    "and closes": [HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(DEAD), DEAD), b""],
}


def says_500(parts: list[bytes]) -> Behaviour:
    async def behave(talk: Conversation, request: Request) -> None:
        for part in parts:
            if part:
                await talk.send(part)
                await asyncio.sleep(0)
        if not parts[-1]:
            talk.writer.close()

    return behave


class Doubt:
    """Answers whether a worker is ending, when the test lets it."""

    def __init__(self, s: Stand, *ending: str) -> None:
        self.ending = ending
        self.asked: list[str] = []
        self.may_answer = asyncio.Event()
        s.routes.on_doubt = self.is_ending

    async def is_ending(self, worker: WorkerId) -> bool:
        self.asked.append(worker)
        await self.may_answer.wait()
        return worker in self.ending


@pytest.mark.parametrize("way", list(WAYS))
async def test_a_500_of_a_worker_that_ends_goes_elsewhere_before_a_client_sees_it(stand: StartStand, way: str) -> None:
    """An engine whose core had died answered 500 for 0.3 s: 48 requests were lost while another worker was well."""
    s = await stand(workers=2)
    doubt = Doubt(s, "w0")
    s.workers[0].behave = says_500(WAYS[way])
    doubt.may_answer.set()
    dialog = await s.dial()
    for _ in range(4):
        reply = await dialog.ask(post())
        assert (reply.status, reply.fields["x-l40s-worker"]) == (200, "w1")
    assert set(doubt.asked) == {"w0"}
    assert set(s.failures) == {("w0", FailureKind.STATUS)}


@pytest.mark.parametrize("way", list(WAYS))
async def test_a_500_of_a_worker_that_is_well_is_passed_on_whole(stand: StartStand, way: str) -> None:
    s = await stand(workers=2)
    doubt = Doubt(s)
    for worker in s.workers:
        worker.behave = says_500(WAYS[way])
    for count in (1, 2):
        dialog = await s.dial()
        await dialog.send(post())
        await s.until(lambda count=count: len(doubt.asked) == count)
        doubt.may_answer.set()
        reply = await dialog.reply()
        assert (reply.status, reply.body) == (500, DEAD)
    assert [kind for _, kind in s.failures] == [FailureKind.STATUS] * 2
    assert s.proxy.stats.retried == 0


async def test_where_nobody_else_is_there_a_request_waits_for_the_worker_that_comes(stand: StartStand) -> None:
    """A rank of a model's only worker was killed: its 16 clients got the engine's 500, and it was back soon after."""
    s = await stand(workers=1)
    Doubt(s, "w0").may_answer.set()
    s.worker.behave = says_500(WAYS["in one"])
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: s.routes.waiting(CHAT) == 1)
    s.worker.behave = answer_ok
    s.routes.remove(WorkerId("w0"))
    s.routes.add(s.backend(s.worker))
    assert (await dialog.reply()).status == 200
    assert len(s.worker.requests) == 2


async def test_where_no_try_is_left_the_500_is_passed_on(stand: StartStand) -> None:
    s = await stand(workers=1, retries=0)
    Doubt(s, "w0").may_answer.set()
    s.worker.behave = says_500(WAYS["in one"])
    reply = await s.ask(post())
    assert (reply.status, reply.body) == (500, DEAD)


async def test_a_request_that_ends_two_workers_this_way_is_poison_as_well(stand: StartStand) -> None:
    """vLLM answers the request that killed its core with 500 and exits a moment later."""
    s = await stand(workers=3)
    doubt = Doubt(s, "w0", "w1", "w2")
    doubt.may_answer.set()
    for worker in s.workers:
        worker.behave = says_500(WAYS["in one"])
    reply = await s.ask(post())
    assert (reply.status, reply.fields["x-should-retry"]) == (502, "false")
    assert sum(len(worker.requests) for worker in s.workers) == 2


async def test_a_client_that_leaves_while_its_500_is_held_leaves_nothing_behind(stand: StartStand) -> None:
    s = await stand(workers=1)
    doubt = Doubt(s)
    s.worker.behave = says_500(WAYS["in one"])
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: len(doubt.asked) == 1)
    dialog.close()
    await s.until(lambda: s.leases() == 0)


async def test_a_worker_that_is_given_up_while_its_500_is_held_is_left(stand: StartStand) -> None:
    s = await stand(workers=2)
    doubt = Doubt(s)
    for worker in s.workers:
        worker.behave = says_500(WAYS["in one"])
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: len(doubt.asked) == 1)
    for worker in s.workers:
        worker.behave = answer_ok
    s.routes.give_up(WorkerId(doubt.asked[0]), "it is being stopped")
    assert (await dialog.reply()).status == 200


async def test_a_question_that_fails_ends_the_request_with_an_answer(stand: StartStand) -> None:
    s = await stand(workers=1)

    async def fail(_: WorkerId) -> bool:
        raise RuntimeError("broken")

    s.routes.on_doubt = fail
    s.worker.behave = says_500(WAYS["in one"])
    reply = await s.ask(post())
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
