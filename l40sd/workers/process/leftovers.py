"""What is left of an instance whose shim is gone or was never complete: find it, kill it, clear it away."""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from l40sd.shim import INSTANCE_VARIABLE, RUNTIME_VARIABLE, cgroup, proc
from l40sd.workers.process.records import Identity, is_ours

FIRST_LOOK_S, LAST_LOOK_S = 0.005, 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """Where to look for one instance's processes.

    Four nets, each sure that what it holds is ours: the instance's own cgroup; the mark in the environment;
    a shim that was just spawned (``shim``), which for a moment has no environment yet; and, only while we
    have been watching (``engine``), the tree and the session of the engine, whose pid nobody else can have
    had in the moment since its shim died.
    """

    instance: str
    group: str = ""
    shim: Identity | None = None
    engine: Identity | None = None

    def find(self) -> list[proc.Process]:
        """Return the living processes outside cgroups' reach; reads all of /proc, about 20 us a process."""
        found = {process.pid: process for process in marked() if self.instance == mark_of(process)[0]}
        if self.shim is not None:
            shim = proc.read_process(self.shim.pid)
            if shim is not None and shim.is_alive and self.shim.matches(shim):
                found[shim.pid] = shim
        if self.engine is not None:
            leader = proc.read_process(self.engine.pid)
            if leader is None or self.engine.matches(leader):
                below = proc.descendants(self.engine.pid, session=self.engine.pid)
                found |= {process.pid: process for process in below if is_ours(process.pid)}
            if leader is not None and leader.is_alive and self.engine.matches(leader):
                found[leader.pid] = leader
        return list(found.values())

    def is_empty(self) -> bool:
        """Whether nobody is left."""
        return not (self.group and cgroup.is_populated(self.group)) and not self.find()

    async def kill(self, timeout_s: float) -> bool:
        """Kill all of it; False when somebody is left after ``timeout_s``."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        look_s = FIRST_LOOK_S
        while not await asyncio.to_thread(self._kill_once):
            if asyncio.get_running_loop().time() >= deadline_s:
                return False
            await asyncio.sleep(look_s)
            look_s = min(LAST_LOOK_S, 2 * look_s)
        return True

    def _kill_once(self) -> bool:
        if self.is_empty():
            return True
        if self.group:
            cgroup.kill(self.group)
            for name in ("engine", "shim"):  # in a unit only these two are ours to kill
                cgroup.kill(f"{self.group}/{name}")
        proc.kill_all(self.find)
        return False


def marked() -> Iterator[proc.Process]:
    """Yield the living processes of our user that carry an instance's mark, but for this one."""
    for process in proc.all_processes():
        if process.is_alive and process.pid != os.getpid() and is_ours(process.pid) and mark_of(process)[0]:
            yield process


def mark_of(process: proc.Process) -> tuple[str, str]:
    """Return the instance and the runtime directory in a process's environment; empty where there is none."""
    try:
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            pairs = dict(part.partition(b"=")[::2] for part in file.read().split(b"\0"))
    except OSError:
        return "", ""
    now = proc.read_process(process.pid)
    if now is None or now.start_ticks != process.start_ticks:
        return "", ""  # that was another's environment
    return os.fsdecode(pairs.get(INSTANCE_VARIABLE.encode(), b"")), os.fsdecode(
        pairs.get(RUNTIME_VARIABLE.encode(), b"")
    )


def is_of(pid: int, instance: str, runtime_dir: Path) -> bool:
    """Whether the process that has this pid now bears an instance's mark, or sits in its cgroup."""
    process = proc.read_process(pid)
    if process is None or not is_ours(pid):
        return False
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    parts = {part for line in lines for part in line.partition("::")[2].split("/")}
    return mark_of(process) == (instance, str(runtime_dir)) or not parts.isdisjoint({instance, unit_of(instance)})


def remove_group(group: str) -> None:
    """Remove an empty cgroup with those below it; one that is not empty stays."""
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()


def trusted_group(group: str, instance: str) -> str:
    """Return a group that a record names, if it can only be this instance's own; else nothing.

    A record may be forged or from another time: a cgroup is killed only if its name says whose it is.
    """
    path = Path(group)
    is_own = path.name in {instance, unit_of(instance)} and path.is_relative_to("/sys/fs/cgroup")
    return group if is_own and ".." not in path.parts else ""


def unit_of(instance: str) -> str:
    """Return the name of an instance's unit."""
    return f"l40s-worker@{instance}.service"
