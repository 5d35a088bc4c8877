"""One run of one worker, as the daemon holds it: a pidfd of its shim, and its directory."""

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

from l40sd.shim import TERM_GROUP, leftovers, proc
from l40sd.workers.process.containment import reset_unit
from l40sd.workers.process.leftovers import Remains, remove_group, trusted_group, unit_of
from l40sd.workers.process.records import (
    CorruptError,
    ExitRecord,
    Identity,
    InstanceSpec,
    RunRecord,
    now_iso,
    read_record,
    write_exit,
)

CLEAR_TIMEOUT_S = 5.0
"""For the processes of a dead shim; who is left then is stuck, and ``Instance.kill`` says so."""
STUCK_LOOK_S = 1.0
"""Between two tries to kill what is stuck."""


class Instance:
    """A shim that was identified through its pidfd, and all that is below it.

    Its shim ends only when everything below it is gone: ``exited`` therefore means all of it, unless the
    shim itself was killed; then the rest is killed from here.
    """

    def __init__(
        self, directory: Path, spec: InstanceSpec, run: RunRecord, pidfd: int | None, *, engine: Identity | None
    ) -> None:
        """Watch a shim.

        Args:
            pidfd: The shim's, and ours from now on; None: the shim is gone already.
            engine: Whose tree and session are killed when the shim is gone; None: not sure enough.
        """
        self.spec = spec
        self.shim_pid = run.shim.pid
        self.engine_pid = run.engine.pid
        self.started_at = run.started_at
        self.group = trusted_group(run.group, spec.instance)
        self._directory = directory
        self._engine = engine
        self._pidfd = pidfd
        self._gone = asyncio.Event()
        self._settling = asyncio.Lock()
        self._record: ExitRecord | None = None
        self._was_killed = False
        if pidfd is None:
            self._gone.set()
        else:
            asyncio.get_running_loop().add_reader(pidfd, self._shim_gone)

    @property
    def is_running(self) -> bool:
        """Whether its shim lives."""
        return not self._gone.is_set()

    async def exited(self) -> ExitRecord:
        """Return how it ended, once it has: for ever in the case of processes that cannot be killed.

        Any number may wait, and stop waiting, at any time.
        """
        await self._gone.wait()
        async with self._settling:
            if self._record is None:
                self._record = await self._settle()
                self._remove_group()
        return self._record

    def terminate(self, *, everybody: bool = False) -> None:
        """Let the shim walk its ladder: SIGTERM and SIGCONT, then after ``term_timeout_s`` the kill.

        It does so also when the daemon dies meanwhile. Nothing happens when it has ended.

        Args:
            everybody: SIGTERM to the whole process group at once: for an engine that serves nobody yet. A shim of an
                older version takes no notice of this.
        """
        if everybody:
            with contextlib.suppress(OSError):  # then it is stopped as if it served: later
                (self._directory / "stop.json").write_text(f'{{"term_to": "{TERM_GROUP}"}}')
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    async def kill(self, timeout_s: float) -> bool:
        """Kill everything now.

        The first half of the time is the shim's, which finds everybody; then it is killed with the rest.

        Returns:
            Whether all is gone; False: the worker is stuck, its GPUs are not free.
        """
        self._was_killed = True
        self._signal(signal.SIGQUIT)
        self._signal(signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s / 2):
                await self._gone.wait()
        self._signal(signal.SIGKILL)
        remains = self._remains()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s / 2):
                await self.exited()
                return await remains.kill(timeout_s)
        return False

    def close(self) -> None:
        """Stop watching; the worker goes on."""
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def clear(self) -> None:
        """Stop watching and remove what is on disk and in the cgroup tree."""
        self.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._remove_group()

    def _remove_group(self) -> None:
        if Path(self.group).name == self.spec.instance:  # a unit's group is systemd's
            remove_group(self.group)

    def _signal(self, number: int) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _shim_gone(self) -> None:
        self.close()
        reap(self.shim_pid)
        self._gone.set()

    def _remains(self) -> Remains:
        return Remains(instance=self.spec.instance, group=self.group, engine=self._engine)

    async def _settle(self) -> ExitRecord:
        """Read how it ended; a shim that left no word was lost, and what it watched is killed here."""
        problem = "its shim was killed"
        try:
            record = read_record(self._directory, "exit.json", ExitRecord)
        except CorruptError as error:
            record, problem = None, str(error)
        if record is not None:
            return record
        is_clear = await self._remains().kill(CLEAR_TIMEOUT_S)
        while not is_clear:  # their GPUs are not free, whatever else is over
            await asyncio.sleep(STUCK_LOOK_S)
            is_clear = await self._remains().kill(0.0)
        await asyncio.to_thread(remove_leavings, self._directory, self.spec)
        record = ExitRecord(
            instance=self.spec.instance,
            cause="killed" if self._was_killed else "shim-lost",
            detail="killed with its shim" if self._was_killed else last_words(self._directory) or problem,
            ended_at=now_iso(),
        )
        with contextlib.suppress(OSError):  # for the next daemon, should this one die first
            await asyncio.to_thread(write_exit, self._directory, record)
        if Path(self.group).name == unit_of(self.spec.instance):
            await reset_unit(self.spec.instance)
        return record


def remove_leavings(directory: Path, spec: InstanceSpec) -> None:
    """Remove what a run has left outside its processes, in a dead shim's place. Blocks on the disk."""
    with contextlib.suppress(OSError):
        leftovers.remove(spec.tmp, (directory / "spec.json").stat().st_ctime)


def open_shim(identity: Identity) -> int | None:
    """Return a pidfd of exactly this process; None when it is gone. Opened first, compared afterwards."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except OSError:
        return None
    if identity.matches(proc.read_process(identity.pid)):
        return pidfd
    os.close(pidfd)
    return None


def reap(pid: int) -> None:
    """Collect the zombie of a shim that we are the parent of; of another's child nothing is to do."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def last_words(directory: Path) -> str:
    """Return the last line that a shim wrote to its standard error, e.g. an exception; mostly empty."""
    with contextlib.suppress(OSError):
        lines = (directory / "shim.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"its shim failed: {lines[-1]}" if lines else ""
    return ""
