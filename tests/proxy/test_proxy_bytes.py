"""However the bytes of a request or a reply are cut into packets, what arrives is the same."""

import asyncio
from collections.abc import Awaitable, Callable

import uvloop
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from proxykit import STREAM_HEAD, Conversation, Request, Stand, chunk, plain, post

cuts = st.lists(st.integers(0, 100_000), max_size=12)
events = st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=12)


def pieces(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in at})
    return [piece for piece in (data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)) if piece]


async def closed(stand: Stand, converse: Callable[[Stand], Awaitable[None]]) -> None:
    """Close everything also after a failure: uvloop waits for ever for a server that was left open."""
    try:
        await converse(stand)
    finally:
        await stand.finish()


@example([([b"0"], True, []), ([b"0"], True, []), ([b"0"], False, [])], [126, 127, 128, 129, 953, 954, 15847], False)
@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.tuples(events, st.booleans(), cuts), min_size=1, max_size=3), cuts, st.booleans())
def test_requests_and_replies_survive_any_cutting(
    exchanges: list[tuple[list[bytes], bool, list[int]]], request_cuts: list[int], is_chunked: bool
) -> None:
    async def converse(stand: Stand) -> None:
        queue = list(exchanges)
        bodies = [b'{"model":"chat","n":"%d%b"}' % (n, b"y" * (n * 700)) for n in range(len(exchanges))]

        async def behave(talk: Conversation, request: Request) -> None:
            parts, is_stream, reply_cuts = queue.pop(0)
            whole = STREAM_HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n" if is_stream else plain(b"".join(parts))
            for piece in pieces(whole, reply_cuts):
                await talk.send(piece)
                await asyncio.sleep(0)

        stand.worker.behave = behave
        await stand.start()
        dialog = await stand.dial()
        requests = b"".join(chunked(body) if is_chunked else post(body) for body in bodies)
        for piece in pieces(requests, request_cuts):
            await dialog.send(piece)
            await asyncio.sleep(0)
        for parts, is_stream, _ in exchanges:
            reply = await dialog.reply()
            expected = b"".join(map(chunk, parts)) + b"0\r\n\r\n" if is_stream else b"".join(parts)
            assert reply.status == 200
            assert reply.raw_body == expected
        assert [request.body for request in stand.worker.requests] == bodies
        assert stand.failures == []

    def chunked(body: bytes) -> bytes:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        return head + b"".join(chunk(piece) for piece in pieces(body, request_cuts)) + b"0\r\n\r\n"

    uvloop.run(closed(Stand(), converse))


@settings(max_examples=examples(40), deadline=None)
@given(events, cuts, st.integers(0, 100_000), st.booleans())
def test_a_reply_cut_anywhere_is_never_taken_for_whole(
    parts: list[bytes], reply_cuts: list[int], end: int, is_stream: bool
) -> None:
    whole = STREAM_HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n" if is_stream else plain(b"".join(parts))
    broken = whole[: end % len(whole)]

    async def converse(stand: Stand) -> None:

        async def behave(talk: Conversation, request: Request) -> None:
            for piece in pieces(broken, reply_cuts):
                await talk.send(piece)
                await asyncio.sleep(0)
            talk.writer.close()

        stand.worker.behave = behave
        await stand.start()
        dialog = await stand.dial()
        await dialog.send(post())
        if broken.find(b"\r\n\r\n") < 0:
            assert (await dialog.reply()).status == 502
        else:
            raw = (await dialog.rest()).partition(b"\r\n\r\n")[2]
            sent = broken.partition(b"\r\n\r\n")[2]
            if is_stream:
                assert not raw.endswith(b"0\r\n\r\n") or sent.endswith(b"0\r\n\r\n")
                assert raw.startswith(sent) or sent.startswith(raw)
            else:
                assert len(raw) < len(b"".join(parts))
            assert len(stand.failures) == 1

    uvloop.run(closed(Stand(retries=0), converse))
