"""The supervisor by itself, where a real daemon would need luck."""

import asyncio
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
import structlog.testing

from l40sd.adapters.ports import HeldPort, PortPool
from l40sd.adapters.probe import Prober
from l40sd.adapters.process import Adoption, Processes
from l40sd.adapters.store import Store
from l40sd.adapters.workerkeys import WorkerKeys
from l40sd.core.configfile import load
from l40sd.core.lifecycle import Goal, Phase
from l40sd.core.model import ModelName
from l40sd.services import report
from l40sd.services.host import Host
from l40sd.services.making import launch_of
from l40sd.services.routes import Routes
from l40sd.services.supervisor import Supervisor
from l40sd.services.tools import Tools
from l40sd.services.worker import Process, Worker

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


async def supervisor_with(disk: Store) -> Supervisor:
    config = load([("l40sd.toml", TWO)]).config
    host = await Host.open(config.host)
    tools = Tools(
        host=host,
        processes=cast(Processes, None),
        ports=PortPool("127.0.0.1", 20000, 20001),
        keys=cast(WorkerKeys, None),
        prober=cast(Prober, None),
        routes=Routes(queue_limit=1, in_flight_limit=0),
        facts=await host.facts(config),
        past_loads_s={},
        python="python",
        base_env={},
        log=structlog.get_logger(),
    )
    supervisor = Supervisor(tools, config, disk)
    await supervisor.begin(Adoption())
    return supervisor


async def test_nobody_is_made_once_a_stop_has_begun(tmp_path: Path) -> None:
    """A turn that was writing at that moment went on to make workers; nobody told them to go, and the stop waited for
    its timeout."""
    disk = SlowDisk(tmp_path / "state.json", version=1)
    supervisor = await supervisor_with(disk)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(supervisor.run())
        await disk.writing.wait()
        assert await supervisor.stop(10) == 0
        disk.go_on.set()
        await disk.written.wait()
        for _ in range(10):  # rounds of the loop, in which the turn goes on
            await asyncio.sleep(0)
        assert supervisor.workers == {}
        running.cancel()
    await supervisor.tools.host.close()


async def test_a_turn_that_the_system_refuses_something_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``ulimit -n 1024`` and many clients there was no file descriptor left once: the daemon ended."""
    monkeypatch.setattr("l40sd.services.supervisor.TURN_AGAIN_S", 0.01)
    supervisor = await supervisor_with(FullTable(tmp_path / "state.json", version=1))
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        with structlog.testing.capture_logs() as logs:
            supervisor._log = structlog.get_logger()
            running = group.create_task(supervisor.run())
            while not supervisor.failed_turns:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert any("Too many open files" in sentence for sentence in supervisor.degraded)
            while supervisor.degraded:  # noqa: ASYNC110
                await asyncio.sleep(0)
            running.cancel()
    events = [(entry["event"], entry["count"]) for entry in logs if entry["event"].startswith("plan.")]
    assert events == [("plan.failed", 1), ("plan.recovered", 3)]
    assert supervisor.workers, "the turn after it did everything"
    await supervisor.tools.host.close()


async def test_a_workers_job_that_the_system_refuses_something_is_done_again_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's task was one of the supervisor's: its exception ended the daemon, too."""
    monkeypatch.setattr("l40sd.services.worker.JOB_AGAIN_S", 0.01)
    supervisor = await supervisor_with(Store(tmp_path / "state.json", version=1))
    ports = supervisor.tools.ports = NoPort("127.0.0.1", 20000, 20001)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        with structlog.testing.capture_logs() as logs:
            supervisor.tools.log = structlog.get_logger()
            running = group.create_task(supervisor.run())
            while ports.tries < 10:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not running.done()
            running.cancel()
    told = [(entry["worker"], entry["job"]) for entry in logs if entry["event"] == "worker.job_failed"]
    assert sorted(told) == sorted({(worker, "spawn") for worker in supervisor.workers})
    await supervisor.tools.host.close()


async def test_what_is_to_be_made_on_a_gpu_that_cannot_be_freed_is_not_waited_for(tmp_path: Path) -> None:
    supervisor = await supervisor_with(Store(tmp_path / "state.json", version=1))
    toy = ModelName("toy")
    supervisor._publish_catalog()
    assert supervisor.tools.routes.may_wait(toy)
    for wanted in supervisor.want.wanted:
        worker = supervisor.workers[wanted.placement.worker] = Worker(wanted, supervisor.config, supervisor.tools)
        worker.phase, worker.goal = Phase.STUCK, Goal.GONE
    supervisor._publish_catalog()
    assert not supervisor.tools.routes.may_wait(toy)
    await supervisor.tools.host.close()


async def test_systemctl_status_counts_those_that_were_adopted(tmp_path: Path) -> None:
    """ "0 of 2 workers ready" was told of two that served since before this daemon."""
    supervisor = await supervisor_with(Store(tmp_path / "state.json", version=1))
    for wanted in supervisor.want.wanted:
        worker = supervisor.workers[wanted.placement.worker] = Worker(wanted, supervisor.config, supervisor.tools)
        launch = launch_of(wanted.placement, supervisor.config, supervisor.tools)
        worker.process, worker.phase = Process(launch=launch, is_adopted=True), Phase.STARTING
    assert report.summary(supervisor, ()) == "pattern C: 0 of 2 workers ready, 2 adopted and not yet looked at"
    worker.phase = Phase.READY
    assert report.summary(supervisor, ()) == "pattern C: 1 of 2 workers ready, 1 adopted and not yet looked at"
    await supervisor.tools.host.close()
