"""What operators tell workers to do: drains, resets, restarts at once and one after the other."""

from collections.abc import Callable, Collection, Sequence

from l40sd.errors import L40sError
from l40sd.model import WorkerId
from l40sd.supervisor.changes import Changes
from l40sd.supervisor.operation import Operation, Operations
from l40sd.supervisor.reconcile import drain_events
from l40sd.supervisor.rolling_restart import RollingRestart
from l40sd.supervisor.worker_set import WorkerSet
from l40sd.workers.context import WorkerContext
from l40sd.workers.lifecycle import Event, Goal
from l40sd.workers.slot import SERVED
from l40sd.workers.worker import Worker

VERBS = {"restart": Event.RESTART, "drain": Event.DRAIN, "undrain": Event.UNDRAIN, "reset": Event.RESET}


class Commands:
    """Owns which workers rest by the operator's wish, and the rolling restart under way.

    Args:
        save: Has everything written to disk before the next step.

    Attributes:
        drained: Who rests, or shall once it is up.
        restarting: The rolling restart under way; None: there is none.
    """

    def __init__(
        self,
        workers: WorkerSet,
        changes: Changes,
        context: WorkerContext,
        operations: Operations,
        save: Callable[[], None],
    ) -> None:
        self.drained: set[WorkerId] = set()
        self.restarting: RollingRestart | None = None
        self._workers = workers
        self._changes = changes
        self._operations = operations
        self._save = save
        self._log = context.log

    # -- one worker ------------------------------------------------------------------------------------------------

    def command(self, worker_id: str, verb: str) -> None:
        """Pass the operator's wish on to a worker: restart, drain, undrain or reset.

        A drain holds until the undrain, over restarts and resets of the worker and of the daemon; see
        ``keep_drained``. It is on disk after ``write_down``.

        Raises:
            L40sError: No such worker or verb, the worker is being retired, or has nothing to drain.
        """
        worker = self._workers.named(worker_id)
        self._refuse(worker, verb)
        if verb == "drain":
            self.drained.add(worker.id)
        elif verb == "undrain":
            self.drained.discard(worker.id)
        worker.post(VERBS[verb], f"{verb} by the operator")
        self._save()

    def _refuse(self, worker: Worker, verb: str) -> None:
        if verb not in VERBS:
            raise L40sError(f"a worker cannot be told to {verb!r}", hint=f"one of {', '.join(VERBS)}", code="bad_verb")
        if worker.goal is Goal.GONE:
            raise L40sError(f"{worker.id} is on its way out", where=worker.id, code="worker_retiring")
        if verb == "drain" and worker.phase not in SERVED and worker.id not in self.drained:
            raise L40sError(
                f"{worker.id} is {worker.phase}: there is nothing to drain",
                where=worker.id,
                hint="drain it once it is ready",
                code="not_serving",
            )

    def is_drained(self, worker: Worker) -> bool:
        """Whether the operator wants it to rest, whatever it is doing at present."""
        return worker.id in self.drained

    def keep_drained(self) -> None:
        """Have every worker rest that shall, and no other."""
        for worker_id, event in drain_events(self._workers.observed(), self.drained).items():
            self._workers[worker_id].post(event)

    def end_drains(self, kept: Collection[WorkerId]) -> None:
        """Forget the drains of all but these: a drain ends with its worker."""
        self.drained.intersection_update(kept)

    # -- several, one after the other ------------------------------------------------------------------------------

    def restart(self, names: Sequence[str], by: str = "") -> Operation:
        """Restart these workers one after the other, each model's floor of ready capacity kept.

        Raises:
            L40sError: No such worker, or a change or another such restart is under way.
        """
        chosen = tuple(dict.fromkeys(self._workers.named(name).id for name in names))
        change, want = self._changes.current, self._changes.want
        if change is not None or self.restarting is not None:
            what = f"the change to {change.pattern}" if change else "another rolling restart"
            raise L40sError(
                f"{what} is under way",
                hint="wait for it: l40sctl wait; or restart --now: all at once, whatever capacity is left",
                code="under_way",
            )
        pace = self._changes.slowest(want)
        restart = RollingRestart.of(chosen, self._workers.observed(), pace, pattern=want.pattern, by=by)
        self.restarting = restart
        self._log.info("workers.restart.started", operation=restart.id, workers=list(chosen), by=by)
        self._operations.note(restart.operation())
        self._save()
        return restart.operation()

    def advance_restart(self) -> None:
        """Tell whoever can be told now to restart; end the rolling restart when it is over."""
        restart, want = self.restarting, self._changes.want
        if restart is None:
            return
        before = len(restart.pending)
        is_over = restart.advance(
            self._workers, start_parallel=self._changes.at_once(want), min_ready=want.config.workers.min_ready
        )
        self._operations.note(restart.operation())
        if is_over:
            self._end_restart(restart)
        elif len(restart.pending) != before:
            self._save()

    def replace_restart(self, successor: str) -> None:
        """End the rolling restart, if one is under way, in favour of ``successor``, named in one clause."""
        if self.restarting is not None:
            self.restarting.replaced(successor)
            self._end_restart(self.restarting)

    def _end_restart(self, restart: RollingRestart) -> None:
        restart.tell_end(self._log)
        self._operations.note(restart.operation())
        self.restarting = None
        self._save()
