"""What browsers are told of the endpoint, and whoever looks for it at a wrong path."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from proxykit import STREAM_HEAD, Behaviour, Conversation, Reply, Request, Stand, answer_ok, chunk, plain, post

StartStand = Callable[..., Awaitable[Stand]]

PAGE = "http://localhost:5173"
ELSEWHERE = "https://evil.example"
ASKED = "authorization,content-type,x-stainless-os"


def of(origin: str) -> bytes:
    return f"Origin: {origin}\r\n".encode()


def preflight(path: str, origin: str, method: str = "POST") -> bytes:
    return (
        f"OPTIONS {path} HTTP/1.1\r\nHost: x\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: {method}\r\n"
        f"Access-Control-Request-Headers: {ASKED}\r\n\r\n"
    ).encode()


def get(path: str, origin: str = PAGE) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nOrigin: {origin}\r\n\r\n".encode()


def cors_of(reply: Reply) -> dict[str, str]:
    return {name: value for name, value in reply.fields.items() if name.startswith("access-control-")}


def says(fields: bytes, status: str = "200 OK") -> Behaviour:
    """Return an engine that says these of CORS itself, in a whole reply or a stream."""

    async def behave(talk: Conversation, request: Request) -> None:
        if b"stream" in request.body:
            await talk.send(STREAM_HEAD[:-2] + fields + b"\r\n" + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        else:
            await talk.send(plain(b'{"ok":1}', status, fields=b"content-type: application/json\r\n" + fields))

    return behave


STREAM = b'{"model":"chat","stream":true}'
ENGINES = {
    "none": b"",
    "vLLM": b"access-control-allow-origin: *\r\naccess-control-allow-credentials: true\r\n",
    "llama.cpp": b"Access-Control-Allow-Origin: \r\n",
    "any": b"ACCESS-CONTROL-EXPOSE-HEADERS: x-secret\r\nx: y\r\naccess-control-max-age: 7\r\n",
}


@pytest.mark.parametrize("engine", list(ENGINES))
async def test_a_page_that_is_allowed_can_read_every_reply(stand: StartStand, engine: str) -> None:
    """Browser clients (Open WebUI's direct connections, Obsidian, a developer's page) could not use the endpoint."""
    s = await stand(cors_origins=(PAGE, "app://obsidian.md"), api_keys=("k",), body_limit_bytes=1024)
    s.worker.behave = says(ENGINES[engine])
    dialog = await s.dial()
    key = b"Authorization: Bearer k\r\n"
    requests = [
        *[post(extra=key + of(PAGE))] * 3,  # parsed, known, known again
        *[post(STREAM, extra=key + of(PAGE))] * 2,
        get("/v1/models").replace(b"\r\n\r\n", b"\r\n" + key + b"\r\n"),
        get("/health"),
        get("/metrics"),
        get("/nowhere"),
        post(extra=of(PAGE)),  # no key
        post(extra=key + of(PAGE), model="nope"),
        post(b"{}", extra=key + of(PAGE)),
        post(b"x" * 2000, extra=key + of(PAGE)),
    ]
    statuses = []
    for request in requests:
        reply = await dialog.ask(request)
        statuses.append(reply.status)
        assert cors_of(reply) == {
            "access-control-allow-origin": PAGE,
            "access-control-expose-headers": "x-request-id, x-l40s-worker, x-l40s-source, retry-after",
        }
        assert reply.fields["vary"] == "Origin"
    assert statuses == [200] * 8 + [404, 401, 404, 400, 413]
    assert not any("origin" in request.fields for request in s.worker.requests), "it is not the engine's to judge"


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("origins", [(), (PAGE,)])
async def test_what_an_engine_says_of_other_pages_does_not_get_out(
    stand: StartStand, engine: str, origins: tuple[str, ...]
) -> None:
    """An engine that allows every origin opened the endpoint to every page that its user has open."""
    s = await stand(cors_origins=origins)
    s.worker.behave = says(ENGINES[engine])
    dialog = await s.dial()
    bodies = []
    for request in [*[post(extra=of(ELSEWHERE))] * 3, *[post(STREAM, extra=of(ELSEWHERE))] * 2]:
        reply = await dialog.ask(request)
        assert cors_of(reply) == {}
        assert ("vary" in reply.fields) == bool(origins)
        assert reply.fields.get("x") == ("y" if engine == "any" else None), "the other fields are passed on"
        bodies.append(reply.body)
    assert bodies == [b'{"ok":1}'] * 3 + [b"data: [DONE]\n\n"] * 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/v1/messages", "/chat/completions"])
async def test_a_browsers_question_is_answered_for_its_page_before_any_key(stand: StartStand, path: str) -> None:
    """For a path that is not there too: the page can then read the error, and the hint in it."""
    s = await stand(cors_origins=(PAGE,), api_keys=("k",))
    reply = await s.ask(preflight(path, PAGE))
    assert reply.status == 204
    assert cors_of(reply)["access-control-allow-origin"] == PAGE
    assert cors_of(reply)["access-control-allow-headers"] == ASKED
    assert ("GET" if path == "/v1/models" else "POST") in cors_of(reply)["access-control-allow-methods"]
    assert int(cors_of(reply)["access-control-max-age"]) > 0
    refused = await s.ask(preflight(path, ELSEWHERE))
    assert (refused.status, cors_of(refused)) == (403, {})
    assert b"cors_origins" in refused.body


async def test_with_no_origins_a_browsers_question_gets_no_leave(stand: StartStand) -> None:
    s = await stand()
    reply = await s.ask(preflight("/v1/models", PAGE, "GET"))
    assert (reply.status, reply.fields["allow"], cors_of(reply)) == (204, "GET, HEAD, OPTIONS", {})
    assert (await s.ask(get("/v1/models"))).status == 200


@pytest.mark.parametrize(
    ("content_type", "is_simple"),
    [
        ("text/plain", True),
        ("Text/Plain;charset=UTF-8", True),
        ("application/x-www-form-urlencoded", True),
        ("multipart/form-data; boundary=x", True),
        ("", True),
        ("application/json", False),
    ],
)
async def test_a_page_elsewhere_cannot_make_workers_work_with_a_simple_post(
    stand: StartStand, content_type: str, *, is_simple: bool
) -> None:
    """A browser sends it without asking first, and the engine reads any body as JSON: its GPUs worked for any page."""
    s = await stand(cors_origins=(PAGE,))

    def asked(origin: bytes) -> bytes:
        line = f"Content-Type: {content_type}\r\n".encode() if content_type else b""
        return post(b'{"model":"chat"}', extra=origin).replace(b"Content-Type: application/json\r\n", line)

    reply = await s.ask(asked(of(ELSEWHERE)))
    assert (reply.status, len(s.worker.requests)) == ((403, 0) if is_simple else (200, 1))
    if is_simple:
        assert (reply.error["code"], cors_of(reply)) == ("origin_not_allowed", {})
    assert (await s.ask(asked(of(ELSEWHERE) + of(PAGE)))).status == (403 if is_simple else 200), "two are none"
    for allowed in (of(PAGE), b""):  # no browser: curl, a library
        assert (await s.ask(asked(allowed))).status == (400 if content_type.startswith("multipart") else 200)


async def test_every_origin_may_be_allowed(stand: StartStand) -> None:
    s = await stand(cors_origins=("*",))
    for request in (post(extra=of(ELSEWHERE)), get("/v1/models", ELSEWHERE), preflight("/v1/models", ELSEWHERE)):
        reply = await s.ask(request)
        assert cors_of(reply)["access-control-allow-origin"] == "*"
        assert "vary" not in reply.fields
    assert cors_of(await s.ask(post())) == {}


async def test_other_origins_count_from_the_next_request_on_an_open_connection_too(stand: StartStand) -> None:
    s = await stand(cors_origins=(PAGE,))
    dialog = await s.dial()
    simple = post(b'{"model":"chat"}', extra=of(PAGE)).replace(b"application/json", b"text/plain")
    for _ in range(2):
        assert cors_of(await dialog.ask(simple))["access-control-allow-origin"] == PAGE
    s.proxy.configure(replace(s.config, cors_origins=("https://other.example",)))
    assert (await dialog.ask(simple)).status == 403
    s.proxy.configure(replace(s.config, cors_origins=()))
    assert (await dialog.ask(simple)).status == 200


async def test_a_names_list_that_is_none_is_not_repeated(stand: StartStand) -> None:
    s = await stand(cors_origins=(PAGE,))
    reply = await s.ask(preflight("/v1/models", PAGE).replace(ASKED.encode(), b"a, b c; d"))
    assert (reply.status, "access-control-allow-headers" in reply.fields) == (204, False)


# -- wrong paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "did you mean /v1/chat/completions? The base URL for OpenAI's libraries ends in /v1"),
        ("/models", "did you mean /v1/models? The base URL for OpenAI's libraries ends in /v1"),
        ("/messages", "did you mean /v1/messages? The base URL for OpenAI's libraries ends in /v1"),
        ("/v1/v1/messages", "did you mean /v1/messages? The base URL has one /v1 too many"),
        ("/v1/v1/chat/completions", "did you mean /v1/chat/completions? The base URL has one /v1 too many"),
        ("//v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/chat/completions/", "did you mean /v1/chat/completions?"),
        ("/v1/chat/completions/chat/completions", "did you mean /v1/chat/completions?"),
        ("/openai/deployments/x/embeddings", "did you mean /v1/embeddings?"),
        ("/api/chat", "OpenAI's is, with a base URL that ends in /v1"),
        ("/", "the API is below /v1, and /v1/models lists what is served"),
        ("/v1", "the API is below /v1, and /v1/models lists what is served"),
    ],
)
async def test_a_base_url_that_is_wrong_by_a_version_gets_a_hint(stand: StartStand, path: str, hint: str) -> None:
    """The library's user saw ``there is nothing at /chat/completions`` and nothing else."""
    s = await stand()
    reply = await s.ask(post(path=path))
    assert reply.status == 404
    error = json.loads(reply.body)["error"]
    assert error["message"].startswith(f"there is nothing at {path}")
    assert hint in error["message"]


@pytest.mark.parametrize("path", ["/favicon.ico", "/v2/nothing", "/v1/fine-tuning/jobs"])
async def test_where_nobody_knows_what_was_meant_nothing_is_said(stand: StartStand, path: str) -> None:
    s = await stand()
    s.worker.behave = answer_ok
    assert (await s.ask(get(path))).error["message"] == f"there is nothing at {path}"
