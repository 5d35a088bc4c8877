"""Owns what is wanted and the workers: plans, and carries out one turn at a time.

A turn looks at every worker, asks ``core.plan`` what to do and does it. Turns are cheap and happen after every change,
so nothing here waits for anything in particular: what is not possible now is possible in a later turn.

A **change** is the way from one wanted layout to another. It is on disk before its first step, so a daemon that is
killed in the middle of it carries on; it remembers what was wanted before, so that going back is only another thing
to want.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from l40sd.adapters.clock import now_s
from l40sd.adapters.process import Adoption, ExitRecord, Instance, InstanceSpec
from l40sd.adapters.store import Store
from l40sd.core import launch as launching
from l40sd.core.config import Config
from l40sd.core.errors import L40sError
from l40sd.core.lifecycle import Event, Goal, Phase
from l40sd.core.messages import OperationStatus, plain, restore
from l40sd.core.model import GpuId, Layout, ModelFacts, ModelName, Placement, WorkerId
from l40sd.core.pattern import patterns_of
from l40sd.core.placement import place
from l40sd.core.plan import Do, Limits, Order, Shape, Wanted, capacity, is_settled, plan, ready_share
from l40sd.services.routes import CatalogEntry
from l40sd.services.worker import Tools, Worker

TURN_AT_LEAST_EVERY_S = 2.0
OPERATIONS_KEPT = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A layout that shall be, with the configuration that its workers are started from."""

    layout: Layout
    config: Config
    force: bool = False
    wanted: tuple[Wanted, ...] = ()

    @property
    def pattern(self) -> str:
        """The pattern's name."""
        return self.layout.pattern


@dataclass(slots=True, kw_only=True)
class Change:
    """The way from one want to another.

    Attributes:
        previous: What everything goes back to when the first new worker does not prove itself; None: nowhere to go.
        baseline: Each model's capacity in GPUs when the change began.
        proven: Shapes that have given one real answer, or serve unchanged.
        created: Workers made for this change: only their failures speak against it.
    """

    id: str
    pattern: str
    previous: Want | None
    baseline: Mapping[ModelName, int]
    proven: set[Shape] = field(default_factory=set)
    created: set[WorkerId] = field(default_factory=set)
    state: str = "running"
    why: str = ""
    step: str = ""
    lowest_ready: float = 1.0
    began_at_s: float = field(default_factory=now_s)

    @property
    def previous_pattern(self) -> str:
        """Name of the pattern it came from; empty when there was none."""
        return self.previous.pattern if self.previous else ""


class Supervisor:
    """Keeps the workers as they are wanted."""

    def __init__(self, tools: Tools, config: Config, store: Store) -> None:
        self.tools = tools
        self.config = config
        self.workers: dict[WorkerId, Worker] = {}
        self.want = Want(layout=Layout(pattern="", placements=()), config=config)
        self.change: Change | None = None
        self.operations: dict[str, OperationStatus] = {}
        self.store = store
        self._wake = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._is_stopping = False
        self._is_unsaved = False
        self._trouble = ""
        self._log = tools.log
        tools.changed = self._wake.set

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
        patterns = patterns_of(config, self.tools.host.inventory)
        if pattern_name not in patterns:
            raise L40sError(
                f"there is no pattern {pattern_name!r}",
                hint=f"known: {', '.join(patterns)}",
                code="unknown_pattern",
            )
        layout = place(
            patterns[pattern_name],
            config,
            self.tools.host.inventory,
            facts=self.tools.facts,
            current=self._current() if current is None else current,
            force=force,
            unusable=self.unusable(),
        )
        return self._want(layout, config, force=force)

    def _current(self) -> list[Placement]:
        return [w.wanted.placement for w in self.workers.values() if w.goal is not Goal.GONE]

    def unusable(self) -> frozenset[GpuId]:
        """Return the GPUs that a worker holds which cannot be killed."""
        return frozenset(g for w in self.workers.values() if w.phase is Phase.STUCK for g in w.wanted.placement.gpus)

    def apply(self, want: Want) -> OperationStatus:
        """Make ``want`` wanted; the turns that follow bring it about. A change under way is replaced.

        What a replaced change would have gone back to stays what this one goes back to: the last layout that served.
        """
        observed = [w.observed() for w in self.workers.values()]
        previous: Want | None = self.want
        baseline = capacity(observed)
        on_trial: set[WorkerId] = set()
        if self.change is not None:
            self._end("replaced", f"replaced by a change to {want.pattern}")
            previous, baseline = self.change.previous, {**baseline, **self.change.baseline}
            on_trial = self.change.created & {w.placement.worker for w in want.wanted}
        there = {(o.worker, o.fingerprint): o for o in observed}
        kept = [o for w in want.wanted if (o := there.get((w.placement.worker, w.fingerprint))) is not None]
        self.change = Change(
            id=secrets.token_hex(4),
            pattern=want.pattern,
            previous=previous,
            baseline=baseline,
            # What was there before has nothing to prove, whatever state it is in: it is not this change's doing.
            proven={o.shape for o in kept if o.is_serving or o.worker not in on_trial},
            created=on_trial,
        )
        self._trouble = ""
        self._set_want(want)
        self._log.info(
            "pattern.apply.started",
            pattern=want.pattern,
            previous=self.change.previous_pattern,
            operation=self.change.id,
            workers=len(want.wanted),
        )
        self._save()
        self._note_operation()
        self._wake.set()
        return self.operations[self.change.id]

    def _want(self, layout: Layout, config: Config, *, force: bool = False) -> Want:
        """Return a want with every launch's fingerprint; a launch that cannot be built is refused here.

        Raises:
            L40sError: An engine, a placeholder or a shape that the engine cannot run.
        """
        wanted = tuple(Wanted(placement=p, fingerprint=self._fingerprint(p, config)) for p in layout.placements)
        return Want(layout=layout, config=config, force=force, wanted=wanted)

    def _fingerprint(self, placement: Placement, config: Config) -> str:
        inventory, python = self.tools.host.inventory, self.tools.python
        return launching.build(placement, config, inventory, port=0, api_key="", python=python).fingerprint

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
        former, self.tools.facts = self.tools.facts, facts
        try:
            want = self.design(self.want.pattern, config, force=self.want.force)
        except L40sError:
            self.tools.facts = former
            raise
        self.config = config
        if want.wanted == self.want.wanted:
            self._set_want(want)
        else:
            self.apply(want)

    @property
    def degraded(self) -> tuple[str, ...]:
        """Sentences on what is not as it is wanted and will not become so by itself."""
        given_up = (Phase.STUCK, Phase.QUARANTINED, Phase.FAILED)
        workers = (f"{w.id} is {w.phase}: {w.reason}" for w in self.workers.values() if w.phase in given_up)
        return (*filter(None, [self._trouble]), *workers)

    # -- turns -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take turns until cancelled. Cancelling leaves every process alone."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for worker in self.workers.values():
                self._run_worker(worker)
            while True:
                self._wake.clear()
                await self._turn()
                try:
                    async with asyncio.timeout(TURN_AT_LEAST_EVERY_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    async def _turn(self) -> None:
        """One look, then what follows from it.

        1. Judge the change: did what is on trial prove itself, or does everything go back?
        2. What is wanted is on disk before anything is done about it. Plan, and carry out.
        3. Is it reached?
        """
        if self._is_stopping:
            self._forget_stopped()
            return
        if self.change is not None:
            self._judge(self.change)  # 1
        await self._write_down()
        for order in plan(self.want.wanted, [w.observed() for w in self.workers.values()], self._limits()):  # 2
            self._carry_out(order)
        if self.change is not None and self._is_reached():  # 3
            self._settle()
        elif self.change is not None and (holder := self._hopeless()):
            self._end("failed", f"{holder} cannot be killed and holds its GPUs; the rest of the pattern is in place")
            self.change = None
            self._save()
        self._note_operation()
        self._publish_catalog()

    def _limits(self) -> Limits:
        workers = self.want.config.workers
        change = self.change
        if change is None:
            return Limits(start_parallel=workers.start_parallel, min_ready=workers.min_ready, baseline={})
        unproven = frozenset(w.shape for w in self.want.wanted) - change.proven
        # A layout that served before, or the only one there is, needs no trial.
        is_trial = change.previous is not None and change.state == "running"
        return Limits(
            start_parallel=workers.start_parallel,
            min_ready=workers.min_ready,
            baseline=change.baseline,
            unproven=unproven if is_trial else frozenset(),
        )

    def _judge(self, change: Change) -> None:
        """Note what has proven itself; when something on trial failed, want what was wanted before."""
        by_id = {w.placement.worker: w for w in self.want.wanted}
        newcomers = [self.workers[i] for i in change.created if i in self.workers and i in by_id]
        for worker in newcomers:
            if worker.phase is Phase.READY and worker.wanted.shape not in change.proven:
                change.proven.add(worker.wanted.shape)
                self._log.info("pattern.apply.proven", pattern=change.pattern, worker=worker.id)
                self._save()
        if change.state != "running" or change.previous is None:
            return
        for worker in newcomers:
            is_trial = worker.wanted.shape not in change.proven
            has_failed = worker.phase in (Phase.QUARANTINED, Phase.FAILED) or (
                is_trial and (worker.phase is Phase.BACKOFF or worker.failed_starts > 0)
            )
            if has_failed:
                self._roll_back(change, worker)
                return

    def _roll_back(self, change: Change, culprit: Worker) -> None:
        assert change.previous is not None
        change.state = "rolling_back"
        change.why = f"{culprit.id}: {culprit.reason}"
        self._log.error(
            "pattern.apply.rolling_back",
            pattern=change.pattern,
            back_to=change.previous_pattern,
            worker=culprit.id,
            reason=culprit.reason,
            last_lines=list(culprit.last_lines),
        )
        self._set_want(change.previous)
        self._save()

    def _is_reached(self) -> bool:
        return is_settled(self.want.wanted, [w.observed() for w in self.workers.values()])

    def _hopeless(self) -> WorkerId | None:
        """Return the stuck worker that alone keeps the change from being reached; None while anything else moves."""
        stuck = [w.id for w in self.workers.values() if w.phase is Phase.STUCK]
        settled = (Phase.READY, Phase.DRAINED, Phase.STUCK)
        is_still = all(w.phase in settled and (w.goal is not Goal.GONE or w.id in stuck) for w in self.workers.values())
        return stuck[0] if stuck and is_still else None

    def _settle(self) -> None:
        assert self.change is not None
        if self.change.state == "rolling_back":
            self._end("rolled_back", self.change.why)
        else:
            self._end("done", "")
        self.change = None
        self._save()

    def _end(self, state: str, why: str) -> None:
        assert self.change is not None
        change = self.change
        change.state, change.why, change.step = state, why, ""
        duration_s = round(now_s() - change.began_at_s, 2)
        keys: dict[str, Any] = {"pattern": change.pattern, "operation": change.id, "duration_s": duration_s}
        if state == "done":
            self._log.info("pattern.apply.complete", lowest_ready=round(change.lowest_ready, 2), **keys)
        else:
            self._log.warning(f"pattern.apply.{state}", why=why, **keys)
        self._note_operation()

    def _carry_out(self, order: Order) -> None:
        match order.do:
            case Do.CREATE:
                wanted = next(w for w in self.want.wanted if w.placement.worker == order.worker)
                worker = Worker(wanted, self.want.config, self.tools)
                self.workers[worker.id] = worker
                if self.change is not None:
                    self.change.created.add(worker.id)
                self._run_worker(worker)
                self._wake.set()  # a place in the line of those that wait to start
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
        self._group.create_task(worker.run(), name=worker.id)

    def _forget(self, worker_id: WorkerId) -> None:
        del self.workers[worker_id]
        if self.change is not None:
            self.change.created.discard(worker_id)
        self._wake.set()  # its GPUs are free now

    def _forget_stopped(self) -> None:
        for worker_id in [i for i, w in self.workers.items() if w.phase is Phase.STOPPED]:
            self._forget(worker_id)

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
                hint=f"workers: {', '.join(sorted(self.workers)) or 'none'}",
                code="unknown_worker",
            )
        return worker

    def command(self, worker_id: str, verb: str) -> None:
        """Pass the operator's wish on to a worker: restart, drain, undrain or reset.

        Raises:
            L40sError: No such worker or verb, or the worker is being retired.
        """
        events = {"restart": Event.RESTART, "drain": Event.DRAIN, "undrain": Event.UNDRAIN, "reset": Event.RESET}
        worker = self.worker(worker_id)
        if verb not in events:
            raise L40sError(f"a worker cannot be told to {verb!r}", hint=f"one of {', '.join(events)}", code="bad_verb")
        if worker.goal is Goal.GONE:
            raise L40sError(f"{worker_id} is on its way out", where=worker_id, code="worker_retiring")
        worker.post(events[verb], f"{verb} by the operator")

    def on_request_failure(self, worker_id: WorkerId, _kind: str) -> None:
        """A request could not be served by this worker: it has a look at itself."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.suspect()

    # -- start and stop --------------------------------------------------------------------------------------------

    async def begin(self, adoption: Adoption) -> None:
        """Take up what an earlier daemon left: what it wanted, the change it was at, its workers. Before ``run``.

        1. Running instances become workers as they were recorded, wanted or not: the planner sorts them out.
        2. What is wanted is read back and placed again, which keeps it where it is unless host or config changed.
        3. A change in the middle is carried on.
        4. What ended meanwhile counts as the failure it was.
        """
        for instance in adoption.running:  # 1
            self._adopt(instance)
        self._recall(await self.store.load() or {})  # 2, 3
        for spec, record in adoption.ended:  # 4
            self._note_ended(spec, record)

    def _adopt(self, instance: Instance) -> None:
        try:
            placement = restore(Placement, instance.spec.meta["placement"])
            self._check_adoptable(placement)
            wanted = Wanted(placement=placement, fingerprint=str(instance.spec.meta["fingerprint"]))
            worker = Worker(wanted, self.config, self.tools)
            worker.adopt(instance)
        except (KeyError, msgspec.ValidationError, L40sError) as error:
            self._log.warning("worker.not_adopted", instance=instance.spec.instance, reason=str(error))
            instance.terminate()
            return
        self.workers[worker.id] = worker
        self._log.info("worker.adopted", worker=worker.id, pid=instance.engine_pid, instance=instance.spec.instance)

    def _check_adoptable(self, placement: Placement) -> None:
        if placement.model not in self.config.models:
            raise L40sError(f"model {placement.model} is not in the configuration any more", code="bad_record")
        if placement.worker in self.workers:
            raise L40sError("its worker has another instance already", where=placement.worker, code="bad_record")

    def _recall(self, state: Mapping[str, Any]) -> None:
        pattern = str(state.get("pattern") or self.config.daemon.pattern)
        stored = self._placements(state.get("placements"))
        try:
            force = bool(state.get("force"))
            self._set_want(self.design(pattern, self.config, force=force, current=stored or None))
        except L40sError as error:
            kept = [p for p in stored if self._is_possible(p)]
            if not kept:
                raise
            self._log.error("pattern.degraded", pattern=pattern, reason=str(error), workers=len(kept))
            self._trouble = f"pattern {pattern} does not fit any more, what is left of it runs: {error.what}"
            self._set_want(self._want(Layout(pattern=pattern, placements=tuple(kept)), self.config))
        journal = state.get("change")
        if isinstance(journal, dict):
            self._recall_change(journal)
        self._save()

    def _recall_change(self, journal: Mapping[str, Any]) -> None:
        previous = None
        former = [p for p in self._placements(journal.get("placements")) if self._is_possible(p)]
        if former:
            layout = Layout(pattern=str(journal.get("previous", "")), placements=tuple(former))
            previous = self._want(layout, self.config)
        self.change = Change(
            id=str(journal.get("id")),
            pattern=str(journal.get("pattern")),
            previous=previous,
            baseline={ModelName(k): int(v) for k, v in dict(journal.get("baseline", {})).items()},
            proven={(ModelName(m), int(t), int(p)) for m, t, p in journal.get("proven", [])},
            created={w.placement.worker for w in self.want.wanted if w.placement.worker in self.workers},
            state=str(journal.get("state", "running")),
            why=str(journal.get("why", "")),
        )
        self._log.warning("pattern.apply.resumed", pattern=self.want.pattern, operation=self.change.id)

    def _placements(self, stored: Any) -> list[Placement]:
        try:
            return restore(list[Placement], stored or [])
        except msgspec.ValidationError as error:
            self._log.error("state.unreadable", reason=str(error))
            return []

    def _is_possible(self, p: Placement) -> bool:
        gpus = {gpu.id for gpu in self.tools.host.inventory.gpus}
        return p.model in self.config.models and gpus.issuperset(p.gpus)

    def _note_ended(self, spec: InstanceSpec, record: ExitRecord) -> None:
        wanted = next((w for w in self.want.wanted if w.placement.worker == spec.worker), None)
        keys = {"cause": record.cause, "ended_at": record.ended_at, "ran_s": round(record.ran_s, 1)}
        keys |= {"exit_code": record.code, "exit_signal": record.signal, "oom": record.oom}
        self._log.warning("worker.ended_meanwhile", worker=spec.worker, **keys)
        self.tools.processes.forget(spec.instance)  # nobody else will: its directory and its cgroup go
        if wanted is None or spec.worker in self.workers or record.cause in ("stopped", "orphaned"):
            return
        worker = Worker(wanted, self.config, self.tools)
        worker.died_meanwhile(record)
        self.workers[worker.id] = worker

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

    async def _write_down(self) -> None:
        """Write what is wanted and the change under way; a full disk degrades, it does not stop the work."""
        while self._is_unsaved:
            self._is_unsaved = False
            await self.store.save(self._state())

    def _state(self) -> dict[str, Any]:
        change = self.change
        state: dict[str, Any] = {
            "pattern": self.want.pattern,
            "force": self.want.force,
            "placements": plain(self.want.layout.placements),
            "change": None,
        }
        if change is not None and change.state in ("running", "rolling_back"):
            state["change"] = {
                "id": change.id,
                "pattern": change.pattern,
                "previous": change.previous_pattern,
                "placements": plain(change.previous.layout.placements) if change.previous else [],
                "baseline": dict(change.baseline),
                "proven": [list(shape) for shape in sorted(change.proven)],
                "state": change.state,
                "why": change.why,
            }
        return state

    def _note_step(self, text: str) -> None:
        if self.change is not None:
            self.change.step = text

    def _note_operation(self) -> None:
        change = self.change
        if change is None:
            return
        observed = [w.observed() for w in self.workers.values()]
        limits = self._limits()
        for model in change.baseline:
            change.lowest_ready = min(change.lowest_ready, ready_share(model, self.want.wanted, observed, limits))
        serving = {(o.worker, o.fingerprint) for o in observed if o.is_serving}
        done = sum((w.placement.worker, w.fingerprint) in serving for w in self.want.wanted)
        self.operations[change.id] = OperationStatus(
            id=change.id,
            pattern=change.pattern,
            previous=change.previous_pattern,
            state=change.state,
            done=done,
            total=len(self.want.wanted),
            step=change.step,
            lowest_ready=change.lowest_ready,
            why=change.why,
            duration_s=now_s() - change.began_at_s,
        )
        while len(self.operations) > OPERATIONS_KEPT:
            self.operations.pop(next(iter(self.operations)))

    def _publish_catalog(self) -> None:
        """Tell the routes which models there are and, for a request that must wait, what is on its way."""
        by_model: dict[ModelName, list[Worker]] = {}
        for worker in self.workers.values():
            by_model.setdefault(worker.wanted.placement.model, []).append(worker)
        in_pattern = {w.placement.model for w in self.want.wanted} | set(by_model)
        pattern = self.want.pattern
        self.tools.routes.set_catalog(
            {
                name: CatalogEntry(
                    aliases=model.aliases,
                    note=loading_note(by_model.get(name, ())) if name in in_pattern else f"not in pattern {pattern}",
                )
                for name, model in self.want.config.models.items()
            }
        )


def loading_note(workers: Sequence[Worker]) -> str:
    """Return why a model cannot be served now, in one clause; empty when it can."""
    if any(w.phase is Phase.READY for w in workers):
        return ""
    counts = Counter(str(w.phase) for w in workers)
    return "workers: " + (", ".join(f"{n} {phase}" for phase, n in sorted(counts.items())) or "none yet")
