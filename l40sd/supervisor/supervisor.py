"""Owns what is wanted and the workers: plans, and carries out one turn at a time.

A turn looks at every worker, asks ``reconcile.plan`` what to do and does it. Turns are cheap and happen after every
change, so nothing here waits for anything in particular: what is not possible now is possible in a later turn.

A **change** is the way from one wanted layout to another. It is on disk before its first step, so a daemon that is
killed in the middle of it carries on; it remembers what was wanted before, so that going back is only another thing
to want.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from l40sd.clock import boot_id, now_s
from l40sd.codec import plain
from l40sd.config.options import Config
from l40sd.errors import DoesNotFit, L40sError
from l40sd.model import GpuId, Layout, ModelFacts, ModelName, OperationState, Placement, WorkerId
from l40sd.naming import natural
from l40sd.placement.patterns import find_pattern, patterns_of
from l40sd.placement.place import place
from l40sd.routing.outliers import Peer
from l40sd.routing.routes import CatalogEntry
from l40sd.supervisor.adopt import MakeWorker, left_of, recall
from l40sd.supervisor.change import Change, Want, state_of
from l40sd.supervisor.learned import Learned
from l40sd.supervisor.learned import recalled as learned
from l40sd.supervisor.operation import Operation, Operations
from l40sd.supervisor.pace import bound_back_s, bound_s, slowest, start_parallel
from l40sd.supervisor.reconcile import Do, Limits, Order, is_settled, plan, ready_share
from l40sd.supervisor.rolling_restart import Roll
from l40sd.supervisor.rollout import Decision, End, begin, decide, models_leaving
from l40sd.supervisor.state_file import Store
from l40sd.workers.context import WorkerContext
from l40sd.workers.lifecycle import Event, Goal, Phase
from l40sd.workers.outlook import Patience, Slot, outlook
from l40sd.workers.process import Adoption
from l40sd.workers.run_spec import launch_of
from l40sd.workers.saved import SavedWorker, written
from l40sd.workers.slot import Observed, Wanted
from l40sd.workers.worker import Worker

TURN_AT_LEAST_EVERY_S = 2.0
TURN_AGAIN_S = 0.5
"""Until a turn is taken again that the system refused something."""
MISSING_TOLD = 4
"""Workers that the end of a change names with their reasons; `status` has all."""
SERVED = (Phase.READY, Phase.UNREADY, Phase.DRAINING, Phase.DRAINED)
"""Phases of a worker that receives requests, or did until it was asked not to."""

HEAR_DRAIN = (Phase.WAITING, Phase.READY, Phase.UNREADY)
HEAR_UNDRAIN = (Phase.WAITING, Phase.STARTING, Phase.DRAINING, Phase.DRAINED)
"""Phases in which a worker can be told; it passes one of them before it serves, or rests, for the next time."""


class Supervisor:
    """Keeps the workers as they are wanted."""

    def __init__(self, context: WorkerContext, config: Config, store: Store) -> None:
        self.context = context
        self.config = config
        self.workers: dict[WorkerId, Worker] = {}
        self.want = Want(layout=Layout(pattern="", placements=()), config=config)
        self.change: Change | None = None
        self.roll: Roll | None = None
        self.operations = Operations()
        self.store = store
        self._wake = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._is_stopping = False
        self._is_unsaved = False
        self._drained: set[WorkerId] = set()
        self._floor: Mapping[ModelName, int] = {}  # of a change that ended incomplete
        self._learned = Learned()
        self._saved: dict[WorkerId, SavedWorker] = {}  # as they are on disk
        self._trouble = ""
        self._refused = ""  # what the system says to the turns since the last good one
        self.failed_turns = 0
        self._make_worker: MakeWorker = partial(Worker, context=context, changed=self._wake.set, peers=self._peers)
        self._log = context.log

    # -- what is wanted --------------------------------------------------------------------------------------------

    def design(
        self, pattern_name: str, config: Config, *, force: bool = False, current: Sequence[Placement] | None = None
    ) -> Want:
        """Return the pattern placed on this host, whole and checked; changes nothing (invariant 6).

        Args:
            current: Where things are, for the placement to move as little as possible; by default the workers'.

        Raises:
            L40sError: No such pattern (hint: the nearest known one), or it does not fit.
        """
        layout = place(
            find_pattern(pattern_name, patterns_of(config, self.context.host.inventory)),
            config,
            self.context.host.inventory,
            facts=self.context.models.facts,
            current=self._current() if current is None else current,
            force=force,
            unusable=self.unusable(),
        )
        return self._want(layout, config, force=force)

    def _current(self) -> list[Placement]:
        return [w.wanted.placement for w in self.workers.values() if w.goal is not Goal.GONE]

    def unusable(self) -> frozenset[GpuId]:
        """Return the GPUs that a worker holds which cannot be killed, and the lost ones.

        A GPU that NVML calls lost while its worker serves is left to that worker.
        """
        serving = {g for w in self.workers.values() if w.phase in SERVED for g in w.wanted.placement.gpus}
        return frozenset(g for g, state in self.out_of_use().items() if state == "stuck" or g not in serving)

    def held_gpus(self) -> set[GpuId]:
        """Return the GPUs that workers have or are wanted on: they are this host's, whatever NVML says."""
        return {g for w in self.workers.values() for g in w.wanted.placement.gpus}

    def out_of_use(self) -> dict[GpuId, str]:
        """Return the GPUs that are ``stuck`` (held by a worker that cannot be killed) or ``lost``."""
        stuck = (g for w in self.workers.values() if w.phase is Phase.STUCK for g in w.wanted.placement.gpus)
        return {gpu.id: "lost" for gpu in self.context.host.lost} | dict.fromkeys(stuck, "stuck")

    def apply(self, want: Want, by: str = "") -> Operation:
        """Make ``want`` wanted; the turns that follow bring it about. A change under way is replaced.

        What a replaced change would have gone back to stays what this one goes back to: the last layout that served.
        """
        change = self.change_to(want, by)
        successor = f"{f'{by} asked for' if by else 'a reload asks for'} pattern {want.pattern}, operation {change.id}"
        if self.change is not None:
            self._end(OperationState.REPLACED, successor)
        if self.roll is not None:
            self.roll.replaced(successor)
            self._end_roll(self.roll)
        self.change = change
        self._trouble = ""
        self._set_want(want)
        self._log.info(
            "pattern.apply.started",
            pattern=want.pattern,
            previous=self.change.previous_pattern,
            operation=self.change.id,
            workers=len(want.wanted),
            by=by,
            leaving=list(change.leaving),
        )
        self._save()
        self._wake.set()
        return self._note_change(self.change)

    def change_to(self, want: Want, by: str = "") -> Change:
        """Return the change that ``apply`` would begin; nothing is changed."""
        observed, former = self._observed(), self.change
        previous = self.want if former is None else former.previous
        pace = slowest(want.config, self.context.models.facts, self.context.models.loads_s, self.at_once(want))
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

    def at_once(self, want: Want) -> int:
        """Return how many workers may be starting at once on the way to this want."""
        return start_parallel(want.config, self.context.host.inventory, self.context.models.facts, want.wanted)

    def _observed(self) -> list[Observed]:
        return [w.observed() for w in self.workers.values()]

    def _want(self, layout: Layout, config: Config, *, force: bool = False) -> Want:
        """Return a want with every launch's fingerprint; a launch that cannot be built is refused here.

        Raises:
            L40sError: An engine, a placeholder or a shape that the engine cannot run.
        """
        launches = [launch_of(p, config, self.context) for p in layout.placements]
        pairs = zip(layout.placements, launches, strict=True)
        wanted = tuple(Wanted(placement=p, fingerprint=launch.fingerprint) for p, launch in pairs)
        return Want(layout=layout, config=config, force=force, wanted=wanted)

    def _set_want(self, want: Want) -> None:
        self.want = want
        for w in want.wanted:  # an unchanged worker is not touched, it only learns the new timings
            worker = self.workers.get(w.placement.worker)
            if worker is not None and worker.wanted.fingerprint == w.fingerprint:
                worker.config = want.config
        self._publish_catalog()

    def reconfigure(self, config: Config, facts: Mapping[ModelName, ModelFacts]) -> None:
        """Take over a new configuration: the pattern in force is placed anew with it, as a change like any other.

        Raises:
            L40sError: The pattern is not in it any more or does not fit; then nothing has changed (invariant 6).
        """
        former = self.context.models.take(facts)
        try:
            want, trouble = self._design_or_keep(config)
        except L40sError:
            self.context.models.take(former)
            raise
        self.config = config
        if want.wanted == self.want.wanted:
            self._set_want(want)
        else:
            self.apply(want)
        self._trouble = trouble
        self._save()

    def _design_or_keep(self, config: Config) -> tuple[Want, str]:
        """Return the pattern in force placed anew; where the host has lost GPUs since, what is left of it, and why."""
        pattern = self.want.pattern
        try:
            return self.design(pattern, config, force=self.want.force), ""
        except DoesNotFit as error:
            host = self.context.host
            if not (self._trouble or host.lost or not host.inventory.gpus):
                raise
            return left_of(pattern, self._current(), config, self.context, self._want, error)

    @property
    def degraded(self) -> tuple[str, ...]:
        """Sentences on what is not as it is wanted and will not become so by itself."""
        given_up = (Phase.STUCK, Phase.QUARANTINED, Phase.FAILED)
        workers = (f"{w.id} is {w.phase}: {w.reason}" for w in self.workers.values() if w.phase in given_up)
        failing = (f"{w.id}: {w.concern}" for w in self.workers.values() if w.concern)
        refused = (
            f"the system refuses what is needed to go on, again and again: {self._refused}" if self._refused else ""
        )
        return (*filter(None, [self._trouble, refused]), *workers, *failing)

    @property
    def under_way(self) -> Operation | None:
        """The pattern change or the rolling restart that has not ended yet; never both."""
        if self.change is not None:
            return self.operations.get(self.change.id)
        return self.roll.operation() if self.roll is not None else None

    # -- turns -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take turns until cancelled. Cancelling leaves every process alone."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for worker in self.workers.values():
                self._run_worker(worker)
            while True:
                self._wake.clear()
                await self._try_turn()
                try:
                    async with asyncio.timeout(TURN_AT_LEAST_EVERY_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    async def _try_turn(self) -> None:
        """Take a turn. One that the system refuses something (no file descriptor is left, say) is taken again.

        It is told once for each reason, and in ``degraded`` while it lasts. What it had done by then is done; the next
        one looks at everything anew.
        """
        try:
            await self._turn()
        except OSError as error:
            self.failed_turns += 1
            if str(error) != self._refused:
                self._refused = str(error)
                self._log.error("plan.failed", reason=self._refused, count=self.failed_turns)
            await asyncio.sleep(TURN_AGAIN_S)
        else:
            if self._refused:
                self._log.info("plan.recovered", reason=self._refused, count=self.failed_turns)
            self._refused = ""

    async def _turn(self) -> None:
        """One look, then what follows from it.

        1. Judge the change: did what is on trial prove itself, or does everything go back?
        2. What is wanted is on disk before anything is done about it.
        3. Plan, and carry out. Is the change over?
        """
        if self._is_stopping:
            self._forget_stopped()
            return
        self._learned.note(self._observed())
        if self.change is not None:
            self._judge(self.change)  # 1
        if self._saved_now() != self._saved:
            self._is_unsaved = True
        await self.write_down()  # 2
        if self._is_stopping:  # since then: whoever was made now would not be told to go
            return
        self._keep_drained()
        if self.change is None:
            self._keep()
        else:
            self._go_on(self.change)  # 3
        if self.roll is not None:
            self._roll_on(self.roll)
        self._note_operation()
        self._publish_catalog()

    def _keep(self) -> None:
        """Have things as they are wanted, outside a change: with a floor only while one that ended left it to do."""
        workers, observed = self.want.config.workers, self._observed()
        limits = Limits(start_parallel=self.at_once(self.want), min_ready=workers.min_ready, baseline=self._floor)
        for order in plan(self.want.wanted, observed, limits):
            self._carry_out(order)
        if self._floor and is_settled(self.want.wanted, observed):
            self._floor = {}
            self._save()

    def _decide(self, change: Change) -> Decision:
        workers = self.want.config.workers
        return decide(
            self.want.wanted,
            self._observed(),
            change.terms,
            start_parallel=self.at_once(self.want),
            min_ready=workers.min_ready,
            is_late=change.is_late,
        )

    def _judge(self, change: Change) -> None:
        """Note what has proven itself; when something speaks against the change, want what was wanted before."""
        decision = self._decide(change)
        change.terms = decision.terms
        for worker_id in decision.proven.values():
            self._log.info("pattern.apply.proven", pattern=change.pattern, worker=worker_id)
            self._save()
        if decision.back is not None:
            self._roll_back(change, decision.back)

    def _go_on(self, change: Change) -> None:
        """Do what the change needs now, or end it; what was not seen before it was on disk, the next turn judges."""
        decision = self._decide(change)
        for order in decision.orders:
            self._carry_out(order)
        if decision.end is not None:
            self._settle(change, decision.end)
        elif decision.back is not None:
            self._wake.set()

    def _roll_back(self, change: Change, culprit: WorkerId) -> None:
        assert change.previous is not None
        worker = self.workers.get(culprit)
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
        self._set_want(change.previous)
        self._save()

    def _told_of(self, worker_id: WorkerId) -> str:
        """Return a worker and why it is not in place, in one clause."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            return f"{worker_id}: {worker.reason or worker.phase}"
        gpus = {g for w in self.want.wanted if w.placement.worker == worker_id for g in w.placement.gpus}
        holders = [w.id for w in self.workers.values() if not gpus.isdisjoint(w.wanted.placement.gpus)]
        return f"{worker_id}: its GPUs are held by {', '.join(holders)}" if holders else f"{worker_id}: not made yet"

    def _settle(self, change: Change, end: End) -> None:
        """End the change as it is. What is missing is tried again as ever, and what is still to be done is done."""
        self._drained &= {w.placement.worker for w in self.want.wanted}  # a drain ends with its worker
        missing = "; ".join(self._told_of(worker) for worker in end.missing[:MISSING_TOLD])
        missing += f"; and {more} more" if (more := len(end.missing) - MISSING_TOLD) > 0 else ""
        if end.is_late:
            missing += f" (not done within {change.back_s if change.turned_at_s else change.forward_s:.0f} s)"
        if change.state is OperationState.ROLLING_BACK:
            self._end(OperationState.ROLLED_BACK, f"{change.why}; back but for {missing}" if missing else change.why)
        elif missing:
            self._end(OperationState.INCOMPLETE, missing)
        else:
            self._end(OperationState.DONE, "")
        self.change = None
        self._floor = change.terms.baseline if missing else {}
        self._save()

    def _end(self, state: OperationState, why: str) -> None:
        assert self.change is not None
        change = self.change
        change.state, change.why, change.step = state, why, ""
        duration_s = round(now_s() - change.began_at_s, 2)
        keys: dict[str, Any] = {"pattern": change.pattern, "operation": change.id, "duration_s": duration_s}
        if state is OperationState.DONE:
            self._log.info("pattern.apply.complete", lowest_ready=round(change.lowest_ready, 2), **keys)
        else:
            self._log.warning(f"pattern.apply.{state}", why=why, **keys)
        self._note_operation()

    def _carry_out(self, order: Order) -> None:
        match order.do:
            case Do.CREATE:
                wanted = next(w for w in self.want.wanted if w.placement.worker == order.worker)
                worker = self._make_worker(wanted, self.want.config)
                self.workers[worker.id] = worker
                if self.change is not None:
                    terms = self.change.terms
                    self.change.terms = replace(terms, created=terms.created | {worker.id})
                self._run_worker(worker)
                self._save()  # before it starts, which takes another turn: a place in the line of those that wait
            case Do.START:
                self.workers[order.worker].post(Event.PERMIT)
                self._note_step(f"starting {order.worker}")
            case Do.RETIRE:
                self.workers[order.worker].post(Event.RETIRE, order.why)
                self._note_step(f"draining {order.worker}")
            case Do.FORGET:
                self._forget(order.worker)

    def _run_worker(self, worker: Worker) -> None:
        assert self._group is not None
        self._group.create_task(worker.handle_events(), name=worker.id)

    def _forget(self, worker_id: WorkerId) -> None:
        del self.workers[worker_id]
        if self.change is not None:
            self.change.terms = replace(self.change.terms, created=self.change.terms.created - {worker_id})
        self._wake.set()  # its GPUs are free now

    def _forget_stopped(self) -> None:
        for worker_id in [i for i, w in self.workers.items() if w.phase is Phase.STOPPED]:
            self._forget(worker_id)

    # -- restarts one after the other ------------------------------------------------------------------------------

    def restart(self, names: Sequence[str], by: str = "") -> Operation:
        """Restart these workers one after the other, each model's floor of ready capacity kept.

        Raises:
            L40sError: No such worker, or a change or another such restart is under way.
        """
        chosen = tuple(dict.fromkeys(self.worker(name).id for name in names))
        if self.change is not None or self.roll is not None:
            what = f"the change to {self.change.pattern}" if self.change else "another rolling restart"
            raise L40sError(
                f"{what} is under way",
                hint="wait for it: l40sctl wait; or restart --now: all at once, whatever capacity is left",
                code="under_way",
            )
        pace = slowest(
            self.want.config, self.context.models.facts, self.context.models.loads_s, self.at_once(self.want)
        )
        self.roll = Roll.of(chosen, self._observed(), pace, pattern=self.want.pattern, by=by)
        self._log.info("workers.restart.started", operation=self.roll.id, workers=list(chosen), by=by)
        operation = self.roll.operation()
        self.operations.note(operation)
        self._save()
        return operation

    def _roll_on(self, roll: Roll) -> None:
        workers, before = self.want.config.workers, len(roll.pending)
        is_over = roll.advance(self.workers, start_parallel=self.at_once(self.want), min_ready=workers.min_ready)
        self.operations.note(roll.operation())
        if is_over:
            self._end_roll(roll)
        elif len(roll.pending) != before:
            self._save()

    def _end_roll(self, roll: Roll) -> None:
        roll.tell_end(self._log)
        self.operations.note(roll.operation())
        self.roll = None
        self._save()

    # -- the operator ----------------------------------------------------------------------------------------------

    def worker(self, worker_id: str) -> Worker:
        """Return the worker with this id.

        Raises:
            L40sError: There is none; the hint lists those there are.
        """
        worker = self.workers.get(WorkerId(worker_id))
        if worker is None:
            raise L40sError(
                f"there is no worker {worker_id!r}",
                hint=f"workers: {', '.join(sorted(self.workers, key=natural)) or 'none'}",
                code="unknown_worker",
            )
        return worker

    def command(self, worker_id: str, verb: str) -> None:
        """Pass the operator's wish on to a worker: restart, drain, undrain or reset.

        A drain holds until the undrain, over restarts and resets of the worker and of the daemon; see
        ``_keep_drained``. It is on disk after ``write_down``.

        Raises:
            L40sError: No such worker or verb, the worker is being retired, or has nothing to drain.
        """
        events = {"restart": Event.RESTART, "drain": Event.DRAIN, "undrain": Event.UNDRAIN, "reset": Event.RESET}
        worker = self.worker(worker_id)
        if verb not in events:
            raise L40sError(f"a worker cannot be told to {verb!r}", hint=f"one of {', '.join(events)}", code="bad_verb")
        if worker.goal is Goal.GONE:
            raise L40sError(f"{worker_id} is on its way out", where=worker_id, code="worker_retiring")
        if verb == "drain" and worker.phase not in SERVED and worker.id not in self._drained:
            raise L40sError(
                f"{worker_id} is {worker.phase}: there is nothing to drain",
                where=worker_id,
                hint="drain it once it is ready",
                code="not_serving",
            )
        if verb == "drain":
            self._drained.add(worker.id)
        elif verb == "undrain":
            self._drained.discard(worker.id)
        worker.post(events[verb], f"{verb} by the operator")
        self._save()

    def is_drained(self, worker: Worker) -> bool:
        """Whether the operator wants it to rest, whatever it is doing at present."""
        return worker.id in self._drained

    def _keep_drained(self) -> None:
        """Have every worker rest that shall, and no other: a new one in a drained one's place, one that was restarted.

        What a worker has been told already is late when it is told again.
        """
        for worker in self.workers.values():
            match worker.goal:
                case Goal.SERVE if worker.id in self._drained and worker.phase in HEAR_DRAIN:
                    worker.post(Event.DRAIN)
                case Goal.REST if worker.id not in self._drained and worker.phase in HEAR_UNDRAIN:
                    worker.post(Event.UNDRAIN)
                case _:
                    pass

    def _peers(self, worker_id: WorkerId) -> list[Peer]:
        model = self.workers[worker_id].wanted.placement.model if worker_id in self.workers else None
        equals = (w for w in self.workers.values() if w.wanted.placement.model == model and w.id != worker_id)
        return [peer for w in equals if (peer := w.as_peer()) is not None]

    def on_request_failure(self, worker_id: WorkerId, _kind: str) -> None:
        """A request could not be served by this worker: it has a look at itself."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.suspect()

    async def is_ending(self, worker_id: WorkerId) -> bool:
        """Return whether this worker's process, or its health, says that it ends; it has just answered 500."""
        worker = self.workers.get(worker_id)
        return worker is None or await worker.is_ending()

    # -- start and stop --------------------------------------------------------------------------------------------

    async def begin(self, adoption: Adoption) -> None:
        """Take up what an earlier daemon left, see recall.py. Before ``run``.

        Raises:
            L40sError: The pattern is not possible, and nothing of it is running.
        """
        state = await self.store.load() or {}
        recalled = await recall(
            adoption,
            state,
            self.config,
            self.context,
            design=self.design,
            want_of=self._want,
            make_worker=self._make_worker,
        )
        self.workers, self.change, self._trouble = recalled.workers, recalled.change, recalled.trouble
        self._learned, loads_s = learned(state.get("learned"))
        self.context.models.loads_s.update(loads_s)
        self._drained, self._floor, self.roll = recalled.drained, recalled.floor, recalled.roll
        for operation in recalled.ended:
            self.operations.note(operation)
        self._set_want(recalled.want)
        self._note_operation()
        self._save()

    async def stop(self, timeout_s: float) -> int:
        """Drain and stop every worker within ``timeout_s``; return how many could not be stopped."""
        self._is_stopping = True
        workers = self.want.config.workers
        drain_until_s = now_s() + max(0.0, timeout_s - workers.term_timeout_s - 2 * workers.kill_timeout_s)
        for worker in self.workers.values():
            worker.post(Event.RETIRE, "the daemon was told to stop")
        try:
            async with asyncio.timeout(timeout_s):
                while any(w.phase is not Phase.STUCK for w in self.workers.values()):
                    for worker in self.workers.values():
                        worker.give_up_spawn()
                    if now_s() >= drain_until_s:
                        for worker in self.workers.values():
                            if worker.phase is Phase.DRAINING:
                                worker.post(Event.EMPTY, "the time for the stop was up")
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pass
        return len(self.workers)

    # -- disk and views --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._is_unsaved = True
        self._wake.set()

    async def write_down(self) -> None:
        """Write what is wanted, the change under way and the saved workers.

        A full disk degrades, it does not stop the work. What somebody else is writing at the moment is waited for.
        """
        while self._is_unsaved:
            self._is_unsaved = False
            self._saved = self._saved_now()
            try:
                state = {
                    **state_of(self.want, self.change, self._drained, self._floor),
                    "pasts": written(self._saved, boot_id(), now_s()),
                    "roll": self.roll.journal() if self.roll else None,
                    "ended": self.operations.saved(),
                    "learned": self._learned.journal(self.context.models.loads_s),
                    "gpus": plain(self.context.host.known),
                }
                await self.store.save(state)
            except OSError:
                self._is_unsaved = True
                raise
        await self.store.retry()

    def _saved_now(self) -> dict[WorkerId, SavedWorker]:
        """Return the saved workers; while all are being stopped, those from before: that is no part of them."""
        return self._saved if self._is_stopping else {w.id: w.saved() for w in self.workers.values()}

    def _note_step(self, text: str) -> None:
        if self.change is not None:
            self.change.step = text

    def _note_operation(self) -> None:
        if self.change is not None:
            self._note_change(self.change)

    def _note_change(self, change: Change) -> Operation:
        observed = self._observed()
        for model in change.terms.baseline:
            share = ready_share(model, self.want.wanted, observed, change.terms.baseline)
            change.lowest_ready = min(change.lowest_ready, share)
        serving = {(o.worker, o.fingerprint) for o in observed if o.is_serving}
        done = sum((w.placement.worker, w.fingerprint) in serving for w in self.want.wanted)
        operation = change.operation(done=done, total=len(self.want.wanted))
        self.operations.note(operation)
        return operation

    def _publish_catalog(self) -> None:
        """Tell the routes which models there are and, for a request that finds no worker, what is on its way."""
        slots: dict[ModelName, list[Slot]] = {}
        for worker in self.workers.values():
            slots.setdefault(worker.wanted.placement.model, []).append(worker.slot())
        for w in self._still_to_be_made():
            is_held = not self.unusable().isdisjoint(w.placement.gpus)
            slots.setdefault(w.placement.model, []).append(Slot(phase=Phase.STUCK if is_held else Phase.WAITING))
        wanted = {w.placement.model for w in self.want.wanted}
        self.context.routes.set_catalog(
            {
                name: CatalogEntry(
                    aliases=model.aliases,
                    outlook=outlook(
                        slots.get(name, ()),
                        self._patience(name),
                        pattern=self.want.pattern,
                        is_wanted=name in wanted,
                    ),
                )
                for name, model in self.want.config.models.items()
            }
        )

    def _still_to_be_made(self) -> list[Wanted]:
        there = {(w.id, w.wanted.fingerprint) for w in self.workers.values() if w.goal is not Goal.GONE}
        return [w for w in self.want.wanted if (w.placement.worker, w.fingerprint) not in there]

    def _patience(self, model: ModelName) -> Patience:
        config = self.want.config
        loads_s = self.context.models.loads_of(model)
        return Patience(
            queue_s=config.proxy.queue_timeout_s,
            load_s=median(loads_s) if loads_s else None,
            external_s=config.health.startup_timeout_s,
        )
