"""The supervisor by itself, where a real daemon would need luck."""

import asyncio
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
import structlog.testing

from l40sd.config.load import load
from l40sd.hardware.host import Host
from l40sd.model import ModelName
from l40sd.routing.routes import Routes
from l40sd.supervisor.state_file import Store
from l40sd.supervisor.supervisor import Supervisor
from l40sd.workers.context import WorkerContext
from l40sd.workers.keys import WorkerKeys
from l40sd.workers.known_models import KnownModels
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.ports import HeldPort, PortPool
from l40sd.workers.probe import Prober
from l40sd.workers.process import Adoption, Processes

TWO = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "C"
[models.toy]
engine = "simulated"
attention_heads = 8
"""


class SlowDisk(Store):
    """Takes as long to write as the test wants."""

    def __init__(self, path: Path, *, version: int) -> None:
        super().__init__(path, version=version)
        self.writing, self.go_on, self.written = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def save(self, content: Mapping[str, Any]) -> bool:
        self.writing.set()
        await self.go_on.wait()
        is_on_disk = await super().save(content)
        self.written.set()
        return is_on_disk


class FullTable(Store):
    """Cannot open a file for the first few times."""

    left = 3

    async def save(self, content: Mapping[str, Any]) -> bool:
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return await super().save(content)


class NoPort(PortPool):
    """Finds no file descriptor to look for a port with."""

    tries = 0

    def take(self) -> HeldPort:
        self.tries += 1
        raise OSError(errno.EMFILE, "Too many open files")


async def supervisor_with(disk: Store, ports: PortPool | None = None) -> Supervisor:
    config = load([("l40sd.toml", TWO)]).config
    host = await Host.open(config.host)
    context = WorkerContext(
        host=host,
        processes=cast(Processes, None),
        ports=ports or PortPool("127.0.0.1", 20000, 20001),
        keys=cast(WorkerKeys, None),
        prober=cast(Prober, None),
        routes=Routes(queue_limit=1, in_flight_limit=0),
        models=KnownModels(await host.facts(config)),
        python="python",
        base_env={},
        log=structlog.get_logger(),
    )
    supervisor = Supervisor(context, config, disk)
    await supervisor.begin(Adoption())
    return supervisor


async def test_nobody_is_made_once_a_stop_has_begun(tmp_path: Path) -> None:
    """A pass that was writing at that moment went on to make workers; nobody told them to go, and the stop waited for
    its timeout."""
    disk = SlowDisk(tmp_path / "state.json", version=1)
    supervisor = await supervisor_with(disk)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(supervisor.run())
        await disk.writing.wait()
        assert await supervisor.stop(10) == 0
        disk.go_on.set()
        await disk.written.wait()
        for _ in range(10):  # rounds of the loop, in which the pass goes on
            await asyncio.sleep(0)
        assert supervisor.workers == {}
        running.cancel()
    await supervisor.context.host.close()


async def test_a_pass_that_the_system_refuses_something_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``ulimit -n 1024`` and many clients there was no file descriptor left once: the daemon ended."""
    monkeypatch.setattr("l40sd.supervisor.supervisor.PASS_AGAIN_S", 0.01)
    supervisor = await supervisor_with(FullTable(tmp_path / "state.json", version=1))
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        with structlog.testing.capture_logs() as logs:
            supervisor._log = structlog.get_logger()
            running = group.create_task(supervisor.run())
            while not supervisor.failed_passes:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert any("Too many open files" in sentence for sentence in supervisor.degraded)
            while supervisor.degraded:  # noqa: ASYNC110
                await asyncio.sleep(0)
            running.cancel()
    events = [(entry["event"], entry["count"]) for entry in logs if entry["event"].startswith("plan.")]
    assert events == [("plan.failed", 1), ("plan.recovered", 3)]
    assert supervisor.workers, "the pass after it did everything"
    await supervisor.context.host.close()


async def test_a_workers_job_that_the_system_refuses_something_is_done_again_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's task was one of the supervisor's: its exception ended the daemon, too."""
    monkeypatch.setattr("l40sd.workers.jobs.JOB_AGAIN_S", 0.01)
    ports = NoPort("127.0.0.1", 20000, 20001)
    with structlog.testing.capture_logs() as logs:
        supervisor = await supervisor_with(Store(tmp_path / "state.json", version=1), ports)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            running = group.create_task(supervisor.run())
            while ports.tries < 10:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not running.done()
            running.cancel()
    told = [(entry["worker"], entry["job"]) for entry in logs if entry["event"] == "worker.job_failed"]
    assert sorted(told) == sorted({(worker, "spawn") for worker in supervisor.workers})
    await supervisor.context.host.close()


async def test_what_is_to_be_made_on_a_gpu_that_cannot_be_freed_is_not_waited_for(tmp_path: Path) -> None:
    supervisor = await supervisor_with(Store(tmp_path / "state.json", version=1))
    toy, changes = ModelName("toy"), supervisor.changes
    changes.publish_catalog()
    assert supervisor.context.routes.may_wait(toy)
    for wanted in changes.want.wanted:
        worker = supervisor.workers.make(wanted, changes.want.config)
        worker.phase, worker.goal = Phase.STUCK, Goal.GONE
        supervisor.workers.add(worker)
    changes.publish_catalog()
    assert not supervisor.context.routes.may_wait(toy)
    await supervisor.context.host.close()
