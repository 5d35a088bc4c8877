"""One run of a worker: its process tree, with the launch, port and key that are its own.

Spawned here or adopted, waited for until it is gone, told to end. What all of it means for the worker (phases, tries,
requests) is worker.py's to say: a run only does as it is told and answers. A worker has one run at a time, on this
host; one that spans hosts will have one on each.
"""

import asyncio
from contextlib import suppress

from l40sd.clock import now_s
from l40sd.config.options import Config
from l40sd.engines.launch import Launch
from l40sd.errors import L40sError
from l40sd.model import Placement
from l40sd.workers.context import WorkerContext
from l40sd.workers.ends import End, end_of
from l40sd.workers.ports import HeldPort
from l40sd.workers.process import ExitRecord, Instance, Processes
from l40sd.workers.run_spec import launch_of, spec_of, with_cache
from l40sd.workers.saved import SavedWorker
from l40sd.workers.slot import Wanted


class Run:
    """One run, from before its process is made until nothing is left of it.

    Attributes:
        launch: Exactly what is run.
        instance: The process tree; None before it is spawned, and for ever when somebody else runs it.
        is_adopted: An earlier daemon spawned it.
        spawned_at_s: Monotonic; of an adopted run that was not ready yet: since when this daemon knows it.
        ready_at_s: When it came up for the first time, monotonic; None: not yet.
    """

    def __init__(
        self,
        launch: Launch,
        processes: Processes,
        *,
        port: HeldPort | None = None,
        instance: Instance | None = None,
    ) -> None:
        self.launch = launch
        self.instance = instance
        self.is_adopted = instance is not None
        self.spawned_at_s = now_s()
        self.ready_at_s: float | None = None
        self._processes = processes
        self._port = port

    @classmethod
    def external(cls, placement: Placement, config: Config, context: WorkerContext) -> "Run":
        """Return the run of a worker that somebody else runs: it can be asked, and that is all."""
        return cls(launch_of(placement, config, context), context.processes)

    @classmethod
    def planned(cls, placement: Placement, config: Config, context: WorkerContext) -> "Run":
        """Return a run with its port and key, to be spawned.

        Raises:
            L40sError: No port is left.
        """
        port = context.ports.take()
        key = context.keys.of(placement.model)
        return cls(launch_of(placement, config, context, port=port.port, api_key=key), context.processes, port=port)

    @classmethod
    def adopted(
        cls, instance: Instance, placement: Placement, config: Config, context: WorkerContext, saved: SavedWorker | None
    ) -> "Run":
        """Return the run of a process that an earlier daemon started.

        Args:
            saved: What that daemon said of the worker, if it was about this very run.

        Raises:
            L40sError: Its record lacks what is needed to talk to it.
        """
        meta = instance.spec.meta
        try:
            port, api_key = int(meta["port"]), str(meta["api_key"])
        except (KeyError, TypeError, ValueError) as error:
            raise L40sError(
                f"the record of {instance.spec.instance} lacks its port or key",
                where=placement.worker,
                code="bad_record",
            ) from error
        launch = launch_of(placement, config, context, port=port, api_key=api_key)
        run = cls(launch, context.processes, port=context.ports.adopt(port), instance=instance)
        if saved is not None and saved.ready_at_s is not None:
            run.spawned_at_s, run.ready_at_s = saved.spawned_at_s, saved.ready_at_s
        return run

    @property
    def name(self) -> str:
        """The instance's name; empty while there is none."""
        return self.instance.spec.instance if self.instance is not None else ""

    @property
    def address(self) -> str:
        """``host:port`` of its engine."""
        return f"{self.launch.host}:{self.launch.port}"

    @property
    def load_s(self) -> float | None:
        """How long it took from the spawn to its first token; None: not up, or nobody here saw it."""
        if self.ready_at_s is None or self.is_adopted:
            return None
        return self.ready_at_s - self.spawned_at_s

    @property
    def ready_for_s(self) -> float | None:
        """How long ago it came up; None when it never did."""
        return None if self.ready_at_s is None else now_s() - self.ready_at_s

    async def spawn(self, wanted: Wanted, config: Config, context: WorkerContext) -> None:
        """Make the process: cache folder, record, shim. It is there when this returns.

        Raises:
            L40sError: ``exec_failed`` or ``spawn_failed``; no process is left then, nor when this is cancelled.
        """
        launch = await with_cache(self.launch, config, context)
        spec = spec_of(launch, wanted, config, context)
        self.instance = await self._processes.spawn(spec, config.workers.spawn_timeout_s)

    async def exited(self) -> ExitRecord:
        """Return how it ended, once the whole tree is gone: never, in the case of one that cannot be killed."""
        assert self.instance is not None, "nobody here sees the end of what somebody else runs"
        return await self.instance.exited()

    async def told_of(self, record: ExitRecord, *, is_wish: bool) -> End:
        """Return what is told of its end."""
        assert self.instance is not None
        return await end_of(self._processes, self.instance.spec, record, is_wish=is_wish)

    def tell_to_end(self) -> None:
        """Give the shim the word: it completes the stop even if this daemon dies in the next moment.

        One that was never ready serves nobody, and vLLM would finish loading before it looks at SIGTERM: everybody is
        told at once. An adopted one may have requests that went through an upgrade.
        """
        if self.instance is not None:
            self.instance.terminate(everybody=self.ready_at_s is None and not self.is_adopted)

    async def end_within(self, kill_timeout_s: float) -> bool:
        """Return whether it is gone: by the shim's SIGTERM and kill, then by ours. False: SIGKILL has not ended it."""
        assert self.instance is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(self.launch.term_timeout_s + kill_timeout_s):
                await self.instance.exited()
                return True
        return await self.instance.kill(kill_timeout_s)

    def clear(self, *, is_over: bool) -> None:
        """Give its port back; ``is_over``: its process is gone for good, and so goes what is on record of it."""
        if self._port is not None:
            self._port.release()
        if self.instance is not None and is_over:
            self._processes.forget(self.instance.spec.instance)
