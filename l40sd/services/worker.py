"""Drives one worker: events in, ``lifecycle.step``, actions out.

The worker owns its process, its route and its record of failures; nobody else changes them. Events come into one queue
(from its own jobs, the planner and the operator) and are handled one at a time. An action only starts a job or does
something instant, so that a worker always listens; a job ends by posting an event. Jobs that make no sense in the phase
now reached are cancelled: ``JOBS_IN`` says which remain.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from l40sd.adapters.clock import now_s
from l40sd.adapters.ports import HeldPort
from l40sd.adapters.process import ExitRecord, Instance
from l40sd.core.config import Config, ModelConfig, WorkersConfig
from l40sd.core.engines import ends_streams
from l40sd.core.errors import L40sError
from l40sd.core.health import startup_timeout_s
from l40sd.core.launch import Launch
from l40sd.core.lifecycle import (
    OCCUPIES_GPUS,
    Action,
    Event,
    Goal,
    Phase,
    Record,
    RestartLimits,
    decide_restart,
    forgiven,
    refused_delay_s,
    step,
)
from l40sd.core.messages import LastEnd
from l40sd.core.model import WorkerId
from l40sd.core.outliers import Peer, Standing
from l40sd.core.outlook import Slot
from l40sd.core.plan import Observed, Wanted
from l40sd.services.ends import End, end_of, last_end_of, told_of_the_end
from l40sd.services.gpus import wait_until_free
from l40sd.services.making import launch_of, refuse_misconfigured, spec_of, with_cache
from l40sd.services.past import TOLD, Past
from l40sd.services.routes import Backend
from l40sd.services.tools import Tools
from l40sd.services.watch import HUNG, Watch

JOBS_IN: Mapping[Phase, frozenset[str]] = {
    Phase.SPAWNING: frozenset({"spawn"}),
    Phase.STARTING: frozenset({"exit", "startup"}),
    Phase.READY: frozenset({"exit", "follow"}),
    Phase.UNREADY: frozenset({"exit", "follow"}),
    Phase.DRAINING: frozenset({"exit", "follow", "drain"}),
    Phase.DRAINED: frozenset({"exit", "follow"}),
    Phase.STOPPING: frozenset({"exit", "terminate"}),
    Phase.STUCK: frozenset({"exit"}),
    Phase.BACKOFF: frozenset({"timer"}),
    Phase.QUARANTINED: frozenset({"timer"}),
    Phase.FAILED: frozenset({"timer"}),
}

ROUTED_ONCE = (Phase.READY, Phase.UNREADY, Phase.DRAINING, Phase.DRAINED)
"""Phases of a process that may have requests and is not being stopped."""
UNKILLABLE = "SIGKILL has not ended it: its GPUs stay out of use until it is gone"
EXIT_SEEN_WITHIN_S = 10.0
"""From a request's broken connection to the word that the worker's whole process tree is gone."""
MAILBOX = 256
PAST_LOADS = 20
JOB_AGAIN_S = 1.0
"""Until a job is tried again that the system refused something."""


@dataclass(frozen=True, slots=True)
class Happening:
    """An event, what it says of the reason, and what a failure is filed under."""

    event: Event
    reason: str = ""
    kind: str = ""
    exit: ExitRecord | None = None
    log_says: str = ""


@dataclass(slots=True, kw_only=True)
class Process:
    """One run: its instance, launch and port; no instance when somebody else runs it."""

    launch: Launch
    instance: Instance | None = None
    port: HeldPort | None = None
    spawned_at_s: float = field(default_factory=now_s)
    ready_at_s: float | None = None
    is_adopted: bool = False


class Worker:
    """One replica's slot, from WAITING to STOPPED; ``past``: as an earlier daemon knew it."""

    def __init__(self, wanted: Wanted, config: Config, tools: Tools, past: Past | None = None) -> None:
        self.wanted = wanted
        self.config = config
        self.phase = Phase.WAITING
        self.goal = Goal.SERVE
        self.reason = ""
        self.last_lines: tuple[str, ...] = ()
        self.record = Record()
        self.restarts = 0
        self.failed_starts = 0
        self.since_s = now_s()
        self.next_start_at_s: float | None = None
        self.last_end: LastEnd | None = past.last_end if past is not None else None
        self.process: Process | None = None
        self.watch: Watch | None = None
        self._tools = tools
        self._mailbox: asyncio.Queue[Happening] = asyncio.Queue(MAILBOX)
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._failure: Happening | None = None
        self._stopped_for = ""  # by wish: what the operator or the planner said
        placement = wanted.placement
        self._log = tools.log.bind(worker=placement.worker, gpus=self.gpu_numbers)
        self._past = past
        if past is not None and past.goal is not Goal.RESTART:  # by wish: its failures were to be forgotten
            self.record, self.restarts, self.failed_starts = past.record, past.restarts, past.failed_starts
            if past.phase in (Phase.BACKOFF, Phase.QUARANTINED):
                self._resume(past)

    @property
    def id(self) -> WorkerId:
        """The worker's id."""
        return self.wanted.placement.worker

    @property
    def model(self) -> ModelConfig:
        """The model's configuration, as it was when this worker was wanted."""
        return self.config.models[self.wanted.placement.model]

    @property
    def is_external(self) -> bool:
        """Somebody else runs it: it is probed and routed to, never started or stopped."""
        return bool(self.wanted.placement.endpoint)

    @property
    def gpu_numbers(self) -> tuple[int, ...]:
        """nvidia-smi's numbers in rank order, for people; a GPU this host no longer has is left out."""
        by_id = {gpu.id: gpu.index for gpu in self._tools.host.inventory.gpus}
        return tuple(by_id[gpu] for gpu in self.wanted.placement.gpus if gpu in by_id)

    def observed(self) -> Observed:
        """Return this worker as the planner sees it."""
        p = self.wanted.placement
        return Observed(
            worker=p.worker,
            model=p.model,
            gpus=p.gpus,
            weight=p.weight,
            shape=self.wanted.shape,
            fingerprint=self.wanted.fingerprint,
            phase=self.phase,
            goal=self.goal,
            failed_starts=self.failed_starts,
        )

    def post(self, event: Event, reason: str = "", *, kind: str = "") -> None:
        """Tell the worker what happened; it is handled after what was posted before it."""
        self._mailbox.put_nowait(Happening(event, reason, kind))

    def adopt(self, instance: Instance) -> None:
        """Take over a process that an earlier daemon started. Call before ``run``.

        Raises:
            L40sError: Its record lacks what is needed to talk to it.
        """
        meta = instance.spec.meta
        try:
            port, api_key = int(meta["port"]), str(meta["api_key"])
        except (KeyError, TypeError, ValueError) as error:
            raise L40sError(
                f"the record of {instance.spec.instance} lacks its port or key", where=str(self.id), code="bad_record"
            ) from error
        self.process = Process(
            launch=launch_of(self.wanted.placement, self.config, self._tools, port=port, api_key=api_key),
            instance=instance,
            port=self._tools.ports.adopt(port),
            is_adopted=True,
        )
        self.phase, self.next_start_at_s = Phase.WAITING, None
        past = self._past.of(instance.spec.instance) if self._past is not None else None
        if past is not None and past.ready_at_s is not None:
            self.process.spawned_at_s, self.process.ready_at_s = past.spawned_at_s, past.ready_at_s
        if past is not None and past.phase in (Phase.STOPPING, Phase.STUCK):
            self._resume(past)
        if not instance.is_running:
            self.phase, self.reason = Phase.STUCK, UNKILLABLE
        elif self.phase is Phase.WAITING:
            self.post(Event.ADOPTED, "running since before this daemon")

    def rest(self) -> None:
        """Rest once it is up: the operator drained it before this daemon began. Call before ``run``."""
        if self.goal is Goal.SERVE:
            self.goal = Goal.REST

    def died_meanwhile(self, record: ExitRecord, end: End) -> None:
        """Count a run that ended while no daemon watched as the failure it was. Call before ``run``."""
        self.phase = Phase.STARTING
        self._ready_for_s = record.ran_s
        if self._past is not None:
            past = self._past.of(record.instance)
            self._ready_for_s = past.ready_for_s(record.ran_s)
            if past.phase in (Phase.STOPPING, Phase.STUCK):
                self._resume(past)
        self._ended(record, end, ", while no daemon watched")

    def past(self) -> Past:
        """Return what the next daemon has to know of this worker."""
        process, is_told = self.process, self.phase in TOLD
        ready_at_s = process.ready_at_s if process is not None else None
        of_instance = process is not None and process.instance is not None and (is_told or ready_at_s is not None)
        return Past(
            fingerprint=self.wanted.fingerprint,
            phase=self.phase if is_told else Phase.WAITING,
            goal=self.goal if is_told else Goal.SERVE,
            since_s=self.since_s if is_told else 0.0,
            reason=self.reason if is_told else "",
            last_lines=self.last_lines if is_told else (),
            kind=self._failure.kind if is_told and self._failure is not None else "",
            record=self.record,
            restarts=self.restarts,
            failed_starts=self.failed_starts,
            instance=process.instance.spec.instance if of_instance and process and process.instance else "",
            spawned_at_s=process.spawned_at_s if of_instance and process else 0.0,
            ready_at_s=ready_at_s,
            next_start_at_s=self.next_start_at_s,
            last_end=self.last_end,
        )

    def _resume(self, past: Past) -> None:
        """Be in the phase that an earlier daemon left this worker in."""
        self.phase, self.goal, self.since_s = past.phase, past.goal, past.since_s
        self.reason, self.last_lines, self.next_start_at_s = past.reason, past.last_lines, past.next_start_at_s
        if past.kind:
            self._failure = Happening(Event.EXITED, past.reason, past.kind)

    def _resume_jobs(self) -> None:
        """Go on with what ``_resume`` found under way."""
        instance = self.process.instance if self.process is not None else None
        if instance is not None and self.phase in (Phase.STOPPING, Phase.STUCK):
            self._start_job("exit", partial(self._await_exit, instance))
        if instance is not None and self.phase is Phase.STOPPING:
            self._take_requests_from_it(is_hung=self._failure is not None and self._failure.kind == HUNG)
            instance.terminate()
            self._start_job("terminate", self._terminate)
        if self.phase is Phase.QUARANTINED and self.next_start_at_s is None:  # by a daemon that knew no further try
            self._retry_given_up()
        if self.phase in (Phase.BACKOFF, Phase.QUARANTINED) and self.next_start_at_s is not None:
            self._start_job("timer", partial(self._retry_later, max(0.0, self.next_start_at_s - now_s())))

    def suspect(self) -> None:
        """A request failed on this worker: have a look now rather than at the next interval."""
        if self.watch is not None:
            self.watch.suspect()
            self._heed()

    def slot(self) -> Slot:
        """Return this worker as the outlook of its model sees it."""
        return Slot(
            phase=self.phase,
            goal=self.goal,
            since_s=now_s() - self.since_s,
            next_start_s=None if self.next_start_at_s is None else max(0.0, self.next_start_at_s - now_s()),
            is_external=self.is_external,
        )

    def as_peer(self) -> Peer | None:
        """Return this worker as its equals are measured against it; None while it does not live or shall not serve."""
        if self.watch is None or self.phase not in (Phase.READY, Phase.UNREADY) or self.goal is not Goal.SERVE:
            return None
        return Peer(is_routed=self.phase is Phase.READY, failed_share=self.watch.fitness.outlier.failed_share)

    @property
    def way_back(self) -> str:
        """When a worker that is out for its failed requests may come back; empty for any other."""
        is_out = self.watch is not None and self.phase is Phase.UNREADY
        return self.watch.fitness.outlier.way_back(now_s()) if is_out and self.watch else ""

    @property
    def concern(self) -> str:
        """What is wrong with a worker that serves nevertheless; empty when all is well."""
        outlier = self.watch.fitness.outlier if self.watch is not None and self.phase is Phase.READY else None
        if outlier is None or outlier.standing is not Standing.KEPT:
            return ""
        return f"{outlier.explain()}; it is kept: too few workers of {self.wanted.placement.model} would be left"

    async def is_ending(self) -> bool:
        """Return whether its process, or its health, says that it ends: an engine whose core died answers 500 first."""
        return self.phase not in ROUTED_ONCE or self.watch is None or await self.watch.is_ending()

    def give_up_spawn(self) -> None:
        """Undo a spawn under way rather than wait for what comes of it; nothing is left of it then.

        For the daemon's stop. Systemd starts no unit that is ordered before one that it stops: the shims of workers
        spawned at that moment would come up only when the daemon has ended, and it would have waited for them.
        """
        job = self._jobs.pop("spawn", None)
        if job is not None:
            why = "the daemon was told to stop"
            job.add_done_callback(lambda ended: self.post(Event.SPAWN_FAILED, why) if ended.cancelled() else None)
            job.cancel()

    async def run(self) -> None:
        """Handle events until the worker is STOPPED. Cancelling it leaves the process alone."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._resume_jobs()
            try:
                while self.phase is not Phase.STOPPED:
                    self._handle(await self._mailbox.get())
            finally:
                for job in self._jobs.values():
                    job.cancel()

    # -- what the watch makes of it --------------------------------------------------------------------------------

    def _heed(self) -> None:
        """Follow the watch's verdict: routed to or not, and with which share. Called as often as there is one."""
        if self.watch is None:
            return
        fitness = self.watch.fitness
        event = fitness.turn(self.phase)
        if event is not None and event is not self._told:
            self._told = event
            self.post(event, fitness.objection)
        if self.phase is Phase.UNREADY and fitness.objection:
            self.reason = fitness.objection
        if self.phase is Phase.READY:
            is_kept = bool(self.concern)
            self._tools.routes.weigh(self.id, share=fitness.outlier.weight_share(now_s()), is_failing=is_kept)
            if is_kept != self._was_kept:
                self._was_kept = is_kept
                self._report_kept()

    def _report_kept(self) -> None:
        keys = {"model": self.wanted.placement.model}
        if self.concern:
            self._log.warning("worker.failing", reason=self.concern, **keys)
        else:
            self._log.info("worker.failing_no_more", **keys)

    _told: Event | None = None
    """The verdict that is in the mailbox; not to be posted twice."""
    _was_kept: bool = False

    # -- events ----------------------------------------------------------------------------------------------------

    def _handle(self, happening: Happening) -> None:
        """Step through the table, then act.

        1. What a failure is filed under is decided by what came first: a hung worker that is then killed hung.
        2. The goal may change where the phase does not.
        """
        if happening.event is self._told:
            self._told = None
        after = step(self.phase, self.goal, happening.event)
        if after is None:
            self._log.debug("worker.late_event", phase=self.phase, happened=happening.event)
            return
        before, was_told_to_restart = self.phase, self.goal is Goal.RESTART
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
        self._report(before, happening, is_wish=was_told_to_restart and before is Phase.STOPPING)
        self._tools.changed()

    def _enter(self, phase: Phase, reason: str) -> None:
        if phase is not self.phase:
            self.since_s = now_s()
            self.phase = phase
            self.next_start_at_s = None
            self.reason = reason
        elif reason:
            self.reason = reason
        remaining = JOBS_IN.get(phase, frozenset())
        for name in [name for name in self._jobs if name not in remaining]:
            self._jobs.pop(name).cancel()

    def _report(self, before: Phase, happening: Happening, *, is_wish: bool) -> None:
        """Tell the operator's story of the day, one line a change."""
        if self.phase is before:
            return
        instance = self.process.instance if self.process else None
        keys: dict[str, Any] = {"model": self.wanted.placement.model, "was": before}
        if self.reason:
            keys["reason"] = self.reason
        if happening.exit is not None:
            keys |= {"exit_code": happening.exit.code, "exit_signal": happening.exit.signal, "oom": happening.exit.oom}
            keys |= {"ran_s": round(happening.exit.ran_s, 1)}
        if instance is not None:
            keys["instance"] = instance.spec.instance
        match self.phase:
            case Phase.READY:
                assert self.process is not None
                self._log.info("worker.ready", address=self._address(), after_s=self._load_s(), **keys)
            case Phase.UNREADY:
                self._report_unready(keys)
            case Phase.BACKOFF:
                keys["delay_s"] = round(max(0.0, (self.next_start_at_s or 0.0) - now_s()), 1)
                self._log.warning("worker.backoff", last_lines=list(self.last_lines), **keys)
            case Phase.QUARANTINED | Phase.FAILED:
                self._log.error(f"worker.{self.phase}", last_lines=list(self.last_lines), **keys)
            case Phase.STUCK:
                self._log.error("worker.stuck", **keys)
            case Phase.WAITING if is_wish:
                self._log.info("worker.exited", **keys)
            case Phase.WAITING if before in OCCUPIES_GPUS:
                self._log.warning("worker.exited", **keys)
            case _:
                self._log.info(f"worker.{self.phase}", **keys)

    def _report_unready(self, keys: dict[str, Any]) -> None:
        outlier = self.watch.fitness.outlier if self.watch is not None else None
        if outlier is None or outlier.standing is not Standing.OUT:
            self._log.warning("worker.unready", **keys)
            return
        self._tools.routes.tally(self.id).ejected += 1
        self._log.warning("worker.ejected", for_s=round(max(0.0, outlier.out_until_s - now_s()), 1), **keys)

    # -- actions ---------------------------------------------------------------------------------------------------

    def _act(self, action: Action, happening: Happening) -> None:
        match action:
            case Action.SPAWN:
                self._start_job("spawn", self._spawn)
            case Action.WATCH_EXIT:
                self._watch_exit()
            case Action.WATCH_START:
                self._begin_watch()
            case Action.ADD_ROUTE:
                self._add_route()
                self._heed()  # of a drain taken back: what was found meanwhile counts
            case Action.REMOVE_ROUTE:
                self._tools.routes.remove(self.id)
            case Action.WATCH:
                assert self.watch is not None
                self._note_up()
                self._start_job("follow", partial(self.watch.follow, self.post, self._heed))
            case Action.DRAIN:
                self._start_job("drain", self._drain)
            case Action.TERMINATE:
                self._take_requests_from_it(is_hung=happening.event is Event.STALLED)
                if self.process is not None and self.process.instance is not None:
                    # Here and not in the job: a stop that is told of has reached the shim, which completes it even if
                    # this daemon dies in the next moment.
                    # One that was never ready serves nobody, and vLLM would finish loading before it looks at SIGTERM.
                    # An adopted one may have requests that went through an upgrade.
                    never_served = self.process.ready_at_s is None and not self.process.is_adopted
                    self.process.instance.terminate(everybody=never_served)
                self._start_job("terminate", self._terminate)
            case Action.CLEAN_UP:
                self._clean_up(happening.exit)
            case Action.ASK_POLICY:
                self._ask_policy(happening)
            case Action.WAIT_BLOCKED:
                self._retry_in(self.config.workers.backoff_never_ready_first_s)
            case Action.WAIT_REFUSED:
                self._retry_refused()
            case Action.FORGIVE:
                self.record, self.failed_starts, self.restarts, self._refusals = Record(), 0, 0, 0
                self._failure, self.last_lines = None, ()

    def _take_requests_from_it(self, *, is_hung: bool) -> None:
        """Before the signal: what an engine aborts then it may answer as if it were whole."""
        why = f"{self.id} is being stopped" + (f": {self.reason}" if self.reason else "")
        self._tools.routes.give_up(self.id, why, is_hung=is_hung)

    def _start_job(self, name: str, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        assert self._group is not None
        previous = self._jobs.pop(name, None)
        if previous is not None:
            previous.cancel()
        self._jobs[name] = self._group.create_task(self._carry_out(name, job), name=f"{self.id}:{name}")

    async def _carry_out(self, name: str, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do a job. What the system refuses now (no file descriptor is left, say) ends neither worker nor daemon."""
        refused = ""
        while True:
            try:
                await job()
            except OSError as error:
                if str(error) != refused:
                    refused = str(error)
                    self._log.error("worker.job_failed", job=name, reason=refused, again_after_s=JOB_AGAIN_S)
                await asyncio.sleep(JOB_AGAIN_S)
            else:
                return

    async def _spawn(self) -> None:
        """Make the process: GPUs free? program there? port, record, shim; posts how it went."""
        self._failure, self.last_lines = None, ()
        workers = self.config.workers
        try:
            if self.is_external:
                self.process = Process(launch=launch_of(self.wanted.placement, self.config, self._tools))
                self.post(Event.SPAWNED)
                return
            refuse_misconfigured(self.wanted, self.config, self._tools)
            holder = await wait_until_free(self._tools.host, self.wanted.placement.gpus, workers.gpu_free_timeout_s)
            if self.goal is Goal.GONE or holder:
                self.post(Event.BLOCKED, holder)
                return
            port = self._tools.ports.take()
            key = self._tools.keys.of(self.model.name)
            launch = launch_of(self.wanted.placement, self.config, self._tools, port=port.port, api_key=key)
            self.process = Process(launch=launch, port=port)
            launch = await with_cache(launch, self.config, self._tools)
            spec = spec_of(launch, self.wanted, self.config, self._tools)
            self.process.instance = await self._tools.processes.spawn(spec, workers.spawn_timeout_s)
        except L40sError as error:
            if error.code in ("exec_failed", "misconfigured"):
                self.post(Event.MISCONFIGURED, str(error), kind=error.code)
            else:
                self.post(Event.SPAWN_FAILED, str(error), kind=error.code)
            return
        self.post(Event.SPAWNED)

    def _begin_watch(self) -> None:
        assert self.process is not None
        loads_s = self._tools.past_loads_s.setdefault(self.model.name, [])
        facts = self._tools.facts.get(self.model.name)
        self.watch = Watch(
            launch=self.process.launch,
            prober=self._tools.prober,
            config=self.config.health,
            deadline_s=startup_timeout_s(self.config, self.model.name, facts, loads_s),
            past_loads_s=tuple(loads_s),
            instance=self.process.instance,
            log_path=self._tools.processes.log_path(self.id),
            leases=lambda: self._tools.routes.in_flight(self.id),
            replies=lambda: self._tools.routes.served(self.id),
            counts=lambda: self._tools.routes.counts(self.id),
            peers=lambda: self._tools.peers(self.id),
        )
        self._start_job("startup", partial(self.watch.startup, self.post))

    def _watch_exit(self) -> None:
        if self.process is not None and self.process.instance is not None:
            self._start_job("exit", partial(self._await_exit, self.process.instance))

    async def _await_exit(self, instance: Instance) -> None:
        record = await instance.exited()
        is_wish = self.phase is Phase.STOPPING and self._failure is None
        self._ended(record, await end_of(self._tools.processes, instance.spec, record, is_wish=is_wish))

    def _ended(self, record: ExitRecord, end: End, when: str = "") -> None:
        self.last_lines = end.last_lines
        self._mailbox.put_nowait(Happening(Event.EXITED, end.reason + when, end.kind, record, end.log_says))

    def _note_up(self) -> None:
        """It has come up: for the first time, or again under the eyes of this daemon."""
        assert self.process is not None
        process = self.process
        self._refusals = 0
        if process.ready_at_s is None:
            process.ready_at_s = now_s()
            if not process.is_adopted:
                self._note_load(now_s() - process.spawned_at_s)
        elif self._past is not None and process.instance is not None:
            past = self._past.of(process.instance.spec.instance)
            self.since_s = past.since_s if past.phase is self.phase else self.since_s
        if self.phase is Phase.READY:
            self.reason = ""

    def _add_route(self) -> None:
        assert self.process is not None
        launch = self.process.launch
        listed = self.watch.listed if self.watch is not None else None
        self._tools.routes.add(
            Backend(
                worker=self.id,
                model=self.model.name,
                host=launch.host,
                port=launch.port,
                weight=self.wanted.placement.weight,
                api_key=launch.api_key,
                served_name=launch.served_name,
                ends_streams=launch.ends_streams or (listed is not None and ends_streams(listed.owned_by)),
                listed=listed,
            )
        )

    def _note_load(self, took_s: float) -> None:
        loads_s = self._tools.past_loads_s.setdefault(self.model.name, [])
        loads_s.append(took_s)
        del loads_s[:-PAST_LOADS]

    async def _drain(self) -> None:
        """Wait until nothing is in flight, or the deadline; then the log says how many were cut (invariant 3)."""
        try:
            async with asyncio.timeout(self.config.workers.drain_timeout_s):
                await self._tools.routes.drained(self.id)
        except TimeoutError:
            cut = self._tools.routes.in_flight(self.id)
            self._log.warning("worker.drain_deadline", in_flight=cut, after_s=self.config.workers.drain_timeout_s)
            self.post(Event.EMPTY, f"{cut} requests were still in flight at the drain's deadline")
            return
        self.post(Event.EMPTY)

    async def _terminate(self) -> None:
        """Ladder: the shim's own SIGTERM and kill, then ours, then give up for now."""
        if self.process is None or self.process.instance is None:
            self.post(Event.EXITED)
            return
        instance, workers = self.process.instance, self.config.workers
        with suppress(TimeoutError):
            async with asyncio.timeout(self.process.launch.term_timeout_s + workers.kill_timeout_s):
                await instance.exited()
                return  # the exit watcher says the rest
        if not await instance.kill(workers.kill_timeout_s):
            self.post(Event.UNKILLABLE, UNKILLABLE)

    def _clean_up(self, exit_record: ExitRecord | None) -> None:
        process, self.process = self.process, None
        self.watch = None
        if process is None:
            return
        if process.ready_at_s is not None:
            self.record = forgiven(
                self.record, ready_for_s=now_s() - process.ready_at_s, limits=restart_limits(self.config.workers)
            )
        if process.port is not None:
            process.port.release()
        if process.instance is not None and exit_record is not None:
            self._tools.processes.forget(process.instance.spec.instance)
        self._ready_for_s = None if process.ready_at_s is None else now_s() - process.ready_at_s

    _ready_for_s: float | None = None
    _refusals: int = 0  # times in a row that it could not be started as configured

    def _ask_policy(self, happening: Happening) -> None:
        failure = self._failure or happening
        ready_for_s, self._ready_for_s = self._ready_for_s, None
        if ready_for_s is None:
            self.failed_starts += 1
        self.restarts += 1
        earlier = self._excuse()
        verdict = decide_restart(
            self.record,
            kind=failure.kind or "exit",
            ready_for_s=ready_for_s,
            is_oom=happening.exit is not None and happening.exit.oom,
            now_s=now_s(),
            jitter=random.uniform(-1, 1),
            limits=restart_limits(self.config.workers),
            is_excused=bool(earlier),
        )
        self.record = verdict.record
        self.reason = failure.reason or failure.kind
        if earlier:
            self.reason += f"; with a request that had ended {earlier} before, where it counts"
        if failure is not happening and happening.exit is not None:  # it hung, say: how it ended when it was stopped
            self.reason += told_of_the_end(happening.exit, happening.reason, happening.log_says)
        if verdict.delay_s is None:
            self.phase = Phase.QUARANTINED
            self.reason = f"{verdict.why}: {self.reason}"
            self._retry_given_up()
        elif verdict.delay_s == 0.0:
            self.phase = Phase.WAITING
        else:
            self._retry_in(verdict.delay_s)

    def _excuse(self) -> str:
        """Return the worker that was ended before by the request that ended this one; empty: none is known."""
        workers = self.config.workers
        within_s = EXIT_SEEN_WITHIN_S + workers.term_timeout_s + workers.kill_timeout_s
        return self._tools.routes.take_excuse(self.id, now_s() - within_s)

    def _retry_refused(self) -> None:
        workers = self.config.workers
        delay_s = refused_delay_s(self._refusals, first_s=workers.refused_retry_s, limit_s=workers.given_up_retry_s)
        self._refusals += 1
        if delay_s is not None:
            self._retry_in(delay_s)

    def _retry_given_up(self) -> None:
        if self.config.workers.given_up_retry_s:
            self._retry_in(self.config.workers.given_up_retry_s)

    def _retry_in(self, delay_s: float) -> None:
        self.next_start_at_s = now_s() + delay_s
        self._start_job("timer", partial(self._retry_later, delay_s))

    async def _retry_later(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self.post(Event.RETRY_DUE, self.reason)

    # -- for people ------------------------------------------------------------------------------------------------

    def _address(self) -> str:
        assert self.process is not None
        return f"{self.process.launch.host}:{self.process.launch.port}"

    def _load_s(self) -> float | None:
        process = self.process
        if process is None or process.ready_at_s is None or process.is_adopted:
            return None
        return round(process.ready_at_s - process.spawned_at_s, 2)


def restart_limits(workers: WorkersConfig) -> RestartLimits:
    """Return the restart policy's figures from the configuration."""
    return RestartLimits(
        backoff_first_s=workers.backoff_first_s,
        backoff_limit_s=workers.backoff_limit_s,
        never_ready_first_s=workers.backoff_never_ready_first_s,
        never_ready_limit_s=workers.backoff_never_ready_limit_s,
        quarantine_alike=workers.quarantine_alike,
        quarantine_per_hour=workers.quarantine_per_hour,
        healthy_after_s=workers.healthy_after_s,
    )
