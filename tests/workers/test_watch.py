"""What is made of a worker that has just answered 500: does it end, or is it only in trouble?"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from l40sd.config.options import HealthConfig
from l40sd.engines.launch import Launch
from l40sd.engines.table import ENGINES
from l40sd.model import WorkerId
from l40sd.workers.probe import Prober
from l40sd.workers.requests import Requests
from l40sd.workers.run import Run
from l40sd.workers.watch import Watch


@asynccontextmanager
async def answering(status: int | None) -> AsyncIterator[int]:
    """A port where every health probe is answered with this status; None: not at all, for as long as it is there."""
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            if status is None:
                await is_over.wait()
                return
            writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % status)
            await writer.drain()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        is_over.set()


def watch_of(port: int, prober: Prober, *, is_running: bool) -> Watch:
    launch = Launch(
        worker=WorkerId("w"),
        engine="vllm",
        argv=(),
        env={},
        host="127.0.0.1",
        port=port,
        api_key="",
        served_name="m",
        probes=ENGINES["vllm"].probes,
        term_timeout_s=1.0,
        fingerprint="",
    )
    return Watch(
        run=cast(Run, SimpleNamespace(launch=launch, instance=SimpleNamespace(is_running=is_running))),
        requests=cast(Requests, None),
        prober=prober,
        config=HealthConfig(probe_timeout_s=0.2),
        deadline_s=60.0,
        past_loads_s=(),
        log_path=Path("/dev/null"),
        peers=lambda: (),
    )


@pytest.mark.parametrize(
    ("status", "is_running", "is_ending"),
    [
        (200, True, False),
        (503, True, True),
        (500, True, True),
        (None, True, False),  # late: it may only be busy, and its requests are not to be taken from it
        (200, False, True),  # what is left of it answers still
        (None, False, True),
    ],
)
async def test_a_worker_ends_when_its_health_says_no_or_its_process_is_gone(
    status: int | None, is_running: bool, is_ending: bool
) -> None:
    prober = Prober()
    async with answering(status) as port:
        assert await watch_of(port, prober, is_running=is_running).is_ending() is is_ending
        await prober.close()


async def test_a_worker_whose_port_is_closed_ends() -> None:
    prober = Prober()
    async with answering(200) as port:
        pass
    assert await watch_of(port, prober, is_running=True).is_ending()
    await prober.close()
