"""The worker table, walked completely: every reachable phase and goal, every event."""

from collections import deque

import pytest

from l40sd.workers.lifecycle import (
    IMPOSSIBLE,
    JOBS_IN,
    LIVE,
    OCCUPIES_GPUS,
    TABLE,
    Action,
    Event,
    Goal,
    Job,
    Phase,
    Step,
    event_of_refusal,
    step,
)

Place = tuple[Phase, Goal]


def walk() -> dict[Place, dict[Event, Step | None]]:
    """Return every (phase, goal) that can be reached from a new worker, with what each event does there."""
    seen: dict[Place, dict[Event, Step | None]] = {}
    todo: deque[Place] = deque([(Phase.WAITING, Goal.SERVE)])
    while todo:
        place = todo.popleft()
        if place in seen:
            continue
        seen[place] = {}
        for event in Event:
            if event in IMPOSSIBLE.get(place[0], ()):
                continue
            after = step(*place, event)
            seen[place][event] = after
            if after is not None:
                assert after.goal is not None
                assert isinstance(after.phase, Phase)
                todo.append((after.phase, after.goal))
    return seen


WALK = walk()
ROUTED = Phase.READY


def test_every_phase_can_be_reached() -> None:
    assert {phase for phase, _ in WALK} == set(Phase)


def test_every_phase_but_the_last_can_be_left_and_the_last_cannot() -> None:
    for (phase, _), row in WALK.items():
        moves = [s for s in row.values() if s is not None]
        assert bool(moves) == (phase is not Phase.STOPPED)


def test_from_everywhere_a_retired_worker_can_end() -> None:
    """Liveness: RETIRE and then whatever happens to processes and requests leads to STOPPED."""
    for place in WALK:
        reached: set[Place] = set()
        todo = [place]
        while todo:
            here = todo.pop()
            if here in reached:
                continue
            reached.add(here)
            for event in (Event.RETIRE, Event.SPAWNED, Event.EMPTY, Event.EXITED, Event.SPAWN_FAILED, Event.RETRY_DUE):
                after = WALK[here].get(event)
                if after is not None:
                    assert after.goal is not None
                    assert isinstance(after.phase, Phase)
                    todo.append((after.phase, after.goal))
        assert (Phase.STOPPED, Goal.GONE) in reached or (place[0] is Phase.STOPPED), place


def test_every_phase_is_left_without_an_operator() -> None:
    """A worker that had been given up, or whose program was on a disk that was mounted later, waited for a person."""
    by_people = {Event.DRAIN, Event.UNDRAIN, Event.RESTART, Event.RETIRE, Event.RESET}
    for (phase, goal), row in WALK.items():
        ways = {s.phase for event, s in row.items() if s is not None and event not in by_people} - {phase}
        assert ways or phase is Phase.STOPPED, (phase, goal)
    for phase in (Phase.QUARANTINED, Phase.FAILED):
        after = WALK[phase, Goal.SERVE][Event.RETRY_DUE]
        assert after is not None
        assert after.phase is Phase.WAITING
        assert Action.FORGIVE not in after.actions, "its failures are remembered"


def test_a_reset_forgets_the_failures_in_every_phase_and_disturbs_no_run() -> None:
    """`l40sctl reset` of a worker that was ready again said that its failures were forgotten, and they counted on."""
    for (phase, goal), row in WALK.items():
        after = row.get(Event.RESET)
        if phase in (Phase.STOPPING, Phase.STOPPED, Phase.STUCK) or goal is Goal.GONE:
            continue  # its run is being ended, or it has none any more
        assert after is not None, (phase, goal)
        assert Action.FORGIVE in after.actions, (phase, goal)
        if phase in OCCUPIES_GPUS:
            assert (after.phase, after.goal, after.actions) == (phase, goal, (Action.FORGIVE,))


def test_a_goal_once_gone_stays_gone() -> None:
    for (_, goal), row in WALK.items():
        if goal is Goal.GONE:
            assert all(s is None or s.goal is Goal.GONE for s in row.values())


def test_routes_are_added_on_entering_ready_and_removed_on_leaving_it() -> None:
    """Invariant 2: a worker is routed to exactly while it is READY."""
    for (phase, _), row in WALK.items():
        for event, after in row.items():
            if after is None:
                continue
            entering = after.phase is ROUTED and phase is not ROUTED
            assert (Action.ADD_ROUTE in after.actions) == entering, (phase, event)
            if phase is ROUTED and after.phase is not ROUTED:
                assert Action.REMOVE_ROUTE in after.actions, (phase, event)


def test_a_serving_worker_is_drained_before_it_is_told_to_exit() -> None:
    """Invariant 3; a hung one is not: its requests would never end."""
    for (phase, _), row in WALK.items():
        for event, after in row.items():
            if after is not None and Action.TERMINATE in after.actions and phase in (Phase.READY, Phase.UNREADY):
                assert event is Event.STALLED


def test_a_worker_that_rests_is_not_routed_to_until_it_is_undrained_whatever_becomes_of_its_process() -> None:
    """A drained worker that died came back serving."""
    for (phase, goal), row in WALK.items():
        if goal is not Goal.REST:
            continue
        for event, after in row.items():
            if after is None or event in (Event.UNDRAIN, Event.RETIRE, Event.RESTART, Event.RESET):
                continue
            assert after.goal is Goal.REST, (phase, event)
            assert Action.ADD_ROUTE not in after.actions, (phase, event)


def test_a_process_that_is_gone_is_always_cleaned_up() -> None:
    for (phase, _), row in WALK.items():
        after = row.get(Event.EXITED)
        if phase in LIVE:
            assert after is not None
            assert Action.CLEAN_UP in after.actions


def test_a_process_that_has_come_to_life_is_watched_whatever_it_is_for() -> None:
    for row in WALK.values():
        for event in (Event.SPAWNED, Event.ADOPTED):
            after = row.get(event)
            assert after is None or Action.WATCH_EXIT in after.actions


def test_nothing_starts_without_a_permit() -> None:
    for (_, _), row in WALK.items():
        for event, after in row.items():
            if after is not None and Action.SPAWN in after.actions:
                assert event is Event.PERMIT


def test_what_an_action_begins_may_be_under_way_in_the_phase_then_reached() -> None:
    begins = {
        Action.SPAWN: Job.SPAWN,
        Action.WATCH_EXIT: Job.EXIT,
        Action.WATCH_START: Job.STARTUP,
        Action.WATCH: Job.FOLLOW,
        Action.DRAIN: Job.DRAIN,
        Action.TERMINATE: Job.TERMINATE,
        Action.ASK_POLICY: Job.TIMER,
        Action.WAIT_BLOCKED: Job.TIMER,
        Action.WAIT_REFUSED: Job.TIMER,
        Action.WAIT_GIVEN_UP: Job.TIMER,
    }
    assert set(begins.values()) == set(Job)
    for row in WALK.values():
        for event, after in row.items():
            for action in after.actions if after is not None else ():
                assert after is not None
                assert isinstance(after.phase, Phase)
                assert action not in begins or begins[action] in JOBS_IN[after.phase], (event, action)


def test_a_process_is_waited_for_as_long_as_there_is_one() -> None:
    assert {phase for phase, jobs in JOBS_IN.items() if Job.EXIT in jobs} == LIVE


def test_the_policy_answers_a_failure_by_giving_up_trying_again_or_waiting() -> None:
    for goal in (Goal.SERVE, Goal.REST):
        given_up, again = WALK[Phase.BACKOFF, goal][Event.GIVEN_UP], WALK[Phase.BACKOFF, goal][Event.RETRY_DUE]
        assert given_up == Step(Phase.QUARANTINED, (Action.WAIT_GIVEN_UP,), goal)
        assert again == Step(Phase.WAITING, (), goal)
    for row in WALK.values():
        for after in row.values():
            assert after is None or Action.ASK_POLICY not in after.actions or after.phase is Phase.BACKOFF


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("misconfigured", Event.MISCONFIGURED),
        ("exec_failed", Event.MISCONFIGURED),
        ("spawn_failed", Event.SPAWN_FAILED),
        ("no_port", Event.SPAWN_FAILED),
    ],
)
def test_a_program_that_is_not_there_is_no_failed_try(code: str, event: Event) -> None:
    assert event_of_refusal(code) is event


def test_what_is_impossible_raises() -> None:
    for phase, events in IMPOSSIBLE.items():
        for event in events:
            assert event not in TABLE[phase]
            with pytest.raises(AssertionError, match="cannot happen"):
                step(phase, Goal.SERVE, event)


def test_a_worker_holds_its_gpus_from_before_its_process_is_made_until_that_is_gone() -> None:
    without = {Phase.WAITING, Phase.BACKOFF, Phase.QUARANTINED, Phase.FAILED, Phase.STOPPED}
    assert set(Phase) - without == OCCUPIES_GPUS
    assert {Phase.SPAWNING} == OCCUPIES_GPUS - LIVE


@pytest.mark.parametrize(
    ("phase", "goal", "event", "after"),
    [
        # It has come to life: for whom?
        (Phase.SPAWNING, Goal.SERVE, Event.SPAWNED, (Phase.STARTING, Goal.SERVE)),
        (Phase.SPAWNING, Goal.GONE, Event.SPAWNED, (Phase.STOPPING, Goal.GONE)),
        (Phase.STARTING, Goal.SERVE, Event.UP, (Phase.READY, Goal.SERVE)),
        (Phase.STARTING, Goal.REST, Event.UP, (Phase.DRAINED, Goal.REST)),
        # It has nothing in flight any more.
        (Phase.DRAINING, Goal.REST, Event.EMPTY, (Phase.DRAINED, Goal.REST)),
        (Phase.DRAINING, Goal.RESTART, Event.EMPTY, (Phase.STOPPING, Goal.RESTART)),
        (Phase.DRAINING, Goal.GONE, Event.EMPTY, (Phase.STOPPING, Goal.GONE)),
        # Its process has gone.
        (Phase.STOPPING, Goal.GONE, Event.EXITED, (Phase.STOPPED, Goal.GONE)),
        (Phase.STOPPING, Goal.RESTART, Event.EXITED, (Phase.WAITING, Goal.SERVE)),
        (Phase.STOPPING, Goal.SERVE, Event.EXITED, (Phase.BACKOFF, Goal.SERVE)),
        (Phase.DRAINED, Goal.REST, Event.EXITED, (Phase.BACKOFF, Goal.REST)),
        # There will be none.
        (Phase.SPAWNING, Goal.SERVE, Event.BLOCKED, (Phase.BACKOFF, Goal.SERVE)),
        (Phase.SPAWNING, Goal.GONE, Event.BLOCKED, (Phase.STOPPED, Goal.GONE)),
        (Phase.SPAWNING, Goal.SERVE, Event.MISCONFIGURED, (Phase.FAILED, Goal.SERVE)),
        (Phase.SPAWNING, Goal.GONE, Event.MISCONFIGURED, (Phase.STOPPED, Goal.GONE)),
        # Drained, and wanted again.
        (Phase.DRAINED, Goal.REST, Event.UNDRAIN, (Phase.READY, Goal.SERVE)),
        (Phase.DRAINING, Goal.REST, Event.UNDRAIN, (Phase.READY, Goal.SERVE)),
    ],
)
def test_where_the_goal_decides_what_follows(phase: Phase, goal: Goal, event: Event, after: tuple[Phase, Goal]) -> None:
    following = step(phase, goal, event)
    assert following is not None
    assert (following.phase, following.goal) == after


def test_what_shall_be_gone_is_not_brought_back_by_an_undrain() -> None:
    for phase in (Phase.WAITING, Phase.STARTING, Phase.DRAINING):
        assert step(phase, Goal.GONE, Event.UNDRAIN) is None
        assert step(phase, Goal.REST, Event.UNDRAIN) is not None


def test_what_came_to_life_although_it_shall_be_gone_is_watched_and_told_to_exit() -> None:
    following = step(Phase.SPAWNING, Goal.GONE, Event.SPAWNED)
    assert following is not None
    assert following.actions == (Action.WATCH_EXIT, Action.TERMINATE)


def test_a_worker_that_shall_be_gone_leaves_nothing_and_is_waited_for_by_nobody() -> None:
    for event in (Event.BLOCKED, Event.MISCONFIGURED):
        following = step(Phase.SPAWNING, Goal.GONE, event)
        assert following is not None
        assert following.actions == (Action.CLEAN_UP,)


def test_a_worker_that_comes_up_to_rest_is_watched_and_not_routed_to() -> None:
    for goal, actions in ((Goal.REST, (Action.WATCH,)), (Goal.SERVE, (Action.WATCH, Action.ADD_ROUTE))):
        following = step(Phase.STARTING, goal, Event.UP)
        assert following is not None
        assert following.actions == actions
