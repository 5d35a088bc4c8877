"""Real shims and engines for the tests here."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from l40sd.shim import cgroup, proc
from l40sd.workers.process import Instance, InstanceSpec, Processes
from l40sd.workers.process.leftovers import mark_of, marked

PATIENCE_S = 60.0


async def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Return the condition's first true value; fail when it has none in time."""
    try:
        async with asyncio.timeout(patience_s):
            while not (value := condition()):  # noqa: ASYNC110 - another process does it
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"did not happen within {patience_s} s: {what}")
    return value


def is_alive(process: proc.Process) -> bool:
    now = proc.read_process(process.pid)
    return now is not None and now.is_alive and now.start_ticks == process.start_ticks


@dataclass
class Site:
    """One daemon's directories."""

    root: Path
    provider: str
    numbers: Any = field(default_factory=lambda: count(1))
    opened: list[Processes] = field(default_factory=list)

    @property
    def runtime_dir(self) -> Path:
        return self.root / "run"

    @property
    def log_dir(self) -> Path:
        return self.root / "log"

    async def open(self) -> Processes:
        """As a daemon does that has just started."""
        processes = await Processes.open(runtime_dir=self.runtime_dir, log_dir=self.log_dir, provider=self.provider)
        self.opened.append(processes)
        return processes

    def spec(self, script: str, **changes: Any) -> InstanceSpec:
        """A shell script as engine; it runs in the root directory of the site."""
        values: dict[str, Any] = {
            "instance": f"w-{next(self.numbers)}",
            "worker": "w",
            "argv": ("/bin/sh", "-c", script),
            "env": {"PATH": os.environ["PATH"]},
            "cwd": str(self.root),
            "term_timeout_s": 10.0,
        }
        return InstanceSpec(**values | changes)

    async def pid_in(self, name: str) -> proc.Process:
        """Wait for an engine's process to write its pid into a file; return who that is."""
        path = self.root / name
        text = await until(lambda: path.exists() and path.read_text().strip(), f"{name} is written")
        process = proc.read_process(int(text))
        assert process is not None
        return process

    def marked(self) -> list[proc.Process]:
        return [one for one in marked() if mark_of(one)[1] == str(self.runtime_dir)]

    def groups(self) -> list[Path]:
        own = cgroup.own()
        return [] if own is None else [path for path in Path(own).glob("l40sd-*") if path.name in self.bases]

    @property
    def bases(self) -> set[str]:
        return {Path(one._base).name for one in self.opened if one._base}


async def leftovers(site: Site) -> list[proc.Process]:
    """A killed process takes a moment to go; a second is enough."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            while site.marked():  # noqa: ASYNC110 - the kernel does it
                await asyncio.sleep(0.01)
    return site.marked()


def open_descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found[name] = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
    return found


async def end(processes: Processes, *instances: Instance) -> None:
    for instance in instances:
        assert await instance.kill(PATIENCE_S)
        processes.forget(instance.spec.instance)
