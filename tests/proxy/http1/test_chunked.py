"""Chunked bodies that another reader goes on with, and where a reply in chunks stands."""

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from l40sd.proxy.http1 import chunked
from l40sd.proxy.http1.chunked import ChunkedBody, ends_between_chunks
from l40sd.proxy.http1.heads import parse_request, plain_request

chunks = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


def wire(parts: list[bytes]) -> bytes:
    return b"".join(b"%x;note=1\r\n%b\r\n" % (len(part), part) for part in parts)


@given(chunks, st.integers(0, 400), st.booleans())
def test_another_reader_goes_on_at_any_byte(parts: list[bytes], at: int, has_trailer: bool) -> None:
    whole = wire(parts) + b"0\r\n" + (b"a: b\r\n" if has_trailer else b"") + b"\r\n"
    at = min(at, len(whole) - 1)
    first = ChunkedBody(1000)
    assert first.feed(whole[:at]) is None
    second = ChunkedBody(1000)
    assert second.feed(first.so_far()) is None
    assert second.feed(whole[at:] + b"next") == b"next"
    assert bytes(second.content) == b"".join(parts)


@given(chunks, st.integers(0, 400))
@example([b"\r\n"], 9)
@example([b"\0", b"\0", b"\0" * 4, b"\0" * 7, b"\0" * 7], 96)  # between the two bytes of a line end
def test_a_place_between_two_chunks_is_found_wherever_the_latest_bytes_begin(parts: list[bytes], start: int) -> None:
    last = b"data: {}\n\n"
    data = wire([*parts, b"event", last])
    start = min(start, len(data) - len(wire([last])))
    assert ends_between_chunks(data[start:])


@pytest.mark.parametrize("tail", [b"5\r\nab\r\n", b"ff\r\n\r\n"])
def test_many_small_chunks_are_followed_once_each(tail: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of chunks of one byte, and no place between two at its end: each line began a walk over all others."""
    steps = 0

    class Counted:
        def __getattr__(self, name: str) -> object:
            return getattr(plain, name)

        def match(self, data: bytes, at: int) -> re.Match[bytes] | None:
            nonlocal steps
            steps += 1
            return plain.match(data, at)

    plain = chunked._chunk_line
    monkeypatch.setattr(chunked, "_chunk_line", Counted())
    count = 5000
    assert not ends_between_chunks(b"1\r\nx\r\n" * count + tail)
    assert steps <= count + 2


@given(st.lists(st.text("abcdef{}:, ", min_size=1, max_size=40).map(str.encode), min_size=1, max_size=6), st.data())
def test_a_place_within_a_chunk_is_not_taken_for_one_between_two(parts: list[bytes], data: st.DataObject) -> None:
    ends = [len(wire(parts[:count])) for count in range(len(parts) + 1)]
    whole = wire(parts)
    at = data.draw(st.integers(1, len(whole)).filter(lambda at: at not in ends))
    assert not ends_between_chunks(whole[:at])


@given(
    st.sampled_from([b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n", b"POST http://a/v1/x HTTP/1.0\r\nhost: b\r\n"]),
    st.lists(
        st.sampled_from(
            [
                b"content-type: application/json\r\n",
                b"X-Other: \xff 1\r\n",
                b"connection: close, x-other\r\n",
                b"te: trailers\r\n",
                b"Origin: https://a \r\n",
            ]
        ),
        unique=True,
    ),
    st.sampled_from([b"", b"Authorization: Bearer k 1\r\n", b"x-api-key: k\r\n"]),
    st.sampled_from([b"", b"x-request-id: mine\r\n"]),
    st.integers(0, 99),
)
def test_the_plainest_form_of_a_head_says_the_same(
    line: bytes, fields: list[bytes], key: bytes, request_id: bytes, length: int
) -> None:
    head = parse_request(line + b"".join(fields) + key + request_id + b"content-length: %d\r\n\r\n" % length)
    again = parse_request(plain_request(head, length))
    names = ("method", "target", "is_http10", "keep_alive", "content_length", "credential", "request_id", "origin")
    for name in (*names, "fields", "content_type"):
        assert getattr(again, name) == getattr(head, name), name
    assert parse_request(plain_request(head)).is_chunked if not head.is_http10 else True


def read_so_far(data: bytes) -> bytes:
    """Return what a client has of a body in chunks that did not end; a ValueError where the framing is broken."""
    body = b""
    while data:
        line, _, data = data.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        assert size, "the last chunk"
        body += data[:size]
        if len(data) >= size + 2 and data[size : size + 2] != b"\r\n":
            raise ValueError("no line end after a chunk")
        data = data[size + 2 :]
    return body


def left_in_chunk(data: bytes) -> int:
    """Return how many bytes end the chunk at hand of a body in chunks, seen from its beginning."""
    while data:
        line, found, rest = data.partition(b"\r\n")
        size = int(line.rstrip(b"\r").partition(b";")[0], 16)
        if not found:
            return (1 if line.endswith(b"\r") else 2) + size + 2
        if len(rest) < size + 2:
            return size + 2 - len(rest)
        data = rest[size + 2 :]
    return 0


@given(chunks, st.integers(0, 400), st.integers(0, 400))
@example([b"data: 1\n\n", b"5\r\nabcde\r\n"], 400, 0)  # a payload that looks like chunks
@example([b"\r\n", b"\r\n"], 400, 399)
def test_a_body_cut_anywhere_goes_on_whatever_of_it_is_seen(parts: list[bytes], cut: int, start: int) -> None:
    whole = wire([*parts, b"last"])
    sent = whole[: 1 + cut % (len(whole) - 1)]
    if sent.rpartition(b"\r\n")[2].rstrip(b"\r").endswith((b";", b"=")):
        return  # within a field of a chunk's size: the parser will not go on there
    seen = sent[start % len(sent) :]
    left = left_in_chunk(sent)
    place = chunked.place_of(seen, left)
    assert place is not None
    more = b"\r\n\r\n" + b"error" * 3 if seen[-1:] != b"\r" else b"\n\r\n" + b"error" * 3
    gone_on = chunked.go_on(place, more)
    assert read_so_far(sent + gone_on).endswith(b"error" * 3)


def test_where_a_body_stands_is_seen_with_what_of_it_was_there() -> None:
    whole = b"9\r\ndata: 1\n\n\r\nA;x=y\r\n0123456789\r\n"
    places = {cut: chunked.place_of(whole[:cut], None) for cut in (14, 15, 16, 20, 21, 23, 30, 31, 32, 33)}
    assert places == {
        14: (0, b"", b"data: 1\n\n"),
        15: (14, b"\r\n", b"data: 1\n\n"),
        16: (14, b"\r\n", b"data: 1\n\n"),
        20: (13, b"\n", b"data: 1\n\n"),
        21: (12, b"", b"data: 1\n\n"),
        23: (10, b"", b"data: 1\n\n01"),
        30: (3, b"", b"data: 1\n\n012345678"),
        31: (2, b"", b"data: 1\n\n0123456789"),
        32: (1, b"", b"data: 1\n\n0123456789"),
        33: (0, b"", b"data: 1\n\n0123456789"),
    }


@pytest.mark.parametrize("data", [b"0\r\n", b"0", b"3\r\nxyz\r\n0\r\nx: y", b"zz", b"5\r\nabcdexx"])
def test_where_no_chunk_can_follow_there_is_no_place(data: bytes) -> None:
    assert chunked.place_of(data, None) is None


def test_a_payload_that_looks_like_chunks_all_over_is_looked_at_once() -> None:
    """Each of 20,000 lines could be the size of a chunk that goes on; copying what is behind each took seconds."""
    data = b"\r\n7fffffff" * 20_000 + b"\r\n"
    copied = 0

    class Counted(bytes):
        def __getitem__(self, key: Any) -> Any:
            nonlocal copied
            part = super().__getitem__(key)
            copied += len(part) if isinstance(key, slice) else 1
            return part

    assert chunked.place_of(Counted(data), 7) == (7, b"", data)
    assert copied <= 2 * len(data)


def test_a_chunk_without_an_end_takes_what_comes_as_its_own() -> None:
    data = b"ffffffff\r\ndata: {"
    place = chunked.place_of(data, chunked.FAR_BYTES)
    assert place == (chunked.FAR_BYTES, b"", b"data: {")
    assert chunked.go_on(place, b"}\n\n") == b"}\n\n"
