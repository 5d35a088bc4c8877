"""Keeps the workers as they are wanted: reconcile passes, one after the other.

A pass looks at every worker, asks reconcile.py what to do and does it. Passes are cheap and happen after every change,
so nothing here waits for anything in particular: what is not possible now is possible in a later pass.

A **change** is the way from one wanted layout to another (changes.py). It is on disk before its first step, so a daemon
that is killed in the middle of it carries on; it remembers what was wanted before, so that going back is only another
thing to want.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from l40sd.clock import boot_id, now_s
from l40sd.codec import plain
from l40sd.config.options import Config
from l40sd.errors import DoesNotFit, L40sError
from l40sd.model import ModelFacts, ModelName, WorkerId
from l40sd.supervisor.adopt import adopt
from l40sd.supervisor.change import Want, saved_want
from l40sd.supervisor.changes import Changes
from l40sd.supervisor.commands import Commands
from l40sd.supervisor.design import Designer
from l40sd.supervisor.learned import Learned
from l40sd.supervisor.operation import Operation, Operations
from l40sd.supervisor.reconcile import Do, Order
from l40sd.supervisor.state_file import Store
from l40sd.supervisor.worker_set import WorkerSet
from l40sd.workers.context import WorkerContext
from l40sd.workers.lifecycle import Event, Phase
from l40sd.workers.process import Adoption
from l40sd.workers.saved import SavedWorker, written

PASS_AT_LEAST_EVERY_S = 2.0
PASS_AGAIN_S = 0.5
"""Until a pass is taken again that the system refused something."""


class Supervisor:
    """Takes the passes, and has what follows from them written to disk.

    Attributes:
        workers: Those there are.
        designer: How a pattern becomes a want.
        changes: What is wanted, and the way there.
        commands: What operators wish of single workers.
        operations: What changes and restarts have come to, by their ids.
        failed_passes: How many passes the system refused something, since the start.
    """

    def __init__(self, context: WorkerContext, config: Config, store: Store) -> None:
        self.context = context
        self.config = config
        self.store = store
        self.failed_passes = 0
        self._wake = asyncio.Event()
        self._learned = Learned()
        self.workers = WorkerSet(context, changed=self._wake.set)
        self.designer = Designer(context, self.workers)
        self.operations = Operations()
        self.changes = Changes(config, self.workers, context, self.operations, self._learned, self._save)
        self.commands = Commands(self.workers, self.changes, context, self.operations, self._save)
        self._is_stopping = False
        self._is_unsaved = False
        self._saved: dict[WorkerId, SavedWorker] = {}  # as they are on disk
        self._trouble = ""
        self._refused = ""  # what the system says to the passes since the last good one
        self._log = context.log

    # -- what is wanted --------------------------------------------------------------------------------------------

    @property
    def want(self) -> Want:
        """What is wanted at present."""
        return self.changes.want

    @property
    def under_way(self) -> Operation | None:
        """The pattern change or the rolling restart that has not ended yet; never both."""
        change, restart = self.changes.current, self.commands.restarting
        if change is not None:
            return self.operations.get(change.id)
        return restart.operation() if restart is not None else None

    def apply(self, want: Want, by: str = "") -> Operation:
        """Make ``want`` wanted; the passes that follow bring it about. What is under way is replaced."""
        change = self.changes.change_to(want, by)
        successor = f"{f'{by} asked for' if by else 'a reload asks for'} pattern {want.pattern}, operation {change.id}"
        self.changes.replace(successor)
        self.commands.replace_restart(successor)
        self._trouble = ""
        return self.changes.begin(change, want)

    def reconfigure(self, config: Config, facts: Mapping[ModelName, ModelFacts]) -> None:
        """Go by a new configuration: the pattern in force is placed anew with it, as a change like any other.

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
            self.changes.set_want(want)
        else:
            self.apply(want)
        self._trouble = trouble
        self._save()

    def _design_or_keep(self, config: Config) -> tuple[Want, str]:
        """Return the pattern in force placed anew; where the host has lost GPUs since, what is left of it, and why."""
        pattern = self.want.pattern
        try:
            return self.designer.design(pattern, config, force=self.want.force), ""
        except DoesNotFit as error:
            host = self.context.host
            if not (self._trouble or host.lost or not host.inventory.gpus):
                raise
            return self.designer.left_of(pattern, self.workers.placements(), config, error)

    @property
    def degraded(self) -> tuple[str, ...]:
        """Sentences on what is not as it is wanted and will not become so by itself."""
        refused = (
            f"the system refuses what is needed to go on, again and again: {self._refused}" if self._refused else ""
        )
        return (*filter(None, [self._trouble, refused]), *self.workers.troubles())

    # -- reconcile passes ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take passes until cancelled. Cancelling leaves every process alone."""
        async with asyncio.TaskGroup() as group:
            self.workers.run_in(group)
            while True:
                self._wake.clear()
                await self._try_pass()
                try:
                    async with asyncio.timeout(PASS_AT_LEAST_EVERY_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    async def _try_pass(self) -> None:
        """Take a pass. One that the system refuses something (no file descriptor is left, say) is taken again.

        It is told once for each reason, and in ``degraded`` while it lasts. What it had done by then is done; the next
        one looks at everything anew.
        """
        try:
            await self._pass()
        except OSError as error:
            self.failed_passes += 1
            if str(error) != self._refused:
                self._refused = str(error)
                self._log.error("plan.failed", reason=self._refused, count=self.failed_passes)
            await asyncio.sleep(PASS_AGAIN_S)
        else:
            if self._refused:
                self._log.info("plan.recovered", reason=self._refused, count=self.failed_passes)
            self._refused = ""

    async def _pass(self) -> None:
        """One look, then what follows from it.

        1. Judge the change: did what is on trial prove itself, or does everything go back?
        2. What is wanted is on disk before anything is done about it.
        3. Decide, and carry out. Is the change over?
        """
        if self._is_stopping:
            self._forget_stopped()
            return
        self._learned.note(self.workers.observed())
        self.changes.judge()  # 1
        if self._saved_now() != self._saved:
            self._is_unsaved = True
        await self.write_down()  # 2
        if self._is_stopping:  # since then: whoever was made now would not be told to go
            return
        self.commands.keep_drained()
        self._reconcile()  # 3
        self.commands.advance_restart()
        self.changes.note_progress()
        self.changes.publish_catalog()

    def _reconcile(self) -> None:
        """Do what is to be done now, or end the change; what was seen only after the write is for the next."""
        decision, is_change = self.changes.decide(), self.changes.current is not None
        for order in decision.orders:
            self._carry_out(order)
        if decision.end is not None:
            if is_change:
                self.commands.end_drains({w.placement.worker for w in self.want.wanted})
            self.changes.end(decision.end)
        elif decision.back is not None:
            self._wake.set()

    def _carry_out(self, order: Order) -> None:
        match order.do:
            case Do.CREATE:
                wanted = next(w for w in self.want.wanted if w.placement.worker == order.worker)
                self.workers.add(self.workers.make(wanted, self.want.config))
                self.changes.note_created(order.worker)
                self._save()  # before it starts, which takes another pass: a place in the line of those that wait
            case Do.START:
                self.workers[order.worker].post(Event.PERMIT)
                self.changes.note_step(f"starting {order.worker}")
            case Do.RETIRE:
                self.workers[order.worker].post(Event.RETIRE, order.why)
                self.changes.note_step(f"draining {order.worker}")
            case Do.FORGET:
                self._forget(order.worker)

    def _forget(self, worker_id: WorkerId) -> None:
        self.workers.forget(worker_id)
        self.changes.note_forgotten(worker_id)

    def _forget_stopped(self) -> None:
        for worker_id in [i for i, w in self.workers.items() if w.phase is Phase.STOPPED]:
            self._forget(worker_id)

    # -- start and stop --------------------------------------------------------------------------------------------

    async def begin(self, adoption: Adoption) -> None:
        """Adopt what an earlier daemon left, see adopt.py. Before ``run``.

        Raises:
            L40sError: The pattern is not possible, and nothing of it is running.
        """
        state = await self.store.load() or {}
        adopted = await adopt(
            adoption, state, self.config, self.context, designer=self.designer, make_worker=self.workers.make
        )
        for worker in adopted.workers.values():
            self.workers.add(worker)
        self.context.models.loads_s.update(self._learned.adopt(state.get("learned")))
        self.changes.current, self.changes.floor, self._trouble = adopted.change, adopted.floor, adopted.trouble
        self.commands.drained, self.commands.restarting = adopted.drained, adopted.restart
        for operation in adopted.ended:
            self.operations.note(operation)
        self.changes.set_want(adopted.want)
        self.changes.note_progress()
        self._save()

    async def stop(self, timeout_s: float) -> int:
        """Drain and stop every worker within ``timeout_s``; return how many could not be stopped."""
        self._is_stopping = True
        return await self.workers.stop(timeout_s, self.want.config.workers)

    # -- disk ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._is_unsaved = True
        self._wake.set()

    async def write_down(self) -> None:
        """Write what is wanted, the change under way and what is saved of the workers.

        A full disk degrades, it does not stop the work. What somebody else is writing at the moment is waited for.
        """
        while self._is_unsaved:
            self._is_unsaved = False
            self._saved = self._saved_now()
            try:
                await self.store.save(self._state())
            except OSError:
                self._is_unsaved = True
                raise
        await self.store.retry()

    def _state(self) -> dict[str, Any]:
        """Return what is kept on disk, over reboots too; adopt.py reads it, and knows what older ones wrote."""
        change, restart = self.changes.current, self.commands.restarting
        return {
            **saved_want(self.want),
            "drained": sorted(self.commands.drained),
            "floor": dict(self.changes.floor),
            "change": change.saved() if change is not None and change.state.is_under_way else None,
            "pasts": written(self._saved, boot_id(), now_s()),
            "roll": restart.saved() if restart is not None else None,
            "ended": self.operations.saved(),
            "learned": self._learned.saved(self.context.models.loads_s),
            "gpus": plain(self.context.host.known),
        }

    def _saved_now(self) -> dict[WorkerId, SavedWorker]:
        """Return the saved workers; while all are being stopped, those from before: that is no part of them."""
        return self._saved if self._is_stopping else self.workers.saved()
