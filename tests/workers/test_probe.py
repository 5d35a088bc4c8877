"""What a prober makes of workers that answer, refuse, stay silent, say too much or talk nonsense. Real sockets."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.engines.table import ENGINES, Probes
from l40sd.model import ListedModel
from l40sd.workers.health import Counters
from l40sd.workers.probe import ANSWER_LIMIT_BYTES, Prober, sum_metrics

VLLM = ENGINES["vllm"].probes
LLAMA = ENGINES["llama-cpp"].probes
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def worker(answer: Answer) -> AsyncIterator[int]:
    """A port on loopback where every connection is answered like this."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            await answer(reader, writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def saying(payload: bytes, *, seen: list[bytes] | None = None) -> AsyncIterator[int]:
    """A worker that sends these bytes after it has read a request, which is added to ``seen``."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = [int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-length")]
        body = await reader.readexactly(length[0]) if length else b""
        if seen is not None:
            seen.append(head + body)
        writer.write(payload)
        await writer.drain()

    async with worker(answer) as port:
        yield port


def http(status: int, body: bytes | str | dict[str, object] = b"") -> bytes:
    text = json.dumps(body).encode() if isinstance(body, dict) else body.encode() if isinstance(body, str) else body
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(text)) + text


@pytest.fixture
async def prober() -> AsyncIterator[Prober]:
    prober = Prober()
    yield prober
    await prober.close()


async def test_a_worker_that_says_200_is_healthy(prober: Prober) -> None:
    async with saying(http(200)) as port:
        result = await prober.health("127.0.0.1", port, VLLM, "", 5)
    assert (result.ok, result.status, result.error) == (True, 200, "")


@pytest.mark.parametrize("status", [503, 500, 401, 302])
async def test_any_other_status_is_named(prober: Prober, status: int) -> None:
    async with saying(http(status)) as port:
        result = await prober.health("127.0.0.1", port, VLLM, "", 5)
    assert (result.ok, result.status, result.error) == (False, status, f"status {status}")


async def test_a_closed_port_is_refused(prober: Prober) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        result = await prober.health("127.0.0.1", free.getsockname()[1], VLLM, "", 5)
    assert (result.ok, result.status, result.error) == (False, None, "refused")


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def trickling(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nfew")
    await silent(_, writer)


@pytest.mark.parametrize("answer", [silent, trickling])
async def test_a_worker_that_takes_the_connection_and_falls_silent_is_a_timeout(prober: Prober, answer: Answer) -> None:
    async with worker(answer) as port:
        result = await prober.health("127.0.0.1", port, VLLM, "", 0.05)
    assert (result.ok, result.error) == (False, "timeout")


async def test_an_engine_that_works_before_it_answers_gets_its_own_time(prober: Prober) -> None:
    async with saying(http(200)) as port:
        result = await prober.health("127.0.0.1", port, Probes(health_timeout_s=5), "", 1e-9)
    assert result.ok


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 99999,
    ],
    ids=["closed", "not HTTP", "half an answer", "endless head"],
)
async def test_an_answer_that_is_none_is_an_error_in_one_line(prober: Prober, payload: bytes) -> None:
    async with saying(payload) as port:
        result = await prober.health("127.0.0.1", port, VLLM, "", 5)
    assert not result.ok
    assert result.error.startswith("broken answer: ")
    assert "\n" not in result.error


async def test_a_reset_connection_is_an_error(prober: Prober) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        linger_zero = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_zero)

    async with worker(answer) as port:
        result = await prober.health("127.0.0.1", port, VLLM, "", 5)
    assert result.error.startswith("broken answer: ")


async def test_an_endless_answer_is_cut_off(prober: Prober) -> None:
    """No memory for a worker that has gone mad: it is read to the limit and no further."""
    sent = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                sent += 65536
                await writer.drain()
        except ConnectionError:
            return

    async with worker(answer) as port:
        result = await prober.health("127.0.0.1", port, VLLM, "", 10)
        assert result.error == "answer longer than 1 MiB"
    assert ANSWER_LIMIT_BYTES < sent < 64 * ANSWER_LIMIT_BYTES


async def test_the_served_names_are_listed_with_the_key(prober: Prober) -> None:
    seen: list[bytes] = []
    async with saying(http(200, {"data": [{"id": "llama"}, {"id": "alias"}, {}, 7]}), seen=seen) as port:
        _, models = await prober.models("127.0.0.1", port, VLLM, "sk-worker", 5)
    assert models == (ListedModel(id="llama"), ListedModel(id="alias"))
    assert b"GET /v1/models " in seen[0]
    assert b"bearer sk-worker" in seen[0].lower()


async def test_what_the_engine_says_of_a_model_is_kept_and_nonsense_is_not(prober: Prober) -> None:
    """Clients that size their prompts by ``max_model_len`` (Open WebUI, aider) found none at the endpoint."""
    said = {"id": "llama", "created": 1700000000, "owned_by": "vllm", "max_model_len": 32768, "root": "/models/x"}
    nonsense = {"id": "alias", "created": True, "owned_by": 7, "max_model_len": "many"}
    beyond = {"id": "beyond", "created": -1, "owned_by": "x" * 5000, "max_model_len": 1 << 60}
    llama_cpp = {"id": "slot", "owned_by": "llamacpp", "meta": {"n_ctx": 512, "n_ctx_train": 8192}}
    async with saying(http(200, {"data": [said, nonsense, beyond, llama_cpp, {"id": "x", "meta": 7}]})) as port:
        _, models = await prober.models("127.0.0.1", port, VLLM, "", 5)
    assert models == (
        ListedModel(id="llama", created=1700000000, owned_by="vllm", max_model_len=32768),
        ListedModel(id="alias"),
        ListedModel(id="beyond", owned_by="x" * 100),
        ListedModel(id="slot", owned_by="llamacpp", max_model_len=512),
        ListedModel(id="x"),
    )


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"data": 3}', "[" * 100_000])
async def test_no_list_is_no_names(prober: Prober, body: str) -> None:
    async with saying(http(200, body)) as port:
        assert (await prober.models("127.0.0.1", port, VLLM, "", 5))[1] == ()


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", b'"prompt"'), ("/v1/chat/completions", b'"messages"')])
async def test_one_token_is_asked_for_and_counted(prober: Prober, path: str, field: bytes) -> None:
    seen: list[bytes] = []
    async with saying(http(200, {"choices": [{"text": "1", "finish_reason": "length"}]}), seen=seen) as port:
        result = await prober.one_token("127.0.0.1", port, Probes(token_path=path), "", "llama", 5)
    assert result.ok
    assert f"POST {path} ".encode() in seen[0]
    assert field in seen[0]
    assert b'"max_tokens": 1' in seen[0]


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (http(500), "status 500"),
        (http(200, {"choices": []}), "answer without a token"),
        (http(200, "<html>"), "answer without a token"),
        (http(200, {"choices": [{"text": "", "finish_reason": "abort"}]}), "aborted"),
    ],
)
async def test_a_token_that_did_not_come_is_named(prober: Prober, payload: bytes, error: str) -> None:
    """A vLLM that is going down ends its requests with finish_reason "abort", as if they were complete."""
    async with saying(payload) as port:
        result = await prober.one_token("127.0.0.1", port, VLLM, "", "llama", 5)
    assert (result.ok, result.error) == (False, error)


METRICS = """# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a } \\" b 9"} 2.0
vllm:num_requests_running{engine="1",model_name="x"} 1.0 1700000000
vllm:num_requests_waiting{engine="0"} 4.0
vllm:generation_tokens_total{engine="0"} 1e3
vllm:generation_tokens_created{engine="0"} 9e9
vllm:prompt_tokens_total{engine="0"} NaN
vllm:iteration_tokens_total_count{engine="0"} 5 # {trace="1"} 7
"""


@pytest.mark.parametrize(("probes", "key"), [(VLLM, b""), (LLAMA, b"bearer sk-worker")])
async def test_metrics_are_asked_for_with_the_key_only_where_it_is_needed(
    prober: Prober, probes: Probes, key: bytes
) -> None:
    seen: list[bytes] = []
    async with saying(http(200, METRICS), seen=seen) as port:
        await prober.counters("127.0.0.1", port, probes, "sk-worker", 5)
    assert (b"authorization" in seen[0].lower()) == bool(key)
    assert key in seen[0].lower()


async def test_counters_are_summed_over_engines_and_labels(prober: Prober) -> None:
    async with saying(http(200, METRICS)) as port:
        counters = await prober.counters("127.0.0.1", port, VLLM, "", 5)
    assert counters == Counters(running=3, waiting=4, tokens=1005)


async def test_counters_that_are_not_there_are_unknown_not_zero(prober: Prober) -> None:
    async with saying(http(200, "vllm:num_requests_running 1\n")) as port:
        assert await prober.counters("127.0.0.1", port, VLLM, "", 5) == Counters(running=1)
    async with saying(http(503)) as port:
        assert await prober.counters("127.0.0.1", port, VLLM, "", 5) is None
    assert await prober.counters("127.0.0.1", 1, ENGINES["external"].probes, "", 5) is None


async def test_a_proxy_named_in_the_environment_is_not_asked_the_way(
    prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with saying(http(200)) as port:
        assert (await prober.health("127.0.0.1", port, VLLM, "", 5)).ok


async def test_every_question_opens_and_closes_its_own_connection(prober: Prober) -> None:
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(http(200))
        assert await reader.read() == b""

    async with worker(answer) as port:
        for _ in range(3):
            assert (await prober.health("127.0.0.1", port, VLLM, "", 5)).ok
    assert connections == 3


@given(st.text())
def test_no_text_breaks_the_reading_of_metrics(text: str) -> None:
    sum_metrics(text, {"a"})
    assert sum_metrics(f"{text}\na 1\n", {"a"})["a"] == pytest.approx(1 + sum_metrics(f"{text}\n", {"a"}).get("a", 0))


@given(st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=4))
def test_whatever_a_label_holds_the_values_are_summed(values: dict[str, int]) -> None:
    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    text = "".join(f'm{{l="{quoted(label)}"}} {value}\n' for label, value in values.items())
    assert sum_metrics(text, {"m"}).get("m", 0) == sum(values.values())


async def test_fault_61_a_host_that_does_not_reach_itself_says_so(prober: Prober) -> None:
    assert await prober.loops_back("127.0.0.1", 5)
    assert not await prober.loops_back("192.0.2.1", 5), "an address that this host does not have"
