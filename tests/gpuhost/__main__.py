"""``scripts/gpu-check``: l40sd on this host's real GPUs, with a small engine of our own that torchrun starts.

What recorded hosts cannot show: NVML's numbers, GPUs chosen by UUID in rank order, memory that is free again before the
next worker starts, strangers on a GPU named, and all of it while the pattern changes under a load. A line for each;
takes two to four minutes, and every GPU of the host, which must be free.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path

from daemonkit import MARKER, Site
from loadkit import Mix, load

from l40sd.control.messages import Status, Topology, WorkerStatus
from l40sd.errors import L40sError

GIB = 1 << 30
HELD_GIB = 4.0
STRANGER_GIB = 6.0
ENGINE = Path(__file__).with_name("tensors.py")
PASSED_ON = ("NCCL_", "TORCH_", "NVSHMEM_")
"""What a host may need to be set for its GPUs to work together; the daemon passes nothing on by itself."""
START_S = 180.0
CHANGE_S = 300.0
FREE_S = 60.0

CONFIG = """
[daemon]
pattern = "A"
[host]
inventory = "auto"
[workers]
drain_timeout_s = 30
term_timeout_s = 15
start_parallel = 4
[engines.tensors]
base = "torchrun"
command = [{python}, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "{{ranks}}",
    "--max-restarts", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    "{{model}}", "--host", "{{host}}", "--port", "{{port}}", "--name", "{{name}}", "--memory-gib", "{held}"]
[engines.tensors.env]
{env}
[models.tensors]
engine = "tensors"
source = {engine}
attention_heads = 64
"""


def say(text: str) -> None:
    """Print at once: its reader waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class CheckError(Exception):
    """Something is not as it has to be; the text says what."""


def check(claim: object, what: object) -> None:
    """Go on if the claim holds.

    Raises:
        CheckError: It does not.
    """
    if not claim:
        raise CheckError(str(what))


def config(folder: Path) -> str:
    """Return the configuration of the run."""
    env = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)} | {MARKER: str(folder)}
    return CONFIG.format(
        python=json.dumps(sys.executable),
        held=HELD_GIB,
        env="\n".join(f"{name} = {json.dumps(value)}" for name, value in sorted(env.items())),
        engine=json.dumps(str(ENGINE)),
    )


def used_gib(status: Status) -> list[float]:
    """Return what NVML says is taken on each GPU."""
    return [round((gpu.used_bytes or 0) / GIB, 1) for gpu in status.gpus]


async def gpus_of(worker: WorkerStatus) -> list[str]:
    """Return the UUIDs that a worker's ranks say they have, in rank order."""

    def ask() -> list[str]:
        with urllib.request.urlopen(f"http://{worker.address}/v1/models", timeout=10) as reply:
            found: list[str] = json.load(reply)["data"][0]["gpus"]
            return found

    return await asyncio.to_thread(ask)


async def ranks_are_where_they_were_placed(status: Status) -> None:
    for worker in status.workers:
        found = await gpus_of(worker)
        check(found == list(worker.gpu_ids), f"{worker.id} was placed on {worker.gpu_ids} and runs on {found}")


class Run:
    """One run over a host; the steps in their order."""

    def __init__(self, site: Site, record: Path | None) -> None:
        self.site = site
        self.record = record
        self.base_gib: list[float] = []
        self.gpu_count = 0

    async def host(self) -> str:
        """Read the host."""
        status = await self.site.until(lambda s: all(gpu.used_bytes is not None for gpu in s.gpus), "NVML answers", 30)
        self.gpu_count = len(status.gpus)
        topology = await self.site.get("/v1/topology", Topology)
        check(topology.is_live, "the inventory is this host's own")
        smi = await asyncio.to_thread(subprocess.check_output, ["nvidia-smi", "topo", "-m"], text=True, timeout=30)
        if self.record is not None:
            (self.record / "host.toml").write_text(topology.record)
            (self.record / "topo.txt").write_text(smi)
        rows = " / ".join(" ".join(row) for row in topology.matrix)
        return (
            f"{self.gpu_count} x {status.gpus[0].name}; links {rows}; NUMA nodes {[g.numa_node for g in status.gpus]}"
        )

    async def ready(self) -> str:
        """Start pattern A."""
        began_s = time.monotonic()
        status = await self.site.until_ready("A", START_S)
        await ranks_are_where_they_were_placed(status)
        used = used_gib(await self.site.status())
        check(all(gib >= HELD_GIB for gib in used), f"each GPU holds the worker's {HELD_GIB} GiB: {used}")
        return f"{len(status.workers)} workers after {time.monotonic() - began_s:.1f} s; GiB taken {used}"

    async def changes(self) -> str:
        """Change the pattern under a load, and back."""
        ways = ["B", "C", "A"] if self.gpu_count >= 4 else ["B", "A"]
        said = []
        mix = Mix(url=await self.site.url(), models=("tensors",), streams=8, shorts=8, stream_tokens=200)
        async with load(mix) as tally:
            for pattern in ways:
                began_s = time.monotonic()
                done = await self.site.change(pattern, CHANGE_S)
                check(done.state == "done", done)
                await ranks_are_where_they_were_placed(await self.site.status())
                said.append(f"{pattern} in {time.monotonic() - began_s:.1f} s")
        check(not tally.lost, tally.examples)
        return f"{', '.join(said)}; {tally.answered} answered, {tally.failed} failed, {tally.truncated} cut short"

    async def rank_killed(self) -> str:
        """Kill one rank of a worker of several: the whole instance goes, its GPUs are free, it comes again."""
        await self.site.change("B", CHANGE_S)
        worker = (await self.site.status()).workers[0]
        ranks = [process for process in self.site.processes() if str(ENGINE) in process.cmdline()[1:3]]
        mine = [process for process in ranks if f"{worker.address.rpartition(':')[2]}" in process.cmdline()]
        check(len(mine) >= worker.tp, f"the ranks of {worker.id} are found: {mine}")
        began_s = time.monotonic()
        mine[-1].kill()
        await self.site.until(lambda s: s.workers[0].instance != worker.instance, "another instance", 60)
        await self.site.until_ready("B", START_S)
        check(not any(process.is_running() for process in mine), "nobody of the old instance is left")
        return f"{worker.id} serves again after {time.monotonic() - began_s:.1f} s"

    async def daemon_killed(self) -> str:
        """Kill the daemon; the next one finds its workers."""
        before = {worker.id: worker.pid for worker in (await self.site.status()).workers}
        await self.site.kill()
        began_s = time.monotonic()
        await self.site.start()
        status = await self.site.until_ready("B", START_S)
        check({worker.id: worker.pid for worker in status.workers} == before, "the workers are the same")
        return f"{len(before)} workers adopted, all ready after {time.monotonic() - began_s:.1f} s"

    async def stranger(self) -> str:
        """Let a stranger take memory on a GPU: no worker is started there, and status names who has it."""
        worker = (await self.site.status()).workers[0]
        code = (
            f"import torch, sys; x = torch.zeros(int({STRANGER_GIB} * 2**30), dtype=torch.uint8, device='cuda'); "
            "print('held', flush=True); sys.stdin.read()"
        )
        stranger = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": worker.gpu_ids[0]},
        )  # fmt: skip
        try:
            assert stranger.stdout is not None
            async with asyncio.timeout(60):
                await stranger.stdout.readline()
            await self.site.post(f"/v1/workers/{worker.id}/restart")
            status = await self.site.until(
                lambda s: f"pid {stranger.pid}" in s.workers[0].reason, "status names the stranger", 90
            )
            reason = status.workers[0].reason
            check(stranger.returncode is None, "the stranger lives")
        finally:
            assert stranger.stdin is not None
            stranger.stdin.close()
            try:
                async with asyncio.timeout(FREE_S):
                    await stranger.wait()
            except TimeoutError:
                stranger.kill()
        await self.site.until_ready("B", START_S)
        return f"{reason!r}; it started once the stranger was gone"

    async def stop(self) -> str:
        """Stop: every GPU is as free as before."""
        began_s = time.monotonic()
        check(await self.site.stop() == 0, "the daemon ends with 0")
        took_s = time.monotonic() - began_s
        check(not self.site.leftovers(), self.site.leftovers())
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        deadline_s = time.monotonic() + FREE_S
        while True:
            used = [
                int(line) / 1024
                for line in (await asyncio.to_thread(subprocess.check_output, query, timeout=30)).split()
            ]
            if all(gib < HELD_GIB for gib in used):
                return f"in {took_s:.1f} s; GiB taken {[round(gib, 1) for gib in used]}"
            check(time.monotonic() < deadline_s, f"memory stays taken: {used}")
            await asyncio.sleep(0.5)


async def run(folder: Path, record: Path | None) -> int:
    site = Site(folder=folder, config=config(folder))
    run = Run(site, record)
    steps: list[tuple[str, Callable[[], Awaitable[str]]]] = [
        ("the host as NVML and /sys have it", run.host),
        ("pattern A, each rank on the GPU it was placed on", run.ready),
        ("the pattern changes under a load", run.changes),
        ("kill -9 of one rank", run.rank_killed),
        ("kill -9 of the daemon", run.daemon_killed),
        ("a stranger on a GPU", run.stranger),
        ("stop", run.stop),
    ]
    passed = 0
    try:
        await site.start(60.0)
        for title, step in steps:
            try:
                said = await step()
            except (CheckError, L40sError, TimeoutError) as error:
                say(f"FAILED  {title}: {error}\n{site.tail(40)}")
                break
            passed += 1
            say(f"ok      {title}: {said}")
    finally:
        if site.daemon is not None and site.daemon.poll() is None:
            site.signal(signal.SIGTERM)
            await site.ended(60)
        site.clear()
        if record is not None and site.log_file.exists():
            shutil.copy(site.log_file, record / "daemon.log")
    say(f"{passed} of {len(steps)} hold")
    return int(passed < len(steps))


def main() -> int:
    """Return 0 when all of it holds."""
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument(
        "--record", type=Path, help="keep the host file, nvidia-smi's topology and the log in this folder"
    )
    options = parser.parse_args()
    if options.record is not None:
        options.record.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="l40sd-gpu-") as folder:
        return asyncio.run(run(Path(folder), options.record))


if __name__ == "__main__":
    sys.exit(main())
