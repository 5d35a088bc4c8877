"""What one client may take from the others: memory, places, turns of the loop. Small limits stand for large ones."""

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable

import pytest
from proxykit import STREAM_HEAD, Conversation, Dialog, Request, Stand, answer_ok, chunk, post

from l40sd.proxy import client_connection, pages
from l40sd.proxy.bounds import FREE_BODY_BYTES, address_of

StartStand = Callable[..., Awaitable[Stand]]
MIB = 1 << 20


def body_of(size: int) -> bytes:
    return b'{"model":"chat","x":"' + b"y" * size + b'"}'


def begun(size: int, *, path: bytes = b"/v1/completions", fields: bytes = b"") -> bytes:
    """Return a head that announces a body."""
    return b"POST %b HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n" % (path, fields, size)


def memory(here: Stand) -> int:
    context = here.proxy._context
    assert context is not None
    return context.bounds.body_bytes


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/chat"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("framing", ["Content-Length: 67108864", "Transfer-Encoding: chunked"])
async def test_a_page_takes_no_body(stand: StartStand, path: str, method: str, framing: str) -> None:
    """20 connections to /health without a key had 1.2 GiB held for them."""
    here = await stand()
    client = await here.dial()
    await client.send(f"{method} {path} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n".encode())
    assert (await client.rest()).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("size", [1000, 64 * MIB])
async def test_a_body_is_not_read_without_a_key(stand: StartStand, size: int) -> None:
    here = await stand(api_keys=("sk-1",))
    client = await here.dial()
    await client.send(begun(size) + b"x" * 1000)
    assert (await client.reply()).status == 401
    assert all(not served.reader._parts and not served.reader.held for served in here.proxy.clients.open)


async def test_the_body_of_a_refused_request_takes_no_memory_from_the_others(stand: StartStand) -> None:
    """It is read to its end, so that its connection can be used again, and thrown away as it comes."""
    size = 60_000
    here = await stand(api_keys=("sk-1",), body_memory_bytes=2 * size, body_limit_bytes=2 * size)
    clients = [await here.dial() for _ in range(4)]
    for client in clients:
        await client.send(begun(size) + b"x" * (size - 1))
    for client in clients:
        await client.send(b"x")
        assert (await client.reply()).status == 401
    assert memory(here) == 0


async def test_bodies_together_are_bounded_and_who_is_refused_may_come_again(stand: StartStand) -> None:
    here = await stand(body_memory_bytes=2 * MIB, body_limit_bytes=2 * MIB)
    go_on = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        await go_on.wait()
        await answer_ok(talk, request)

    here.worker.behave = behave
    first = await here.dial()
    await first.send(post(body_of(MIB)))
    await here.until(lambda: len(here.worker.requests) == 1)
    assert memory(here) >= MIB, "kept until the worker has begun to answer: it may have to be sent again"
    second = await here.dial()
    second.writer.write(post(body_of(3 * MIB // 2)))
    reply = await second.reply()
    assert (reply.status, reply.error["code"]) == (503, "overloaded")
    assert int(reply.fields["retry-after"]) > 0
    await here.until(lambda: memory(here) < MIB + MIB // 2)
    small = await here.dial()
    await small.send(post())
    go_on.set()
    assert (await small.reply()).status == 200, "small ones are not counted"
    assert (await first.reply()).status == 200
    assert memory(here) == 0
    assert (await here.ask(post(body_of(3 * MIB // 2)))).status == 200


async def test_what_is_sent_ahead_counts_as_well(stand: StartStand) -> None:
    here = await stand(body_memory_bytes=MIB, body_limit_bytes=MIB)
    go_on = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        await go_on.wait()
        await answer_ok(talk, request)

    here.worker.behave = behave
    clients = [await here.dial() for _ in range(20)]
    for client in clients:
        client.writer.write(post() + post(body_of(200_000)))
    await here.until(lambda: here.proxy.stats.connections < 20)
    assert memory(here) <= MIB + 300_000
    go_on.set()
    served = 0
    for client in clients:
        try:
            served += (await client.reply()).status == 200
        except (ConnectionError, asyncio.IncompleteReadError):
            continue
    assert 0 < served < 20
    await here.until(lambda: memory(here) == 0)


@pytest.mark.parametrize("how", ["reset", "half", "chunks", "refused", "unknown", "lost worker"])
async def test_memory_for_bodies_is_given_back_however_it_ends(stand: StartStand, how: str) -> None:
    here = await stand(retries=0)
    size = 4 * FREE_BODY_BYTES
    client = await here.dial()
    match how:
        case "reset" | "half":
            await client.send(begun(2 * size) + b"y" * size)
            await here.until(lambda: memory(here) == size)
            if how == "reset":
                client.reset()
            else:
                client.writer.write_eof()
        case "chunks":
            head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            await client.send(head + b"%x\r\n%b\r\n" % (size, b"y" * size))
            await here.until(lambda: memory(here) == size)
            await client.send(b"broken\r\n")
            assert (await client.reply()).status == 400
        case "refused":
            await client.send(begun(size) + b"y" * size)
            assert (await client.reply()).status == 400
        case "unknown":
            await client.send(post(body_of(size).replace(b"chat", b"nope")))
            assert (await client.reply()).status == 404
        case _:

            async def behave(talk: Conversation, request: Request) -> None:
                talk.writer.close()

            here.worker.behave = behave
            await client.send(post(body_of(size)))
            assert (await client.reply()).status == 502
    await here.until(lambda: memory(here) == 0)


async def test_a_body_takes_memory_until_its_reply_begins(stand: StartStand) -> None:
    """It is kept to be sent again, which is over then: a stream may go on for an hour."""
    here = await stand()
    is_over = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        assert memory(here) > MIB
        await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
        await is_over.wait()
        await talk.send(b"0\r\n\r\n")

    here.worker.behave = behave
    client = await here.dial()
    client.writer.write(post(body_of(MIB)))
    await client.reader.readuntil(b"data: 1\n\n\r\n")
    assert memory(here) == 0
    (served,) = clients_of(here)
    assert served.exchange is not None
    assert not served.exchange._body
    is_over.set()
    await client.reader.readuntil(b"0\r\n\r\n")


async def test_nothing_is_kept_of_a_refused_request(stand: StartStand) -> None:
    """A model's name of 20 MiB stayed for as long as its connection idled; 30 of them stayed in the log's ring."""
    here = await stand(access_log=True)
    client = await here.dial()
    for body in (b'{"model":"' + b"n" * MIB + b'"}', b'{"a":[[]],"model":"' + b"n" * MIB + b'","b":[[]]}'):
        client.writer.write(post(body))
        assert (await client.reply()).status == 404
    await here.until(lambda: all(each.exchange is None for each in clients_of(here)))
    gc.collect()
    large = [each for each in gc.get_objects() if isinstance(each, (list, dict)) and is_large(each)]
    assert large == []
    for served in clients_of(here):
        for holder in (served, served.reader, served._cached_name):
            for name in [name for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ())]:
                value = getattr(holder, name)
                assert not isinstance(value, (bytes, str)) or len(value) < 10_000, name


def clients_of(here: Stand) -> list[client_connection.ClientConnection]:
    return list(here.proxy.clients.open)


def is_large(holder: list[object] | dict[object, object]) -> bool:
    values = list(holder) if isinstance(holder, list) else list(holder.values())
    return any(isinstance(value, (bytes, str)) and len(value) >= MIB and value[5:] == value[:-5] for value in values)


async def test_the_access_log_cuts_what_a_client_chose(stand: StartStand, caplog: pytest.LogCaptureFixture) -> None:
    import structlog.testing

    here = await stand(access_log=True)
    with structlog.testing.capture_logs() as logs:
        reply = await here.ask(post(model="n" * 900, path="/v1/completions?" + "q" * 9000))
        assert reply.status == 404
    line = next(entry for entry in logs if entry["event"] == "proxy.request")
    assert len(json.dumps(line)) < 2000
    assert line["model"] == "n" * 200


@pytest.mark.parametrize(
    ("peername", "address"),
    [
        (("192.0.2.7", 5000), "192.0.2.7"),
        (("2001:db8:1:2::7", 5000, 0, 0), "2001:db8:1:2::"),
        (("2001:db8:1:2:ffff::8", 5000, 0, 0), "2001:db8:1:2::"),
        (("2001:db8:1:3::7", 5000, 0, 0), "2001:db8:1:3::"),
        (("fe80::1%eth0", 5000, 0, 2), "fe80::"),
        (("::ffff:192.0.2.7", 5000, 0, 0), "192.0.2.7"),
        ("", ""),
    ],
)
def test_what_one_customer_has_is_one_address(peername: object, address: str) -> None:
    """A provider gives each customer 2**64 addresses of IPv6 and more: counted one by one they would be no bound."""
    assert address_of(asyncio.BaseTransport({"peername": peername})) == address


async def test_one_address_cannot_take_every_place(stand: StartStand) -> None:
    here = await stand(connection_limit=8, address_connection_limit=3)
    held = [await here.dial() for _ in range(3)]
    for dialog in held:
        assert (await dialog.ask(post())).status == 200
    over = await here.dial()
    reply = await over.reply()
    assert (reply.status, reply.error["code"]) == (429, "too_many_connections")
    assert int(reply.fields["retry-after"]) > 0
    other = Dialog(*await asyncio.open_connection("127.0.0.1", here.port, local_addr=("127.0.0.2", 0)))
    here.dialogs.append(other)
    assert (await other.ask(post())).status == 200
    held.pop().close()
    over.close()
    await here.until(lambda: here.proxy.stats.connections == 3)
    assert (await here.ask(post())).status == 200


async def test_requests_sent_ahead_are_answered_some_at_a_time(
    stand: StartStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sent 6000 requests for a page in one go had them all answered in one turn of the loop."""
    here = await stand()
    turns: list[int] = [0]

    def next_turn() -> None:
        turns.append(0)
        asyncio.get_running_loop().call_soon(next_turn)

    show = pages.show

    def counting(*args: object, **options: object) -> object:
        turns[-1] += 1
        return show(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pages, "show", counting)
    client = await here.dial()
    next_turn()
    client.writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 2000)
    for _ in range(2000):
        assert (await client.reply()).status == 200
    assert sum(turns) == 2000
    assert max(turns) <= 4 * client_connection.REQUESTS_PER_TURN
    monkeypatch.undo()


async def test_a_client_that_does_not_read_gets_no_further_answers(stand: StartStand) -> None:
    here = await stand()
    count = 4000
    client = await here.dial()
    client.reader._limit = 1 << 10  # type: ignore[attr-defined]  # of what is read ahead here
    client.writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * count)
    await here.until(lambda: any(each.is_paused for each in clients_of(here)))
    for _ in range(50):
        await asyncio.sleep(0)
    waiting = sum(each.transport.get_write_buffer_size() for each in clients_of(here))
    page = len((await client.reply()).body)
    assert waiting < 65536 + (client_connection.REQUESTS_PER_TURN + 1) * (page + 500)
    for _ in range(count - 1):
        assert (await client.reply()).status == 200


async def test_connections_to_workers_are_bounded_with_the_clients(stand: StartStand) -> None:
    here = await stand(workers=3, connection_limit=2, upstream_idle_timeout_s=60.0)
    first, second = [await here.dial() for _ in range(2)]
    for _ in range(6):
        assert (await first.ask(post())).status == 200
        assert (await second.ask(post())).status == 200
        await here.until(lambda: sum(worker.open for worker in here.workers) <= 2)
    assert here.failures == []
