"""Start workers' shims, and find them again."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from l40sd.errors import L40sError
from l40sd.naming import natural
from l40sd.shim import OWN_GROUP, leftovers, proc
from l40sd.workers.process import logs
from l40sd.workers.process.containment import Provider, Unavailable, choose, kill_unit, start_unit
from l40sd.workers.process.instance import Instance, last_words, open_shim, reap
from l40sd.workers.process.leftovers import Remains, is_of, mark_of, marked, remove_group, trusted_group
from l40sd.workers.process.logs import Position
from l40sd.workers.process.records import (
    Birth,
    CorruptError,
    ExitRecord,
    Identity,
    InstanceSpec,
    RunRecord,
    distrust_of,
    is_ours,
    read_record,
    write_spec,
)
from l40sd.workers.process.spawn import exec_failed, has_ended, identity_of, spawn_failed, start_shim

FIRST_LOOK_S, LAST_LOOK_S = 0.005, 0.05
"""Between two looks for run.json: a shim takes about 60 ms, and a poll needs no descriptor and cannot be missed."""
CLEAR_TIMEOUT_S = 5.0
CORRUPT_KEPT = 10
ENDING_S = 0.5
"""From the moment that a process has no environment any more until it is a zombie."""
REMOVE_TRIES = 10
LOCK_NAME = "l40sd.lock"


@dataclass(slots=True, kw_only=True)
class Adoption:
    """What a new daemon found.

    Attributes:
        running: Workers that go on, untouched.
        ended: Workers that ended meanwhile; their records stay on disk until ``forget``.
        stuck: Workers without a shim, whose processes could not be killed; they are tried on.
        killed: Instances that were half-born or nobody's.
        notes: One sentence each for what was odd: corrupt records, another boot.
    """

    running: list[Instance] = field(default_factory=list)
    ended: list[tuple[InstanceSpec, ExitRecord]] = field(default_factory=list)
    stuck: list[Instance] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Processes:
    """The one that starts and adopts instances, in ``runtime_dir``/instances.

    The caller holds the daemon's lock: there is one of these per runtime directory.

    Attributes:
        provider: unit, cgroup or none.
        note: What the provider cannot do here; empty when nothing is missing.
    """

    def __init__(self, runtime_dir: Path, log_dir: Path, provider: Provider) -> None:
        self.provider = provider.name
        self.note = provider.note
        self._base = provider.base
        self._runtime_dir = runtime_dir
        self._instances_dir = runtime_dir / "instances"
        self._log_dir = log_dir
        self._instances: dict[str, Instance] = {}

    @classmethod
    async def open(cls, *, runtime_dir: Path, log_dir: Path, provider: str = "auto") -> Self:
        """Make the directories and choose the provider.

        Raises:
            L40sError: A directory cannot be made or written; the provider asked for does not work here.
        """
        runtime_dir, log_dir = runtime_dir.absolute(), log_dir.absolute()
        for path, mode in ((runtime_dir / "instances", 0o700), (log_dir, 0o750)):
            try:
                path.mkdir(mode=mode, parents=True, exist_ok=True)
                why = distrust_of(path, follow=True)
            except OSError as error:
                raise not_writable(path, error.strerror) from error
            if why or not os.access(path, os.W_OK | os.X_OK):
                raise not_writable(path, why or "not writable by this user")
        return cls(runtime_dir, log_dir, await choose(provider, runtime_dir))

    async def spawn(self, spec: InstanceSpec, timeout_s: float) -> Instance:
        """Start an instance; it is on record before it is a process, and complete when this returns.

        Raises:
            L40sError: Its program cannot be run (``exec_failed``), or its shim did not come up within
                ``timeout_s`` (``spawn_failed``). Nothing is left of it then, nor when this is cancelled.
        """
        directory = self._instances_dir / spec.instance
        group = self._make_record(directory, spec)
        pid: int | None = None
        instance: Instance | None = None
        try:
            async with asyncio.timeout(timeout_s):
                if self.provider == "unit":
                    await start_unit(spec.instance, timeout_s=timeout_s)
                else:
                    pid = start_shim(directory, spec.instance, self._runtime_dir)
                instance = await self._born(directory, spec, pid)
        except TimeoutError as error:
            why = last_words(directory) or f"no answer within {timeout_s:g} s"
            raise spawn_failed(spec, why) from error
        except Unavailable as error:
            raise spawn_failed(spec, str(error)) from error
        finally:
            if instance is None:
                remains = Remains(instance=spec.instance, group=group, shim=identity_of(pid) if pid else None)
                await self._withdraw(directory, remains, self.provider, spec.tmp)
                if pid is not None:
                    reap(pid)
        self._instances[spec.instance] = instance
        return instance

    async def adopt(self) -> Adoption:
        """Sort out what the last daemon left; call it once, before anything is spawned.

        Per directory, first match wins:
          1. a spec of another boot: dropped, nobody signalled
          2. no spec, or a corrupt one: killed, moved aside
          3. exit.json: ended
          4. a complete record whose shim lives: adopted
          5. a complete record whose shim is gone: the rest is killed, ended as shim-lost; or stuck
          6. no complete record: half-born, killed
        Then cgroups and marked processes that no directory speaks of are killed.
        """
        adoption = Adoption()
        gone: list[Instance] = []
        for directory in sorted(self._instances_dir.iterdir()):
            if ".corrupt-" in directory.name or directory.name in self._instances:
                continue
            try:
                await self._sort_out(directory, adoption, gone)
            except CorruptError as error:
                await self._set_aside(directory, adoption, str(error))
        for instance, record in zip(gone, await asyncio.gather(*map(_end_of, gone)), strict=True):
            if record is None:
                adoption.stuck.append(instance)
            else:
                adoption.ended.append((instance.spec, record))
        await self._kill_strays(adoption)
        return adoption

    def forget(self, instance_id: str) -> None:
        """Remove the directory and the cgroup of an instance that has ended; a second call does nothing."""
        instance = self._instances.pop(instance_id, None)
        if instance is not None:
            instance.clear()
        self._remove(self._instances_dir / instance_id)

    def metas(self) -> list[Mapping[str, Any]]:
        """Return what the makers of all instances that are not forgotten wrote down of them."""
        return [instance.spec.meta for instance in self._instances.values()]

    def log_path(self, worker: str) -> Path:
        """Return where a worker's output goes; older output is beside it in ``.1``, ``.2``, ..."""
        return self._log_dir / f"{worker}.log"

    async def tail(self, worker: str, lines: int) -> list[str]:
        """Return the last lines of a worker's output, made printable; see ``logs.tail``."""
        return await asyncio.to_thread(logs.tail, self.log_path(worker), lines)

    async def last_run(self, spec: InstanceSpec, limit_bytes: int) -> list[str]:
        """Return the end of what one instance said; see ``logs.last_run``."""
        return await asyncio.to_thread(logs.last_run, self.log_path(spec.worker), spec.instance, limit_bytes)

    async def tail_to_resume(self, worker: str, lines: int) -> tuple[list[str], Position]:
        """Return the last whole lines, and where to follow from; see ``logs.tail_to_resume``."""
        return await asyncio.to_thread(logs.tail_to_resume, self.log_path(worker), lines)

    def follow(self, worker: str, begin: Position) -> AsyncIterator[tuple[str, Position]]:
        """Yield a worker's output from there on, made printable; see ``logs.follow`` and ``logs.printable_lines``."""
        return logs.printable_lines(logs.follow(self.log_path(worker), begin))

    async def logged(self) -> list[str]:
        """Return the workers of which there is output, also those that are gone; in their natural order."""
        return await asyncio.to_thread(lambda: sorted(map(worker_of, self._log_dir.glob("*.log")), key=natural))

    async def close(self) -> None:
        """Let go of everything and leave the workers alone."""
        for instance in self._instances.values():
            instance.close()
        self._instances.clear()
        if self._base:
            with contextlib.suppress(OSError):  # some are still running
                Path(self._base).rmdir()

    # Spawning

    def _make_record(self, directory: Path, spec: InstanceSpec) -> str:
        """Write what is about to run; return the cgroup made for it, if one was."""
        group = {"unit": OWN_GROUP, "cgroup": f"{self._base}/{spec.instance}"}.get(self.provider, "")
        birth = Birth(
            boot_id=proc.boot_id(),
            group=group,
            lock=str(self._runtime_dir / LOCK_NAME),
            log=str(self.log_path(spec.worker)),
        )
        try:
            directory.mkdir(mode=0o700)
            write_spec(directory, spec, birth)
            if self.provider == "cgroup":
                Path(group).mkdir(parents=True)
        except OSError as error:
            self._remove(directory)
            raise spawn_failed(spec, f"{error.filename or directory}: {error.strerror}") from error
        return group if self.provider == "cgroup" else ""

    async def _born(self, directory: Path, spec: InstanceSpec, pid: int | None) -> Instance:
        """Wait for the shim's first word.

        Raises:
            L40sError: It could not run the program, or died.
        """
        look_s = FIRST_LOOK_S
        while True:
            # In this order: what ends between the two looks has left exit.json for the second.
            is_dead = pid is not None and has_ended(pid)
            ended = read_record(directory, "exit.json", ExitRecord)
            run = read_record(directory, "run.json", RunRecord)
            if ended is not None and ended.cause == "exec-failed":
                raise exec_failed(spec, ended.detail)
            if run is not None:
                return Instance(directory, spec, run, open_shim(run.shim), engine=run.engine)
            if is_dead or ended is not None:
                raise spawn_failed(spec, ended.detail if ended else last_words(directory) or "its shim was killed")
            await asyncio.sleep(look_s)
            look_s = min(LAST_LOOK_S, 2 * look_s)

    async def _withdraw(self, directory: Path, remains: Remains, provider: str, tmp: str) -> bool:
        """Undo a birth: a shim that starts only now finds no spec and ends; whoever runs is killed."""
        with contextlib.suppress(OSError):
            (directory / "spec.json").rename(directory / "spec.withdrawn")
        if provider == "unit":  # its shim may be too young to be found otherwise
            await kill_unit(remains.instance)
        is_clear = await remains.kill(CLEAR_TIMEOUT_S)
        await asyncio.to_thread(leftovers.remove_folder, tmp)
        self._remove(directory)
        if remains.group:
            remove_group(remains.group)
        return is_clear

    def _remove(self, directory: Path) -> None:
        for _ in range(REMOVE_TRIES):  # a shim that starts only now makes its log in it
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                break
        if self._base:
            remove_group(f"{self._base}/{directory.name}")

    # Adopting

    async def _sort_out(self, directory: Path, adoption: Adoption, gone: list[Instance]) -> None:
        if why := distrust_of(directory):
            raise CorruptError(f"{directory}: {why}")
        birth = read_record(directory, "spec.json", Birth)
        spec = read_record(directory, "spec.json", InstanceSpec)
        if birth is not None and birth.boot_id != proc.boot_id():  # 1
            adoption.notes.append(f"{directory.name}: of another boot, dropped")
            if spec is not None:
                await asyncio.to_thread(leftovers.remove_folder, spec.tmp)
            self._remove(directory)
            return
        if birth is None or spec is None or spec.instance != directory.name:  # 2
            await self._finish_off(directory, adoption, group="", tmp="")
            return
        ended = read_record(directory, "exit.json", ExitRecord)
        run = read_record(directory, "run.json", RunRecord)
        if run is None:
            if ended is not None:  # 3, of an engine that never ran
                adoption.ended.append((spec, ended))
            else:  # 6
                await self._finish_off(directory, adoption, group=birth.group, tmp=spec.tmp)
            return
        pidfd, engine = await self._who_runs(directory, run)
        instance = Instance(directory, spec, run, pidfd, engine=engine)
        self._instances[spec.instance] = instance
        if instance.is_running and ended is None:  # 4
            adoption.running.append(instance)
        else:  # 3, 5
            gone.append(instance)

    async def _who_runs(self, directory: Path, run: RunRecord) -> tuple[int | None, Identity | None]:
        """Return a pidfd of the shim that a record names, and its engine; None for what is gone or not sure to be ours.

        The record is our user's alone (``read_record``), and may still be wrong: whoever runs as our user could write
        it. So a living shim has to bear the instance's mark or sit in its cgroup, and its engine to be its child.
        Without a shim the engine that is recorded has to be our user's; it may have overwritten its own mark.

        Raises:
            CorruptError: The shim or the engine is another process.
        """
        pidfd = open_shim(run.shim)
        engine = proc.read_process(run.engine.pid)
        if pidfd is None:
            return None, run.engine if engine is None or is_ours(engine.pid) else None
        deadline_s = asyncio.get_running_loop().time() + ENDING_S
        while not is_of(run.shim.pid, directory.name, self._runtime_dir) and _is_alive(run.shim):
            if asyncio.get_running_loop().time() >= deadline_s:
                os.close(pidfd)
                raise CorruptError(f"{directory / 'run.json'}: pid {run.shim.pid} is not this instance's shim")
            await asyncio.sleep(FIRST_LOOK_S)  # one that is just ending has no environment any more
        is_there = engine is not None and run.engine.matches(engine)
        if engine is not None and is_there and engine.parent != run.shim.pid and _is_alive(run.shim):
            os.close(pidfd)
            raise CorruptError(f"{directory / 'run.json'}: pid {engine.pid} is not a child of its shim")
        return pidfd, run.engine if is_there else None

    async def _finish_off(self, directory: Path, adoption: Adoption, *, group: str, tmp: str) -> None:
        name = directory.name
        remains = Remains(instance=name, group=trusted_group(group or f"{self._base}/{name}", name))
        if not await self._withdraw(directory, remains, "unit" if group == OWN_GROUP else "", tmp):
            adoption.notes.append(f"{name}: half-born, and processes are left that cannot be killed")
        adoption.killed.append(name)

    async def _set_aside(self, directory: Path, adoption: Adoption, problem: str) -> None:
        """Kill what a corrupt record may be about, and keep the record for whoever wants to know."""
        name = directory.name
        adoption.notes.append(problem)
        await Remains(instance=name, group=trusted_group(f"{self._base}/{name}", name)).kill(CLEAR_TIMEOUT_S)
        adoption.killed.append(name)
        for number in range(CORRUPT_KEPT):
            aside = directory.with_name(f"{name}.corrupt-{number}")
            if not aside.exists():
                directory.rename(aside)
                break
        self._remove(directory)

    async def _kill_strays(self, adoption: Adoption) -> None:
        """Kill what carries our mark, or sits in our cgroup, and is on no record."""
        known = set(self._instances) | {spec.instance for spec, _ in adoption.ended}
        strays = dict.fromkeys(await asyncio.to_thread(marked_in, self._runtime_dir), "")
        if self._base:
            strays |= {path.name: str(path) for path in Path(self._base).iterdir() if path.is_dir()}
        for name in sorted(strays.keys() - known):
            remains = Remains(instance=name, group=strays[name])
            if remains.is_empty():
                remove_group(remains.group)
                continue
            await remains.kill(CLEAR_TIMEOUT_S)
            remove_group(remains.group)
            adoption.killed.append(name)


def _is_alive(identity: Identity) -> bool:
    process = proc.read_process(identity.pid)
    return process is not None and process.is_alive and identity.matches(process)


async def _end_of(instance: Instance) -> ExitRecord | None:
    """Return how an instance without a shim ended, after killing what is left of it; None: it cannot be killed."""
    try:
        async with asyncio.timeout(CLEAR_TIMEOUT_S):
            return await instance.exited()
    except TimeoutError:
        return None


def worker_of(log: Path) -> str:
    """Return the worker whose output is in this file; see ``Processes.log_path``."""
    return log.name.removesuffix(".log")


def marked_in(runtime_dir: Path) -> set[str]:
    """Return the instances of this runtime directory that living processes are marked with."""
    marks = [mark_of(process) for process in marked()]
    return {instance for instance, where in marks if where == str(runtime_dir)}


def not_writable(path: Path, why: str | None) -> L40sError:
    """Return the error for a directory that cannot be used."""
    return L40sError(f"{path}: {why}", hint=f"make it, owned by the user that runs l40sd (uid {os.geteuid()})",
                     code="not_writable")  # fmt: skip
