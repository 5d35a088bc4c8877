"""What a well-behaved client and well-behaved workers get."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from proxykit import CHAT, STREAM_HEAD, Conversation, Dialog, Request, Stand, answer_ok, chunk, plain, post

from l40sd.errors import L40sError
from l40sd.model import ListedModel, ModelName, WorkerId
from l40sd.routing.routes import CatalogEntry

StartStand = Callable[..., Awaitable[Stand]]


async def test_a_request_is_answered_by_a_worker_that_is_named(stand: StartStand) -> None:
    s = await stand()
    reply = await s.ask(post())
    assert (reply.status, reply.body) == (200, b'{"ok":true}')
    assert reply.fields["x-l40s-worker"] == "w0"
    assert len(reply.fields["x-request-id"]) > 8
    assert s.routes.served(WorkerId("w0")) == 1


async def test_the_worker_gets_the_clients_fields_without_the_hop_by_hop_ones_and_with_its_own_key(
    stand: StartStand,
) -> None:
    s = await stand()
    s.routes.add(s.backend(s.worker, api_key="worker-secret"))
    extra = (
        b"Authorization: Bearer client-secret\r\nX-Api-Key: other-secret\r\nConnection: keep-alive, X-Hop\r\n"
        b"X-Hop: 1\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\nUpgrade: h2c\r\nProxy-Authorization: x\r\n"
        b"X-Request-Id: mine-1\r\nX-Kept: as it is \r\n"
    )
    reply = await s.ask(post(extra=extra))
    fields = s.worker.requests[0].fields
    assert fields == {
        "host": f"127.0.0.1:{s.worker.port}",
        "authorization": "Bearer worker-secret",
        "content-type": "application/json",
        "x-kept": "as it is ",
        "x-request-id": "mine-1",
        "content-length": str(len(s.worker.requests[0].body)),
    }
    assert reply.fields["x-request-id"] == "mine-1"


@pytest.mark.parametrize("bad", [b"with space", b"x" * 129, b"caf\xc3\xa9"])
async def test_a_request_id_that_is_not_sound_is_replaced(stand: StartStand, bad: bytes) -> None:
    s = await stand()
    reply = await s.ask(post(extra=b"X-Request-Id: " + bad + b"\r\n"))
    assert reply.fields["x-request-id"].encode() != bad
    assert s.worker.requests[0].fields["x-request-id"] == reply.fields["x-request-id"]


async def test_the_workers_hop_by_hop_fields_stay_behind(stand: StartStand) -> None:
    s = await stand()

    async def behave(talk: Conversation, request: Request) -> None:
        fields = b"connection: keep-alive, x-mine\r\nx-mine: 1\r\nkeep-alive: timeout=5\r\nx-l40s-worker: forged\r\n"
        await talk.send(plain(b"{}", fields=fields + b"x-a: 1\r\nX-Request-ID: forged\r\n"))

    s.worker.behave = behave
    reply = await s.ask(post())
    assert set(reply.fields) == {"x-a", "content-length", "x-l40s-worker", "x-request-id"}
    assert reply.fields["x-l40s-worker"] == "w0"


async def test_a_stream_arrives_byte_for_byte_and_event_by_event(stand: StartStand) -> None:
    s = await stand()
    go_on = asyncio.Event()
    events = [b"data: %d\n\n" % number for number in range(20)]

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(STREAM_HEAD + chunk(events[0]))
        await go_on.wait()
        for event in events[1:]:
            await talk.send(chunk(event))
        await talk.send(b"0\r\n\r\n")

    s.worker.behave = behave
    dialog = await s.dial()
    await dialog.send(post())
    head = await dialog.reader.readuntil(b"data: 0\n\n\r\n")  # before the worker goes on
    go_on.set()
    body = await dialog.reader.readuntil(b"\r\n0\r\n\r\n")
    assert head.partition(b"\r\n\r\n")[2] + body == b"".join(map(chunk, events)) + b"0\r\n\r\n"
    assert (await dialog.ask(post(model="gpt"))).status == 200  # the connection is still good


async def test_connections_are_kept_on_both_sides(stand: StartStand) -> None:
    s = await stand()
    dialog = await s.dial()
    for _ in range(10):
        assert (await dialog.ask(post())).status == 200
    assert (s.worker.connections, len(s.worker.requests)) == (1, 10)


async def test_idle_connections_to_workers_are_closed_before_the_worker_would(stand: StartStand) -> None:
    s = await stand(upstream_idle_timeout_s=0.1)
    await s.ask(post())
    await s.until(lambda: s.worker.open == 0)


async def test_an_idle_connection_to_a_removed_worker_is_closed(stand: StartStand) -> None:
    s = await stand(upstream_idle_timeout_s=3.0)
    await s.ask(post())
    s.routes.remove(WorkerId("w0"))
    await s.until(lambda: s.worker.open == 0)


async def test_requests_go_to_the_least_busy_worker(stand: StartStand) -> None:
    s = await stand(workers=3)
    go_on = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        await go_on.wait()
        await answer_ok(talk, request)

    for worker in s.workers:
        worker.behave = behave
    dialogs = [await s.dial() for _ in range(6)]
    for dialog in dialogs:
        await dialog.send(post())
    await s.until(lambda: s.leases() == 6)
    assert [s.routes.in_flight(WorkerId(w.name)) for w in s.workers] == [2, 2, 2]
    assert s.proxy.stats.in_flight == 6
    go_on.set()
    assert [(await dialog.reply()).status for dialog in dialogs] == [200] * 6


async def test_an_alias_and_a_differently_named_engine_get_the_name_the_engine_knows(stand: StartStand) -> None:
    s = await stand()
    s.routes.add(s.backend(s.worker, served_name='org/"model" é'))
    body = b'{"messages": [{"content": "\\"model\\": \\"gpt\\""}], "model": "gpt", "stream":false}'
    await s.ask(post(body))
    got = s.worker.requests[0].body
    assert json.loads(got) == {**json.loads(body), "model": 'org/"model" é'}
    assert got.startswith(b'{"messages": [{"content": "\\"model\\": \\"gpt\\""}], "model": "')


async def test_an_audio_forms_model_is_found_and_renamed(stand: StartStand) -> None:
    s = await stand()
    form = (
        b'--b0\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n\x00\xff--b0 \r\n'
        b'--b0\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt\r\n--b0--\r\n'
    )
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b0\r\n"
    reply = await s.ask(head + b"Content-Length: %d\r\n\r\n" % len(form) + form)
    assert reply.status == 200
    assert s.worker.requests[0].body == form.replace(b"gpt", b"chat")


async def test_a_chunked_request_reaches_the_worker_with_its_length(stand: StartStand) -> None:
    s = await stand()
    body = b'{"model":"chat","messages":[]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    framed = chunk(body[:7]) + b"5;ext=1\r\n" + body[7:12] + b"\r\n" + chunk(body[12:]) + b"0\r\nx-trailer: 1\r\n\r\n"
    dialog = await s.dial()
    assert (await dialog.ask(head + framed)).status == 200
    assert s.worker.requests[0].body == body
    assert (await dialog.ask(post())).status == 200


async def test_a_client_that_waits_for_100_continue_is_told_to_go_on(stand: StartStand) -> None:
    s = await stand()
    whole = post(extra=b"Expect: 100-continue\r\n")
    head, _, body = whole.partition(b"\r\n\r\n")
    dialog = await s.dial()
    assert (await dialog.ask(head + b"\r\n\r\n")).status == 100
    assert (await dialog.ask(body)).status == 200
    assert "expect" not in s.worker.requests[0].fields


async def test_pipelined_requests_are_answered_in_order(stand: StartStand) -> None:
    s = await stand(workers=2)

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(plain(json.dumps(json.loads(request.body)["n"]).encode()))

    for worker in s.workers:
        worker.behave = behave
    dialog = await s.dial()
    many = [post(b'{"model":"chat","n":%d}' % number) for number in range(30)]
    await dialog.send(b"".join([many[0], b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", *many[1:]]))
    replies = [await dialog.reply() for _ in range(31)]
    assert [reply.status for reply in replies] == [200] * 31
    assert b"models" in replies.pop(1).body
    assert [int(reply.body) for reply in replies] == list(range(30))


async def test_pipelining_more_than_is_held_is_slowed_down_not_lost(stand: StartStand) -> None:
    s = await stand()
    dialog = await s.dial()
    sending = asyncio.get_running_loop().create_task(
        dialog.send(post(b'{"model":"chat","x":"%b"}' % (b"y" * 9000)) * 100)
    )
    assert [(await dialog.reply()).status for _ in range(100)] == [200] * 100
    await sending


async def test_http_1_0_clients_get_an_unchunked_reply_and_a_closed_connection(stand: StartStand) -> None:
    s = await stand()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
        await talk.send(chunk(b"data: 2\n\n") + b"0\r\n\r\n")

    s.worker.behave = behave
    dialog = await s.dial()
    await dialog.send(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = (await dialog.rest()).partition(b"\r\n\r\n")
    assert body == b"data: 1\n\ndata: 2\n\n"
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head


async def test_a_reply_that_ends_with_its_connection_is_passed_on_whole(stand: StartStand) -> None:
    s = await stand()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nhello ")
        await talk.send(b"world")
        talk.writer.close()

    s.worker.behave = behave
    dialog = await s.dial()
    await dialog.send(post())
    raw = await dialog.rest()
    assert raw.endswith(b"\r\n\r\nhello world")
    assert b"connection: close" in raw
    assert s.failures == []


async def test_interim_replies_are_not_taken_for_the_reply(stand: StartStand) -> None:
    s = await stand()

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + plain(b"done"))

    s.worker.behave = behave
    assert (await s.ask(post())).body == b"done"


async def test_a_large_body_and_a_large_reply_pass_unchanged(stand: StartStand) -> None:
    s = await stand()
    body = b'{"model":"chat","x":"' + b"0123456789" * 300_000 + b'"}'

    async def behave(talk: Conversation, request: Request) -> None:
        await talk.send(plain(request.body))

    s.worker.behave = behave
    reply = await s.ask(post(body))
    assert reply.body == body


async def test_what_is_not_an_api_path_is_not_found_in_openais_shape(stand: StartStand) -> None:
    s = await stand()
    for path in ("/", "/v1/fine_tuning/jobs", "/v1/chat/completions/../x", "/v1/audio/../../x", "/docs", "/v1/%63hat"):
        reply = await s.ask(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        assert (reply.status, reply.error["code"]) == (404, "not_found")
    reply = await s.ask(b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (reply.status, reply.fields["allow"]) == (405, "POST, OPTIONS")
    assert s.worker.requests == []


async def test_an_unknown_model_is_refused_with_the_names_of_the_known(stand: StartStand) -> None:
    s = await stand()
    dialog = await s.dial()
    reply = await dialog.ask(post(model="other"))
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    assert "chat" in reply.error["message"]
    reply = await dialog.ask(post(b"{}"))
    assert (reply.status, reply.error["code"]) == (400, "missing_required_parameter")
    reply = await dialog.ask(post(b"{nonsense"))
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")
    assert (await dialog.ask(post())).status == 200


async def test_tokenize_goes_where_engines_have_it(stand: StartStand) -> None:
    s = await stand()
    await s.ask(post(path="/v1/tokenize?a=1"))
    assert s.worker.requests[0].head.startswith(b"POST /tokenize?a=1 HTTP/1.1\r\n")


async def test_the_models_are_shown_as_their_engines_describe_them(stand: StartStand) -> None:
    """created was 0 and the owner l40sd for every model, and its length was nowhere: clients could not size prompts."""
    s = await stand(workers=2)

    async def shown() -> list[dict[str, object]]:
        return list(json.loads((await s.ask(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")).body)["data"])

    plain_entry = {"object": "model", "created": 0, "owned_by": "l40sd", "root": "chat", "ready": 2}
    assert await shown() == [{"id": "chat", **plain_entry}, {"id": "gpt", **plain_entry}]
    for worker, created, length in zip(s.workers, (1700000007, 1700000000), (32768, 4096), strict=True):
        listed = ListedModel(id="chat", created=created, owned_by="vllm", max_model_len=length)
        s.routes.add(s.backend(worker, listed=listed))
    said = {**plain_entry, "created": 1700000000, "owned_by": "vllm", "max_model_len": 4096}
    assert await shown() == [{"id": "chat", **said}, {"id": "gpt", **said}]
    assert json.loads((await s.ask(b"GET /v1/models/gpt HTTP/1.1\r\nHost: x\r\n\r\n")).body) == {"id": "gpt", **said}
    s.routes.remove(WorkerId("w1"))
    assert (await shown())[0]["max_model_len"] == 32768
    s.routes.remove(WorkerId("w0"))
    assert (await shown())[0] == {"id": "chat", **said, "ready": 0, "max_model_len": 4096}, "as it was said last"


async def test_models_health_ready_and_metrics(stand: StartStand) -> None:
    s = await stand()

    async def page(path: str, method: str = "GET") -> tuple[int, str]:
        dialog = await s.dial()
        await dialog.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await dialog.rest()).decode().partition("\r\n\r\n")
        return int(head.split(" ")[1]), body

    status, body = await page("/v1/models")
    models = json.loads(body)
    assert (status, models["object"]) == (200, "list")
    assert [(m["id"], m["root"], m["ready"]) for m in models["data"]] == [("chat", "chat", 1), ("gpt", "chat", 1)]
    assert json.loads((await page("/v1/models/gpt"))[1])["id"] == "gpt"
    assert (await page("/v1/models/other"))[0] == 404
    assert (await page("/health"))[0] == (await page("/ready"))[0] == 200
    assert await page("/health", "HEAD") == (200, "")
    s.routes.set_catalog({CHAT: CatalogEntry(), ModelName("embed"): CatalogEntry()})
    assert ((await page("/health"))[0], (await page("/ready"))[0]) == (200, 503)
    s.routes.remove(WorkerId("w0"))
    assert (await page("/health"))[0] == 503
    await s.ask(post(model="nope"))
    status, text = await page("/metrics")
    assert 'l40sd_proxy_requests_total{model="",code="404"}' in text
    assert "nope" not in text  # a name that a client made up is no label
    assert 'l40sd_worker_in_flight{worker="w0"} 0' in text
    assert s.proxy.metrics_text().endswith("\n")


async def test_the_metrics_are_what_prometheus_reads(stand: StartStand) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    s = await stand()
    for _ in range(3):
        await s.ask(post())
    families = {f.name: f for f in text_string_to_metric_families(s.proxy.metrics_text())}
    samples = {(x.name, *sorted(x.labels.items())): x.value for f in families.values() for x in f.samples}
    assert samples["l40sd_proxy_requests_total", ("code", "200"), ("model", "chat")] == 3
    assert samples["l40sd_proxy_duration_seconds_bucket", ("le", "+Inf"), ("model", "chat")] == 3
    assert samples["l40sd_worker_served_total", ("worker", "w0")] == 3
    assert families["l40sd_proxy_first_byte_seconds"].type == "histogram"


async def test_with_keys_only_those_who_have_one_are_served_and_keys_can_be_changed(stand: StartStand) -> None:
    s = await stand(api_keys=("one", "two"))
    dialog = await s.dial()
    for extra, status in (
        (b"", 401),
        (b"Authorization: Bearer three\r\n", 401),
        (b"Authorization: Basic one\r\n", 401),
        (b"Authorization: Bearer one\r\n", 200),
        (b"authorization: bearer two\r\n", 200),
        (b"x-api-key: one\r\n", 200),
    ):
        assert (await dialog.ask(post(extra=extra))).status == status
    refused = await dialog.ask(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    assert (await dialog.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200
    good = post(extra=b"Authorization: Bearer one\r\n")
    assert (await dialog.ask(good)).status == 200
    s.proxy.set_api_keys(["three"])
    assert (await dialog.ask(good)).status == 401  # also on a connection that was served with the old key


async def test_options_and_head(stand: StartStand) -> None:
    s = await stand()
    dialog = await s.dial()
    reply = await dialog.ask(b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (reply.status, reply.fields["allow"]) == (204, "POST, OPTIONS")
    assert (await dialog.ask(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")).status == 204
    assert s.worker.requests == []


async def test_it_listens_on_ipv6_and_on_a_path_and_says_so_when_it_cannot(stand: StartStand, tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    s = await stand(listen=("127.0.0.1:0", "[::1]:0", f"unix:{path}"))
    _, six, unix = s.proxy.addresses
    assert six.startswith("[::1]:")
    assert unix == f"unix:{path}"
    for opening in (asyncio.open_connection("::1", int(six.rpartition(":")[2])), asyncio.open_unix_connection(path)):
        dialog = Dialog(*await opening)
        assert (await dialog.ask(post())).status == 200
        dialog.close()
    with pytest.raises(L40sError) as caught:
        await stand(listen=(s.proxy.addresses[0],))
    assert caught.value.code == "cannot_listen"
    with pytest.raises(L40sError):
        await stand(listen=(f"unix:{path}",))  # somebody answers there
    await s.proxy.stop(1.0)
    assert not path.exists()


async def test_a_socket_left_behind_is_replaced(stand: StartStand, tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    s = await stand(listen=(f"unix:{path}",))
    dialog = Dialog(*await asyncio.open_unix_connection(path))
    assert (await dialog.ask(post())).status == 200
    dialog.close()
    await s.proxy.stop(1.0)


async def test_an_inherited_socket_is_used_and_not_bound_again(stand: StartStand) -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = own.getsockname()[1]
        s = Stand(listen=(f"127.0.0.1:{port}",))
        await s.worker.start()
        s.routes.add(s.backend(s.worker))
        await s.proxy.start([own.dup()])
        assert s.proxy.addresses == (f"127.0.0.1:{port}",)
        assert (await s.ask(post())).status == 200
        await s.finish()


async def test_while_accepting_is_paused_connections_queue_and_none_is_refused(stand: StartStand) -> None:
    s = await stand()
    await s.proxy.pause_accepting()
    dialogs = [await s.dial() for _ in range(5)]
    for dialog in dialogs:
        await dialog.send(post())
    assert s.proxy.stats.connections == 0
    await s.proxy.resume_accepting()
    assert [(await dialog.reply()).status for dialog in dialogs] == [200] * 5


async def test_stopping_lets_open_requests_end_and_closes_idle_connections(stand: StartStand) -> None:
    s = await stand()
    go_on = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        await go_on.wait()
        await answer_ok(talk, request)

    s.worker.behave = behave
    idle, busy = await s.dial(), await s.dial()
    await busy.send(post())
    await s.until(lambda: s.leases() == 1)
    stopping = asyncio.get_running_loop().create_task(s.proxy.stop(10.0))
    assert await idle.rest() == b""
    with pytest.raises(ConnectionRefusedError):
        await s.dial()
    go_on.set()
    reply = await busy.reply()
    assert (reply.status, reply.fields["connection"]) == (200, "close")
    await stopping


async def test_stopping_is_bounded(stand: StartStand) -> None:
    s = await stand()
    never = asyncio.Event()

    async def behave(talk: Conversation, request: Request) -> None:
        await never.wait()

    s.worker.behave = behave
    busy = await s.dial()
    await busy.send(post())
    await s.until(lambda: s.leases() == 1)
    await s.proxy.stop(0.05)
    assert s.leases() == 0
    await busy.rest()


async def test_limits_can_be_changed_while_it_runs(stand: StartStand) -> None:
    s = await stand()
    dialog = await s.dial()
    assert (await dialog.ask(post())).status == 200
    s.proxy.configure(type(s.config)(listen=s.config.listen, body_limit_bytes=1024))
    reply = await dialog.ask(post(b'{"model":"chat","x":"%b"}' % (b"y" * 2000)))
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert (await dialog.ask(post())).status == 200
