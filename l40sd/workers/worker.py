"""Drives one worker: events in, ``lifecycle.step``, actions out.

The worker owns its run, its place in the routes and its record of failures; nobody else changes them. Events come into
one queue (from its own jobs, the reconciler and the operator) and are handled one at a time. An action only starts a
job or does something instant, so that a worker always listens; a job ends by posting an event. Jobs that make no sense
in the phase now reached are cancelled: ``lifecycle.JOBS_IN`` says which remain.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from l40sd.clock import now_s
from l40sd.config.options import Config, ModelConfig
from l40sd.errors import L40sError
from l40sd.hardware.gpu_memory import wait_until_free
from l40sd.model import WorkerId
from l40sd.routing.outliers import Peer, Standing
from l40sd.workers.beginning import UNKILLABLE, Beginning, begin, begin_after_end, begin_with_run
from l40sd.workers.context import WorkerContext
from l40sd.workers.ends import End, last_end_of
from l40sd.workers.failures import Failure, Failures, answer, excused_within_s
from l40sd.workers.jobs import Jobs
from l40sd.workers.last_end import LastEnd
from l40sd.workers.lifecycle import (
    JOBS_IN,
    ROUTED_ONCE,
    Action,
    Event,
    Goal,
    Job,
    Phase,
    event_of_refusal,
    step,
)
from l40sd.workers.outlook import Slot
from l40sd.workers.phase_log import line_of
from l40sd.workers.process import ExitRecord, Instance
from l40sd.workers.requests import Requests
from l40sd.workers.run import Run
from l40sd.workers.run_spec import refuse_misconfigured
from l40sd.workers.saved import TOLD, SavedWorker
from l40sd.workers.slot import Observed, Wanted
from l40sd.workers.startup import startup_timeout_s
from l40sd.workers.watch import HUNG, Watch

MAILBOX = 256


@dataclass(frozen=True, slots=True)
class Happening:
    """An event, what it says of the reason, and what a failure is filed under."""

    event: Event
    reason: str = ""
    kind: str = ""
    exit: ExitRecord | None = None
    log_says: str = ""


class Worker:
    """One replica's slot, from WAITING to STOPPED.

    Attributes:
        run: Its process tree, spawned or adopted; None while it has none.
        watch: What is asked of the run; None before it is and after its end.
        reason: Why it is in its phase, for the operator.
        last_lines: The end of the output of its latest run that ended.
    """

    def __init__(
        self,
        wanted: Wanted,
        config: Config,
        saved: SavedWorker | None = None,
        *,
        adopted: Instance | None = None,
        ended: tuple[ExitRecord, End] | None = None,
        context: WorkerContext,
        changed: Callable[[], None],
        peers: Callable[[WorkerId], Sequence[Peer]],
    ) -> None:
        """Begin as new, or where an earlier daemon left it.

        Args:
            saved: As that daemon knew it.
            adopted: Its process, which that daemon started.
            ended: How its run ended while no daemon watched; it counts as the failure it was.
            changed: Called whenever what ``observed`` returns may be new.
            peers: Returns the other live workers of a worker's model.

        Raises:
            L40sError: The record of the process lacks what is needed to talk to it.
        """
        placement = wanted.placement
        self.id = placement.worker
        self.is_external = bool(placement.endpoint)
        self.wanted = wanted
        self.config = config
        self.run: Run | None = None
        self.watch: Watch | None = None
        self._context = context
        self._changed = changed
        self._peers = peers
        self._log = context.log.bind(worker=self.id, gpus=self.gpu_numbers)
        self._requests = Requests(context.routes, placement, self._log)
        self._mailbox: asyncio.Queue[Happening] = asyncio.Queue(MAILBOX)
        self._jobs = Jobs(self.id, self._log)
        self._told: Event | None = None  # the verdict that is in the mailbox; not to be posted twice
        self._stopped_for = ""  # by wish: what the operator or the reconciler said
        self._saved = saved
        self.last_end: LastEnd | None = saved.last_end if saved is not None else None
        if adopted is not None:
            name = adopted.spec.instance
            own = saved.of(name) if saved is not None else None
            self.run = Run.adopted(adopted, placement, config, context, own)
            self._begin_as(begin_with_run(saved, name, is_running=adopted.is_running))
            if self.phase is Phase.WAITING:
                self.post(Event.ADOPTED, "running since before this daemon")
        elif ended is not None:
            record, end = ended
            self._begin_as(begin_after_end(saved, record.instance, ran_s=record.ran_s, now_s=now_s()))
            self._post_end(record, end, ", while no daemon watched")
        else:
            self._begin_as(begin(saved))

    def _begin_as(self, beginning: Beginning) -> None:
        self.phase, self.goal, self.reason = beginning.phase, beginning.goal, beginning.reason
        self.since_s = now_s() if beginning.since_s is None else beginning.since_s
        self.last_lines = beginning.last_lines
        self.next_start_at_s = beginning.next_start_at_s
        self.failures = beginning.failures
        self._ready_for_s = beginning.ready_for_s  # of the run that has just ended
        self._failure = Happening(Event.EXITED, beginning.reason, beginning.kind) if beginning.kind else None

    # -- as others see it ------------------------------------------------------------------------------------------

    @property
    def model(self) -> ModelConfig:
        """The model's configuration, as it was when this worker was wanted."""
        return self.config.models[self.wanted.placement.model]

    @property
    def gpu_numbers(self) -> tuple[int, ...]:
        """nvidia-smi's numbers in rank order, for people; a GPU this host no longer has is left out."""
        by_id = {gpu.id: gpu.index for gpu in self._context.host.inventory.gpus}
        return tuple(by_id[gpu] for gpu in self.wanted.placement.gpus if gpu in by_id)

    def observed(self) -> Observed:
        """Return this worker as the reconciler sees it."""
        p = self.wanted.placement
        return Observed(
            worker=p.worker,
            model=p.model,
            gpus=p.gpus,
            weight=p.weight,
            kind=self.wanted.kind,
            fingerprint=self.wanted.fingerprint,
            phase=self.phase,
            goal=self.goal,
            failed_starts=self.failures.failed_starts,
        )

    def slot(self) -> Slot:
        """Return this worker as the outlook of its model sees it."""
        return Slot(
            phase=self.phase,
            goal=self.goal,
            since_s=now_s() - self.since_s,
            next_start_s=None if self.next_start_at_s is None else max(0.0, self.next_start_at_s - now_s()),
            is_external=self.is_external,
        )

    def saved(self) -> SavedWorker:
        """Return what the next daemon has to know of this worker."""
        run, is_told = self.run, self.phase in TOLD
        is_of_run = run is not None and bool(run.name) and (is_told or run.ready_at_s is not None)
        return SavedWorker(
            fingerprint=self.wanted.fingerprint,
            phase=self.phase if is_told else Phase.WAITING,
            goal=self.goal if is_told else Goal.SERVE,
            since_s=self.since_s if is_told else 0.0,
            reason=self.reason if is_told else "",
            last_lines=self.last_lines if is_told else (),
            kind=self._failure.kind if is_told and self._failure is not None else "",
            record=self.failures.record,
            restarts=self.failures.restarts,
            failed_starts=self.failures.failed_starts,
            instance=run.name if run is not None and is_of_run else "",
            spawned_at_s=run.spawned_at_s if run is not None and is_of_run else 0.0,
            ready_at_s=run.ready_at_s if run is not None else None,
            next_start_at_s=self.next_start_at_s,
            last_end=self.last_end,
        )

    def as_peer(self) -> Peer | None:
        """Return this worker as its equals are measured against it; None while it does not live or shall not serve."""
        return self.watch.fitness.as_peer(self.phase, self.goal) if self.watch is not None else None

    @property
    def way_back(self) -> str:
        """When a worker that is out for its failed requests may come back; empty for any other."""
        return self.watch.fitness.way_back(self.phase, now_s()) if self.watch is not None else ""

    @property
    def concern(self) -> str:
        """What is wrong with a worker that serves nevertheless; empty when all is well."""
        model = self.wanted.placement.model
        return self.watch.fitness.concern(self.phase, model) if self.watch is not None else ""

    async def is_ending(self) -> bool:
        """Return whether its process, or its health, says that it ends: an engine whose core died answers 500 first."""
        return self.phase not in ROUTED_ONCE or self.watch is None or await self.watch.is_ending()

    # -- what it is told -------------------------------------------------------------------------------------------

    def post(self, event: Event, reason: str = "", *, kind: str = "") -> None:
        """Tell the worker what happened; it is handled after what was posted before it."""
        self._mailbox.put_nowait(Happening(event, reason, kind))

    def rest(self) -> None:
        """Rest once it is up: the operator drained it before this daemon began. Call before ``handle_events``."""
        if self.goal is Goal.SERVE:
            self.goal = Goal.REST

    def suspect(self) -> None:
        """A request failed on this worker: have a look now rather than at the next interval."""
        if self.watch is not None:
            self.watch.suspect()
            self._heed()

    def give_up_spawn(self) -> None:
        """Undo a spawn under way rather than wait for what comes of it; nothing is left of it then.

        For the daemon's stop. Systemd starts no unit that is ordered before one that it stops: the shims of workers
        spawned at that moment would come up only when the daemon has ended, and it would have waited for them.
        """
        self._jobs.cancel(Job.SPAWN, lambda: self.post(Event.SPAWN_FAILED, "the daemon was told to stop"))

    # -- events ----------------------------------------------------------------------------------------------------

    async def handle_events(self) -> None:
        """Handle events until the worker is STOPPED. Cancelling it leaves the process alone."""
        async with self._jobs:
            self._go_on()
            while self.phase is not Phase.STOPPED:
                self._handle(await self._mailbox.get())

    def _go_on(self) -> None:
        """Start the jobs of the phase that an earlier daemon left it in."""
        if self.phase in (Phase.STOPPING, Phase.STUCK):
            self._await_exit()
        if self.phase is Phase.STOPPING and self.run is not None:
            self._terminate(is_hung=self._failure is not None and self._failure.kind == HUNG)
        if self.phase is Phase.QUARANTINED and self.next_start_at_s is None:  # by a daemon that knew no further try
            self._retry_in(self.config.workers.given_up_retry_s or None)
        elif self.phase in (Phase.BACKOFF, Phase.QUARANTINED) and self.next_start_at_s is not None:
            self._retry_in(max(0.0, self.next_start_at_s - now_s()))

    def _handle(self, happening: Happening) -> None:
        """Step through the table, act, and tell it: one line a change."""
        before, was_told_to_restart = self.phase, self.goal is Goal.RESTART
        if not self._step(happening):
            self._log.debug("worker.late_event", phase=self.phase, happened=happening.event)
            return
        self._report(before, happening, is_wish=was_told_to_restart and before is Phase.STOPPING)
        self._changed()

    def _step(self, happening: Happening) -> bool:
        """Step through the table, then act; return whether the event had a row.

        1. What a failure is filed under is decided by what came first: a hung worker that is then killed hung.
        2. The goal may change where the phase does not.
        """
        if happening.event is self._told:
            self._told = None
        after = step(self.phase, self.goal, happening.event)
        if after is None:
            return False
        if happening.kind and self._failure is None:  # 1
            self._failure = happening
        if happening.event in (Event.RESTART, Event.RETIRE):
            self._stopped_for = happening.reason
        if happening.exit is not None:
            earlier = self._failure.reason if self._failure not in (None, happening) else ""
            self.last_end = last_end_of(happening.exit, happening.reason, why=earlier or self._stopped_for)
            self._stopped_for = ""
        assert isinstance(after.phase, Phase)
        assert after.goal is not None
        self.goal = after.goal  # 2
        self._enter(after.phase, happening.reason)
        for action in after.actions:
            self._act(action, happening)
        return True

    def _enter(self, phase: Phase, reason: str) -> None:
        if phase is not self.phase:
            self.since_s = now_s()
            self.phase = phase
            self.next_start_at_s = None
            self.reason = reason
        elif reason:
            self.reason = reason
        self._jobs.keep(JOBS_IN[phase])

    def _report(self, before: Phase, happening: Happening, *, is_wish: bool) -> None:
        """Tell the operator's story of the day, one line a change."""
        if self.phase is before:
            return
        outlier = self.watch.fitness.outlier if self.watch is not None and self.phase is Phase.UNREADY else None
        is_ejected = outlier is not None and outlier.standing is Standing.OUT
        keys: dict[str, Any] = {"model": self.wanted.placement.model, "was": before}
        if self.reason:
            keys["reason"] = self.reason
        if happening.exit is not None:
            keys |= {"exit_code": happening.exit.code, "exit_signal": happening.exit.signal, "oom": happening.exit.oom}
            keys |= {"ran_s": round(happening.exit.ran_s, 1)}
        if self.run is not None and self.run.name:
            keys["instance"] = self.run.name
        if self.phase is Phase.READY and self.run is not None:
            load_s = self.run.load_s
            keys |= {"address": self.run.address, "after_s": None if load_s is None else round(load_s, 2)}
        if self.phase is Phase.BACKOFF:
            keys["delay_s"] = round(max(0.0, (self.next_start_at_s or 0.0) - now_s()), 1)
        if self.phase in (Phase.BACKOFF, Phase.QUARANTINED, Phase.FAILED):
            keys["last_lines"] = list(self.last_lines)
        if outlier is not None and is_ejected:
            self._requests.note_ejected()
            keys["for_s"] = round(max(0.0, outlier.out_until_s - now_s()), 1)
        level, event = line_of(before, self.phase, is_wish=is_wish, is_ejected=is_ejected)
        getattr(self._log, level)(event, **keys)

    # -- actions ---------------------------------------------------------------------------------------------------

    def _act(self, action: Action, happening: Happening) -> None:
        workers = self.config.workers
        match action:
            case Action.SPAWN:
                self._jobs.start(Job.SPAWN, self._spawn)
            case Action.WATCH_EXIT:
                self._await_exit()
            case Action.WATCH_START:
                self.watch = self._begin_watch()
                self._jobs.start(Job.STARTUP, partial(self.watch.startup, self.post))
            case Action.ADD_ROUTE:
                self._let_in()
            case Action.REMOVE_ROUTE:
                self._requests.keep_out()
            case Action.WATCH:
                assert self.watch is not None
                self._note_up()
                self._jobs.start(Job.FOLLOW, partial(self.watch.follow, self.post, self._heed))
            case Action.DRAIN:
                self._jobs.start(Job.DRAIN, self._drain)
            case Action.TERMINATE:
                self._terminate(is_hung=happening.event is Event.STALLED)
            case Action.CLEAN_UP:
                self._clean_up(is_over=happening.exit is not None)
            case Action.ASK_POLICY:
                self._ask_policy(happening)
            case Action.WAIT_BLOCKED:
                self._retry_in(workers.backoff_never_ready_first_s)
            case Action.WAIT_REFUSED:
                self.failures, delay_s = self.failures.refused(workers)
                self._retry_in(delay_s)
            case Action.WAIT_GIVEN_UP:
                self._retry_in(workers.given_up_retry_s or None)
            case Action.FORGIVE:
                self._forgive()

    def _forgive(self) -> None:
        """Forget the failures; of one that is ready nothing is left to say."""
        self.failures = Failures()
        self._failure, self.last_lines = None, ()
        if self.phase is Phase.READY:
            self.reason = ""

    async def _spawn(self) -> None:
        """Make the process: GPUs free? program there? port, record, shim; posts how it went."""
        self._failure, self.last_lines = None, ()
        self._clean_up(is_over=False)  # of a try that the system refused something
        placement, config, context = self.wanted.placement, self.config, self._context
        try:
            if self.is_external:
                self.run = Run.external(placement, config, context)
            else:
                refuse_misconfigured(self.wanted, config, context)
                holder = await wait_until_free(context.host, placement.gpus, config.workers.gpu_free_timeout_s)
                if self.goal is Goal.GONE or holder:
                    self.post(Event.BLOCKED, holder)
                    return
                self.run = Run.planned(placement, config, context)
                await self.run.spawn(self.wanted, config, context)
        except L40sError as error:
            self.post(event_of_refusal(error.code), str(error), kind=error.code)
            return
        self.post(Event.SPAWNED)

    def _begin_watch(self) -> Watch:
        assert self.run is not None
        models, name = self._context.models, self.model.name
        loads_s = models.loads_of(name)
        return Watch(
            run=self.run,
            requests=self._requests,
            prober=self._context.prober,
            config=self.config.health,
            deadline_s=startup_timeout_s(self.config, name, models.facts.get(name), loads_s),
            past_loads_s=tuple(loads_s),
            log_path=self._context.processes.log_path(self.id),
            peers=lambda: self._peers(self.id),
        )

    def _await_exit(self) -> None:
        run = self.run
        if run is None or run.instance is None:
            return

        async def until_gone() -> None:
            record = await run.exited()
            is_wish = self.phase is Phase.STOPPING and self._failure is None
            self._post_end(record, await run.told_of(record, is_wish=is_wish))

        self._jobs.start(Job.EXIT, until_gone)

    def _post_end(self, record: ExitRecord, end: End, when: str = "") -> None:
        self.last_lines = end.last_lines
        self._mailbox.put_nowait(Happening(Event.EXITED, end.reason + when, end.kind, record, end.log_says))

    def _note_up(self) -> None:
        """It has come up: for the first time, or again under the eyes of this daemon."""
        assert self.run is not None
        run = self.run
        self.failures = self.failures.not_refused()
        if run.ready_at_s is None:
            run.ready_at_s = now_s()
            if run.load_s is not None:
                self._context.models.note_load(self.model.name, run.load_s)
        elif self._saved is not None and run.name:
            own = self._saved.of(run.name)
            self.since_s = own.since_s if own.phase is self.phase else self.since_s
        if self.phase is Phase.READY:
            self.reason = ""

    def _let_in(self) -> None:
        assert self.run is not None
        self._requests.let_in(self.run.launch, self.watch.listed if self.watch is not None else None)
        self._heed()  # of a drain taken back: what was found meanwhile counts

    def _heed(self) -> None:
        """Follow the watch's verdict: routed to or not, and with which share. Called as often as there is one."""
        if self.watch is None:
            return
        fitness = self.watch.fitness
        event = fitness.follows(self.phase)
        if event is not None and event is not self._told:
            self._told = event
            self.post(event, fitness.objection)
        if self.phase is Phase.UNREADY and fitness.objection:
            self.reason = fitness.objection
        if self.phase is Phase.READY:
            self._requests.weigh(fitness.outlier.weight_share(now_s()), self.concern)

    async def _drain(self) -> None:
        self.post(Event.EMPTY, await self._requests.drain(self.config.workers.drain_timeout_s))

    def _terminate(self, *, is_hung: bool) -> None:
        """Tell it to end, at once and not in the job: a stop that is told of has reached the shim."""
        self._requests.take_away(self.reason, is_hung=is_hung)
        run = self.run
        if run is not None:
            run.tell_to_end()

        async def until_gone() -> None:
            if run is None or run.instance is None:
                self.post(Event.EXITED)
            elif not await run.end_within(self.config.workers.kill_timeout_s):
                self.post(Event.UNKILLABLE, UNKILLABLE)

        self._jobs.start(Job.TERMINATE, until_gone)

    def _clean_up(self, *, is_over: bool) -> None:
        run, self.run = self.run, None
        self.watch = None
        if run is None:
            return
        self._ready_for_s = run.ready_for_s
        if self._ready_for_s is not None:
            self.failures = self.failures.forgiven(self._ready_for_s, self.config.workers)
        run.clear(is_over=is_over)

    def _ask_policy(self, happening: Happening) -> None:
        """Have the restart policy answer a failure; its answer is the next event."""
        first, workers = self._failure or happening, self.config.workers
        ready_for_s, self._ready_for_s = self._ready_for_s, None
        failure = Failure(
            kind=first.kind,
            reason=first.reason,
            ended=happening.reason if first is not happening else "",
            log_says=happening.log_says if first is not happening else "",
            ready_for_s=ready_for_s,
            is_oom=happening.exit is not None and happening.exit.oom,
            excused_by=self._requests.take_excuse(excused_within_s(workers)),
        )
        found = answer(self.failures, failure, workers, now_s=now_s(), jitter=random.uniform(-1, 1))
        self.failures, self.reason = found.failures, found.reason
        if found.event is None:
            self._retry_in(found.delay_s)
        else:
            self._step(Happening(found.event, found.reason))

    def _retry_in(self, delay_s: float | None) -> None:
        """Try again after so long; None: not by itself."""
        if delay_s is None:
            return
        self.next_start_at_s = now_s() + delay_s

        async def later() -> None:
            await asyncio.sleep(delay_s)
            self.post(Event.RETRY_DUE, self.reason)

        self._jobs.start(Job.TIMER, later)
