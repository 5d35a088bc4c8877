"""What the long runs happen on: a daemon on a small recorded host, and the claims that are made again and again.

Claims that hold at every moment (``look``): no GPU has two owners, the state file is whole, the daemon ends only when
it is told to, and a worker that nothing touches keeps its process. Claims that hold once nothing is under way
(``rest``): exactly what is wanted runs, and nothing else is left: no process, cgroup, instance's directory, descriptor.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import psutil
from daemonkit import Site

from l40sd.control.messages import ChangePreview, PatternRequest, Status
from l40sd.errors import L40sError
from l40sd.hardware.host_file import format_host_file, parse_host_file
from l40sd.shim import proc
from soak.living import Living, doubly_owned, living

GPUS = (0, 1, 2, 3)
"""Four GPUs below one PCIe switch, cut out of a bundled host: enough for every kind of change."""
REST_S = 90.0
SETTLE_S = 20.0
THREADS_AT_MOST = 2 + min(32, (os.cpu_count() or 1) + 4)
"""asyncio.to_thread's pool starts its threads as it needs them, up to so many."""
LOOK_S = 0.05
AT_REST = ("ready", "drained")

SHAPES: dict[str, Counter[tuple[str, int]]] = {
    "pairs": Counter({("toy", 2): 2}),
    "wide": Counter({("toy", 4): 1}),
    "mixed": Counter({("toy", 2): 1, ("other", 1): 2}),
    "others": Counter({("other", 2): 2}),
    "few": Counter({("toy", 2): 1}),
    "bad": Counter({("toy", 2): 1, ("bad", 2): 1}),
}
"""What each pattern runs: (model, TP) and how many."""
GOOD = tuple(name for name in SHAPES if name != "bad")


def config(host_file: Path, *, other_args: str = "", extra: str = "") -> str:
    """Return a configuration: failures are forgiven without end, so that any number of them is survived by waiting.

    Args:
        other_args: Arguments of the model ``other``: another launch, so a reload rolls its workers.
        extra: Laid behind it, e.g. something broken.
    """
    models = "".join(
        f'[models.{name}]\nengine = "simulated"\nattention_heads = 8\nargs = [{args}]\n'
        for name, args in (
            ("toy", '"--tokens-per-s", "50"'),
            ("other", other_args),
            ("bad", '"--fault", "exit-at-once=3"'),
        )
    )
    patterns = "".join(
        f'[[patterns.{pattern}.replicas]]\nmodel = "{model}"\ntp = {tp}\ncount = {count}\n'
        for pattern, shapes in SHAPES.items()
        for (model, tp), count in shapes.items()
    )
    return f"""
[host]
inventory = "{host_file}"
[daemon]
pattern = "pairs"
[workers]
start_parallel = 4
drain_timeout_s = 20
term_timeout_s = 10
backoff_first_s = 0.1
backoff_limit_s = 0.5
backoff_never_ready_first_s = 0.1
backoff_never_ready_limit_s = 0.5
quarantine_alike = 100
quarantine_per_hour = 1000
[health]
probe_interval_s = 0.5
startup_interval_s = 0.05
{models}{patterns}{extra}
"""


class Broken(AssertionError):  # noqa: N818 - a promise that was not kept
    """What was promised did not happen; the text says what was seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What a daemon takes while nothing is under way; ``life`` tells one daemon's process from the next."""

    life: str
    descriptors: int
    threads: int
    rss_mib: float
    cgroups: int
    directories: int


@dataclass(slots=True, kw_only=True)
class Ground:
    """A daemon and what is expected of it.

    Attributes:
        asked: The pattern that was in force when nothing was under way for the last time, and those asked for since.
        is_disturbed: Something was killed, or cannot come up: a change since then may have gone back.
        drained: Workers that rest because we asked for it.
        keeps: Workers that nothing has touched since they were ready, by their engine's process.
    """

    site: Site
    asked: list[str] = field(default_factory=lambda: ["pairs"])
    is_disturbed: bool = False
    drained: set[str] = field(default_factory=set)
    keeps: dict[str, Living] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, *, listen: str = "") -> "Ground":
        """Write a host of four GPUs into a folder, and make a site there; nothing is started.

        Args:
            listen: The endpoint's address; by default a free one. Not port 0: each upgrade would add a port.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = files("l40sd").joinpath("sim/hosts/l40s-8.toml").read_text("utf-8")
        whole = parse_host_file(text, source="l40s-8")
        small = replace(whole, host="small", gpus=tuple(gpu for gpu in whole.gpus if gpu.index in GPUS))
        host_file = folder / "host.toml"
        host_file.write_text(format_host_file(small))
        return cls(site=Site(folder=folder / "site", config=config(host_file), listen=listen or free_address()))

    @property
    def folder(self) -> Path:
        """Everything is below it."""
        return self.site.folder.parent

    @property
    def host_file(self) -> Path:
        """Where the host's description is."""
        return self.folder / "host.toml"

    @property
    def runtime_dir(self) -> Path:
        """The daemon's runtime directory."""
        return self.site.folder / "run"

    @property
    def wanted(self) -> set[str]:
        """Return the patterns that may be in force once nothing is under way."""
        return set(self.asked) if self.is_disturbed else {self.asked[-1]}

    @property
    def is_up(self) -> bool:
        """Whether the daemon was started and not ended by us."""
        return self.site.daemon is not None

    # -- at every moment -------------------------------------------------------------------------------------------

    def look(self) -> list[Living]:
        """Make the claims that hold at every moment; return who lives.

        Raises:
            Broken: One of them does not hold.
        """
        daemon = self.site.daemon
        if daemon is not None and daemon.poll() is not None:
            raise Broken(f"the daemon ended by itself with {daemon.returncode}; its log ends with\n{self.site.tail()}")
        found = living(self.runtime_dir)
        if double := doubly_owned(found):
            raise Broken("; ".join(double))
        state = self.site.folder / "state" / "state.json"
        if state.exists():
            try:
                json.loads(state.read_bytes())["pattern"]
            except (ValueError, KeyError) as error:
                raise Broken(f"the state file cannot be read: {error!r}: {state.read_bytes()[:200]!r}") from error
        if lost := [f"{worker} ({keeper.pid})" for worker, keeper in self.keeps.items() if not keeper.lives()]:
            raise Broken(f"nothing touched {', '.join(lost)}, and it is gone; the log ends with\n{self.site.tail()}")
        return found

    async def until(self, holds: Callable[[Status], bool], what: str, timeout_s: float = REST_S) -> Status:
        """Return the first status for which this holds; ``look`` all the while.

        Raises:
            Broken: Not in time.
        """
        deadline_s = time.monotonic() + timeout_s
        said = "no answer"
        while time.monotonic() < deadline_s:
            self.look()
            try:
                status = await self.site.status()
            except L40sError as error:
                said = str(error)
            else:
                if holds(status):
                    return status
                said = f"pattern {status.pattern}, {status.operation}: " + ", ".join(
                    f"{w.id} {w.phase} {w.reason}".strip() for w in status.workers
                )
            await asyncio.sleep(LOOK_S)
        raise Broken(f"not within {timeout_s:g} s: {what}; now: {said}; the log ends with\n{self.site.tail()}")

    async def start(self) -> Status:
        """Start the daemon; return its first status."""
        self.site.spawn()
        return await self.until(lambda _: True, "the control socket answers", 60.0)

    async def kill(self) -> None:
        """Kill the daemon; its workers are not touched."""
        await self.site.kill()
        self.site.daemon = None

    async def upgrade(self) -> None:
        """Let the daemon replace itself by exec (SIGUSR2); return when the next one answers in the same process."""
        began_s = time.monotonic()
        self.site.signal(signal.SIGUSR2)
        await self.until(lambda s: s.uptime_s < time.monotonic() - began_s, "the next daemon answers")

    async def stop(self) -> None:
        """Stop the daemon as a service manager does; nothing is left then.

        Raises:
            Broken: Something is.
        """
        self.keeps.clear()
        code = await self.site.stop(REST_S)
        self.site.daemon = None
        if code != 0:
            raise Broken(f"the daemon ended with {code}; its log ends with\n{self.site.tail()}")
        if left := [*self.site.leftovers(), *self.site.cgroups(), *self.directories()]:
            raise Broken(f"left behind by a stop: {', '.join(left)}")

    def directories(self) -> list[str]:
        """Return the directories of instances."""
        folder = self.runtime_dir / "instances"
        return sorted(map(str, folder.iterdir())) if folder.exists() else []

    # -- what is asked of it ---------------------------------------------------------------------------------------

    async def tell(self, worker: str, verb: str) -> None:
        """Pass a wish on to a worker, which may have gone meanwhile: that is no news.

        Raises:
            L40sError: It is refused for any other reason.
        """
        try:
            await self.site.post(f"/v1/workers/{worker}/{verb}")
        except L40sError as error:
            if error.code not in ("unknown_worker", "worker_retiring", "not_serving"):
                raise
            return
        match verb:
            case "drain":
                self.drained.add(worker)
            case "undrain":
                self.drained.discard(worker)
            case "restart":
                self.touched(worker)
                self.is_disturbed = True
            case _:
                pass

    async def wake(self) -> None:
        """Let every worker that we drained serve again."""
        for worker in list(self.drained):
            await self.tell(worker, "undrain")

    async def ask(self, pattern: str) -> str:
        """Ask for a pattern; return the operation's id. Whom it keeps is asked of a dry run before."""
        request = PatternRequest(name=pattern, dry_run=True)
        preview = await asyncio.to_thread(self.site.client.ask, "/v1/pattern", request, ChangePreview)
        operation = await self.site.request(pattern)
        self.keep_only(preview.kept)
        if pattern in GOOD:
            self.asked.append(pattern)
        else:
            self.is_disturbed = True
        return operation

    def keep_only(self, workers: Iterable[str]) -> None:
        """Expect of these workers only that they keep their process."""
        kept = set(workers)
        self.keeps = {worker: keeper for worker, keeper in self.keeps.items() if worker in kept}

    def touched(self, worker: str) -> None:
        """Expect nothing of this worker's process any more."""
        self.keeps.pop(worker, None)

    def keep_ready(self, status: Status, found: Iterable[Living]) -> None:
        """Expect from now on that every worker which is ready keeps its process."""
        by_pid = {process.pid: process for process in found}
        self.keeps = {w.id: by_pid[w.pid] for w in status.workers if w.phase in AT_REST and w.pid in by_pid}

    # -- once nothing is under way ---------------------------------------------------------------------------------

    async def rest(self, *, base: Census | None = None) -> Census:
        """Wait until what is wanted is reached, and make the claims that hold then.

        Args:
            base: What the daemon took in the same pattern; connections of its probes may take a moment to close.

        Raises:
            Broken: It is not reached in time, or something else is there as well.
        """

        def is_reached(status: Status) -> bool:
            shapes = Counter((w.model, w.tp) for w in status.workers)
            return (
                status.operation is None
                and status.pattern in self.wanted
                and shapes == SHAPES[status.pattern]
                and all(w.phase == "ready" or (w.phase == "drained" and w.id in self.drained) for w in status.workers)
                # What was killed a moment ago is ready until the daemon has noticed.
                and {w.pid for w in status.workers} <= {process.pid for process in living(self.runtime_dir)}
            )

        status = await self.until(is_reached, f"one of {sorted(self.wanted)} is in force and ready")
        # A worker's processes are gone before its status is; its directory goes a moment after.
        status = await self.until(lambda _: not self.surplus(status), f"nothing else is left: {self.surplus(status)}")
        found = self.look()
        self.asked, self.is_disturbed = [status.pattern], False
        self.keep_ready(status, found)
        if missing := {w.id for w in status.workers} - self.keeps.keys():
            raise Broken(f"ready, and has no process: {', '.join(sorted(missing))}")
        if base is not None:
            await self.until(
                lambda _: self.census().descriptors <= base.descriptors,
                f"no more descriptors than {base.descriptors} ({self.census().descriptors})",
                SETTLE_S,
            )
            threads = self.census().threads
            if threads > max(base.threads, THREADS_AT_MOST):
                raise Broken(f"the daemon has {threads} threads, {base.threads} before")
        return self.census()

    def surplus(self, status: Status) -> list[str]:
        """Return what belongs to no worker of this status: processes, cgroups and directories."""
        instances = {w.instance for w in status.workers}
        found = living(self.runtime_dir)
        strangers = [f"process {p.pid} of {p.instance}" for p in found if p.instance not in instances]
        places = [p for p in (*self.site.cgroups(), *self.directories()) if Path(p).name not in instances]
        return [*strangers, *places]

    def census(self) -> Census:
        """Count what the daemon takes."""
        assert self.site.daemon is not None
        process = psutil.Process(self.site.daemon.pid)
        with process.oneshot():
            return Census(
                life=f"{process.pid}/{process.create_time():.2f}",
                descriptors=process.num_fds(),
                threads=process.num_threads(),
                rss_mib=round(process.memory_info().rss / 2**20, 1),
                cgroups=len(self.site.cgroups()),
                directories=len(self.directories()),
            )


def free_address() -> str:
    """Return an address of this host that nobody listens on, below the ports of outgoing connections."""
    for port in random.SystemRandom().sample(range(10_000, 15_000), 100):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"
    raise Broken("no free port")


def belongs(found: Iterable[Living], *statuses: Status) -> list[str]:
    """Return, in words, the processes that belong to no worker of these statuses; one that spawns has no id yet."""
    instances = {w.instance for status in statuses for w in status.workers}
    spawning = {w.id for status in statuses for w in status.workers if w.phase in ("waiting", "spawning")}
    return [
        f"process {process.pid} of {process.instance}"
        for process in found
        if process.instance not in instances and process.instance.rpartition("-")[0] not in spawning and process.lives()
    ]


def kill(process: Living) -> bool:
    """Kill exactly this process; False when it has ended meanwhile."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        now = proc.read_process(process.pid)
        if now is None or now.start_ticks != process.start_ticks:
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def parts_of(found: Iterable[Living], part: str) -> list[Living]:
    """Return all shims, all leaders (their children), or all children of leaders, in order of their instances."""
    everybody = list(found)
    shims = {process.pid for process in everybody if process.is_shim}
    leaders = {process.pid for process in everybody if not process.is_shim and process.parent in shims}
    chosen = {
        "shim": [p for p in everybody if p.pid in shims],
        "leader": [p for p in everybody if p.pid in leaders],
        "child": [p for p in everybody if not p.is_shim and p.parent in leaders],
    }[part]
    return sorted(chosen, key=lambda process: (process.instance, process.pid))


def worker_of(process: Living) -> str:
    """Return the worker whose instance a process belongs to: an instance is its worker's id and ten more letters."""
    return process.instance.rpartition("-")[0]
