"""The composition root: ``main`` turns ``run`` into an exit code, ``run`` wires the parts in the order they start.

lock ── host ── routes ── proxy (listens; requests wait) ── processes ── supervisor (adopts, plans) ── control
  READY=1 once the control socket answers; workers may still be loading, the proxy's waiting line holds requests
"""

import asyncio
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

import click
import structlog
import uvloop

from l40sd import __version__, log
from l40sd.adapters import configfiles, handover, heap, systemd
from l40sd.adapters.apikeys import read_keys
from l40sd.adapters.clock import now_s
from l40sd.adapters.lock import DaemonLock
from l40sd.adapters.ports import PortPool
from l40sd.adapters.probe import Prober
from l40sd.adapters.process import Processes
from l40sd.adapters.store import Store
from l40sd.core import configshow
from l40sd.core.config import Config
from l40sd.core.configfile import Loaded, load
from l40sd.core.errors import ConfigError, L40sError
from l40sd.core.lifecycle import Phase
from l40sd.core.messages import Status
from l40sd.services import report
from l40sd.services.control import Control, Doors
from l40sd.services.doctor import examine
from l40sd.services.events import Events
from l40sd.services.host import Host
from l40sd.services.proxy import Proxy
from l40sd.services.routes import CatalogEntry, Routes
from l40sd.services.supervisor import Supervisor
from l40sd.services.tools import Tools

EXIT_FAILED = 1
EXIT_BAD_CONFIG = 78  # EX_CONFIG: systemd does not try again (RestartPreventExitStatus)
TICK_S = 5.0
THREADS = 8
ADOPT_TIMEOUT_S = 30.0
PROXY_GRACE_S = 5.0
PASSED_ON = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "HF_HOME", "CUDA_HOME")
"""What workers see of the daemon's own environment; the rest is theirs to be given in the configuration."""
STATE_VERSION = 1


class Ending(StrEnum):
    """Why the daemon ends, which decides what becomes of the workers."""

    STOP = "stop"  # nothing shall serve any more: drain and stop all of them
    RESTART = "restart"  # another daemon follows: leave them
    UPGRADE = "upgrade"  # this process becomes the next daemon: leave them, keep the listener


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_path", metavar="FILE", help="Default: $L40SD_CONFIG, else /etc/l40sd/l40sd.toml.")
@click.option("--check-config", is_flag=True, help="Check the configuration, say what is wrong, and exit (0 or 78).")
@click.version_option(__version__, prog_name="l40sd")
def main(config_path: str | None, *, check_config: bool) -> None:
    """Run the host's inference workers: place, start, watch, balance and reshape them."""
    path = configfiles.find(config_path, os.environ)
    try:
        loaded = load(configfiles.read(path))
    except L40sError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_BAD_CONFIG)
    if check_config:
        click.echo(f"{path}: good")
        return
    handover.hold_signals()  # until there is somebody to answer them: a stop in mid start is a stop of the workers too
    events = Events(loaded.config.daemon.events_kept)
    log.configure(loaded.config.daemon.log_level, on_event=events.add)
    try:
        ending = run_to_its_end(path, loaded, events)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_BAD_CONFIG)
    except L40sError as error:
        structlog.get_logger().error("daemon.failed", reason=error.what, where=error.where, hint=error.hint)
        sys.exit(EXIT_BAD_CONFIG if error.code in ("bad_config", "does_not_fit", "unknown_pattern") else EXIT_FAILED)
    if ending is not Ending.UPGRADE:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told again while the interpreter ends: the answer is the same
    else:
        handover.exec_again()


def run_to_its_end(path: Path, loaded: Loaded, events: Events) -> Ending:
    """Run the loop; an error for the operator comes out as itself, not as part of a TaskGroup's (fault 39)."""
    try:
        return uvloop.run(run(path, loaded, events))
    except BaseExceptionGroup as group:
        ours, others = group.split(L40sError)
        error: BaseException | None = ours if others is None else None
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if error is None:
            raise
        raise error from None


async def run(path: Path, loaded: Loaded, events: Events) -> Ending:
    """Run the daemon until it is told to end; return why it did.

    Raises:
        L40sError: It could not start: already running, directories not writable, pattern does not fit this host.
    """
    config = loaded.config
    logger = structlog.get_logger()
    # Signals are the loop's alone: a helper thread that took one while the loop ends would lose it. libuv's own threads
    # come into being with its first look-up, and inherit what is held now.
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, initializer=handover.hold_signals))
    await loop.getaddrinfo("127.0.0.1", None)
    logger.info("daemon.starting", version=__version__, config=str(path), pid=os.getpid())
    async with AsyncExitStack() as stack:
        heap.keep_resident()
        # 0. systemd watches from the first moment: a slow NVML or many workers to adopt are no reason to be killed.
        notifier = systemd.Notifier()
        background = await stack.enter_async_context(asyncio.TaskGroup())
        stack.callback(background.create_task(feed_watchdog(notifier), name="watchdog").cancel)
        # 1. Nobody else is in charge of this host.
        prepare_directories(config)
        runtime_dir = Path(config.daemon.runtime_dir)
        kept = handover.take()
        lock_path = runtime_dir / "l40sd.lock"
        lock = DaemonLock.resume(lock_path, kept.lock) if kept else DaemonLock.acquire(lock_path)
        stack.callback(lock.release)
        # 2. What the host is made of.
        host = await Host.open(config.host)
        stack.push_async_callback(host.close)
        # 3. The endpoint listens before any worker is looked at: requests wait, none is refused.
        routes = Routes(queue_limit=config.proxy.queue_limit, in_flight_limit=config.proxy.in_flight_limit)
        # Without a catalog the first requests after a restart would be told that there is no such model.
        note = "the daemon has just started"
        routes.set_catalog({m.name: CatalogEntry(aliases=m.aliases, note=note) for m in config.models.values()})
        proxy = Proxy(config.proxy, routes, api_keys=read_keys(config.proxy.api_keys_file))
        lent = kept.lent if kept else systemd.listen_sockets().get("proxy", [])
        await proxy.start(lent, kept.own if kept else ())
        stack.push_async_callback(proxy.stop, PROXY_GRACE_S)
        # 4. Workers: those of an earlier daemon first.
        processes = await Processes.open(
            runtime_dir=runtime_dir, log_dir=Path(config.daemon.log_dir), provider=config.daemon.provider
        )
        stack.push_async_callback(processes.close)
        prober = Prober()
        stack.push_async_callback(prober.close)
        workers = config.workers
        tools = Tools(
            host=host,
            processes=processes,
            ports=PortPool(workers.host, workers.port_first, workers.port_last),
            prober=prober,
            routes=routes,
            facts=await host.facts(config),
            past_loads_s={},
            python=own_python(),
            base_env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
            log=logger,
        )
        supervisor = Supervisor(
            tools, config, Store(Path(config.daemon.state_dir) / "state.json", version=STATE_VERSION)
        )
        routes.on_failure = supervisor.on_request_failure
        async with asyncio.timeout(ADOPT_TIMEOUT_S):
            adoption = await processes.adopt()
        await supervisor.begin(adoption)
        for note in (*adoption.notes, *supervisor.store.notes):
            logger.warning("daemon.found", note=note)
        # 5. The operator.
        daemon = Daemon(path, loaded, supervisor, proxy, lock, notifier)
        stack.push_async_callback(supervisor.write_down)  # what was accepted last, once nothing more can be
        control = Control(control_socket(config), config.daemon.control_group, supervisor, events, daemon.doors())
        await control.start()
        stack.push_async_callback(control.close)
        # 6. Go.
        daemon.notifier.ready(daemon.summary())
        logger.info("daemon.ready", adopted=len(adoption.running), listen=list(proxy.addresses), **daemon.facts())
        ending = await daemon.live(control)
        if ending is Ending.UPGRADE:
            daemon.hand_over()
        return ending


class Daemon:
    """The running whole: answers signals, keeps systemd informed, ends as it is told to."""

    def __init__(
        self,
        path: Path,
        loaded: Loaded,
        supervisor: Supervisor,
        proxy: Proxy,
        lock: DaemonLock,
        notifier: systemd.Notifier,
    ) -> None:
        self.notifier = notifier
        self._path = path
        self._loaded = loaded
        self._supervisor = supervisor
        self._proxy = proxy
        self._lock = lock
        self._began_at_s = now_s()
        self._ending: asyncio.Future[Ending | None] = asyncio.get_running_loop().create_future()
        self._is_upgrading = False
        self._reload_wanted = asyncio.Event()
        self._log = structlog.get_logger()

    async def live(self, control: Control) -> Ending:
        """Live until a signal says otherwise, then end in an orderly way."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_end, None)
        loop.add_signal_handler(signal.SIGUSR2, self._told_to_end, Ending.UPGRADE)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        handover.release_signals()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._supervisor.run(), name="supervisor"),
                group.create_task(self._tick(control), name="tick"),
                group.create_task(self._reload_on_hup(), name="reload"),
            ]
            ending = await self._told()
            if ending is Ending.UPGRADE and not await self._finish_open_requests():
                ending = await self._told()
            self._log.info("daemon.stopping", because=ending)
            if ending is not Ending.UPGRADE:
                self.notifier.stopping(str(ending))
            if ending is Ending.STOP:
                self._proxy.send_away_waiting()
                await self._stop_workers()
            for task in tasks:
                task.cancel()
        return ending

    def doors(self) -> Doors:
        """Return what the control API may reach."""
        return Doors(
            status=self.status,
            metrics=self._proxy.metrics_text,
            doctor=lambda: examine(self._supervisor, self._loaded.config),
            reload=self.reload,
            upgrade=lambda: self._told_to_end(Ending.UPGRADE),
            config_toml=lambda: configshow.to_toml(self._loaded.config, self._loaded.origins),
            config_files=lambda: self._loaded.files,
            config_diff=self._config_diff,
        )

    async def status(self) -> Status:
        """Return everything of `l40sctl status`."""
        host, store = self._supervisor.tools.host, self._supervisor.store
        return report.status(
            self._supervisor,
            self._proxy,
            await host.memory(),
            began_at_s=self._began_at_s,
            degraded=(*host.degraded, *filter(None, [store.degraded]), *self._supervisor.degraded),
        )

    async def reload(self) -> list[str]:
        """Read the configuration again; what changed is returned. A bad one changes nothing.

        Raises:
            L40sError: The configuration is bad or does not fit this host.
        """
        self.notifier.reloading()
        try:
            loaded = load(configfiles.read(self._path))
            changed = list(configshow.diff(self._loaded.config, loaded.config))
            keys = read_keys(loaded.config.proxy.api_keys_file)
            facts = await self._supervisor.tools.host.facts(loaded.config)
            self._supervisor.reconfigure(loaded.config, facts)
        except L40sError as error:
            self._log.error("config.reload.failed", reason=str(error))
            raise
        finally:
            self.notifier.ready(self.summary())
        self._loaded = loaded
        self._proxy.configure(loaded.config.proxy)
        self._proxy.set_api_keys(keys)
        proxy = loaded.config.proxy
        self._supervisor.tools.routes.configure(queue_limit=proxy.queue_limit, in_flight_limit=proxy.in_flight_limit)
        log.set_level(loaded.config.daemon.log_level)
        self._log.info("config.reloaded", changed=changed)
        return changed

    def summary(self) -> str:
        """Return one line for `systemctl status`."""
        workers = self._supervisor.workers.values()
        ready = sum(w.phase is Phase.READY for w in workers)
        return f"pattern {self._supervisor.want.pattern}: {ready} of {len(workers)} workers ready"

    def facts(self) -> dict[str, object]:
        """Return what is worth a line in the log at the start."""
        tools = self._supervisor.tools
        return {
            "pattern": self._supervisor.want.pattern,
            "host": tools.host.inventory.source,
            "gpu_count": len(tools.host.inventory.gpus),
            "provider": tools.processes.provider,
        }

    def hand_over(self) -> None:
        """Keep the listener and the lock for the next daemon in this process; from now on signals wait for it."""
        handover.hold_signals()
        self.notifier.watchdog()
        self._log.info("daemon.handing_over", requests_cut=self._proxy.stats.in_flight)
        lent = self._proxy.lent
        own = [sock for sock in self._proxy.sockets if sock not in lent]
        handover.give(self._lock.keep_over_exec(), own=own, lent=lent)
        self._proxy.keep_files()

    async def _finish_open_requests(self) -> bool:
        """Let open requests end, bounded, before an upgrade; False: told to end meanwhile, which comes first.

        New connections are not refused meanwhile: they wait in the listener's backlog. Workers, watchdog and operator
        are looked after as ever, since it may take as long as the longest request.
        """
        self._log.info("daemon.upgrading", in_flight=self._proxy.stats.in_flight)
        self.notifier.reloading("upgrading")
        self._is_upgrading, self._ending = True, asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as group:
            drain = group.create_task(self._proxy.drain(self._loaded.config.workers.drain_timeout_s), name="drain")
            either: set[asyncio.Future[Any]] = {drain, self._ending}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            drain.cancel()
        if self._ending.done():
            await self._proxy.resume_accepting()  # those that wait are told why, rather than reset
            return False
        return True

    async def _told(self) -> Ending:
        return await self._ending or await self._ending_by_signal()

    def _told_to_end(self, ending: Ending | None) -> None:
        if not self._ending.done() and not (self._is_upgrading and ending is Ending.UPGRADE):
            self._ending.set_result(ending)

    async def _ending_by_signal(self) -> Ending:
        """Tell a stop from a restart: at SIGTERM systemd knows which job it is doing."""
        return Ending.RESTART if await systemd.stop_reason() == "restart" else Ending.STOP

    async def _stop_workers(self) -> None:
        timeout_s = self._loaded.config.daemon.stop_timeout_s
        self.notifier.extend_timeout(timeout_s + 2 * PROXY_GRACE_S)
        left = await self._supervisor.stop(timeout_s)
        if left:
            self._log.error("daemon.workers_left", count=left, workers=sorted(self._supervisor.workers))

    async def _reload_on_hup(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            with suppress(L40sError):  # said by reload(); the old configuration stays
                await self.reload()

    async def _tick(self, control: Control) -> None:
        """Now and then: what nobody else notices."""
        while True:
            await asyncio.sleep(TICK_S)
            await control.rebind_if_lost()
            self._keep_lock()
            await self._supervisor.store.retry()
            self.notifier.status(self.summary())

    def _keep_lock(self) -> None:
        """Without the lock's file the shims would take this daemon for dead, and the next one would not see it."""
        try:
            if self._lock.restore():
                self._log.warning("daemon.lock_restored", path=str(self._lock.path))
        except L40sError as error:
            if error.code == "already_running":  # it has adopted the workers: they are its own now
                self._log.error("daemon.replaced", reason=error.what)
                self._told_to_end(Ending.RESTART)
            else:
                self._log.error("daemon.lock_lost", reason=str(error))

    def _config_diff(self) -> str:
        fresh = load(configfiles.read(self._path)).config
        return "\n".join(configshow.diff(self._loaded.config, fresh))


def own_python() -> str:
    """Return this interpreter's path: where there is one, the path that an upgrade keeps.

    It stands in the command line of a simulated worker: beside /opt/l40sd/current/bin/l40sd it stays the same and an
    upgrade leaves the worker alone; ``sys.executable`` names the release.
    """
    beside = Path(sys.argv[0]).with_name("python")
    return str(beside) if beside.is_file() else sys.executable


async def feed_watchdog(notifier: systemd.Notifier) -> None:
    """Tell systemd that the loop turns, for as long as it does; returns at once where nobody watches."""
    while (interval_s := notifier.watchdog_interval_s) is not None:
        notifier.watchdog()
        await asyncio.sleep(interval_s)


def prepare_directories(config: Config) -> None:
    """Make the daemon's directories.

    Raises:
        L40sError: One cannot be made or written to.
    """
    for key in ("state_dir", "runtime_dir", "log_dir"):
        directory = Path(getattr(config.daemon, key))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            raise L40sError(
                f"cannot be used: {error.strerror}",
                where=f"daemon.{key} = {str(directory)!r}",
                hint=f"create it, owned by user {os.geteuid()}, or name another directory in the configuration",
                code="bad_config",
            ) from error


def control_socket(config: Config) -> Path:
    """Return the control socket's path."""
    return Path(config.daemon.control_socket or f"{config.daemon.runtime_dir}/control.sock")
