"""A stream that breaks off, wherever it does, tells its client in the client's own language."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from proxykit import STREAM_HEAD, Behaviour, Conversation, Request, Stand, answer_ok, chunk, post
from ssekit import SseEvent, decode

from l40sd.routing.routes import FailureKind

StartStand = Callable[..., Awaitable[Stand]]

UNFRAMED_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\r\n"
PATHS = {
    "/v1/chat/completions": [
        b'data: {"id":"c1","choices":[{"index":0,"delta":{"content":"gr\xc3\xbc\xc3\x9fe"},"finish_reason":null}]}\n\n',
        b'data: {"id":"c1","choices":[{"index":0,"delta":{"content":"two"},"finish_reason":null}]}\n\n',
    ],
    "/v1/messages": [
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m1","content":[]}}\n\n',
        b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"hi"}}\n\n',
    ],
    "/v1/responses": [
        b'event: response.created\ndata: {"type":"response.created","sequence_number":0,"response":{"id":"r1"}}\n\n',
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":1}\n\n',
    ],
}


def in_pieces(*pieces: bytes, reset: bool = False) -> Behaviour:
    """Return a worker that sends these one after the other, each a read of its own, and is gone."""

    async def behave(talk: Conversation, request: Request) -> None:
        for piece in pieces:
            await talk.send(piece)
            await asyncio.sleep(0)
        talk.reset() if reset else talk.writer.close()

    return behave


def so_far(body: bytes) -> bytes:
    """Return what a client has read of chunks that do not end."""
    out = b""
    while body:
        line, found, body = body.partition(b"\r\n")
        size = int(line, 16)
        assert found, "half a size"
        assert size, "a last chunk would make the reply look whole"
        out += body[:size]
        assert len(body) < size + 2 or body[size : size + 2] == b"\r\n"
        body = body[size + 2 :]
    return out


async def events_of(s: Stand, path: str, *, is_chunked: bool = True) -> list[SseEvent]:
    dialog = await s.dial()
    await dialog.send(post(path=path))
    body = (await dialog.rest()).partition(b"\r\n\r\n")[2]
    dialog.close()
    return decode(so_far(body) if is_chunked else body)


def is_error(path: str, event: SseEvent) -> bool:
    """Return whether the library for this path takes the event for an error, with the reason in it."""
    said: dict[str, Any] = event.json
    match path:
        case "/v1/messages":
            kind = said["error"]["type"] if said["type"] == "error" else ""
            return (event.name, kind) == ("error", "api_error") and "broke off" in said["error"]["message"]
        case "/v1/responses":
            is_own = event.name == said["type"] == "error" and "sequence_number" in said
            return is_own and said["code"] == "worker_failed" and "broke off" in said["message"]
        case _:
            return said.get("error", {}).get("code") == "worker_failed" and "broke off" in said["error"]["message"]


@pytest.mark.parametrize("path", list(PATHS))
async def test_a_stream_in_chunks_cut_at_any_byte_ends_in_the_paths_own_error_event(
    stand: StartStand, path: str
) -> None:
    """The error event was glued to half an event, or missing: the client's JSON parser failed and the reason was lost.

    On /v1/messages it had OpenAI's shape, which anthropic's library drops without a word.
    """
    s = await stand()
    first, second = PATHS[path]
    complete = decode(first + second)
    whole = chunk(first) + chunk(second)
    for cut in range(1, len(whole)):
        s.worker.behave = in_pieces(STREAM_HEAD + whole[: min(cut, len(chunk(first)))], whole[len(chunk(first)) : cut])
        events = await events_of(s, path)
        assert is_error(path, events[-1]), whole[:cut]
        assert all(is_error(path, event) for event in events if event not in complete), whole[:cut]
    assert {kind for _, kind in s.failures} == {FailureKind.CUT}


@pytest.mark.parametrize("size", [1, 3, 10])
async def test_events_and_chunks_that_do_not_match_are_no_hindrance(stand: StartStand, size: int) -> None:
    """Chunks of a few bytes, each byte a read of its own or all at once: the error event is one for every client."""
    s = await stand()
    body = b"".join(PATHS["/v1/chat/completions"])
    whole = b"".join(chunk(body[at : at + size]) for at in range(0, len(body), size))
    for cut in range(150, 250):
        for pieces in ([whole[:cut]], [whole[at : at + 1] for at in range(cut)]):
            s.worker.behave = in_pieces(STREAM_HEAD, *pieces)
            assert is_error("/v1/chat/completions", (await events_of(s, "/v1/chat/completions"))[-1]), whole[:cut]


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("reset", [False, True])
async def test_a_stream_without_framing_cut_at_any_byte_ends_in_the_paths_own_error_event(
    stand: StartStand, path: str, *, reset: bool
) -> None:
    """Its orderly close within an event was taken for its end."""
    s = await stand()
    first, second = PATHS[path]
    complete = decode(first + second)
    for cut in range(1, len(second)):
        s.worker.behave = in_pieces(UNFRAMED_HEAD + first + second[:cut], reset=reset)
        events = await events_of(s, path, is_chunked=False)
        assert is_error(path, events[-1]), second[:cut]
        assert all(is_error(path, event) for event in events if event not in complete), second[:cut]


async def test_a_client_that_reads_no_chunks_gets_the_event_without_them(stand: StartStand) -> None:
    s = await stand()
    first, second = PATHS["/v1/chat/completions"]
    s.worker.behave = in_pieces(STREAM_HEAD + chunk(first) + b"ff\r\n" + second[:30])
    dialog = await s.dial()
    await dialog.send(post().replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    events = decode((await dialog.rest()).partition(b"\r\n\r\n")[2])
    assert events[0].data.encode() in first
    assert all(is_error("/v1/chat/completions", event) for event in events[1:])
    assert len(events) == 3


# -- streams whose end is their connection's ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/v1/chat/completions", b"data: [DONE]\n\n"),
        ("/v1/completions", b"data: [DONE]\n\n"),
        ("/v1/messages", b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
    ],
)
async def test_a_stream_that_ends_without_its_last_event_is_told_as_cut_where_the_engine_always_sends_one(
    stand: StartStand, path: str, last: bytes
) -> None:
    """A worker that died between two events of an unframed stream made it look complete: the answer was cut in half."""
    s = await stand()
    s.routes.add(s.backend(s.worker, ends_streams=True))
    first, second = PATHS.get(path, PATHS["/v1/chat/completions"])
    s.worker.behave = in_pieces(UNFRAMED_HEAD + first, second, last)
    assert await events_of(s, path, is_chunked=False) == decode(first + second + last)
    assert s.failures == []
    s.worker.behave = in_pieces(UNFRAMED_HEAD + first, second)
    events = await events_of(s, path, is_chunked=False)
    assert [is_error(path, event) for event in events] == [False, False, True]
    assert s.failures == [("w0", FailureKind.CUT)]
    s.worker.behave = in_pieces(UNFRAMED_HEAD)
    assert [is_error(path, event) for event in await events_of(s, path, is_chunked=False)] == [True]


async def test_of_a_worker_that_is_not_known_no_more_is_expected_than_it_once_did(stand: StartStand) -> None:
    """Somebody's own server may end its streams as it likes; one that was seen to send [DONE] is held to it."""
    s = await stand()
    path = "/v1/chat/completions"
    first, second = PATHS[path]
    s.worker.behave = in_pieces(UNFRAMED_HEAD + first, second)
    assert await events_of(s, path, is_chunked=False) == decode(first + second)
    s.worker.behave = in_pieces(UNFRAMED_HEAD + first, b"data: [DONE]\n\n")
    await events_of(s, path, is_chunked=False)
    s.worker.behave = in_pieces(UNFRAMED_HEAD + first, second)
    assert is_error(path, (await events_of(s, path, is_chunked=False))[-1])


async def test_what_is_no_stream_of_events_may_end_with_its_connection(stand: StartStand) -> None:
    s = await stand()
    s.routes.add(s.backend(s.worker, ends_streams=True))
    s.worker.behave = in_pieces(b"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\n\r\nRIFF")
    dialog = await s.dial()
    await dialog.send(post(path="/v1/audio/speech"))
    assert (await dialog.rest()).endswith(b"\r\n\r\nRIFF")
    assert s.failures == []


# -- replies of ours ----------------------------------------------------------------------------------------------


MESSAGES_ERRORS = {
    "unknown model": (post(path="/v1/messages", model="nope"), 404, "not_found_error"),
    "no JSON": (post(b"nope", path="/v1/messages"), 400, "invalid_request_error"),
    "a wrong method": (b"GET /v1/messages HTTP/1.1\r\nHost: x\r\n\r\n", 405, "invalid_request_error"),
    "a large body": (
        b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n",
        413,
        "request_too_large",
    ),
    "a large head": (b"POST /v1/messages HTTP/1.1\r\nX: " + b"y" * 5000 + b"\r\n\r\n", 431, "invalid_request_error"),
    "no Host": (b"POST /v1/messages?beta=true HTTP/1.1\r\n\r\n", 400, "invalid_request_error"),
    "no such path": (post(path="/v1/messages/nope"), 404, "not_found_error"),
}


@pytest.mark.parametrize("what", list(MESSAGES_ERRORS))
async def test_every_error_of_ours_on_messages_has_anthropics_shape(stand: StartStand, what: str) -> None:
    """Its library found no reason in OpenAI's shape."""
    request, status, kind = MESSAGES_ERRORS[what]
    s = await stand(body_limit_bytes=100_000, head_limit_bytes=4096)
    reply = await s.ask(request)
    body = json.loads(reply.body)
    assert (reply.status, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert reply.fields["x-l40s-source"] == "l40sd"


async def test_the_shape_is_right_also_for_a_head_that_was_seen_before(stand: StartStand) -> None:
    s = await stand()
    dialog = await s.dial()
    for path in ("/v1/messages", "/v1/chat/completions"):
        s.worker.behave = answer_ok
        assert (await dialog.ask(post(path=path))).status == 200
        assert (await dialog.ask(post(path=path))).status == 200
        assert ("type" in json.loads((await dialog.ask(post(b'"none"', path=path))).body)) == (path == "/v1/messages")
        s.worker.behave = in_pieces(b"")
        body = json.loads((await dialog.ask(post(path=path))).body)
        assert ("type" in body) == (path == "/v1/messages")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/models", "/v1/embeddings", "/nowhere"])
async def test_every_other_path_has_openais_shape(stand: StartStand, path: str) -> None:
    s = await stand(api_keys=("secret",))
    reply = await s.ask(f"PUT {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert reply.error["type"] == "invalid_request_error"
