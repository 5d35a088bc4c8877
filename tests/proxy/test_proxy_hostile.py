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


# -- what a client says --


def json_post(body: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def chunked_post(chunks: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


FORM_HEAD = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"


def form_post(form: bytes) -> bytes:
    return FORM_HEAD + b"Content-Length: %d\r\n\r\n" % len(form) + form


def part(head: bytes, content: bytes) -> bytes:
    return b"--b\r\n%b\r\n\r\n%b\r\n" % (head, content)


MODEL_PART = b'Content-Disposition: form-data; name="model"'
BODY = b'{"model":"chat"}'
NAMES = b",".join(b"a%d" % number for number in range(5000))

REQUESTS = {  # "gpt" is an alias of "chat"
    "a form's head that repeats its field": (
        form_post(part(b"content-disposition:" * 21000, b"x") + b"--b--\r\n"),
        400,
    ),
    "a form of many parts": (form_post(part(b"a: b", b"x") * 300 + b"--b--\r\n"), 400),
    "a form that names two models": (
        form_post(part(MODEL_PART, b"chat") + part(MODEL_PART, b"other") + b"--b--\r\n"),
        400,
    ),
    "a form whose part has an escaped name": (
        form_post(part(MODEL_PART.replace(b"model", b"mod\\el"), b"chat") + b"--b--\r\n"),
        400,
    ),
    "a form that does not end": (form_post(part(MODEL_PART, b"chat")), 400),
    "a form with a model before it": (form_post(BODY + b"\r\n--b--\r\n"), 400),
    "5000 names in Connection": (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: " + NAMES + b"\r\n\r\n",
        400,
    ),
    "3000 fields": (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + b"x:\r\n" * 3000 + b"\r\n", 431),
    "a host that is none": (json_post(BODY).replace(b"Host: a", b"Host: a/b@c d"), 400),
    "chunks of two bytes": (chunked_post(b"2\r\naa\r\n" * 20_000), 400),
    "a space behind a chunk's size": (chunked_post(b"10 \r\n" + BODY + b"\r\n0\r\n\r\n"), 400),
    "a chunk extension without a name": (chunked_post(b"10;\r\n" + BODY + b"\r\n0\r\n\r\n"), 400),
    "a chunk extension whose quotes stay open": (chunked_post(b'10;a="\r\n' + BODY + b"\r\n0\r\n\r\n"), 400),
    "a length in a trailer": (chunked_post(b"10\r\n" + BODY + b"\r\n0\r\nContent-Length: 1\r\n\r\n"), 400),
    "2000 levels": (json_post(b'{"a":' + b"[" * 2000 + b"]" * 2000 + b',"model":"chat","b":{"c":{"d":1}}}'), 400),
    "a name of 2 MiB": (json_post(b'{"model":"' + b"n" * (2 << 20) + b'"}'), 404),
    "a name of 2 MiB in the middle": (json_post(b'{"a":[[]],"model":"' + b"n" * (2 << 20) + b'","b":[[]]}'), 404),
    "another key that ends like model": (json_post(b'{"a":1,"model":"nope","x\\"model":"gpt"}'), 404),
    "only another key that ends like model": (json_post(b'{"\\"model":"chat"}'), 400),
    "an alias, then another model": (json_post(b'{"model":"gpt","model":"other"}'), 400),
    "another model, then an alias": (json_post(b'{"a":[[]],"model":"other","model":"gpt"}'), 400),
    "an alias, then another model, escaped": (json_post(b'{"model":"gpt","\\u006dodel":"other"}'), 400),
    "an escaped alias in what is no text": (json_post(b'{"\xd2":[ ],"mod\\u0065l":"gpt"}'), 400),
}


@pytest.mark.parametrize(("sent", "status"), REQUESTS.values(), ids=REQUESTS)
async def test_a_request_that_asks_too_much_is_refused_with_an_answer(
    stand: StartStand, sent: bytes, status: int
) -> None:
    """Some stopped the loop for half a minute, some were never answered, some reached a worker as another request."""
    here = await stand()
    client = await here.dial()
    client.writer.write(sent)
    reply = await client.reply()
    assert (reply.status, bool(reply.error["message"])) == (status, True)
    assert len(reply.body) < 1000
    assert here.worker.requests == []
    assert (await here.ask(post())).status == 200
    assert here.failures == []


SERVED = {  # and what the worker gets of it
    "an escaped key": (
        b'{"\\u006dodel":"gpt", "a":1}',
        b'{"\\u006dodel":"chat", "a":1}',
    ),
    "an alias beside a tool with a model": (
        b'{"model":"gpt","tools":[{"model":"x"}], "user":"model"}',
        b'{"model":"chat","tools":[{"model":"x"}], "user":"model"}',
    ),
    "an alias in the middle": (
        b'{"a":["{\\"model\\":1}\\\\",{"model":"gpt"}], "model" : "gpt","b":[[]]}',
        b'{"a":["{\\"model\\":1}\\\\",{"model":"gpt"}], "model" : "chat","b":[[]]}',
    ),
}


@pytest.mark.parametrize(("sent", "expected"), SERVED.values(), ids=SERVED)
async def test_only_the_model_of_an_aliased_request_is_replaced(
    stand: StartStand, sent: bytes, expected: bytes
) -> None:
    here = await stand()
    assert (await here.ask(json_post(sent))).status == 200
    assert here.worker.requests[0].body == expected


async def test_a_form_may_hold_anything_that_looks_like_its_lines(stand: StartStand) -> None:
    here = await stand()
    file = b"x--b\r\n\r\n--bb\r\n" + MODEL_PART + b"\r\n\r\nother"
    head = b'Content-Disposition: form-data; name="file"; filename="C:\\dir; name=model"'
    form = part(head, file) + part(MODEL_PART, b"gpt") + b"--b--\r\n"
    assert (await here.ask(form_post(form))).status == 200
    assert here.worker.requests[0].body == form.replace(b"gpt", b"chat")
