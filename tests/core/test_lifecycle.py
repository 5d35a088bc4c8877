"""The worker table, walked completely: every reachable phase and goal, every event."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.core.lifecycle import (
    IMPOSSIBLE,
    LIVE,
    OCCUPIES_GPUS,
    TABLE,
    Action,
    Event,
    Goal,
    Phase,
    Record,
    RestartLimits,
    Step,
    decide_restart,
    forgiven,
    refused_delay_s,
    step,
)

LIMITS = RestartLimits(
    backoff_first_s=5,
    backoff_limit_s=300,
    never_ready_first_s=15,
    never_ready_limit_s=600,
    quarantine_alike=3,
    quarantine_per_hour=6,
    healthy_after_s=600,
)

Place = tuple[Phase, Goal]


def policy_answers(after: Step) -> list[Phase]:
    """A failure's next phase is the restart policy's to choose."""
    if Action.ASK_POLICY in after.actions:
        return [Phase.BACKOFF, Phase.WAITING, Phase.QUARANTINED]
    assert isinstance(after.phase, Phase)
    return [after.phase]


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
                todo.extend((phase, after.goal) for phase in policy_answers(after))
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
                    todo.extend((phase, after.goal) for phase in policy_answers(after))
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


def test_a_worker_that_cannot_be_started_is_looked_at_again_ever_later() -> None:
    delays = [refused_delay_s(n, first_s=60, limit_s=3600) for n in range(8)]
    assert delays == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert refused_delay_s(0, first_s=60, limit_s=0) is None


def test_one_that_is_tried_again_after_it_was_given_up_has_one_try() -> None:
    record = Record()
    for n in range(3):
        record, delay = fail(record, at_s=n * 60.0)
    assert delay is None
    for n in range(1, 4):
        record, delay = fail(record, at_s=n * 3600.0 + 200)
        assert delay is None, "it fails as before"


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


def test_what_is_impossible_raises() -> None:
    for phase, events in IMPOSSIBLE.items():
        for event in events:
            assert event not in TABLE[phase]
            with pytest.raises(AssertionError, match="cannot happen"):
                step(phase, Goal.SERVE, event)


def fail(
    record: Record, at_s: float, *, ready_for_s: float | None = None, kind: str = "exit 1"
) -> tuple[Record, float | None]:
    verdict = decide_restart(
        record, kind=kind, ready_for_s=ready_for_s, is_oom=False, now_s=at_s, jitter=0.0, limits=LIMITS
    )
    return verdict.record, verdict.delay_s


def test_a_worker_that_was_ready_comes_back_at_once_then_ever_later() -> None:
    """Fault 30: flapping is not healed by being ready for 20 s."""
    record, delays = Record(), []
    for n in range(6):
        record, delay = fail(record, at_s=n * 60.0, ready_for_s=20)
        delays.append(delay)
    assert delays == [0.0, 5.0, 10.0, 20.0, 40.0, None]


def test_a_worker_that_never_was_ready_is_quarantined_after_three_that_fail_alike() -> None:
    """Fault 28."""
    record, delays = Record(), []
    for n in range(3):
        record, delay = fail(record, at_s=n * 60.0)
        delays.append(delay)
    assert delays == [15.0, 30.0, None]


def test_failures_of_different_kinds_are_not_alike() -> None:
    record = Record()
    for n, kind in enumerate(["exit 1", "signal 11", "exit 1", "signal 11"]):
        record, delay = fail(record, at_s=n * 700.0, kind=kind)
        assert delay is not None


def test_ten_healthy_minutes_clear_the_record() -> None:
    record = Record()
    for n in range(5):
        record, _ = fail(record, at_s=float(n), ready_for_s=20)
    assert forgiven(record, ready_for_s=600, limits=LIMITS) == Record()
    record, delay = fail(record, at_s=1000.0, ready_for_s=700)
    assert delay == 0.0
    assert record.streak == 1


@pytest.mark.parametrize("ready_for_s", [0.5, 20.0, 700.0])
def test_a_worker_that_ended_with_a_request_that_ends_workers_has_nothing_on_its_record(ready_for_s: float) -> None:
    """Six calls of one poisoned request put a host of eight GPUs into quarantine until somebody reset it."""
    before, _ = fail(Record(), at_s=0.0, ready_for_s=20)
    record = before
    for n in range(20):
        verdict = decide_restart(
            record,
            kind="exit 1",
            ready_for_s=ready_for_s,
            is_oom=False,
            now_s=float(n),
            jitter=0.0,
            limits=LIMITS,
            is_excused=True,
        )
        record = verdict.record
        assert verdict.delay_s == 0.0
    assert record == before


def test_out_of_memory_waits_longer() -> None:
    plain = decide_restart(Record(streak=1), kind="oom", ready_for_s=30, is_oom=False, now_s=0, jitter=0, limits=LIMITS)
    oom = decide_restart(Record(streak=1), kind="oom", ready_for_s=30, is_oom=True, now_s=0, jitter=0, limits=LIMITS)
    assert plain.delay_s is not None
    assert oom.delay_s == 2 * plain.delay_s


@given(
    st.lists(
        st.tuples(st.floats(0, 4000), st.none() | st.floats(0, 2000), st.sampled_from(["exit 1", "signal 9"])),
        max_size=40,
    ),
    st.floats(-1, 1),
)
def test_no_worker_is_tried_more_than_six_times_an_hour(
    failures: list[tuple[float, float | None, str]], jitter: float
) -> None:
    record, now_s, tried_at = Record(), 0.0, []
    for gap_s, ready_for_s, kind in failures:
        now_s += gap_s
        verdict = decide_restart(
            record, kind=kind, ready_for_s=ready_for_s, is_oom=False, now_s=now_s, jitter=jitter, limits=LIMITS
        )
        record = verdict.record
        if verdict.delay_s is None:
            assert verdict.why
            return
        assert 0 <= verdict.delay_s <= 1.1 * LIMITS.never_ready_limit_s
        if ready_for_s is None or ready_for_s < LIMITS.healthy_after_s:
            tried_at.append(now_s)
        else:
            tried_at = [now_s]
        assert len([t for t in tried_at if now_s - t < 3600]) < LIMITS.quarantine_per_hour
