"""Conducts changes: what is wanted, the change under way, and how one ends.

What is decided is decided in rollout.py; here it is asked at each reconcile pass, done, logged and written down.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from l40sd.clock import now_s
from l40sd.config.options import Config
from l40sd.model import Layout, ModelName, OperationState, WorkerId
from l40sd.supervisor.catalog import catalog
from l40sd.supervisor.change import Change, Want
from l40sd.supervisor.learned import Learned
from l40sd.supervisor.operation import Operation, Operations
from l40sd.supervisor.pace import bound_back_s, bound_s, slowest, start_parallel
from l40sd.supervisor.reconcile import ready_share
from l40sd.supervisor.rehearsal import Pace
from l40sd.supervisor.rollout import Decision, End, begin, decide, keep, models_leaving, state_at
from l40sd.supervisor.worker_set import WorkerSet
from l40sd.workers.context import WorkerContext

MISSING_TOLD = 4
"""Workers that the end of a change names with their reasons; `status` has all."""


class Changes:
    """Owns what is wanted and the change under way.

    Args:
        config: What nothing is wanted from yet.
        learned: Which launches served a short while ago.
        save: Has everything written to disk before the next step.

    Attributes:
        current: The change under way; None: there is none.
        floor: The baseline of a change that ended incomplete: what is still to be done keeps to it.
    """

    def __init__(
        self,
        config: Config,
        workers: WorkerSet,
        context: WorkerContext,
        operations: Operations,
        learned: Learned,
        save: Callable[[], None],
    ) -> None:
        self.want = Want(layout=Layout(pattern="", placements=()), config=config)
        self.current: Change | None = None
        self.floor: Mapping[ModelName, int] = {}
        self._workers = workers
        self._context = context
        self._operations = operations
        self._learned = learned
        self._save = save
        self._log = context.log

    # -- the beginning ---------------------------------------------------------------------------------------------

    def change_to(self, want: Want, by: str = "") -> Change:
        """Return the change that ``begin`` would begin; nothing is changed.

        What a replaced change would have gone back to stays what this one goes back to: the last layout that served.
        """
        observed, former = self._workers.observed(), self.current
        previous = self.want if former is None else former.previous
        pace = self.slowest(want)
        terms = begin(
            want.wanted,
            observed,
            former=former.terms if former else None,
            is_trial=previous is not None,
            remembered=self._learned.proofs(want.config.workers.proof_kept_s),
        )
        return Change(
            id=secrets.token_hex(4),
            pattern=want.pattern,
            previous=previous,
            terms=terms,
            forward_s=bound_s(want.wanted, observed, terms, pace),
            back_s=bound_back_s(want.wanted, previous.wanted, pace) if previous else 0.0,
            leaving=models_leaving(want.wanted, terms.baseline),
            by=by,
        )

    def begin(self, change: Change, want: Want) -> Operation:
        """Have ``want`` wanted, by this change; what was under way is over (``replace``)."""
        self.current = change
        self.set_want(want)
        self._log.info(
            "pattern.apply.started",
            pattern=want.pattern,
            previous=change.previous_pattern,
            operation=change.id,
            workers=len(want.wanted),
            by=change.by,
            leaving=list(change.leaving),
        )
        self._save()
        return self._note(change)

    def replace(self, successor: str) -> None:
        """End the change under way, if there is one, in favour of ``successor``, named in one clause."""
        if self.current is not None:
            self._end(self.current, OperationState.REPLACED, successor)

    def set_want(self, want: Want) -> None:
        """Have this wanted, as it was or for timings only; an unchanged worker only learns the new timings."""
        self.want = want
        for w in want.wanted:
            worker = self._workers.get(w.placement.worker)
            if worker is not None and worker.wanted.fingerprint == w.fingerprint:
                worker.config = want.config
        self.publish_catalog()

    def publish_catalog(self) -> None:
        """Tell the routes which models there are, and what is on its way."""
        self._context.routes.set_catalog(catalog(self.want, self._workers, self._context.models))

    def at_once(self, want: Want) -> int:
        """Return how many workers may be starting at once on the way to this want."""
        return start_parallel(want.config, self._context.host.inventory, self._context.models.facts, want.wanted)

    def slowest(self, want: Want) -> Pace:
        """Return the pace at which every step to this want takes all the time that its configuration gives it."""
        models = self._context.models
        return slowest(want.config, models.facts, models.loads_s, self.at_once(want))

    # -- on the way ------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Note what has proven itself; when something speaks against the change, want what was wanted before."""
        change = self.current
        if change is None:
            return
        decision = self.decide()
        change.terms = decision.terms
        for worker_id in decision.proven.values():
            self._log.info("pattern.apply.proven", pattern=change.pattern, worker=worker_id)
            self._save()
        if decision.back is not None:
            self._roll_back(change, decision.back)

    def decide(self) -> Decision:
        """Return what follows from one look at the workers, during a change and outside one."""
        change, want = self.current, self.want
        limits: dict[str, Any] = {"start_parallel": self.at_once(want), "min_ready": want.config.workers.min_ready}
        if change is None:
            return keep(want.wanted, self._workers.observed(), self.floor, **limits)
        return decide(want.wanted, self._workers.observed(), change.terms, is_late=change.is_late, **limits)

    def note_created(self, worker_id: WorkerId) -> None:
        """A worker was made for the change."""
        if (change := self.current) is not None:
            change.terms = replace(change.terms, created=change.terms.created | {worker_id})

    def note_forgotten(self, worker_id: WorkerId) -> None:
        """Nothing is left of this worker."""
        if (change := self.current) is not None:
            change.terms = replace(change.terms, created=change.terms.created - {worker_id})

    def note_step(self, text: str) -> None:
        """Say what the change is at."""
        if self.current is not None:
            self.current.step = text

    def note_progress(self) -> None:
        """Note how the change stands, for whoever asks for its operation."""
        if self.current is not None:
            self._note(self.current)

    # -- the end ---------------------------------------------------------------------------------------------------

    def end(self, end: End) -> None:
        """End the change as it is. What is missing is tried again as ever, and what is still to be done is done.

        Outside a change: what an incomplete one left has been done.
        """
        change, floor = self.current, self.floor
        self.floor = {}
        if change is not None:
            self._settle(change, end)
        elif floor:
            self._save()

    def _settle(self, change: Change, end: End) -> None:
        state = state_at(end, is_back=change.state is OperationState.ROLLING_BACK)
        why = "; ".join(self._told_of(worker) for worker in end.missing[:MISSING_TOLD])
        why += f"; and {more} more" if (more := len(end.missing) - MISSING_TOLD) > 0 else ""
        if end.is_late:
            why += f" (not done within {change.back_s if change.turned_at_s else change.forward_s:.0f} s)"
        if not end.is_whole:
            self.floor = change.terms.baseline
        if state is OperationState.ROLLED_BACK:
            why = change.why if end.is_whole else f"{change.why}; back but for {why}"
        self._end(change, state, why)
        self.current = None
        self._save()

    def _roll_back(self, change: Change, culprit: WorkerId) -> None:
        assert change.previous is not None
        worker = self._workers.get(culprit)
        late = f" (not done within {change.forward_s:.0f} s)" if change.is_late else ""
        change.turn_back(self._told_of(culprit) + late)
        self._log.error(
            "pattern.apply.rolling_back",
            pattern=change.pattern,
            back_to=change.previous_pattern,
            worker=culprit,
            reason=change.why,
            last_lines=list(worker.last_lines) if worker else [],
        )
        self.set_want(change.previous)
        self._save()

    def _end(self, change: Change, state: OperationState, why: str) -> None:
        change.state, change.why, change.step = state, why, ""
        duration_s = round(now_s() - change.began_at_s, 2)
        keys: dict[str, Any] = {"pattern": change.pattern, "operation": change.id, "duration_s": duration_s}
        if state is OperationState.DONE:
            self._log.info("pattern.apply.complete", lowest_ready=round(change.lowest_ready, 2), **keys)
        else:
            self._log.warning(f"pattern.apply.{state}", why=why, **keys)
        self._note(change)

    def _note(self, change: Change) -> Operation:
        observed = self._workers.observed()
        for model in change.terms.baseline:
            share = ready_share(model, self.want.wanted, observed, change.terms.baseline)
            change.lowest_ready = min(change.lowest_ready, share)
        serving = {(o.worker, o.fingerprint) for o in observed if o.is_serving}
        done = sum((w.placement.worker, w.fingerprint) in serving for w in self.want.wanted)
        operation = change.operation(done=done, total=len(self.want.wanted))
        self._operations.note(operation)
        return operation

    def _told_of(self, worker_id: WorkerId) -> str:
        """Return a worker and why it is not in place, in one clause."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            return f"{worker_id}: {worker.reason or worker.phase}"
        gpus = {g for w in self.want.wanted if w.placement.worker == worker_id for g in w.placement.gpus}
        holders = [w.id for w in self._workers.values() if not gpus.isdisjoint(w.wanted.placement.gpus)]
        return f"{worker_id}: its GPUs are held by {', '.join(holders)}" if holders else f"{worker_id}: not made yet"
