"""The host and its workers behind the endpoint: imported, wired and run once the endpoint serves.

host ── processes ── supervisor (adopts, plans) ── control
  READY=1 once the control socket answers; workers may still be loading, the proxy's waiting line holds requests
"""

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import structlog

from l40sd import systemd
from l40sd.clock import now_s
from l40sd.config.options import Config
from l40sd.control import report
from l40sd.control.doctor import examine
from l40sd.control.event_file import EventFile
from l40sd.control.messages import Check, Status
from l40sd.control.preflight import STATE_NAME
from l40sd.control.server import Control
from l40sd.daemon import reexec
from l40sd.daemon.in_force import ConfigInForce
from l40sd.daemon.parts import Parts
from l40sd.daemon.shutdown import PROXY_GRACE_S, ShutdownReason
from l40sd.errors import L40sError
from l40sd.hardware.gpu_watch import GpuWatch
from l40sd.hardware.host import Host
from l40sd.naming import natural
from l40sd.supervisor.state_file import Store
from l40sd.supervisor.supervisor import Supervisor
from l40sd.workers.context import WorkerContext
from l40sd.workers.keys import WorkerKeys
from l40sd.workers.known_models import KnownModels
from l40sd.workers.ports import PortPool
from l40sd.workers.probe import Prober
from l40sd.workers.process import Processes

TICK_S = 5.0
ADOPT_TIMEOUT_S = 30.0
CHECK_TIMEOUT_S = 20.0
PASSED_ON = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "HF_HOME", "CUDA_HOME")
"""What workers see of the daemon's own environment; the rest is theirs to be given in the configuration."""
STATE_VERSION = 1
EVENTS_NAME = "events.ndjson"  # in log_dir; a worker's output is in NAME.log


async def run_workers(parts: Parts) -> ShutdownReason:
    """Run the host and its workers behind the endpoint until told to end; return why.

    Raises:
        L40sError: As ``run``.
    """
    config, routes, proxy = parts.loaded.config, parts.routes, parts.proxy
    logger = structlog.get_logger()
    runtime_dir = Path(config.daemon.runtime_dir)
    async with AsyncExitStack() as stack:
        # 0. What happened before, and where what happens now is remembered.
        event_file = EventFile(
            Path(config.daemon.log_dir) / EVENTS_NAME, config.daemon.events_kept, reexec.hold_signals
        )
        parts.events.resume(*await asyncio.to_thread(event_file.read), event_file)
        # 1. What the host is made of.
        host = await Host.open(config.host)
        stack.push_async_callback(host.close)
        # 2. Workers: those of an earlier daemon first.
        processes = await Processes.open(
            runtime_dir=runtime_dir, log_dir=Path(config.daemon.log_dir), provider=config.daemon.provider
        )
        stack.push_async_callback(processes.close)
        prober = Prober()
        stack.push_async_callback(prober.close)
        workers = config.workers
        context = WorkerContext(
            host=host,
            processes=processes,
            ports=PortPool(workers.host, workers.port_first, workers.port_last),
            keys=WorkerKeys(Path(config.daemon.state_dir) / "worker-keys"),
            prober=prober,
            routes=routes,
            models=KnownModels(await host.facts(config)),
            python=own_python(),
            base_env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
            log=logger,
        )
        supervisor = Supervisor(
            context, config, Store(Path(config.daemon.state_dir) / STATE_NAME, version=STATE_VERSION)
        )
        routes.on_failure = supervisor.workers.on_request_failure
        routes.on_doubt = supervisor.workers.is_ending
        async with asyncio.timeout(ADOPT_TIMEOUT_S):
            adoption = await processes.adopt()
        await supervisor.begin(adoption)
        for note in (*adoption.notes, *supervisor.store.notes):
            logger.warning("daemon.found", note=note)
        # 3. The operator.
        daemon = Daemon(parts, supervisor)
        stack.push_async_callback(supervisor.write_down)  # what was accepted last, once nothing more can be
        control = Control(control_socket(config), config.daemon.control_group, supervisor, parts.events, daemon)
        await control.start()
        stack.push_async_callback(control.close)
        # 4. Go.
        daemon.notifier.ready(daemon.summary())
        logger.info(
            "daemon.ready",
            adopted=len(adoption.running),
            listen=list(proxy.addresses),
            pattern=supervisor.want.pattern,
            host=host.inventory.source,
            gpu_count=len(host.inventory.gpus),
            provider=processes.provider,
        )
        return await daemon.live(control)


class Daemon:
    """The running whole: answers signals, keeps systemd informed, ends as it is told to."""

    def __init__(self, parts: Parts, supervisor: Supervisor) -> None:
        self.notifier = parts.notifier
        self._in_force = ConfigInForce(parts.path, parts.loaded, supervisor, parts.proxy)
        self._supervisor = supervisor
        self._proxy = parts.proxy
        self._lock = parts.lock
        self._began_at_s = now_s()
        self._ending: asyncio.Future[ShutdownReason | None] = asyncio.get_running_loop().create_future()
        self._upgrade_wanted = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._log = structlog.get_logger()
        host = supervisor.context.host
        self._watch_gpus = GpuWatch(host, lambda: self._in_force.config.host, self._in_force.take_in_gpus)

    async def live(self, control: Control) -> ShutdownReason:
        """Live until a signal says otherwise, then end in an orderly way."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_end, None)
        loop.add_signal_handler(signal.SIGUSR2, self._upgrade_wanted.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        reexec.release_signals()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._supervisor.run(), name="supervisor"),
                group.create_task(self._tick(control), name="tick"),
                group.create_task(self._reload_on_hup(), name="reload"),
                group.create_task(self._watch_gpus.run(), name="gpus"),
                group.create_task(self._upgrade_on_signal(), name="upgrade"),
            ]
            ending = await self._told()
            self._log.info("daemon.stopping", because=ending)
            if ending is ShutdownReason.UPGRADE:
                self.notifier.reloading("upgrading")
            else:
                self.notifier.stopping(str(ending))
            if ending is ShutdownReason.STOP:
                self._proxy.send_away_waiting()
                await self._stop_workers()
            for task in tasks:
                task.cancel()
        return ending

    async def status(self) -> Status:
        """Return everything of `l40sctl status`."""
        memory = await self._supervisor.context.host.memory()
        return report.status(
            self._supervisor, self._proxy, memory, began_at_s=self._began_at_s, degraded=self._degraded()
        )

    async def reload(self, *, forget_gpus: bool = False) -> list[str]:
        """See ``ConfigInForce.reload``; systemd is told meanwhile."""
        self.notifier.reloading()
        try:
            return await self._in_force.reload(forget_gpus=forget_gpus)
        finally:
            self.notifier.ready(self.summary())

    async def examine(self) -> list[Check]:
        """Return what `l40sctl doctor` shows."""
        held = self._in_force
        return await examine(self._supervisor, held.config, held.path, reload_problem=held.reload_problem)

    def metrics_text(self) -> str:
        """Return the metrics as Prometheus text."""
        return self._proxy.metrics_text()

    def config_toml(self) -> str:
        """Return the configuration in force as TOML, each option with where it comes from."""
        return self._in_force.to_toml()

    def config_files(self) -> tuple[str, ...]:
        """Return the files that the configuration in force was read from."""
        return self._in_force.files

    def config_diff(self) -> str:
        """Return what a reload would say and change."""
        return self._in_force.diff()

    def summary(self) -> str:
        """Return one line for `systemctl status`."""
        return report.summary(self._supervisor, self._degraded())

    def _degraded(self) -> tuple[str, ...]:
        """Sentences on what does not work at present."""
        host, store = self._supervisor.context.host, self._supervisor.store
        return (*host.degraded, *filter(None, [store.degraded]), *self._supervisor.degraded)

    async def upgrade(self) -> None:
        """Become the release now installed; it is asked before whether it would start with this configuration.

        Raises:
            L40sError: It would not; nothing has changed.
        """
        problem = await reexec.check(CHECK_TIMEOUT_S)
        if problem:
            self._log.error("daemon.upgrade.failed", reason=problem)
            raise L40sError(
                f"the release now installed would not start: {problem}",
                where=reexec.command()[0],
                hint="mend the configuration, or install the release that runs now again; this daemon goes on",
                code="upgrade_refused",
            )
        if not self._ending.done():
            self._log.info("daemon.upgrading", in_flight=self._proxy.stats.in_flight)
            self._told_to_end(ShutdownReason.UPGRADE)

    async def _told(self) -> ShutdownReason:
        return await self._ending or await self._ending_by_signal()

    def _told_to_end(self, ending: ShutdownReason | None) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)
            if ending is ShutdownReason.UPGRADE:
                reexec.hold_signals()  # what comes from now on is for the next daemon
        elif self._ending.result() is ShutdownReason.UPGRADE and ending is not ShutdownReason.UPGRADE:
            reexec.tell_next(signal.SIGTERM)  # it was on its way already

    async def _ending_by_signal(self) -> ShutdownReason:
        """Tell a stop from a restart: at SIGTERM systemd knows which job it is doing."""
        return ShutdownReason.RESTART if await systemd.stop_reason() == "restart" else ShutdownReason.STOP

    async def _stop_workers(self) -> None:
        timeout_s = self._in_force.config.daemon.stop_timeout_s
        self.notifier.extend_timeout(timeout_s + 2 * PROXY_GRACE_S)
        left = await self._supervisor.stop(timeout_s)
        if left:
            self._log.error("daemon.workers_left", count=left, workers=sorted(self._supervisor.workers, key=natural))

    async def _reload_on_hup(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            with suppress(L40sError):  # said by reload(); the old configuration stays
                await self.reload()

    async def _upgrade_on_signal(self) -> None:
        while True:
            await self._upgrade_wanted.wait()
            self._upgrade_wanted.clear()
            with suppress(L40sError):  # said by upgrade(); this release stays
                await self.upgrade()

    async def _tick(self, control: Control) -> None:
        """Now and then: what nobody else notices."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await control.rebind_if_lost()
                self._keep_lock()
                await self._supervisor.store.retry()
                self.notifier.status(self.summary())
            except OSError as error:  # no file descriptor is left, say: the next time comes soon
                self._log.error("daemon.look_failed", reason=str(error))

    def _keep_lock(self) -> None:
        """Without the lock's file the shims would take this daemon for dead, and the next one would not see it."""
        try:
            if self._lock.restore():
                self._log.warning("daemon.lock_restored", path=str(self._lock.path))
        except L40sError as error:
            if error.code == "already_running":  # it has adopted the workers: they are its own now
                self._log.error("daemon.replaced", reason=error.what)
                self._told_to_end(ShutdownReason.RESTART)
            else:
                self._log.error("daemon.lock_lost", reason=str(error))


def own_python() -> str:
    """Return this interpreter's path: where there is one, the path that an upgrade keeps.

    It stands in the command line of a simulated worker: beside /opt/l40sd/current/bin/l40sd it stays the same and an
    upgrade leaves the worker alone; ``sys.executable`` names the release.
    """
    beside = Path(sys.argv[0]).absolute().with_name("python")  # a worker starts in another folder
    return str(beside) if beside.is_file() else sys.executable


def control_socket(config: Config) -> Path:
    """Return the control socket's path."""
    return Path(config.daemon.control_socket or f"{config.daemon.runtime_dir}/control.sock")
