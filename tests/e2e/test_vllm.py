"""Real vLLM on the CPU, two ranks, tensor and pipeline parallel: what no other engine here can show.

`scripts/setup --vllm` installs it; `scripts/test --engines` runs this.
"""

import asyncio
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest
from daemonkit import Site, SiteOf

from l40sd.control.messages import WorkerStatus

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

VLLM = Path(__file__).resolve().parents[2] / ".cache" / "vllm"
START_S = 600.0
"""A minute on two cores that have nothing else to do."""
STREAMS, TOKENS = 4, 600
TINY = f"""
[host]
inventory = "l40s-8"
[daemon]
pattern = "pair"
[workers]
drain_timeout_s = 240
term_timeout_s = 240
env = {{ VLLM_CPU_OMP_THREADS_BIND = "nobind", OMP_NUM_THREADS = "1", HF_HUB_OFFLINE = "1" }}
[health]
startup_timeout_s = {START_S:g}
stall_timeout_s = {START_S:g}
[models.tiny]
engine = "vllm"
source = "{VLLM / "models" / "tiny"}"
args = ["-cc", '{{"mode":2,"backend":"eager"}}', "--kv-cache-memory-bytes", "67108864", "--dtype", "bfloat16"]
[engines.vllm]
env = {{ PATH = "{VLLM / "bin"}:{os.environ["PATH"]}" }}
[[patterns.pair.replicas]]
model = "tiny"
count = 1
"""


@dataclass
class Stream:
    """What came of one."""

    tokens: int = 0
    finish: str = ""
    is_whole: bool = False


async def read(session: aiohttp.ClientSession, worker: WorkerStatus, key: str, stream: Stream) -> None:
    """Ask the worker itself: the proxy would drain it first."""
    question = {"model": "tiny", "prompt": "1", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {key}"}
    async with session.post(f"http://{worker.address}/v1/completions", json=question, headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: [DONE]"):
                stream.is_whole = True
            elif line.startswith(b"data: "):
                choice = json.loads(line[6:]).get("choices", [{"finish_reason": "error"}])[0]
                stream.tokens += 1
                stream.finish = choice["finish_reason"] or ""


def worker_key(site: Site) -> str:
    return next(site.folder.rglob("worker-keys/tiny")).read_text().strip()


def ranks(worker: WorkerStatus) -> list[psutil.Process]:
    assert worker.pid is not None
    below = psutil.Process(worker.pid).children(recursive=True)
    return [process for process in below if any("VLLM::Worker" in part for part in process.cmdline())]


def run_folder(worker: WorkerStatus) -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp")) / f"l40sd-{worker.instance.rsplit('-', 1)[1]}"


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("vllm_dist_*")}


@pytest.mark.parametrize("split", ["tp", "pp"])
async def test_vllm_is_stopped_with_its_streams_whole_and_its_end_is_told(site_of: SiteOf, split: str) -> None:
    """SIGTERM to the whole group ended the ranks before they had drained: 8 of 8 streams cut at TP2. Of a rank that
    died "exited with status 0" was told; its segments of shared memory and its sockets stayed."""
    if not (VLLM / ".setup").exists():
        pytest.fail(f"{VLLM} is missing: run scripts/setup --vllm")
    before = segments()
    site = site_of(f"{TINY}{split} = 2\n")
    await site.start()
    first = (await site.until_ready("pair", START_S)).workers[0]
    folder = run_folder(first)
    assert list(folder.iterdir()), "its temporary files are its own"
    assert len(ranks(first)) == 2

    streams = [Stream() for _ in range(STREAMS)]
    timeout = aiohttp.ClientTimeout(total=START_S)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(read(session, first, worker_key(site), stream))
        async with asyncio.timeout(START_S):
            while not all(stream.tokens for stream in streams):  # noqa: ASYNC110 - another process makes them
                await asyncio.sleep(0.01)
        await site.post(f"/v1/workers/{first.id}/restart")
        assert not any(stream.is_whole for stream in streams), "they are under way when it is told to stop"
    assert streams == [Stream(TOKENS, "length", is_whole=True)] * STREAMS
    exited = await site.until_event("worker.exited", START_S)
    assert (exited.level, exited.data["reason"]) == ("info", "stopped as told")
    assert not folder.exists()

    status = await site.until(
        lambda s: s.workers[0].phase == "ready" and s.workers[0].instance != first.instance, "again", START_S
    )
    second = status.workers[0]
    cache = next(site.folder.rglob(f"cache/tiny-{'tp2-pp1' if split == 'tp' else 'tp1-pp2'}"))
    assert (cache / "vllm").is_dir()
    assert cache.stat().st_mode & 0o777 == 0o700

    ranks(second)[0].send_signal(signal.SIGKILL)
    status = await site.until(lambda s: s.workers[0].instance != second.instance, "the dead rank is seen", START_S)
    told = [event for event in await site.events() if event.event == "worker.exited" and event.level == "warning"]
    assert "its rank VllmWorker-" in told[0].data["reason"], told[0].data
    assert not run_folder(second).exists()
    assert segments() <= before
