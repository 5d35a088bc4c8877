"""The simulated engine as a process: what it serves, and that each fault is the fault it is named for."""

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest

from l40sd.config.options import Config, ModelConfig
from l40sd.engines.launch import build
from l40sd.engines.table import ENGINES
from l40sd.model import GpuId, Inventory, ModelName, Placement, WorkerId
from l40sd.workers.health import Counters
from l40sd.workers.probe import Prober

DEADLINE_S = 20
PROBES = ENGINES["simulated"].probes


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    output: Path
    http: aiohttp.ClientSession
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, **more: object) -> aiohttp.ClientResponse:
        """Ask; the caller reads the reply or closes it."""
        question = {"model": "llama", "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 5, **more}
        return await self.http.post(f"{self.url}/v1/chat/completions", json=question)

    async def status(self, **more: object) -> int:
        """Ask, read the whole reply, and return its status."""
        async with await self.ask(**more) as reply:
            await reply.read()
            return reply.status

    async def get(self, path: str) -> int:
        async with self.http.get(f"{self.url}{path}") as reply:
            await reply.read()
            return reply.status

    async def state(self) -> dict[str, object]:
        return await (await self.http.get(f"{self.url}/sim/state")).json()

    async def set(self, **faults: float | None) -> None:
        named = {name.replace("_", "-"): number for name, number in faults.items()}
        assert (await self.http.post(f"{self.url}/sim/fault", json=named)).status == 200

    async def until(self, **wanted: object) -> None:
        """Wait until the engine's own account says this."""
        async with asyncio.timeout(DEADLINE_S):
            while {name: (await self.state())[name] for name in wanted} != wanted:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)

    async def line(self, containing: bytes) -> bytes:
        """Wait for a whole line of output with this in it."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                lines = self.output.read_bytes().split(b"\n")[:-1]
                for line in lines:
                    if containing in line:
                        return line
                await asyncio.sleep(0.01)

    async def exit_code(self) -> int:
        return await asyncio.to_thread(self.process.wait, DEADLINE_S)


@asynccontextmanager
async def process(*args: str, env: dict[str, str] | None = None, argv: tuple[str, ...] = ()) -> AsyncIterator[Running]:
    argv = argv or (sys.executable, "-m", "l40sd.sim.engine", "--model", "llama", "--port", "0", *args)
    with tempfile.NamedTemporaryFile() as output:
        # asyncio's own subprocesses end only when their pipes do, and leaked ranks hold those open.
        child = subprocess.Popen(argv, env={**os.environ, **(env or {})}, stdout=output)  # noqa: ASYNC220
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as http:
                yield Running(child, Path(output.name), http)
        finally:
            child.kill()
            child.wait(DEADLINE_S)


@asynccontextmanager
async def engine(*args: str, env: dict[str, str] | None = None) -> AsyncIterator[Running]:
    """An engine that listens."""
    async with process(*args, env=env) as running:
        running.port = int((await running.line(b"listening on")).rsplit(b":", 1)[1])
        yield running


@pytest.fixture
def foster_children() -> Iterator[psutil.Process]:
    """Orphans of this test become its children, are seen, and are ended with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_child_subreaper = 36
    assert libc.prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0
    before = {child.pid for child in psutil.Process().children()}
    yield psutil.Process()
    for child in psutil.Process().children():
        if child.pid not in before:
            child.kill()
            child.wait(DEADLINE_S)
    libc.prctl(pr_set_child_subreaper, 0, 0, 0, 0)


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line]


# --- what it serves


@pytest.mark.parametrize(("path", "part"), [("chat/completions", "message"), ("completions", "text")])
async def test_it_counts_to_the_number_of_tokens_asked_for(path: str, part: str) -> None:
    async with engine() as running:
        question = {"model": "llama", "prompt": "a b", "messages": [], "max_tokens": 3}
        reply = await (await running.http.post(f"{running.url}/v1/{path}", json=question)).json()
    content = reply["choices"][0][part]
    assert (content["content"] if part == "message" else content) == " 1 2 3"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 3


async def test_a_stream_ends_with_its_usage_and_done() -> None:
    async with engine() as running:
        reply = await running.ask(stream=True, stream_options={"include_usage": True})
        *parts, usage, done = events(await reply.text())
    assert done == "[DONE]"
    assert json.loads(usage)["usage"]["completion_tokens"] == 5
    said = [json.loads(part)["choices"][0] for part in parts]
    assert "".join(one["delta"].get("content", "") for one in said) == " 1 2 3 4 5"
    assert [one["finish_reason"] for one in said] == [None] * 5 + ["length"]


async def test_only_the_api_asks_for_the_key() -> None:
    async with engine(env={"L40SD_SIM_API_KEY": "sk-1"}) as running:
        assert await running.status() == 401
        assert await running.get("/health") == 200
        assert await running.get("/metrics") == 200
        listed = await running.http.get(f"{running.url}/v1/models", headers={"authorization": "Bearer sk-1"})
        assert [model["id"] for model in (await listed.json())["data"]] == ["llama"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b'{"model": "other"}', 404), (b"{", 400), (b"[]", 400), (b'{"model": "llama", "max_tokens": "x"}', 400)],
)
async def test_a_wrong_request_is_refused_and_the_next_is_answered(body: bytes, status: int) -> None:
    async with engine() as running:
        reply = await running.http.post(f"{running.url}/v1/completions", data=body)
        assert (reply.status, (await reply.json())["error"]["param"]) == (status, None)
        assert await running.status() == 200


async def test_a_request_in_chunks_is_read() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"model": "llama",'
        yield b'"max_tokens": 2}'

    async with engine() as running:
        reply = await running.http.post(f"{running.url}/v1/completions", data=chunks())
        assert (await reply.json())["choices"][0]["text"] == " 1 2"


async def test_what_the_table_says_about_it_is_so() -> None:
    """The table's record, from the command line to the counters: started, listed, asked, scraped, with its key."""
    name = ModelName("llama")
    config = Config(models={name: ModelConfig(name=name, engine="simulated", aliases=("alias",))})
    host = Inventory(host="h", source="test", gpus=(), numa_nodes=(), links={})
    placement = Placement(worker=WorkerId("w"), model=name, tp=1, pp=1, gpus=(GpuId("GPU-1"),))
    launch = build(placement, config, host, port=0, api_key="sk-1", python=sys.executable)
    prober = Prober()
    async with process(argv=launch.argv, env=dict(launch.env)) as running:
        port = int((await running.line(b"listening on")).rsplit(b":", 1)[1])
        at = ("127.0.0.1", port, launch.probes, "sk-1")
        assert (await prober.health(*at, 5)).ok
        assert [model.id for model in (await prober.models(*at, 5))[1]] == ["llama", "alias"]
        assert (await prober.one_token(*at, "llama", 5)).ok
        assert await prober.counters(*at, 5) == Counters(running=0, waiting=0, tokens=1)
        assert (await (await running.http.get(f"http://127.0.0.1:{port}/sim/state")).json())["gpus"] == "GPU-1"
        await prober.close()


async def test_requests_beyond_its_slots_wait_and_are_counted() -> None:
    async with engine("--slots", "1", "--fault", "hang-after=0") as running, asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(running.status()) for _ in range(3)]
        await running.until(running=1, waiting=2)
        await running.set(hang_after=None)
        assert [await one for one in asked] == [200] * 3


async def test_a_client_that_leaves_frees_its_slot() -> None:
    async with engine("--tokens-per-s", "50") as running, asyncio.TaskGroup() as tasks:
        stream = await running.ask(stream=True, max_tokens=100_000)
        await stream.content.readline()
        stream.close()
        await running.until(running=0, cut=1)
        asked = tasks.create_task(running.status(max_tokens=100_000))
        await running.until(running=1)
        asked.cancel()
        await running.until(running=0, cut=2)


# --- how it ends


async def test_sigterm_aborts_open_streams_as_if_they_were_complete() -> None:
    async with engine("--tokens-per-s", "20") as running:
        reply = await running.ask(stream=True, max_tokens=10_000)
        await reply.content.readline()
        running.process.terminate()
        *_, last, done = events(await reply.text())
        assert (json.loads(last)["choices"][0]["finish_reason"], done) == ("abort", "[DONE]")
        assert await running.exit_code() == 0


async def test_with_a_drain_open_streams_run_to_their_end_and_health_stays_good() -> None:
    async with engine("--tokens-per-s", "20", "--drain-s", "10") as running:
        reply = await running.ask(stream=True, max_tokens=10)
        await reply.content.readline()
        running.process.terminate()
        await running.line(b"stopping")
        assert await running.get("/health") == 200
        *_, last, _ = events(await reply.text())
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert await running.exit_code() == 0


async def test_it_can_be_told_to_ignore_sigterm() -> None:
    async with engine("--fault", "ignore-term") as running:
        running.process.terminate()
        await running.line(b"does not")
        assert await running.status() == 200


@pytest.mark.parametrize("code", [0, 1, 78])
async def test_it_exits_at_once(code: int) -> None:
    async with process("--fault", f"exit-at-once={code}") as running:
        assert await running.exit_code() == code


async def test_it_dies_some_time_after_it_was_ready() -> None:
    async with engine("--fault", "die-after=0.05") as running:
        assert await running.exit_code() == 1


async def test_it_crashes_after_so_many_requests() -> None:
    async with engine(env={"L40SD_SIM_FAULTS": "crash-after=1,slow-metrics=0"}) as running:
        assert await running.status() == 200
        with pytest.raises(aiohttp.ClientError):
            await running.status()
        assert await running.exit_code() == 1


async def test_it_exits_at_a_poisoned_request_and_at_no_other() -> None:
    async with engine("--fault", "poison=3") as running:
        assert await running.status() == 200
        with pytest.raises(aiohttp.ClientError):
            await running.status(prompt="a poisoned one")
        assert await running.exit_code() == 3


async def test_with_a_dead_core_it_says_so_and_exits_a_moment_later() -> None:
    async with engine("--fault", "dead-core=0.5") as running:
        assert await running.status() == 500
        assert await running.get("/health") == 503
        assert await running.exit_code() == 1


async def test_an_unknown_fault_is_refused_with_the_known_ones() -> None:
    async with process("--fault", "hang") as running:
        assert b"hang-after" in await running.line(b"no fault 'hang'")
        assert await running.exit_code() == 2


# --- how it fails


async def test_it_never_opens_its_port() -> None:
    async with process("--fault", "never-bind") as running:
        await running.line(b"GPUs")
        assert not psutil.Process(running.process.pid).net_connections()
        running.process.terminate()
        assert await running.exit_code() == 0


async def test_it_says_503_while_loading_and_for_ever_when_told() -> None:
    async with engine("--loading-s", "0.1", "--fault", "unavailable") as running:
        assert await running.get("/health") == 503
        await running.set(unavailable=None)
        async with asyncio.timeout(DEADLINE_S):
            while await running.get("/health") != 200:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)


async def test_it_hangs_with_a_good_health_and_still_counters() -> None:
    prober = Prober()
    async with engine("--fault", "hang-after=1") as running, asyncio.TaskGroup() as tasks:
        assert await running.status() == 200
        hanging = tasks.create_task(running.status())
        await running.until(running=1)
        at = ("127.0.0.1", running.port, PROBES, "")
        seen = {await prober.counters(*at, 5) for _ in range(3)}
        assert seen == {Counters(running=1, waiting=0, tokens=5)}
        assert (await prober.health(*at, 5)).ok
        await running.set(hang_after=None)
        assert await hanging == 200
    await prober.close()


async def test_it_is_slow_to_say_that_it_is_well() -> None:
    prober = Prober()
    async with engine("--fault", "slow-health") as running:
        assert (await prober.health("127.0.0.1", running.port, PROBES, "", 0.1)).error == "timeout"
        assert (await prober.one_token("127.0.0.1", running.port, PROBES, "", "llama", 5)).ok
    await prober.close()


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    ("fault", "last"),
    [
        ("half-response", b""),
        ("half-event", b'"delta": {"content": "\xc3'),
        ("bad-chunk", b"zz\r\nnot a chunk\r\n"),
        ("reset", None),
    ],
)
async def test_it_breaks_so_many_replies_and_no_more(fault: str, last: bytes | None, is_stream: bool) -> None:
    """Read byte by byte: a client library might mend, or miss, what is broken."""
    async with engine("--fault", f"{fault}=1") as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        body = json.dumps({"model": "llama", "stream": is_stream}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        if last is None:
            with pytest.raises(ConnectionResetError):
                await reader.read()
        else:
            rest = await reader.read()
            assert rest.endswith(last)
            assert not rest.endswith(b"0\r\n\r\n")
        writer.close()
        assert await running.status(stream=is_stream) == 200


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_request_brings_its_own_break_along(is_stream: bool) -> None:
    """A fault that is counted in requests may strike the daemon's own question, or not the second try of a request."""
    async with engine() as running:
        for _ in range(2):
            with pytest.raises(aiohttp.ClientError):
                await running.status(stream=is_stream, simulate="half-response")
            assert await running.status(stream=is_stream) == 200


async def test_it_answers_so_many_requests_with_500() -> None:
    async with engine("--fault", "error=2") as running:
        assert [await running.status() for _ in range(3)] == [500, 500, 200]


# --- its processes, output and memory


async def test_the_death_of_a_rank_is_its_own(foster_children: psutil.Process) -> None:
    async with engine("--ranks", "2") as running:
        ranks = (await running.state())["ranks"]
        assert isinstance(ranks, list)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert await running.exit_code() == 1
        assert psutil.pid_exists(ranks[0])


async def test_the_death_of_a_rank_may_go_unnoticed(foster_children: psutil.Process) -> None:
    async with engine("--ranks", "2", "--fault", "rank-death-unnoticed") as running, asyncio.TaskGroup() as tasks:
        ranks = (await running.state())["ranks"]
        assert isinstance(ranks, list)
        os.kill(ranks[1], signal.SIGKILL)
        await running.until(ranks=ranks[:1])
        assert await running.get("/health") == 200
        asked = tasks.create_task(running.status())
        await running.until(running=1, tokens=0)
        asked.cancel()


@pytest.mark.parametrize("leaks", [False, True])
async def test_a_clean_exit_takes_its_ranks_along_unless_it_leaks(foster_children: psutil.Process, leaks: bool) -> None:
    async with engine("--ranks", "3", *(["--fault", "leak-children"] if leaks else [])) as running:
        ranks = (await running.state())["ranks"]
        assert isinstance(ranks, list)
        running.process.terminate()
        assert await running.exit_code() == 0
        left = {child.pid for child in foster_children.children() if child.status() != psutil.STATUS_ZOMBIE}
        assert left & set(ranks) == (set(ranks) if leaks else set())


async def test_its_daemon_child_is_nobodys_and_has_no_environment(foster_children: psutil.Process) -> None:
    before = {child.pid for child in foster_children.children()}
    async with engine("--fault", "daemon-child=2") as running:
        fostered = [c for c in foster_children.children() if c.pid not in {*before, running.process.pid}]
        assert len(fostered) == 2
        assert [child.environ().keys() - {"PWD", "SHLVL", "_", "OLDPWD"} for child in fostered] == [set(), set()]
        assert all(os.getsid(child.pid) not in {os.getsid(0), child.pid} for child in fostered)


async def test_its_fork_bomb_is_bounded(foster_children: psutil.Process) -> None:
    async with engine() as running:
        await running.set(fork_bomb=20)
        await running.line(b"20 of 20 born")
        children = psutil.Process(running.process.pid).children()
        assert len({os.getsid(child.pid) for child in children}) == 20


async def test_it_takes_memory() -> None:
    async with engine() as running:
        before = psutil.Process(running.process.pid).memory_info().rss
        await running.set(memory=64)
        assert psutil.Process(running.process.pid).memory_info().rss - before > 60 << 20


@pytest.mark.parametrize(
    ("fault", "number", "expected"),
    [("flood_log", 1, b"flood x"), ("long_line", 1, b"x" * (1 << 20)), ("bad_output", 3, b"\xff\xfe\x00\x00")],
    ids=["flood", "long line", "no text"],
)
async def test_it_writes_what_no_log_should_have_to_take(fault: str, number: float, expected: bytes) -> None:
    async with engine() as running:
        await running.set(**{fault: number})
        await running.line(expected)


async def test_a_dozen_start_together() -> None:
    async with AsyncExitStack() as stack:
        dozen = await asyncio.gather(*(stack.enter_async_context(process()) for _ in range(12)))
        for running in dozen:
            await running.line(b"listening on")
