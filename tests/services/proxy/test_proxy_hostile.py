"""Requests and replies that were tried on it raw, and what becomes of each: byte for byte, as data."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from proxykit import Conversation, Request, Stand, post

StartStand = Callable[..., Awaitable[Stand]]

# -- what a worker says --

OURS = b"x-request-id: r\r\nx-l40s-worker: w0\r\n"

REPLIES = {
    "no field is left, and the body has no CR LF in front": (
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\n" + OURS + b"connection: close\r\n\r\nok",
    ),
    "a bare 204 is nothing but its head": (
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n" + OURS + b"\r\n",
    ),
    "nothing comes after a 204, nor does it say how much": (
        b"HTTP/1.1 204 No Content\r\ncontent-length: 4\r\n\r\n\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n" + OURS + b"\r\n",
    ),
    "an empty line behind a body with a length is not passed on": (
        b"HTTP/1.1 200 OK\r\nx-a: 1\r\ncontent-length: 2\r\n\r\nok\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + OURS + b"x-a: 1\r\ncontent-length: 2\r\n\r\nok",
    ),
    "an empty line behind the last chunk is not passed on": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + OURS + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ),
    "HTTP/1.1 is spoken here, whatever the worker speaks": (
        b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + OURS + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ),
    "a trailer that is the worker's own is passed on": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-checksum: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + OURS + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-checksum: 1\r\n\r\n",
    ),
}

WRONG_REPLIES = {
    "a status below 100": b"HTTP/1.1 000 OK\r\ncontent-length: 2\r\n\r\nok",
    "a status of no final reply": b"HTTP/1.0 102 Processing\r\n\r\n",
    "our name in a trailer": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-L40S-Worker: spoof\r\n\r\n"
    ),
    "a length in a trailer": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\ncontent-length: 9\r\n\r\n"
    ),
}


def replying(*parts: bytes) -> Callable[[Conversation, Request], Awaitable[None]]:
    async def behave(talk: Conversation, request: Request) -> None:
        for part in parts:
            await talk.send(part)
        if b"\r\nconnection: close" in parts[0]:
            talk.writer.close()

    return behave


@pytest.mark.parametrize(("sent", "expected"), REPLIES.values(), ids=REPLIES)
@pytest.mark.parametrize("is_split", [False, True])
async def test_a_reply_is_passed_on_with_no_byte_too_many(
    stand: StartStand, sent: bytes, expected: bytes, is_split: bool
) -> None:
    """A reply whose fields were all taken out came with two bytes too many, a 204 with an empty line behind it."""
    at = sent.index(b"\r\n\r\n") + 5 if is_split else len(sent)
    here = await stand()
    here.worker.behave = replying(sent[:at], sent[at:])
    client = await here.dial()
    await client.send(post(extra=b"x-request-id: r\r\n"))
    is_open = b"connection: close" not in expected
    if is_open:  # what comes next on the connection is the next answer and nothing else
        await client.send(b"GET /nowhere HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    raw = await client.rest()
    assert raw.startswith(expected)
    assert raw[len(expected) :].startswith(b"HTTP/1.1 404 ") == is_open
    assert here.failures == []


async def test_a_reply_for_an_http10_client_has_no_byte_too_many_either(stand: StartStand) -> None:
    here = await stand()
    here.worker.behave = replying(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    client = await here.dial()
    await client.send(b'POST /v1/completions HTTP/1.0\r\nContent-Length: 16\r\n\r\n{"model":"chat"}')
    head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert body == b"ok"
    assert b"connection: close" in head


@pytest.mark.parametrize("sent", WRONG_REPLIES.values(), ids=WRONG_REPLIES)
async def test_a_reply_that_may_not_be_passed_on_is_the_workers_failure(stand: StartStand, sent: bytes) -> None:
    """A worker's ``HTTP/1.1 000 OK`` and its ``x-l40s-worker: spoof`` behind the body reached the client as such."""
    here = await stand(retries=0)
    here.worker.behave = replying(sent)
    reply = await here.ask(post())
    assert (reply.status, reply.error["code"]) == (502, "worker_failed")
    assert len(here.failures) == 1


async def test_a_reserved_name_in_a_late_trailer_cuts_the_reply(stand: StartStand) -> None:
    here = await stand()
    whole = WRONG_REPLIES["our name in a trailer"]
    at = whole.index(b"X-L40S")
    has_arrived = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(whole[:at])
        await has_arrived.wait()
        await talk.send(whole[at:])

    here.worker.behave = behave
    client = await here.dial()
    await client.send(post())
    await client.reader.readuntil(b"ok\r\n0\r\n")
    has_arrived.set()
    assert await client.rest() == b"", "a client would take the reply for whole"
    assert len(here.failures) == 1


async def test_a_worker_that_talks_unasked_loses_its_connection_and_nothing_else_happens(
    stand: StartStand, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time it did, the log had an AssertionError with a traceback."""
    here = await stand()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(b"HTTP/1.1 200 OK\r\nx-a: 1\r\ntransfer-encoding: chunked\r\n\r\n")
        await talk.send(b"2\r\nok\r\n0\r\n\r\n")
        await idle.reply()
        await talk.send(b"EVIL")

    here.worker.behave = behave
    idle = await here.dial()
    await idle.send(post())
    await here.until(lambda: here.worker.connections == 1 and here.worker.open == 0)
    reply = await here.ask(post())
    assert reply.body == b"ok"
    assert [record for record in caplog.records if record.exc_info] == []
