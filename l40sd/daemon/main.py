"""The composition root: ``main`` turns ``run`` into an exit code, ``run`` wires the parts in the order they start.

lock ── routes ── proxy (listens, goes on with handed-over connections; requests wait) ── the rest: daemon.py

What is imported here is what an upgrade's gap is made of: nothing that the endpoint does not need.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
import structlog
import uvloop

from l40sd import __version__, log, systemd
from l40sd.clock import now_s
from l40sd.config import files as config_files
from l40sd.config.load import Loaded, load
from l40sd.config.options import Config
from l40sd.control.events import Events
from l40sd.daemon import reexec
from l40sd.daemon.lock import DaemonLock
from l40sd.daemon.parts import Parts
from l40sd.daemon.shutdown import PROXY_GRACE_S, ShutdownReason
from l40sd.errors import ConfigError, L40sError
from l40sd.model import Outlook
from l40sd.proxy import heap
from l40sd.proxy.api_keys import read_keys
from l40sd.proxy.server import Proxy
from l40sd.routing.routes import CatalogEntry, Routes
from l40sd.streams import abandon
from l40sd.trust import distrust, unusable

if TYPE_CHECKING:
    RunWorkers = Callable[[Parts], Coroutine[Any, Any, ShutdownReason]]

EXIT_FAILED = 1
EXIT_BAD_CONFIG = 78  # EX_CONFIG: systemd does not try again (RestartPreventExitStatus)
THREADS = 8


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_path", metavar="FILE", help="Default: $L40SD_CONFIG, else /etc/l40sd/l40sd.toml.")
@click.option("--check-config", is_flag=True, help="Check the configuration, say what is wrong, and exit (0 or 78).")
@click.version_option(__version__, prog_name="l40sd")
def main(config_path: str | None, *, check_config: bool) -> None:
    """Run the host's inference workers: place, start, watch, balance and reshape them."""
    path = config_files.find(config_path, os.environ)
    try:
        loaded = load(config_files.read(path))
        if check_config:
            from l40sd.control.preflight import refuse_unusable  # not in the way of an upgrade

            refuse_unusable(loaded)
    except L40sError as error:
        say(str(error), sys.stderr)
        sys.exit(EXIT_BAD_CONFIG)
    if check_config:
        say(f"{path}: good", sys.stdout)
        return
    # Until there is somebody to answer them: a stop in mid start is a stop of the workers too.
    reexec.hold_signals()
    events = Events(loaded.config.daemon.events_kept, loaded.config.daemon.request_events_kept)
    log.configure(loaded.config.daemon.log_level, log_format=loaded.config.daemon.log_format, on_event=events.add)
    try:
        ending = run_to_its_end(path, loaded, events)
    except ConfigError as error:
        say(str(error), sys.stderr)
        sys.exit(EXIT_BAD_CONFIG)
    except L40sError as error:
        structlog.get_logger().error("daemon.failed", reason=error.what, where=error.where, hint=error.hint)
        sys.exit(EXIT_BAD_CONFIG if error.code in ("bad_config", "does_not_fit", "unknown_pattern") else EXIT_FAILED)
    if ending is not ShutdownReason.UPGRADE:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told again while the interpreter ends: the answer is the same
    else:
        reexec.exec_again()


def say(text: str, stream: TextIO | None) -> None:
    """Print where it can be printed. Where not, the exit status says it all: 78 must stay 78 on a full disk."""
    try:
        click.echo(text, file=stream)
    except OSError:
        if stream is not None:
            abandon(stream)


def run_to_its_end(path: Path, loaded: Loaded, events: Events) -> ShutdownReason:
    """Run the loop; an error for the operator comes out as itself, not as part of a TaskGroup's."""
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


async def run(path: Path, loaded: Loaded, events: Events) -> ShutdownReason:
    """Run the daemon until it is told to end; return why it did.

    Raises:
        L40sError: It could not start: already running, directories not writable, pattern does not fit this host.
    """
    config = loaded.config
    logger = structlog.get_logger()
    # Signals are the loop's alone: a helper thread that took one while the loop ends would lose it. libuv's own threads
    # come into being with its first look-up, and inherit what is held now.
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, initializer=reexec.hold_signals))
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
        kept = reexec.take()
        lock_path = runtime_dir / "l40sd.lock"
        lock = DaemonLock.resume(lock_path, kept.lock) if kept else DaemonLock.acquire(lock_path)
        stack.callback(lock.release)
        stack.callback(events.close)
        # 2. The endpoint listens before anything slow: requests wait, none is refused, and connections that the daemon
        # before us in this process had go on.
        routes = Routes(queue_limit=config.proxy.queue_limit, in_flight_limit=config.proxy.in_flight_limit)
        # Without a catalog the first requests after a restart would be told that there is no such model.
        outlook = Outlook(note="the daemon has just started")
        routes.set_catalog({m.name: CatalogEntry(aliases=m.aliases, outlook=outlook) for m in config.models.values()})
        proxy = Proxy(config.proxy, routes, api_keys=read_keys(config.proxy.api_keys_file))
        if kept is not None and kept.problem:
            logger.warning("daemon.connections_lost", reason=kept.problem)
        lent = kept.lent if kept else systemd.listen_sockets().get("proxy", [])
        await proxy.start(lent, kept.own if kept else (), kept.connections if kept else None)
        stack.push_async_callback(proxy.stop, PROXY_GRACE_S)
        # 3. The rest; to import it takes longer than all of the above, so it is not imported before.
        run_workers = await asyncio.to_thread(import_the_rest)
        parts = Parts(path=path, loaded=loaded, events=events, notifier=notifier, lock=lock, routes=routes, proxy=proxy)
        ending = await run_workers(parts)
        if ending is ShutdownReason.UPGRADE:
            await hand_over(notifier, lock, proxy)
        return ending


def import_the_rest() -> "RunWorkers":
    """Return what runs behind the endpoint. In a thread: requests are served meanwhile."""
    from l40sd.daemon.daemon import run_workers

    return run_workers


async def hand_over(notifier: systemd.Notifier, lock: DaemonLock, proxy: Proxy) -> None:
    """Keep lock, listeners and open connections for the next daemon in this process; from here on nothing is served."""
    notifier.watchdog()
    own = [sock for sock in proxy.sockets if sock not in proxy.lent]
    reexec.give(lock.keep_over_exec(), own=own, lent=proxy.lent)
    began_s = now_s()
    handed, lost = await proxy.export_connections()
    reexec.give_connections(handed)
    structlog.get_logger().info(
        "daemon.handing_over",
        connections=len(handed.connections),
        in_flight=handed.in_flight,
        lost=lost,
        took_s=round(now_s() - began_s, 4),
    )


async def feed_watchdog(notifier: systemd.Notifier) -> None:
    """Tell systemd that the loop turns, for as long as it does; returns at once where nobody watches."""
    while (interval_s := notifier.watchdog_interval_s) is not None:
        notifier.watchdog()
        await asyncio.sleep(interval_s)


def prepare_directories(config: Config) -> None:
    """Make the daemon's directories.

    Raises:
        L40sError: One cannot be made or written to, or others may: what they put there would be taken for our own.
    """
    for key in ("state_dir", "runtime_dir", "log_dir"):
        directory = Path(getattr(config.daemon, key))
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            found = directory.stat()
            why = distrust(owner=found.st_uid, mode=found.st_mode, own=os.geteuid())
            if why or not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(13, why or "not writable")
        except OSError as error:
            raise unusable(key, str(directory), error.strerror, own=os.geteuid()) from error
