"""The workers there are: who they are, which GPUs they hold, who is asked to end."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

from l40sd.clock import now_s
from l40sd.config.options import Config, WorkersConfig
from l40sd.errors import L40sError
from l40sd.model import GpuId, Placement, WorkerId
from l40sd.naming import natural
from l40sd.routing.outliers import Peer
from l40sd.workers.context import WorkerContext
from l40sd.workers.ends import End
from l40sd.workers.lifecycle import Event, Goal, Phase
from l40sd.workers.process import ExitRecord, Instance
from l40sd.workers.saved import SavedWorker
from l40sd.workers.slot import SERVED, Observed, Wanted
from l40sd.workers.worker import Worker

STOP_LOOK_S = 0.05


class MakeWorker(Protocol):
    """How a slot gets its worker."""

    def __call__(
        self,
        wanted: Wanted,
        config: Config,
        saved: SavedWorker | None = None,
        *,
        adopted: Instance | None = None,
        ended: tuple[ExitRecord, End] | None = None,
    ) -> Worker:
        """Return the worker; its events are not yet handled. What the arguments mean: ``Worker``.

        Raises:
            L40sError: The record of the process says too little to talk to it.
        """


class WorkerSet(Mapping[WorkerId, Worker]):
    """Owns which workers there are; the supervisor's pass alone adds and forgets.

    Args:
        changed: Called whenever what is observed of a worker may be new.

    Attributes:
        make: Returns a new worker, not yet one of these.
    """

    def __init__(self, context: WorkerContext, changed: Callable[[], None]) -> None:
        self._context = context
        self._changed = changed
        self._by_id: dict[WorkerId, Worker] = {}
        self._group: asyncio.TaskGroup | None = None
        self.make: MakeWorker = partial(Worker, context=context, changed=changed, peers=self._peers)

    def __getitem__(self, worker_id: WorkerId) -> Worker:
        return self._by_id[worker_id]

    def __iter__(self) -> Iterator[WorkerId]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    # -- who there is ----------------------------------------------------------------------------------------------

    def add(self, worker: Worker) -> None:
        """Make it one of these; it runs as soon as ``run_in`` was called."""
        self._by_id[worker.id] = worker
        if self._group is not None:
            self._group.create_task(worker.handle_events(), name=worker.id)

    def run_in(self, group: asyncio.TaskGroup) -> None:
        """Run the workers there are, and those to come, as tasks of ``group``."""
        self._group = group
        for worker in self.values():
            group.create_task(worker.handle_events(), name=worker.id)

    def forget(self, worker_id: WorkerId) -> None:
        """Let go of one of which nothing is left: its GPUs are free now."""
        del self._by_id[worker_id]
        self._changed()

    def named(self, worker_id: str) -> Worker:
        """Return the worker with this id.

        Raises:
            L40sError: There is none; the hint lists those there are.
        """
        worker = self.get(WorkerId(worker_id))
        if worker is None:
            raise L40sError(
                f"there is no worker {worker_id!r}",
                hint=f"workers: {', '.join(sorted(self, key=natural)) or 'none'}",
                code="unknown_worker",
            )
        return worker

    # -- what is seen of them --------------------------------------------------------------------------------------

    def observed(self) -> list[Observed]:
        """Return them as they are."""
        return [w.observed() for w in self.values()]

    def saved(self) -> dict[WorkerId, SavedWorker]:
        """Return what the next daemon has to know of them."""
        return {w.id: w.saved() for w in self.values()}

    def placements(self) -> list[Placement]:
        """Return where those are that stay."""
        return [w.wanted.placement for w in self.values() if w.goal is not Goal.GONE]

    def held_gpus(self) -> set[GpuId]:
        """Return the GPUs that workers have or are wanted on: they are this host's, whatever NVML says."""
        return {g for w in self.values() for g in w.wanted.placement.gpus}

    def out_of_use(self) -> dict[GpuId, str]:
        """Return the GPUs that are ``stuck`` (held by a worker that cannot be killed) or ``lost``."""
        stuck = (g for w in self.values() if w.phase is Phase.STUCK for g in w.wanted.placement.gpus)
        return {gpu.id: "lost" for gpu in self._context.host.lost} | dict.fromkeys(stuck, "stuck")

    def unusable(self) -> frozenset[GpuId]:
        """Return the GPUs that a worker holds which cannot be killed, and the lost ones.

        A GPU that NVML calls lost while its worker serves is left to that worker.
        """
        serving = {g for w in self.values() if w.phase in SERVED for g in w.wanted.placement.gpus}
        return frozenset(g for g, state in self.out_of_use().items() if state == "stuck" or g not in serving)

    def troubles(self) -> Iterator[str]:
        """Yield a sentence on each that was given up, then on each that serves with something wrong."""
        given_up = (Phase.STUCK, Phase.QUARANTINED, Phase.FAILED)
        yield from (f"{w.id} is {w.phase}: {w.reason}" for w in self.values() if w.phase in given_up)
        yield from (f"{w.id}: {w.concern}" for w in self.values() if w.concern)

    def _peers(self, worker_id: WorkerId) -> list[Peer]:
        model = self[worker_id].wanted.placement.model if worker_id in self else None
        equals = (w for w in self.values() if w.wanted.placement.model == model and w.id != worker_id)
        return [peer for w in equals if (peer := w.as_peer()) is not None]

    # -- what requests tell of them --------------------------------------------------------------------------------

    def on_request_failure(self, worker_id: WorkerId, _kind: str) -> None:
        """A request could not be served by this worker: it has a look at itself."""
        worker = self.get(worker_id)
        if worker is not None:
            worker.suspect()

    async def is_ending(self, worker_id: WorkerId) -> bool:
        """Return whether this worker's process, or its health, says that it ends; it has just answered 500."""
        worker = self.get(worker_id)
        return worker is None or await worker.is_ending()

    # -- the end ---------------------------------------------------------------------------------------------------

    async def stop(self, timeout_s: float, config: WorkersConfig) -> int:
        """Drain and stop every worker within ``timeout_s``; return how many could not be stopped.

        Whoever is STOPPED has to be forgotten meanwhile.
        """
        drain_until_s = now_s() + max(0.0, timeout_s - config.term_timeout_s - 2 * config.kill_timeout_s)
        for worker in self.values():
            worker.post(Event.RETIRE, "the daemon was told to stop")
        try:
            async with asyncio.timeout(timeout_s):
                while any(w.phase is not Phase.STUCK for w in self.values()):
                    for worker in self.values():
                        worker.give_up_spawn()
                        if now_s() >= drain_until_s and worker.phase is Phase.DRAINING:
                            worker.post(Event.EMPTY, "the time for the stop was up")
                    await asyncio.sleep(STOP_LOOK_S)
        except TimeoutError:
            pass
        return len(self)
