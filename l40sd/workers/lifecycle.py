"""The worker table: which phase follows from which event, and what is then done.

Everything that decides a transition is in this file; workers/worker.py only carries out the actions.

                     PERMIT           SPAWNED            UP
        WAITING ─────────────> SPAWNING ──────> STARTING ────> READY <────> UNREADY
           ^                      │                │             │ DRAIN       │
  RETRY_DUE│          BLOCKED,    │                │ FAILED,     v             │ STALLED
           │       SPAWN_FAILED   │                │ EXITED   DRAINING ────> DRAINED (goal REST)
        BACKOFF <─────────────────┴────────────────┘             │ EMPTY
           │                                                     v       UNKILLABLE
       QUARANTINED, FAILED  (until RESET or RETRY_DUE)       STOPPING ─────────────> STUCK
                                                                 │ EXITED
                                                                 v
                            goal GONE: STOPPED · goal RESTART: WAITING · goal SERVE: as the restart policy says

The **goal** is what the worker is for at present, next to the phase it is in: SERVE, REST (drained by the operator,
process kept), RESTART (once, by the operator) or GONE (the plan has no more use for it). A worker that rests is kept
alive like any other: when its process fails it is started again, and goes from STARTING straight to DRAINED.

An event without a row is *late*: it was true of a phase that has been left (a probe that answered after the drain
began, say). Late events are absorbed. Events that can only come from our own mistake are in ``IMPOSSIBLE`` and raise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """A worker's row in the table."""

    WAITING = "waiting"  # for its turn to start
    SPAWNING = "spawning"  # GPUs being checked, process being made
    STARTING = "starting"  # process lives, model loads
    READY = "ready"  # receives requests
    UNREADY = "unready"  # lives, does not answer probes
    DRAINING = "draining"  # no new requests, finishes the old
    DRAINED = "drained"  # idle by the operator's wish
    STOPPING = "stopping"  # told to exit
    BACKOFF = "backoff"  # waits before the next try
    QUARANTINED = "quarantined"  # tried often enough; tried again after long, or at `l40sctl reset`
    FAILED = "failed"  # cannot be started as configured; looked at again ever later, at a new config or at a reset
    STUCK = "stuck"  # cannot be killed; its GPUs are out of use
    STOPPED = "stopped"  # nothing is left of it


class Event(StrEnum):
    """What happens to a worker."""

    PERMIT = "permit"  # the plan lets it start now
    SPAWNED = "spawned"
    ADOPTED = "adopted"  # an earlier daemon started it
    SPAWN_FAILED = "spawn_failed"  # this try came to nothing
    BLOCKED = "blocked"  # its GPUs are not free; not its fault
    MISCONFIGURED = "misconfigured"  # no try can succeed: program or model missing
    UP = "up"  # startup verdict: it made a token
    START_FAILED = "start_failed"  # startup verdict: deadline passed
    FELL = "fell"  # readiness verdict: no
    ROSE = "rose"  # readiness verdict: yes
    STALLED = "stalled"  # progress verdict: hung
    DRAIN = "drain"  # operator: rest
    UNDRAIN = "undrain"  # operator: serve again
    RESTART = "restart"  # operator: once
    RETIRE = "retire"  # plan: be gone, after a drain
    RESET = "reset"  # operator: forget the failures; where it waits for another try, now
    EMPTY = "empty"  # nothing in flight any more, or the drain's deadline passed
    EXITED = "exited"  # the process and all its children are gone
    UNKILLABLE = "unkillable"  # SIGKILL did not empty it in time
    RETRY_DUE = "retry_due"
    GIVEN_UP = "given_up"  # restart policy: tried often enough


class Goal(StrEnum):
    """What a worker is for."""

    SERVE = "serve"
    REST = "rest"
    RESTART = "restart"
    GONE = "gone"


class Action(StrEnum):
    """What workers/worker.py then does."""

    SPAWN = "spawn"  # GPUs free? port, process
    WATCH_EXIT = "watch_exit"  # EXITED when the process is gone
    WATCH_START = "watch_start"  # startup probes
    ADD_ROUTE = "add_route"
    REMOVE_ROUTE = "remove_route"
    WATCH = "watch"  # it has come up: readiness and progress probes
    DRAIN = "drain"  # EMPTY when nothing is in flight
    TERMINATE = "terminate"  # ladder: SIGTERM ... kill; EXITED or UNKILLABLE
    CLEAN_UP = "clean_up"  # port, instance directory
    ASK_POLICY = "ask_policy"  # a failure: failures.py says GIVEN_UP, RETRY_DUE at once, or nothing yet: it waits
    WAIT_BLOCKED = "wait_blocked"  # back-off that counts as nobody's failure
    WAIT_REFUSED = "wait_refused"  # until it is looked at whether it can be started now
    WAIT_GIVEN_UP = "wait_given_up"  # until it has one more try
    FORGIVE = "forgive"  # clear the record of failures


class Job(StrEnum):
    """What takes time: begun by an action, and cancelled where the phase now reached has no use for it."""

    SPAWN = "spawn"
    EXIT = "exit"  # waits until the process is gone
    STARTUP = "startup"
    FOLLOW = "follow"
    DRAIN = "drain"
    TERMINATE = "terminate"
    TIMER = "timer"


class NextPhase(StrEnum):
    """A next phase that depends on the goal."""

    AFTER_START = "after_start"
    AFTER_DRAIN = "after_drain"
    AFTER_EXIT = "after_exit"


@dataclass(frozen=True, slots=True)
class Step:
    """One row's answer."""

    phase: Phase | NextPhase
    actions: tuple[Action, ...] = ()
    goal: Goal | None = None  # None: stays as it is


P, E, A, G = Phase, Event, Action, Goal

LIVE = frozenset({P.STARTING, P.READY, P.UNREADY, P.DRAINING, P.DRAINED, P.STOPPING, P.STUCK})
"""Phases with a process; SPAWNING may have one."""
OCCUPIES_GPUS = LIVE | {P.SPAWNING}
COMING_UP = frozenset({P.SPAWNING, P.STARTING})
ROUTED_ONCE = frozenset({P.READY, P.UNREADY, P.DRAINING, P.DRAINED})
"""Phases of a process that may have requests and is not being stopped."""

JOBS_IN: Mapping[Phase, frozenset[Job]] = {
    P.WAITING: frozenset(),
    P.SPAWNING: frozenset({Job.SPAWN}),
    P.STARTING: frozenset({Job.EXIT, Job.STARTUP}),
    P.READY: frozenset({Job.EXIT, Job.FOLLOW}),
    P.UNREADY: frozenset({Job.EXIT, Job.FOLLOW}),
    P.DRAINING: frozenset({Job.EXIT, Job.FOLLOW, Job.DRAIN}),
    P.DRAINED: frozenset({Job.EXIT, Job.FOLLOW}),
    P.STOPPING: frozenset({Job.EXIT, Job.TERMINATE}),
    P.STUCK: frozenset({Job.EXIT}),
    P.BACKOFF: frozenset({Job.TIMER}),
    P.QUARANTINED: frozenset({Job.TIMER}),
    P.FAILED: frozenset({Job.TIMER}),
    P.STOPPED: frozenset(),
}
"""What may be under way in each phase; everything else is cancelled on entering it."""

_EXIT = Step(NextPhase.AFTER_EXIT, (A.REMOVE_ROUTE, A.CLEAN_UP))
_ENDED = Step(P.STOPPED, goal=G.GONE)
_TERMINATE = (A.REMOVE_ROUTE, A.TERMINATE)
_AGAIN = Step(P.WAITING, (A.FORGIVE,), goal=G.SERVE)
_DRAIN = (A.REMOVE_ROUTE, A.DRAIN)

TABLE: dict[Phase, dict[Event, Step]] = {
    P.WAITING: {
        E.PERMIT: Step(P.SPAWNING, (A.SPAWN,)),
        E.ADOPTED: Step(P.STARTING, (A.WATCH_EXIT, A.WATCH_START)),
        E.RETIRE: _ENDED,
        E.MISCONFIGURED: Step(P.FAILED, (A.WAIT_REFUSED,)),
        E.RESET: _AGAIN,
        E.RESTART: _AGAIN,
        # Said before the permit to one that shall rest: it must not serve for a moment in between.
        E.DRAIN: Step(P.WAITING, goal=G.REST),
        E.UNDRAIN: Step(P.WAITING, goal=G.SERVE),
    },
    P.SPAWNING: {
        E.SPAWNED: Step(P.STARTING, (A.WATCH_EXIT, A.WATCH_START)),
        E.SPAWN_FAILED: Step(NextPhase.AFTER_EXIT, (A.CLEAN_UP,)),
        E.BLOCKED: Step(P.BACKOFF, (A.CLEAN_UP, A.WAIT_BLOCKED)),
        E.MISCONFIGURED: Step(P.FAILED, (A.CLEAN_UP, A.WAIT_REFUSED)),
        # The process may come into being at any moment: remember the wish, act when it is known.
        E.RETIRE: Step(P.SPAWNING, goal=G.GONE),
        E.RESET: Step(P.SPAWNING, (A.FORGIVE,)),
        E.RESTART: Step(P.SPAWNING),
    },
    P.STARTING: {
        E.UP: Step(NextPhase.AFTER_START, (A.WATCH,)),
        E.RESET: Step(P.STARTING, (A.FORGIVE,)),
        E.UNDRAIN: Step(P.STARTING, goal=G.SERVE),
        E.START_FAILED: Step(P.STOPPING, _TERMINATE),
        E.EXITED: _EXIT,
        # A worker that was never routed has nothing in flight, its drain is over at once; one that was adopted may have
        # requests that went through an upgrade.
        E.RETIRE: Step(P.DRAINING, _DRAIN, goal=G.GONE),
        E.RESTART: Step(P.STOPPING, _TERMINATE, goal=G.RESTART),
    },
    P.READY: {
        E.RESET: Step(P.READY, (A.FORGIVE,)),
        E.FELL: Step(P.UNREADY, (A.REMOVE_ROUTE,)),
        E.STALLED: Step(P.STOPPING, _TERMINATE),
        E.EXITED: _EXIT,
        E.DRAIN: Step(P.DRAINING, _DRAIN, goal=G.REST),
        E.RETIRE: Step(P.DRAINING, _DRAIN, goal=G.GONE),
        E.RESTART: Step(P.DRAINING, _DRAIN, goal=G.RESTART),
    },
    P.UNREADY: {
        E.RESET: Step(P.UNREADY, (A.FORGIVE,)),
        E.ROSE: Step(P.READY, (A.ADD_ROUTE,)),
        E.STALLED: Step(P.STOPPING, _TERMINATE),
        E.EXITED: _EXIT,
        # It may still finish what it has in flight: the drain's deadline bounds that.
        E.DRAIN: Step(P.DRAINING, _DRAIN, goal=G.REST),
        E.RETIRE: Step(P.DRAINING, _DRAIN, goal=G.GONE),
        E.RESTART: Step(P.DRAINING, _DRAIN, goal=G.RESTART),
    },
    P.DRAINING: {
        E.RESET: Step(P.DRAINING, (A.FORGIVE,)),
        E.EMPTY: Step(NextPhase.AFTER_DRAIN),
        E.STALLED: Step(P.STOPPING, _TERMINATE),
        E.EXITED: _EXIT,
        # The stricter wish wins; GONE is never taken back, the plan makes a new worker instead.
        E.RETIRE: Step(P.DRAINING, goal=G.GONE),
        E.RESTART: Step(P.DRAINING, goal=G.RESTART),
        E.UNDRAIN: Step(P.READY, (A.ADD_ROUTE,), goal=G.SERVE),
    },
    P.DRAINED: {
        E.RESET: Step(P.DRAINED, (A.FORGIVE,)),
        E.UNDRAIN: Step(P.READY, (A.ADD_ROUTE,), goal=G.SERVE),
        E.STALLED: Step(P.STOPPING, _TERMINATE),
        E.EXITED: _EXIT,
        E.RETIRE: Step(P.STOPPING, (A.TERMINATE,), goal=G.GONE),
        E.RESTART: Step(P.STOPPING, (A.TERMINATE,), goal=G.RESTART),
    },
    P.STOPPING: {
        E.EXITED: _EXIT,
        E.UNKILLABLE: Step(P.STUCK),
        E.RETIRE: Step(P.STOPPING, goal=G.GONE),
        E.RESTART: Step(P.STOPPING, goal=G.RESTART),
    },
    P.STUCK: {
        E.EXITED: _EXIT,  # the driver let go after all
        E.RETIRE: Step(P.STUCK, goal=G.GONE),
        E.RESET: Step(P.STOPPING, (A.TERMINATE,), goal=G.RESTART),
        E.RESTART: Step(P.STOPPING, (A.TERMINATE,), goal=G.RESTART),
    },
    P.BACKOFF: {
        E.RETRY_DUE: Step(P.WAITING),
        E.GIVEN_UP: Step(P.QUARANTINED, (A.WAIT_GIVEN_UP,)),
        E.RETIRE: _ENDED,
        E.RESET: _AGAIN,
        E.RESTART: _AGAIN,
    },
    # Nobody may be there to reset it: the disk that was not mounted is, the request that ended it has gone. The record
    # of its failures is kept, so that one that fails as before is back here after one try.
    P.QUARANTINED: {E.RETRY_DUE: Step(P.WAITING), E.RETIRE: _ENDED, E.RESET: _AGAIN, E.RESTART: _AGAIN},
    P.FAILED: {E.RETRY_DUE: Step(P.WAITING), E.RETIRE: _ENDED, E.RESET: _AGAIN, E.RESTART: _AGAIN},
    P.STOPPED: {},
}

IMPOSSIBLE: dict[Phase, frozenset[Event]] = {
    # A process is made once for each permit, and only the plan's permit leads to one.
    P.READY: frozenset({E.SPAWNED, E.SPAWN_FAILED, E.ADOPTED, E.GIVEN_UP}),
    P.STARTING: frozenset({E.SPAWN_FAILED, E.ADOPTED, E.GIVEN_UP}),
    P.STOPPED: frozenset({E.SPAWNED, E.ADOPTED, E.UP, E.GIVEN_UP}),
}


def event_of_refusal(code: str) -> Event:
    """Return what a spawn comes to that ended with this error: no try can succeed, or this one did not.

    Args:
        code: Of the L40sError.
    """
    return E.MISCONFIGURED if code in ("exec_failed", "misconfigured") else E.SPAWN_FAILED


def step(phase: Phase, goal: Goal, event: Event) -> Step | None:
    """Return what follows when ``event`` happens in ``phase``; None when the event is late.

    The step's phase is always a Phase and its goal always set: ``NextPhase`` is resolved with the goal in force.
    After ASK_POLICY the policy's answer is the next event, before any other: it stays in BACKOFF, or leaves it at once.

    1. A goal once GONE stays GONE.
    2. A worker that comes to life although it shall be gone is stopped at once.
    3. A failure asks the restart policy; a wished exit does not.
    """
    assert event not in IMPOSSIBLE.get(phase, ()), f"{event} cannot happen to a worker that is {phase}"
    row = TABLE[phase].get(event)
    if row is None:
        return None
    new_goal = goal if row.goal is None or goal is G.GONE else row.goal  # 1
    if new_goal is G.GONE and event is E.UNDRAIN:  # 1
        return None
    if new_goal is G.GONE and event is E.SPAWNED:  # 2
        return Step(P.STOPPING, (A.WATCH_EXIT, A.TERMINATE), new_goal)
    match row.phase:
        case NextPhase.AFTER_START:
            if new_goal is G.REST:
                return Step(P.DRAINED, row.actions, new_goal)
            return Step(P.READY, (*row.actions, A.ADD_ROUTE), new_goal)
        case NextPhase.AFTER_DRAIN:
            if new_goal is G.REST:
                return Step(P.DRAINED, row.actions, new_goal)
            return Step(P.STOPPING, (*row.actions, A.TERMINATE), new_goal)
        case NextPhase.AFTER_EXIT:
            if new_goal is G.GONE:
                return Step(P.STOPPED, row.actions, new_goal)
            if new_goal is G.RESTART:
                return Step(P.WAITING, (*row.actions, A.FORGIVE), G.SERVE)
            return Step(P.BACKOFF, (*row.actions, A.ASK_POLICY), new_goal)  # 3: to SERVE or to REST, as before
        case _:
            if new_goal is G.GONE and row.phase in (P.WAITING, P.BACKOFF, P.FAILED):
                return Step(P.STOPPED, tuple(a for a in row.actions if a is A.CLEAN_UP), new_goal)
            return Step(row.phase, row.actions, new_goal)
