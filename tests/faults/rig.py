"""What the faults are injected with: a daemon of its own for each, the means to look at it, and the cleaning up."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from daemonkit import Site
from loadkit import Mix, Tally, load

from l40sd.control.messages import Event, Status, WorkerStatus

PATIENCE_S = 60.0
STOP_S = 60.0
LOOK_S = 0.02

WORKERS = {
    "start_parallel": 4,
    "drain_timeout_s": 10.0,
    "term_timeout_s": 2.0,
    "kill_timeout_s": 3.0,
    "backoff_first_s": 0.5,
    "backoff_never_ready_first_s": 0.5,
}
HEALTH = {
    "probe_interval_s": 0.2,
    "probe_timeout_s": 1.0,
    "startup_interval_s": 0.05,
    "startup_timeout_s": 20.0,
    "stall_timeout_s": 2.0,
    "canary_interval_s": 1.0,
    "canary_timeout_s": 2.0,
}
PROXY = {"upstream_idle_timeout_s": 0.5, "client_idle_timeout_s": 5.0}
PACED = ("--tokens-per-s", "40")
"""A stream of 40 tokens takes a second."""


class Broken(Exception):  # noqa: N818 - a promise that was not kept
    """What was promised did not happen; the text says what was seen."""


def check(holds: object, what: object) -> None:
    """Raise ``Broken`` with this text unless the claim holds."""
    if not holds:
        raise Broken(str(what))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A moment in a daemon's story: the last event so far, and the wall clock, which events carry too."""

    seq: int
    at: datetime

    def until(self, event: Event) -> float:
        """Return the seconds from here to an event."""
        return (datetime.fromisoformat(event.time) - self.at).total_seconds()


@dataclass(slots=True, kw_only=True)
class Rig:
    """One fault's folder and daemons.

    Attributes:
        is_quick: Fewer rounds, so that the whole suite takes minutes.
        provider: Who holds the workers' processes: ``auto`` or, to repeat a fault without cgroups, ``none``.
    """

    number: int
    folder: Path
    is_quick: bool
    provider: str = "auto"
    sites: list[Site] = field(default_factory=list)
    _bases: list[tuple[Site, int, int]] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list)

    # -- a daemon ------------------------------------------------------------------------------------------------

    def site(
        self,
        *,
        count: int | str = 2,
        tp: int = 1,
        args: Iterable[str] = (),
        workers: Mapping[str, Any] | None = None,
        health: Mapping[str, Any] | None = None,
        proxy: Mapping[str, Any] | None = None,
        daemon: Mapping[str, str | float] | None = None,
        model: Mapping[str, Any] | None = None,
        host: Mapping[str, Any] | None = None,
        extra: str = "",
        prefix: tuple[str, ...] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Site:
        """Return a daemon, not started yet, with one pattern ``few``: ``count`` replicas of a simulated model ``toy``.

        Timeouts are short; what is given is laid over them.
        """
        toy = {"engine": "simulated", "attention_heads": 64, "args": [*args], **(model or {})}
        few = {"model": "toy", "count": count, "tp": tp}
        sections = {
            "host": {"inventory": "l40s-12-4+2", **(host or {})},
            "workers": {**WORKERS, **(workers or {})},
            "health": {**HEALTH, **(health or {})},
            "proxy": {**PROXY, **(proxy or {})},
            "models.toy": toy,
        }
        text = "\n".join(section(name, values) for name, values in sections.items())
        text += f"\n{section('[patterns.few.replicas]', few)}\n{extra}"
        settings: dict[str, str | float] = {"pattern": "few", "provider": self.provider, "stop_timeout_s": 20.0}
        site = Site(
            folder=self.folder / f"site{len(self.sites)}",
            config=text,
            settings={**settings, **(daemon or {})},
            prefix=prefix,
            environ=environ or {},
        )
        self.sites.append(site)
        return site

    async def serve(self, site: Site, pattern: str = "few") -> Status:
        """Start it, wait until every worker is ready, and note its file descriptors; return its status."""
        await site.start(PATIENCE_S)
        status = await site.until_ready(pattern, PATIENCE_S)
        assert site.daemon is not None
        least = min([await descriptors(site) for _ in range(3)])
        self._bases.append((site, site.daemon.pid, least))
        return status

    def at_end(self, undo: Callable[[], object]) -> None:
        """Have this called after the fault, the last one first, before the daemons are stopped."""
        self._undo.append(undo)

    async def end(self) -> list[str]:
        """Stop what still runs and return what is left that should not be, one sentence each."""
        problems = []
        while self._undo:
            self._undo.pop()()
        for site, pid, base in self._bases:
            if site.daemon is not None and site.daemon.pid == pid and site.daemon.poll() is None:
                problems += await descriptors_are_back(site, base)
        for site in self.sites:
            if site.daemon is not None and site.daemon.poll() is None:
                code = await site.stop(STOP_S)
                if code != 0:
                    problems.append(f"the daemon ended with {code}: {site.tail(5)}")
            problems += await self._left(site)
        self.clear()
        return problems

    async def _left(self, site: Site) -> list[str]:
        left: list[str] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):  # what was killed takes a moment to go
                while left := [*site.leftovers(), *site.cgroups()]:  # noqa: ASYNC110 - the kernel does it
                    await asyncio.sleep(LOOK_S)
        if site.socket.exists():
            left.append(f"the socket's file {site.socket}")
        return [f"left behind: {what}" for what in left]

    def clear(self) -> None:
        """Kill whatever is left, without a word."""
        while self._undo:
            with contextlib.suppress(OSError):
                self._undo.pop()()
        for site in self.sites:
            site.clear()

    # -- a look at it --------------------------------------------------------------------------------------------

    async def mark(self, site: Site) -> Mark:
        """Return this moment; call it right before the injection."""
        events = await site.events()
        return Mark(seq=events[-1].seq if events else 0, at=now())

    async def told(
        self, site: Site, mark: Mark, name: str, worker: str = "", *, timeout_s: float = PATIENCE_S
    ) -> tuple[Event, float]:
        """Return the first event of this name (of this worker) after a moment, and how many seconds after it.

        Raises:
            Broken: There was none in time.
        """

        async def look() -> Event | None:
            for event in await site.events():
                if event.seq > mark.seq and event.event == name and worker in ("", event.data.get("worker")):
                    return event
            return None

        try:
            event = await until(look, f"event {name} {worker}", timeout_s)
        except Broken as error:
            seen = [f"{e.event} {e.data.get('worker', '')}" for e in await site.events() if e.seq > mark.seq]
            raise Broken(f"{error}; there were: {', '.join(seen) or 'none'}") from error
        return event, mark.until(event)

    @contextlib.asynccontextmanager
    async def loaded(self, site: Site, **changes: Any) -> AsyncIterator[Tally]:
        """Keep a load on while the block runs."""
        values: dict[str, Any] = {"models": ("toy",), "streams": 4, "shorts": 2, "stream_tokens": 40, "timeout_s": 30.0}
        async with load(Mix(url=await site.url(), **(values | changes))) as tally:
            yield tally


def now() -> datetime:
    """Return the wall clock, which the events carry."""
    return datetime.now().astimezone()


def section(name: str, values: Mapping[str, Any]) -> str:
    """Return one TOML table; JSON's strings, numbers and arrays are TOML's."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join([f"[{name}]", *lines, ""])


async def until(look: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Return the first true value of ``look``, which may be a coroutine function.

    Raises:
        Broken: There was none in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                found = look()
                if isinstance(found, Awaitable):
                    found = await found
                if found:
                    return found
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        raise Broken(f"not within {timeout_s:g} s: {what}") from None


async def descriptors(site: Site) -> int:
    """Return how many file descriptors the daemon has; looked at after a moment of rest."""
    assert site.daemon is not None
    await asyncio.sleep(0.1)
    return int(psutil.Process(site.daemon.pid).num_fds())


async def descriptors_are_back(site: Site, base: int) -> list[str]:
    """Return a sentence when the daemon keeps more descriptors than it had."""
    count = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(15):
            while (count := await descriptors(site)) > base:
                pass
            return []
    return [f"the daemon has {count} file descriptors, {base} before"]


def worker_of(status: Status, worker_id: str) -> WorkerStatus:
    """Return one worker of a status."""
    return next(worker for worker in status.workers if worker.id == worker_id)


async def busiest(site: Site, least: int = 1) -> WorkerStatus:
    """Return the worker with the most requests, once one has some."""
    status = await site.until(lambda s: any(w.in_flight >= least for w in s.workers), "a worker is busy", PATIENCE_S)
    return max(status.workers, key=lambda worker: worker.in_flight)


def kill(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Signal exactly the process that has this pid now."""
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)


def tree_of(pid: int | None) -> list[psutil.Process]:
    """Return an engine's whole tree as its shim has it: all that is below the shim, adopted children too."""
    return psutil.Process(pid).parent().children(recursive=True)  # type: ignore[no-any-return]


def living(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return those that still live; a pid that was used again is another process."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


async def set_faults(worker: WorkerStatus, **faults: float | None) -> None:
    """Change a simulated engine's faults while it runs; ``_`` in a name stands for ``-``."""
    body = {name.replace("_", "-"): number for name, number in faults.items()}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.post(f"http://{worker.address}/sim/fault", json=body) as reply,
    ):
        check(reply.status == 200, await reply.text())


async def engine_state(worker: WorkerStatus) -> dict[str, Any]:
    """Return a simulated engine's own account."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.get(f"http://{worker.address}/sim/state") as reply,
    ):
        found: dict[str, Any] = await reply.json()
        return found


async def ask(
    site: Site, *, tokens: int = 2, stream: bool = False, timeout_s: float = 30.0, **fields: str
) -> tuple[int, str]:
    """Ask for a completion through the proxy, with further fields of the request; return status and body."""
    body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": stream}
    body.update(fields)
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
        session.post(f"{await site.url()}/v1/chat/completions", json=body) as reply,
    ):
        return reply.status, await reply.text()


def forge(site: Site, name: str, **changes: Any) -> None:
    """Change a file of every instance's record."""
    for path in (site.folder / "run" / "instances").glob(f"*/{name}"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
