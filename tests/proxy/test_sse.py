"""A stream of events that breaks off anywhere ends in an error event that every client can read."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ssekit import decode

from l40sd.proxy.sse import ending, error_event, is_whole

CHAT = b'"error":{"message":"cut","code":"worker_failed"}'
MESSAGES = b'"type":"error","error":{"type":"api_error","message":"cut"}'


def chunk(content: str) -> bytes:
    text = {"id": "c1", "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}]}
    return b"data: %b\n\n" % json.dumps(text, ensure_ascii=False).encode()


def named(kind: str, content: str) -> bytes:
    text = json.dumps({"type": kind, "index": 0, "delta": {"text": content}}, ensure_ascii=False).encode()
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), text)


STREAMS = {
    "chat": (chunk("first") + chunk("gr\u00fc\u00dfe \U0001f642") + b"data: [DONE]\n\n", CHAT, b""),
    "with CR LF": (chunk("a").replace(b"\n", b"\r\n") + chunk("b").replace(b"\n", b"\r\n"), CHAT, b""),
    "with CR": (chunk("a").replace(b"\n", b"\r") + chunk("b").replace(b"\n", b"\r"), CHAT, b""),
    "comments and ids": (b": ping\n\n: ping\nid: 7\nretry: 100\n" + chunk("a") + b":\n\n", CHAT, b""),
    "no space": (chunk("a").replace(b"data: ", b"data:"), CHAT, b""),
    "data in lines": (b'data: {"a":\ndata: 1}\n\ndata: {"a":\ndata: 2}\n\n', CHAT, b""),
    "messages": (named("message_start", "x") + named("content_block_delta", "\u65e5\u672c\u8a9e"), MESSAGES, b"error"),
}


@pytest.mark.parametrize("kind", list(STREAMS))
def test_a_stream_cut_at_any_byte_ends_in_a_well_formed_error_event(kind: str) -> None:
    """An error event glued to half an event made openai's and anthropic's libraries fail in their JSON parsers."""
    whole, members, name = STREAMS[kind]
    complete = decode(whole)
    for cut in range(len(whole)):
        events = decode(whole[:cut] + ending(whole[:cut], members, name))
        assert events[-1] == decode(error_event(members, name))[0], whole[:cut]
        begun = [event for event in events[:-1] if event not in complete]
        assert len(begun) <= 1, "no more than the event that was cut"
        for event in begun:
            assert event.name == name.decode()
            assert event.json["error"]["message"] == "cut", "whoever decodes it is told as well"
        assert [event for event in events if event in complete] == complete[: len(events) - 1 - len(begun)]


@pytest.mark.parametrize("kind", list(STREAMS))
@pytest.mark.parametrize("seen_from", [4, 7, 30, 61])
def test_where_only_the_last_bytes_are_seen_the_error_event_is_still_one(kind: str, seen_from: int) -> None:
    whole, members, name = STREAMS[kind]
    for cut in range(len(whole)):
        start = max(0, cut - seen_from)
        events = decode(whole[:cut] + ending(whole[start:cut], members, name))
        assert events[-1] == decode(error_event(members, name))[0], whole[:cut]


def test_half_a_character_does_not_make_the_stream_unreadable() -> None:
    for text in ("\u00fc", "\u65e5", "\U0001f642"):
        for cut in range(1, len(text.encode())):
            seen = b"data: plain " + text.encode()[:cut]
            assert decode(seen + ending(seen, CHAT))[-1].json == {"error": {"message": "cut", "code": "worker_failed"}}


@given(st.binary(max_size=80), st.sampled_from([(CHAT, b""), (MESSAGES, b"error")]))
@example(b"data: {", (CHAT, b""))
@example(b"event: x\ndata", (CHAT, b""))
@example(b"data: \r\n\r", (CHAT, b""))
def test_after_any_bytes_the_last_event_is_the_error(seen: bytes, how: tuple[bytes, bytes]) -> None:
    members, name = how
    stream = (seen + ending(seen, members, name)).decode(errors="replace").encode()
    assert decode(stream)[-1].json == json.loads(b"{%b}" % members)


@pytest.mark.parametrize(
    ("seen", "last_data", "expected"),
    [
        (chunk("a") + b"data: [DONE]\n\n", b"[DONE]", True),
        (b"data: [DONE]\n\n", b"[DONE]", True),
        (b"data: [DONE]\r\n\r\n", b"[DONE]", True),
        (b"data:[DONE]\n", b"[DONE]", True),
        (b"data: [DONE]", b"", True),
        (b"NE]\n\n", b"[DONE]", True),  # what came before is not seen
        (b"\n", b"[DONE]", True),
        (chunk("a"), b"[DONE]", False),
        (chunk("a"), b"", True),  # nobody knows how this worker ends its streams
        (chunk("say [DONE]"), b"", True),
        (chunk("a")[:-1], b"", False),  # the last event is lost to every client
        (chunk("a")[:-1].replace(b"\n", b"\r\n"), b"", False),
        (chunk("a")[:-9], b"", False),
        (chunk("a")[9:-9], b"", False),
        (b"", b"[DONE]", False),
        (b"", b"", True),
        (named("content_block_delta", "a"), b"message_stop", False),
        (named("message_stop", ""), b"message_stop", True),
    ],
)
def test_a_stream_without_framing_is_whole_only_where_it_ends_as_such_streams_do(
    seen: bytes, last_data: bytes, *, expected: bool
) -> None:
    """A worker that died between two events of an unframed stream made it look complete."""
    assert is_whole(seen, last_data) is expected
