"""What clients, workers and the machine may do wrong, and what the proxy makes of it."""

import asyncio
import errno
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from proxykit import (
    CHAT,
    STREAM_HEAD,
    Behaviour,
    Conversation,
    Dialog,
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
from ssekit import decode

from l40sd.model import WorkerId
from l40sd.routing.routes import CatalogEntry, FailureKind

StartStand = Callable[..., Awaitable[Stand]]


def sends(data: bytes, *, then: str = "close") -> Behaviour:
    """Return a worker that sends these bytes and then closes, resets, stays silent or keeps the connection."""

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(data)
        if then == "close":
            talk.writer.close()
        elif then == "reset":
            raw = talk.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            talk.reset()
        elif then == "silence":
            await talk.closed()

    return behave


# -- workers: before the first byte -------------------------------------------------------------------------------


BEFORE_A_REPLY = {
    "closes at once": sends(b""),
    "resets at once": sends(b"", then="reset"),
    "half a head": sends(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "not HTTP": sends(b"SSH-2.0-OpenSSH_9.2\r\n", then="silence"),
    "endless head": sends(b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 70000, then="silence"),
    "two lengths": sends(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc"),
    "length and chunked": sends(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"),
    "more than was asked for": sends(plain(b"{}") + plain(b"{}")),
    "folded field": sends(b"HTTP/1.1 200 OK\r\nx: a\r\n\tcontent-length: 3\r\n\r\nabc"),
    "101": sends(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
}


@pytest.mark.parametrize("fault", list(BEFORE_A_REPLY))
async def test_a_worker_that_fails_before_its_reply_is_blamed_and_another_answers(
    stand: StartStand, fault: str
) -> None:
    s = await stand(workers=2)
    s.workers[0].behave = BEFORE_A_REPLY[fault]
    dialog = await s.dial()
    for _ in range(4):
        reply = await dialog.ask(post())
        assert (reply.status, reply.fields["x-l40s-worker"]) == (200, "w1")
    assert set(s.failures) == {("w0", FailureKind.CLOSED)}
    assert s.proxy.stats.retried == len(s.workers[0].requests) > 0


@pytest.mark.parametrize("fault", list(BEFORE_A_REPLY))
async def test_when_every_worker_fails_the_client_gets_a_502_soon(stand: StartStand, fault: str) -> None:
    s = await stand(workers=2, retries=2)
    for worker in s.workers:
        worker.behave = BEFORE_A_REPLY[fault]
    dialog = await s.dial()
    reply = await dialog.ask(post())
    assert (reply.status, reply.error["code"], reply.error["type"]) == (502, "worker_failed", "server_error")
    is_death = fault in ("closes at once", "resets at once")
    assert sum(len(worker.requests) for worker in s.workers) == (2 if is_death else 3)
    assert reply.fields.get("x-should-retry") == ("false" if is_death else None)
    for worker in s.workers:
        worker.behave = answer_ok
    async with asyncio.timeout(10):  # workers that are still there a moment later are no reason to refuse it
        while (await dialog.ask(post())).status != 200:
            assert is_death


async def test_a_single_worker_that_closes_is_tried_again(stand: StartStand) -> None:
    s = await stand()
    behaviours = [BEFORE_A_REPLY["closes at once"], answer_ok]

    async def behave(talk: Conversation, request: Request) -> None:
        await behaviours.pop(0)(talk, request)

    s.worker.behave = behave
    assert (await s.ask(post())).status == 200


async def test_a_kept_connection_that_went_stale_is_nobodys_fault(stand: StartStand) -> None:
    s = await stand(upstream_idle_timeout_s=30.0, retries=0)
    assert (await s.ask(post())).status == 200
    first = s.worker.behave

    async def behave(talk: Conversation, request: Request) -> None:
        s.worker.behave = first
        talk.reset()  # it was closing this connection as the request came

    s.worker.behave = behave
    assert (await s.ask(post())).status == 200
    assert (s.failures, s.proxy.stats.retried, s.worker.connections) == ([], 0, 2)


async def test_a_kept_connection_that_closed_at_once_is_one_of_the_tries(stand: StartStand) -> None:
    """A request went out four times with retries = 2: over a stale connection, over a new one, and twice elsewhere."""
    s = await stand(workers=3, upstream_idle_timeout_s=30.0, retries=2)
    for worker in s.workers:
        worker.behave = sends(plain(b"{}"), then="keep")
    dialogs = [await s.dial() for _ in s.workers]
    await asyncio.gather(*(dialog.ask(post()) for dialog in dialogs))
    before = sum(len(worker.requests) for worker in s.workers)
    garbled = BEFORE_A_REPLY["not HTTP"]

    async def behave(talk: Conversation, request: Request) -> None:
        for worker in s.workers:
            worker.behave = garbled
        talk.reset()

    for worker in s.workers:
        worker.behave = behave
    assert (await dialogs[0].ask(post())).status == 502
    assert sum(len(worker.requests) for worker in s.workers) - before == 3


async def test_a_refused_connection_leads_to_another_worker(stand: StartStand) -> None:
    s = await stand(workers=2)
    await s.workers[0].stop()
    for _ in range(4):
        assert (await s.ask(post())).fields["x-l40s-worker"] == "w1"
    assert set(s.failures) == {("w0", FailureKind.CONNECT)}


async def test_a_request_whose_only_worker_is_gone_waits_for_the_next_instance(stand: StartStand) -> None:
    """kill -9 of a single worker: the request that met the refused port waits in line like those that come later."""
    s = await stand()
    await s.worker.stop()
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: s.routes.waiting(CHAT) == 1)
    s.routes.remove(WorkerId("w0"))
    again = FakeWorker("w0")
    s.workers.append(again)
    await again.start()
    s.routes.add(s.backend(again))
    assert (await dialog.reply()).status == 200


async def test_a_worker_that_does_not_accept_in_time_is_left_for_another(stand: StartStand) -> None:
    with unaccepting() as port:
        s = await stand(connect_timeout_s=0.1)
        s.routes.add(s.backend(FakeWorker("full"), port=port, weight=100))
        reply = await s.ask(post())
        assert reply.fields["x-l40s-worker"] == "w0"
        assert s.failures == [("full", FailureKind.CONNECT)]


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Service Unavailable"])
async def test_a_502_or_503_of_a_worker_is_taken_to_another_or_else_passed_on(stand: StartStand, status: str) -> None:
    s = await stand(workers=2)
    busy = sends(plain(b'{"error":"loading"}', status=status), then="keep")
    s.workers[0].behave = busy
    for _ in range(3):
        assert (await s.ask(post())).fields["x-l40s-worker"] == "w1"
    s.workers[1].behave = busy
    reply = await s.ask(post())
    assert (reply.status, reply.body) == (int(status[:3]), b'{"error":"loading"}')
    assert set(s.failures) == {("w0", FailureKind.STATUS), ("w1", FailureKind.STATUS)}


async def test_a_500_is_passed_on_and_reported_and_a_400_is_not_the_workers_fault(stand: StartStand) -> None:
    s = await stand(workers=2)
    for worker in s.workers:
        worker.behave = sends(plain(b"{}", status="400 Bad Request"), then="keep")
    assert (await s.ask(post())).status == 400
    assert s.failures == []
    for worker in s.workers:
        worker.behave = sends(plain(b"{}", status="500 Internal Server Error"), then="keep")
    for count in range(1, 4):
        assert (await s.ask(post())).status == 500
        assert len(s.failures) == count
    assert max(s.routes.failures_in_row(WorkerId(w.name)) for w in s.workers) >= 2


async def test_silence_before_the_reply_ends_in_504_with_the_request_id_and_no_second_try(stand: StartStand) -> None:
    s = await stand(workers=2, first_byte_timeout_s=0.1)
    for worker in s.workers:
        worker.behave = sends(b"", then="silence")
    reply = await s.ask(post(extra=b"X-Request-Id: r-17\r\n"))
    assert (reply.status, reply.error["code"]) == (504, "worker_timeout")
    assert "r-17" in reply.error["message"]
    assert [kind for _, kind in s.failures] == [FailureKind.FIRST_BYTE]
    assert sum(len(worker.requests) for worker in s.workers) == 1
    await s.until(lambda: all(worker.open == 0 for worker in s.workers))


# -- workers: within a reply --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_stream_that_breaks_ends_in_an_error_event_and_without_its_last_chunk(
    stand: StartStand, end: str
) -> None:
    s = await stand(workers=2)
    for worker in s.workers:
        worker.behave = sends(STREAM_HEAD + chunk(b"data: 1\n\n"), then=end)
    dialog = await s.dial()
    await dialog.send(post())
    raw = (await dialog.rest()).partition(b"\r\n\r\n")[2]
    with pytest.raises(ValueError, match="cut"):
        unchunked(raw)  # a client that reads to the end can tell
    events = unchunked(raw + b"0\r\n\r\n").split(b"\n\n")
    assert events[0] == b"data: 1"
    error = json.loads(events[1].removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == ("worker_failed", "server_error")
    assert [kind for _, kind in s.failures] == [FailureKind.CUT]
    assert sum(len(worker.requests) for worker in s.workers) == 1, "a reply that has begun is never repeated"
    assert not dialog.was_reset


@pytest.mark.parametrize(
    "so_far",
    [
        STREAM_HEAD + chunk(b"data: 1\n\n") + b"0\r\nx: half a trai",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"{"),
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 100\r\n\r\ndata: 1\n\n",
    ],
)
async def test_what_cannot_be_continued_is_cut_so_that_the_client_can_tell(stand: StartStand, so_far: bytes) -> None:
    s = await stand()
    s.worker.behave = sends(so_far)
    dialog = await s.dial()
    await dialog.send(post())
    raw = (await dialog.rest()).partition(b"\r\n\r\n")[2]
    assert so_far.partition(b"\r\n\r\n")[2].startswith(raw)
    assert [kind for _, kind in s.failures] == [FailureKind.CUT]


async def test_a_stream_without_framing_that_is_reset_ends_in_an_error_event(stand: StartStand) -> None:
    s = await stand()
    s.worker.behave = sends(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\n\n", then="reset")
    dialog = await s.dial()
    await dialog.send(post())
    assert b'data: {"error"' in await dialog.rest()


async def test_an_unframed_reply_that_is_reset_is_reset_for_the_client_too(stand: StartStand) -> None:
    """Its end is the connection's: an orderly close would make half a reply look whole."""
    s = await stand()
    s.worker.behave = sends(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nhalf", then="reset")
    dialog = await s.dial()
    await dialog.send(post())
    await dialog.rest()
    assert dialog.was_reset


@pytest.mark.parametrize("garbage", [b"zz\r\n", b"5\r\nabcdefgh\r\n", chunk(b"data: 2\n\n") + b"\r\n\r\n"])
async def test_a_broken_chunk_ends_the_stream_and_nothing_of_it_is_passed_on(stand: StartStand, garbage: bytes) -> None:
    s = await stand()
    go_on = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
        await go_on.wait()
        await talk.send(garbage)
        await talk.closed()

    s.worker.behave = behave
    dialog = await s.dial()
    await dialog.send(post())
    await dialog.reader.readuntil(b"data: 1\n\n\r\n")
    go_on.set()
    rest = await dialog.rest()
    assert garbage not in rest
    assert decode(b"data: 1\n\n" + rest.partition(b"\r\n")[2])[-1].json["error"]["code"] == "worker_failed"
    assert s.failures == [("w0", FailureKind.CUT)]
    await s.until(lambda: s.worker.open == 0)


async def test_a_second_reply_in_the_read_that_ends_the_first_is_not_passed_on(stand: StartStand) -> None:
    s = await stand()
    go_on = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
        await go_on.wait()
        await talk.send(b"0\r\n\r\n" + plain(b"forged"))

    s.worker.behave = behave
    dialog = await s.dial()
    await dialog.send(post())
    await dialog.reader.readuntil(b"data: 1\n\n\r\n")
    go_on.set()
    assert b"forged" not in await dialog.rest()
    assert s.failures == [("w0", FailureKind.CUT)]


async def test_bytes_after_the_end_of_a_reply_never_reach_the_next_request(stand: StartStand) -> None:
    s = await stand(upstream_idle_timeout_s=30.0)
    forged = plain(b"forged")

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(plain(b"first"))
        await talk.send(forged)

    s.worker.behave = behave
    dialog = await s.dial()
    for _ in range(5):
        await dialog.send(post())
        reply = await dialog.reply()
        assert reply.body == b"first" or reply.status == 502  # the latter when both came in one read
        await s.until(lambda: s.worker.open == 0)  # an idle connection that speaks is dropped


async def test_silence_within_a_stream_ends_it_with_an_error_event(stand: StartStand) -> None:
    s = await stand(idle_timeout_s=0.15)
    s.worker.behave = sends(STREAM_HEAD + chunk(b"data: 1\n\n"), then="silence")
    dialog = await s.dial()
    await dialog.send(post())
    assert b"silent for 0.15 s" in await dialog.rest()
    assert s.failures == [("w0", FailureKind.IDLE)]
    await s.until(lambda: s.worker.open == 0)


async def test_a_reply_before_the_request_was_read_is_passed_on_and_its_connection_not_used_again(
    stand: StartStand,
) -> None:
    s = await stand(upstream_idle_timeout_s=30.0)
    refusals = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal refusals
        refusals += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(plain(b"{}", status="413 Content Too Large"))
        await writer.drain()
        await done.wait()
        writer.close()

    done = asyncio.Event()
    server = await asyncio.start_server(refuse, "127.0.0.1", 0, limit=4096)
    s.routes.add(s.backend(s.worker, port=server.sockets[0].getsockname()[1]))
    big = post(b'{"model":"chat","x":"%b"}' % (b"y" * (16 << 20)))
    for count in (1, 2):
        assert (await s.ask(big)).status == 413
        assert refusals == count
    done.set()
    server.close()
    await s.until(lambda: len(asyncio.all_tasks()) <= 2)


# -- clients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fin", "rst"])
@pytest.mark.parametrize("phase", ["asked", "streaming"])
async def test_when_the_client_goes_the_worker_sees_it_at_once(stand: StartStand, way: str, phase: str) -> None:
    s = await stand()
    gone = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        if phase == "streaming":
            await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
        await talk.closed()
        gone.set()

    s.worker.behave = behave
    dialog = await s.dial()
    await dialog.send(post())
    if phase == "streaming":
        await dialog.reader.readuntil(b"data: 1\n\n\r\n")
    await s.until(lambda: len(s.worker.requests) == 1)
    if way == "fin":
        dialog.writer.write_eof()
    else:
        dialog.reset()
    async with asyncio.timeout(1.0):
        await gone.wait()
    await s.until(lambda: s.leases() == 0)
    assert s.failures == []
    # Seen: a client that closes at [DONE], as many do, was counted nowhere but at its worker.
    code = "200" if phase == "streaming" else "499"
    assert f'l40sd_proxy_requests_total{{model="chat",code="{code}"}} 1' in s.proxy.metrics_text()
    assert s.proxy.stats.served == (phase == "streaming")


async def test_a_client_that_leaves_the_line_leaves_nothing_behind(stand: StartStand) -> None:
    s = await stand(workers=0)
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: s.routes.waiting(CHAT) == 1)
    dialog.close()
    await s.until(lambda: s.routes.waiting(CHAT) == 0)


async def test_requests_wait_for_a_worker_and_are_served_in_order(stand: StartStand) -> None:
    s = await stand(workers=0)
    dialogs = []
    for number in range(5):
        dialogs.append(await s.dial())
        await dialogs[-1].send(post(b'{"model":"chat","n":%d}' % number))
        await s.until(lambda: s.routes.waiting(CHAT) == len(dialogs))
    worker = FakeWorker("late")
    s.workers.append(worker)
    await worker.start()
    s.routes.configure(queue_limit=10, in_flight_limit=1)
    s.routes.add(s.backend(worker))
    assert [(await dialog.reply()).status for dialog in dialogs] == [200] * 5
    assert [json.loads(request.body)["n"] for request in worker.requests] == list(range(5))


async def test_waiting_in_vain_ends_in_503_that_says_what_is_on_its_way(stand: StartStand) -> None:
    s = await stand(workers=0, queue_timeout_s=0.05)
    reply = await s.ask(post())
    assert (reply.status, reply.error["code"]) == (503, "no_worker")
    assert "2 workers are loading" in reply.error["message"]
    assert int(reply.fields["retry-after"]) > 0


async def test_a_full_line_refuses_at_once(stand: StartStand) -> None:
    s = await stand(workers=0, queue_limit=1)
    waiting = await s.dial()
    await waiting.send(post())
    await s.until(lambda: s.routes.waiting(CHAT) == 1)
    assert (await s.ask(post())).status == 503


async def test_waiting_for_a_model_that_is_taken_away_ends_in_404(stand: StartStand) -> None:
    s = await stand(workers=0)
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: s.routes.waiting(CHAT) == 1)
    s.routes.set_catalog({})
    assert (await dialog.reply()).status == 404
    s.routes.set_catalog({CHAT: CatalogEntry()})


async def test_a_slow_client_slows_the_worker_down_and_memory_stays_bounded(stand: StartStand) -> None:
    s = await stand()
    sent = 0

    async def behave(talk: Conversation, request: Request) -> None:
        nonlocal sent
        talk.writer.transport.set_write_buffer_limits(high=65536)
        await talk.send(STREAM_HEAD)
        part = chunk(b"z" * 65536)
        for _ in range(1000):
            await talk.send(part)
            sent += len(part)
        await talk.send(b"0\r\n\r\n")

    s.worker.behave = behave
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(raw, ("127.0.0.1", s.port))
    dialog = Dialog(*await asyncio.open_connection(sock=raw, limit=65536))
    await dialog.send(post())
    seen = -1
    while sent != seen:  # until the worker has come to a stand
        seen = sent
        await asyncio.sleep(0.2)
    assert sent < 32 << 20
    total = len(await dialog.reader.readuntil(b"\r\n\r\n"))
    while not (data := await dialog.reader.read(1 << 20)).endswith(b"\r\n0\r\n\r\n"):
        assert data
        total += len(data)
    assert sent == 1000 * len(chunk(b"z" * 65536))
    dialog.close()


async def test_a_client_that_sends_far_ahead_is_not_read_until_its_turn(stand: StartStand) -> None:
    s = await stand()
    s.worker.behave = sends(b"", then="silence")
    dialog = await s.dial()
    await dialog.send(post())
    await s.until(lambda: s.leases() == 1)
    dialog.writer.write(post(b'{"model":"chat","x":"%b"}' % (b"y" * 60000)) * 500)
    left = -1
    while left != (now := dialog.writer.transport.get_write_buffer_size()):  # until nothing moves any more
        left = now
        await asyncio.sleep(0.2)
    assert left > 10 << 20
    raw = dialog.writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    dialog.reset()  # without this option its end would stand behind what is not read, where nobody sees it
    await s.until(lambda: s.leases() == 0)


async def test_a_client_that_never_reads_is_cut_off_and_its_worker_not_blamed(stand: StartStand) -> None:
    s = await stand(idle_timeout_s=0.2)

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(STREAM_HEAD)
        for _ in range(1000):
            await talk.send(chunk(b"z" * 65536))

    s.worker.behave = behave
    dialog = await s.dial()
    dialog.reader._transport.pause_reading()  # type: ignore[attr-defined]
    await dialog.send(post())
    await s.until(lambda: len(s.worker.requests) == 1)
    await s.until(lambda: s.leases() == 0)
    assert s.failures == []


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost:", b"HTTP/1.1 408 "),
        (post()[:-3], b"HTTP/1.1 408 "),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", b"HTTP/1.1 408 "),
    ],
)
async def test_a_request_that_stops_coming_is_given_up(stand: StartStand, sent: bytes, answer: bytes) -> None:
    s = await stand(client_header_timeout_s=0.1, client_body_timeout_s=0.1)
    dialog = await s.dial()
    await dialog.send(sent)
    assert (await dialog.rest())[:13] == answer


async def test_a_head_that_trickles_in_has_one_deadline_for_all_of_it(stand: StartStand) -> None:
    s = await stand(client_header_timeout_s=0.3)
    dialog = await s.dial()

    async def trickle() -> None:
        for byte in post():
            await dialog.send(bytes([byte]))
            await asyncio.sleep(0.02)

    sending = asyncio.get_running_loop().create_task(trickle())
    assert (await dialog.rest()).startswith(b"HTTP/1.1 408 ")
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def test_idle_keep_alive_connections_are_closed(stand: StartStand) -> None:
    s = await stand(client_idle_timeout_s=0.1)
    dialog = await s.dial()
    await dialog.ask(post())
    assert await dialog.rest() == b""
    assert s.proxy.stats.connections == 0


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"X: " + b"y" * 5000 + b"\r\n", 431),
        (b"".join(b"X-%d: y\r\n" % number for number in range(10000)), 431),
        (b"Content-Length: 2000\r\n", 413),
        (b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n", 413),
        (b"Expect: nonsense\r\n", 417),
        (b"Transfer-Encoding: gzip, chunked\r\n", 501),
    ],
)
async def test_limits_are_kept_and_the_refusal_is_readable(stand: StartStand, head: bytes, status: int) -> None:
    s = await stand(head_limit_bytes=4096, body_limit_bytes=1024)
    dialog = await s.dial()
    reply = await dialog.ask(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n" + b"z" * 2000)
    assert reply.status == status
    assert reply.error["type"] == "invalid_request_error" if status < 500 else "server_error"


SMUGGLING = [
    b"Content-Length: 4\r\nContent-Length: 5\r\n",
    b"Content-Length: 4\r\nContent-Length: 4\r\n",
    b"Content-Length: 4, 4\r\n",
    b"Content-Length: +4\r\n",
    b"Content-Length: -4\r\n",
    b"Content-Length: 0x4\r\n",
    b"Content-Length:\r\n",
    b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Transfer-Encoding: chunked, identity\r\n",
    b"Transfer-Encoding: xchunked\r\n",
    b"Transfer-Encoding : chunked\r\n",
    b"Transfer-Encoding\t: chunked\r\n",
    b" Transfer-Encoding: chunked\r\n",
    b"X: a\r\n Transfer-Encoding: chunked\r\n",
    b"X: a\nTransfer-Encoding: chunked\r\n",
    b"X: a\rTransfer-Encoding: chunked\r\n",
    b"X: a\0b\r\n",
    b"X\0: a\r\n",
    b": a\r\n",
    b"nocolon\r\n",
    b"Host: other\r\n",
]


@pytest.mark.parametrize("fields", SMUGGLING)
async def test_a_request_that_could_be_read_in_two_ways_is_refused(stand: StartStand, fields: bytes) -> None:
    s = await stand()
    dialog = await s.dial()
    hidden = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n" + b'{"model":"chat"}'
    await dialog.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n0\r\n\r\n" + hidden)
    raw = await dialog.rest()
    assert raw[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 501")
    assert raw.count(b"x-l40s-source") == 1
    assert s.worker.requests == []


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"POST /v1/completions HTTP/1.1 ", 400),
        (b"POST  /v1/completions HTTP/1.1", 400),
        (b"POST /v1/comp letions HTTP/1.1", 400),
        (b"post /v1/completions HTTP/1.1", 400),
        (b"POST /v1/completions", 400),
        (b"POST /v1/completions HTTP/2.0", 505),
        (b"PRI * HTTP/2.0", 505),
        (b"CONNECT here:443 HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
async def test_a_bad_request_line_is_refused(stand: StartStand, line: bytes, status: int) -> None:
    s = await stand()
    dialog = await s.dial()
    await dialog.send(line + b"\r\nHost: x\r\n\r\n")
    assert (await dialog.rest())[9:12].decode() == str(status)


@pytest.mark.parametrize(
    "chunks", [b"-1\r\n", b"0x5\r\nabcde\r\n", b"5\r\nabcdefgh", b"5;\0\r\nabcde\r\n", b"g\r\n", b"f" * 2000]
)
async def test_a_broken_chunked_request_is_refused(stand: StartStand, chunks: bytes) -> None:
    s = await stand()
    dialog = await s.dial()
    await dialog.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert (await dialog.rest())[9:12] == b"400"


async def test_connections_over_the_limit_are_told_so_and_others_served(stand: StartStand) -> None:
    s = await stand(connection_limit=2)
    held = [await s.dial() for _ in range(2)]
    for dialog in held:
        assert (await dialog.ask(post())).status == 200
    over = await s.dial()
    await over.send(post())
    assert (await over.reply()).status == 503
    held.pop().close()
    over.close()
    await s.until(lambda: s.proxy.stats.connections == 1)
    assert (await s.ask(post())).status == 200


async def test_thousands_of_idle_connections_cost_little(stand: StartStand) -> None:
    s = await stand()
    count = min(2000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
    socks = []
    for _ in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", s.port))
        socks.append(sock)
    await s.until(lambda: s.proxy.stats.connections == count)
    assert (await s.ask(post())).status == 200
    for sock in socks:
        sock.close()
    await s.until(lambda: s.proxy.stats.connections <= 1)


def test_running_out_of_file_descriptors_is_survived(tmp_path: Path) -> None:
    """More clients than descriptors: some are refused or wait, none makes it spin or die, and it recovers."""
    ready = tmp_path / "proxy.sock"
    serve = [sys.executable, "-m", "benchmarks.proxy.serve", "--listen", f"unix:{ready}", "--workers", "127.0.0.1:1"]

    def with_few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(serve, cwd=root, preexec_fn=with_few_descriptors, stdout=subprocess.DEVNULL)
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    async def attack() -> None:
        async with asyncio.timeout(30):
            while not ready.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            socks = []
            for _ in range(300):
                sock = socket.socket(socket.AF_UNIX)
                sock.setblocking(False)
                socks.append(sock)
                while sock.connect_ex(str(ready)) == errno.EAGAIN:  # noqa: ASYNC110 - the kernel's queue is full
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.5)
            ticks = cpu_ticks(process.pid)
            await asyncio.sleep(1.0)
            assert cpu_ticks(process.pid) - ticks < os.sysconf("SC_CLK_TCK") // 2, "it spins"
            for sock in socks:
                sock.close()
            while True:
                reader, writer = await asyncio.open_unix_connection(str(ready))
                writer.write(ask)
                answer = await reader.read()
                writer.close()
                if answer.startswith(b"HTTP/1.1 200"):
                    return

    try:
        asyncio.run(attack())
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
