"""A daemon of one's own in a folder of its own: for the demo and the end-to-end tests.

Everything the daemon writes stays in the folder; its ports are its own. Started and stopped as a service
manager would do it: a process, signals, its exit status; and spoken to as an operator would: through its
control socket.
"""

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

from l40sd.codec import encode
from l40sd.control.client import UNREACHABLE, Client
from l40sd.control.messages import Event, OperationStatus, PatternRequest, Status, WorkerStatus
from l40sd.errors import L40sError

T = TypeVar("T")

MARKER = "L40SD_SITE"
POLL_S = 0.1
QUICK = """
[host]
inventory = "l40s-8"
[workers]
backoff_first_s = 0.2
backoff_never_ready_first_s = 0.2
backoff_never_ready_limit_s = 0.4
start_parallel = 4
[health]
probe_interval_s = 0.2
startup_timeout_s = 10
"""
"""The top of a configuration: eight recorded GPUs, and nothing takes long."""


@dataclass(slots=True, kw_only=True)
class Site:
    """One daemon and its folder.

    Attributes:
        config: The configuration without the places and the endpoint, which are laid over it.
        programs: Folders to look for engines in, before PATH.
        settings: More of ``[daemon]``.
        prefix: A program that the daemon is started through, e.g. ``("unshare", "--mount")``.
        environ: Laid over this process's own environment.
        pass_fds: Descriptors that the daemon's process keeps, e.g. a listening socket.
        daemon: The daemon's process, once started.
    """

    folder: Path
    config: str
    programs: tuple[Path, ...] = ()
    listen: str = "127.0.0.1:0"
    settings: Mapping[str, str | float] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    pass_fds: tuple[int, ...] = ()
    daemon: subprocess.Popen[bytes] | None = None

    # -- the process ---------------------------------------------------------------------------------------------

    def write_config(self) -> None:
        """Write the configuration file, and the places to a file laid over it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(self.config)
        (self.folder / "conf.d").mkdir(exist_ok=True)
        daemon: dict[str, str | float] = {
            "state_dir": str(self.folder / "state"),
            "runtime_dir": str(self.folder / "run"),
            "log_dir": str(self.folder / "log"),
            "orphan_grace_s": 60.0,
            **self.settings,
        }
        lines = [f"{key} = {_toml(value)}" for key, value in daemon.items()]
        marks = [
            f"[engines.{engine}.env]\n{MARKER} = {_toml(str(self.folder))}" for engine in ("llama-cpp", "simulated")
        ]
        # A hundred ports of our own: those of a daemon that is killed in mid start may be taken by another's workers.
        first = 20_000 + zlib.crc32(str(self.folder).encode()) % 100 * 100
        ports = ["[workers]", f"port_first = {first}", f"port_last = {first + 99}"]
        text = "\n".join(["[daemon]", *lines, "[proxy]", f"listen = [{_toml(self.listen)}]", *ports, *marks, ""])
        (self.folder / "conf.d" / "site.toml").write_text(text)

    def spawn(self) -> None:
        """Start the daemon's process; its output goes to ``daemon.log``."""
        self.write_config()
        path = os.pathsep.join([*map(str, self.programs), os.environ.get("PATH", os.defpath)])
        with self.log_file.open("ab") as log:
            self.daemon = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "l40sd", "--config", str(self.config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=os.environ | {"PATH": path} | dict(self.environ),
                start_new_session=True,
                pass_fds=self.pass_fds,
            )

    async def start(self, timeout_s: float = 30.0) -> Status:
        """Start the daemon and return its first status.

        Raises:
            L40sError: It ended, or did not answer in time; with the end of its log.
        """
        self.spawn()
        return await self.until(lambda _: True, "the control socket answers", timeout_s)

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon a signal."""
        assert self.daemon is not None, "not started"
        self.daemon.send_signal(number)

    async def ended(self, timeout_s: float) -> int:
        """Wait for the daemon to end; return its exit status (negative: the signal that killed it).

        Raises:
            L40sError: It is still there after so many seconds.
        """
        assert self.daemon is not None, "not started"
        try:
            return await asyncio.to_thread(self.daemon.wait, timeout_s)
        except subprocess.TimeoutExpired as error:
            raise L40sError(f"the daemon did not end within {timeout_s:g} s", where=self.tail()) from error

    async def stop(self, timeout_s: float = 60.0) -> int:
        """Stop the daemon as a service manager does (SIGTERM); return its exit status."""
        self.signal(signal.SIGTERM)
        return await self.ended(timeout_s)

    async def kill(self) -> None:
        """Kill the daemon (SIGKILL), as a crash would; its workers are not touched."""
        self.signal(signal.SIGKILL)
        await self.ended(10.0)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything whatever happened in the block; nothing stays behind, only files."""
        try:
            if self.daemon is not None and self.daemon.poll() is None:
                await self.stop()
        finally:
            self.clear()

    def clear(self) -> list[str]:
        """Kill what is left of this site, daemon and workers, and return what it was."""
        left = self.leftovers()
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.kill()
            self.daemon.wait(10)
        for process in self.processes():
            process.kill()
        return left

    def leftovers(self) -> list[str]:
        """Return every process of this site that lives, in words: shims and what carries a worker's marker."""
        left = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # gone since it was found
                left.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
        return left

    def processes(self) -> list[psutil.Process]:
        """Return the living processes of this site but the daemon: shims by their folder, engines by the marker."""
        found = []
        for process in psutil.process_iter():
            try:
                is_shim = str(self.folder / "run") in " ".join(process.cmdline())
                if (is_shim or process.environ().get(MARKER) == str(self.folder)) and process.is_running():
                    found.append(process)
            except psutil.Error:  # gone meanwhile, or a zombie: nothing that could be left behind
                continue
        return [process for process in found if self.daemon is None or process.pid != self.daemon.pid]

    def cgroups(self) -> list[str]:
        """Return the workers' cgroups of this site that are still there (provider ``cgroup``)."""
        name = f"l40sd-{hashlib.sha256(os.fsencode(self.folder / 'run')).hexdigest()[:12]}"
        mounts = [part.mountpoint for part in psutil.disk_partitions(all=True) if part.fstype == "cgroup2"]
        # Not rglob, which raises when another's cgroup goes away meanwhile.
        bases = [Path(at) / name for mount in mounts for at, inner, _ in os.walk(mount) if name in inner]
        return [str(group) for base in bases for group in base.glob("*/")]

    # -- what it says --------------------------------------------------------------------------------------------

    @property
    def config_file(self) -> Path:
        """The main configuration file."""
        return self.folder / "l40sd.toml"

    @property
    def log_file(self) -> Path:
        """The daemon's own output."""
        return self.folder / "daemon.log"

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self.folder / "run" / "control.sock"

    @property
    def client(self) -> Client:
        """A client of the control socket."""
        return Client(str(self.socket), timeout_s=10.0)

    def tail(self, lines: int = 20) -> str:
        """Return the end of the daemon's log."""
        if not self.log_file.exists():
            return "(no log)"
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    async def status(self) -> Status:
        """Return what `l40sctl status` shows."""
        return await self.get("/v1/status", Status)

    async def url(self) -> str:
        """Return the proxy's address, with the port that it really has."""
        return f"http://{(await self.status()).proxy.listen[0]}"

    async def events(self) -> list[Event]:
        """Return every event of the daemon that runs now; what it remembers of those before it is left out."""
        events = await asyncio.to_thread(lambda: list(self.client.events(since=0)))
        begin = max((n for n, event in enumerate(events) if event.event == "daemon.starting"), default=0)
        return events[begin:]

    async def until(self, holds: Callable[[Status], bool], what: str, timeout_s: float) -> Status:
        """Return the first status for which ``holds``.

        Raises:
            L40sError: Not within so many seconds, or the daemon ended; says what was waited for, and the log's end.
        """
        deadline_s = time.monotonic() + timeout_s
        status: Status | None = None
        while time.monotonic() < deadline_s:
            if self.daemon is not None and self.daemon.poll() is not None:
                raise L40sError(
                    f"the daemon ended with {self.daemon.returncode} before {what}; its log ends with\n{self.tail()}"
                )
            try:
                status = await self.status()
            except L40sError as error:
                if error.code != UNREACHABLE:
                    raise
                status = None
            if status is not None and holds(status):
                return status
            await asyncio.sleep(POLL_S)
        phases = ", ".join(f"{w.id} {w.phase} {w.reason}".strip() for w in status.workers) if status else "no answer"
        raise L40sError(f"not within {timeout_s:g} s: {what}; now: {phases}; the log ends with\n{self.tail()}")

    async def until_ready(self, pattern: str, timeout_s: float) -> Status:
        """Return the status once every worker of this pattern is ready, and nothing else is there."""
        return await self.until(
            lambda status: (
                status.pattern == pattern
                and bool(status.workers)
                and all(worker.phase == "ready" for worker in status.workers)
                and (status.operation is None or not status.operation.is_under_way)
            ),
            f"every worker of pattern {pattern} is ready",
            timeout_s,
        )

    async def until_event(self, name: str, timeout_s: float) -> Event:
        """Return the first event of this name.

        Raises:
            L40sError: Not within so many seconds.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            events = await self.events()
            for event in events:
                if event.event == name:
                    return event
            if time.monotonic() > deadline_s:
                seen = ", ".join(dict.fromkeys(event.event for event in events))
                raise L40sError(f"no event {name} within {timeout_s:g} s; there were {seen}")
            await asyncio.sleep(POLL_S)

    async def request(self, pattern: str, *, force: bool = False) -> str:
        """Ask for a pattern; return the operation's id."""
        request = PatternRequest(name=pattern, force=force)
        answer = await asyncio.to_thread(self.client.post, "/v1/pattern", request)
        return str(answer["operation"])

    async def operation(self, operation: str, timeout_s: float) -> OperationStatus:
        """Return how a pattern change ended.

        Raises:
            L40sError: It is still under way after so many seconds.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            now = await self.get(f"/v1/operations/{operation}", OperationStatus)
            if not now.is_under_way:
                return now
            if time.monotonic() > deadline_s:
                raise L40sError(f"still {now.state} after {timeout_s:g} s: {now}; the log ends with\n{self.tail()}")
            await asyncio.sleep(POLL_S)

    async def change(self, pattern: str, timeout_s: float) -> OperationStatus:
        """Change to a pattern and return how that ended."""
        return await self.operation(await self.request(pattern), timeout_s)

    async def post(self, path: str, body: object = None) -> dict[str, Any]:
        """Ask the control socket for something; return what it says.

        Raises:
            L40sError: It refused; the words are the daemon's own.
        """
        return await asyncio.to_thread(self.client.post, path, body)

    async def get(self, path: str, kind: type[T]) -> T:
        """Return what the control socket says at this path.

        Raises:
            L40sError: It refused; the words are the daemon's own.
        """
        return await asyncio.to_thread(self.client.get, path, kind)


SiteOf = Callable[[str], Site]
"""Makes a site of its configuration."""


@contextlib.asynccontextmanager
async def sites(folder: Path, *, programs: tuple[Path, ...] = (), stop_s: float = 60.0) -> AsyncIterator[SiteOf]:
    """Make sites in this folder. At the end each daemon is told to stop, and must leave nothing behind.

    Args:
        folder: Each site gets a folder in it.
        programs: Folders to look for engines in, before PATH.
        stop_s: For each daemon to stop.
    """
    made: list[Site] = []

    def make(config: str) -> Site:
        site = Site(folder=folder / f"site{len(made)}", config=config, programs=programs)
        made.append(site)
        return site

    yield make
    try:
        for site in made:
            if site.daemon is not None and site.daemon.poll() is None:
                assert await site.stop(stop_s) == 0, site.tail()
                assert not site.socket.exists()
            assert site.leftovers() == [], site.tail()
            assert site.cgroups() == [], site.tail()
    finally:
        for site in made:
            site.clear()


def worker_of(status: Status, worker: str) -> WorkerStatus:
    """Return what a status says of this worker."""
    return next(w for w in status.workers if w.id == worker)


def pids(status: Status) -> dict[str, int | None]:
    """Return the workers' process ids."""
    return {worker.id: worker.pid for worker in status.workers}


def _toml(value: str | float) -> str:
    """Return a TOML value; JSON's strings and numbers are TOML's."""
    return encode(value).decode()
