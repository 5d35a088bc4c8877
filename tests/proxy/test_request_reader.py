"""Requests off a byte stream, whole or in parts, and what another connection would read again."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.config.options import ProxyConfig
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.request_reader import Progress, RequestReader
from l40sd.routing.routes import Routes

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
BODY = b'{"model": "chat"}'
WITH_LENGTH = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
IN_CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\n" + BODY[:9] + b"\r\n8\r\n" + BODY[9:] + b"\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def context() -> Iterator[ProxyContext]:
    loop = asyncio.new_event_loop()
    context = ProxyContext(config=ProxyConfig(), routes=Routes(), loop=loop)
    context.configure(ProxyConfig(), descriptor_limit=1024)
    yield context
    loop.close()


def is_whole(reader: RequestReader) -> bool:
    """Read on; return whether the request is whole."""
    return (reader.head is not None or not isinstance(reader.read_head(), Progress)) and reader.read_body()


@pytest.mark.parametrize("request_bytes", [WITH_LENGTH, IN_CHUNKS])
@given(st.data())
def test_a_request_in_two_parts_is_the_request_and_so_is_what_another_reader_reads_of_the_first(
    context: ProxyContext, request_bytes: bytes, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(request_bytes) - 1))
    reader, other = RequestReader(context), RequestReader(context)
    reader.add(request_bytes[:cut])
    assert not is_whole(reader)
    other.add(reader.unread())
    for each in (reader, other):
        each.add(request_bytes[cut:])
        assert is_whole(each)
        assert (each.target, each.take_body(), each.held) == (b"/v1/completions", BODY, b"")


def test_only_the_first_part_of_a_head_is_its_beginning(context: ProxyContext) -> None:
    reader = RequestReader(context)
    assert reader.read_head() is Progress.PART
    reader.add(HEAD)
    assert reader.read_head() is Progress.BEGUN
    reader.add(b"Content-Le")
    assert reader.read_head() is Progress.PART


def test_a_head_that_was_admitted_is_known_when_it_comes_again_with_its_whole_body(context: ProxyContext) -> None:
    reader = RequestReader(context)
    assert not reader.end_of_known(WITH_LENGTH)
    reader.add(WITH_LENGTH)
    assert is_whole(reader)
    reader.take_body()
    reader.begin()
    assert reader.end_of_known(WITH_LENGTH) == len(WITH_LENGTH) - len(BODY)
    assert not reader.end_of_known(WITH_LENGTH[:-1])
    assert not reader.end_of_known(WITH_LENGTH + b"x")
    context.set_keys(frozenset((b"sk-1",)))
    assert not reader.end_of_known(WITH_LENGTH), "other requests may come in than before"
    context.set_keys(frozenset())


def test_the_memory_of_a_large_body_is_given_back(context: ProxyContext) -> None:
    reader = RequestReader(context)
    reader.add(HEAD + b"Content-Length: 100000\r\n\r\n" + b"x" * 50_000)
    assert not is_whole(reader)
    assert context.bounds.body_bytes == 50_000
    reader.discard()
    assert context.bounds.body_bytes == 0
    assert not reader.held
