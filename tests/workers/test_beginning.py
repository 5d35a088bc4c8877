"""What of a worker is kept for the next daemon, and what a worker begins as then."""

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from l40sd.model import WorkerId
from l40sd.workers import saved
from l40sd.workers.beginning import UNKILLABLE, Beginning, begin, begin_after_end, begin_with_run
from l40sd.workers.failures import Failures
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.restart_policy import Record
from l40sd.workers.saved import TOLD, SavedWorker

times = st.floats(0, 1e6)
saved_workers = st.builds(
    SavedWorker,
    fingerprint=st.text(max_size=5),
    phase=st.sampled_from([Phase.WAITING, *TOLD]),
    goal=st.sampled_from(Goal),
    since_s=times,
    reason=st.text(max_size=5),
    last_lines=st.tuples(st.text(max_size=5)),
    kind=st.text(max_size=5),
    record=st.builds(Record, kind=st.text(max_size=5), alike=st.integers(0, 9), failed_at_s=st.tuples(times, times)),
    restarts=st.integers(0, 99),
    instance=st.text(max_size=3),
    spawned_at_s=times,
    ready_at_s=st.none() | times,
    next_start_at_s=st.none() | times,
)


@given(st.dictionaries(st.text(max_size=3).map(WorkerId), saved_workers, max_size=3))
def test_what_is_written_is_read(found: dict[WorkerId, SavedWorker]) -> None:
    stored = json.loads(json.dumps(saved.written(found, "this", 100.0)))
    assert saved.read(stored, "this", 100.0) == (found, "")
    assert saved.read(stored, "another", 100.0) == ({}, "")
    assert saved.read(stored, "this", 99.0) == ({}, ""), "of another clock"


@given(saved_workers, st.text(max_size=3), st.floats(0, 1e6))
def test_a_run_has_been_ready_for_no_longer_than_it_ran(one: SavedWorker, instance: str, ran_s: float) -> None:
    about = one.of(instance)
    assert about.of(instance).record == one.record
    ready_s = replace(about, spawned_at_s=0.0).ready_for_s(ran_s, 2e6)
    assert (ready_s is None) == (about.ready_at_s is None)
    if ready_s is not None and ran_s > 0:
        assert 0 <= ready_s <= ran_s


WAITS = SavedWorker(
    fingerprint="f", phase=Phase.BACKOFF, reason="exit 1", kind="exit 1", since_s=5, next_start_at_s=90, restarts=3
)
STOPS = SavedWorker(
    fingerprint="f", phase=Phase.STOPPING, goal=Goal.RESTART, kind="hung", since_s=5, instance="toy-1", restarts=3
)
SERVED = SavedWorker(fingerprint="f", phase=Phase.READY, instance="toy-1", spawned_at_s=10, ready_at_s=30, restarts=3)


def test_a_new_worker_begins_with_nothing() -> None:
    assert begin(None) == begin_with_run(None, "toy-1", is_running=True) == Beginning()


def test_who_waits_for_its_next_try_goes_on_waiting() -> None:
    found = begin(WAITS)
    assert (found.phase, found.since_s, found.next_start_at_s, found.kind) == (Phase.BACKOFF, 5, 90, "exit 1")
    assert begin(replace(WAITS, phase=Phase.QUARANTINED)).phase is Phase.QUARANTINED


def test_failures_are_kept_unless_a_restart_was_to_clear_them() -> None:
    for one in (WAITS, SERVED):
        assert begin(one).failures == Failures(restarts=3)
        assert begin(replace(one, goal=Goal.RESTART)) == Beginning()


def test_who_served_or_rested_begins_anew_and_finds_its_phase_confirmed() -> None:
    for phase in (Phase.READY, Phase.DRAINED, Phase.WAITING):
        found = begin_with_run(replace(SERVED, phase=phase), "toy-1", is_running=True)
        assert (found.phase, found.goal, found.since_s) == (Phase.WAITING, Goal.SERVE, None)


def test_a_stop_under_way_goes_on_for_the_run_that_it_was_about() -> None:
    found = begin_with_run(STOPS, "toy-1", is_running=True)
    assert (found.phase, found.goal, found.kind, found.since_s) == (Phase.STOPPING, Goal.RESTART, "hung", 5)
    other = begin_with_run(STOPS, "toy-2", is_running=True)
    assert (other.phase, other.goal, other.kind) == (Phase.WAITING, Goal.SERVE, "")


def test_a_run_beside_a_wait_for_it_ends_the_wait() -> None:
    found = begin_with_run(WAITS, "toy-1", is_running=True)
    assert (found.phase, found.next_start_at_s, found.failures.restarts) == (Phase.WAITING, None, 3)


def test_what_cannot_be_killed_is_stuck_whatever_was_saved() -> None:
    for one in (None, WAITS, STOPS, SERVED):
        found = begin_with_run(one, "toy-1", is_running=False)
        assert (found.phase, found.reason) == (Phase.STUCK, UNKILLABLE)


def test_an_end_that_nobody_watched_is_one_of_a_run_that_lived() -> None:
    assert begin_after_end(None, "toy-1", ran_s=7, now_s=100).ready_for_s == 7
    found = begin_after_end(SERVED, "toy-1", ran_s=50, now_s=100)
    assert (found.phase, found.ready_for_s, found.failures.restarts) == (Phase.STARTING, 30, 3)
    assert begin_after_end(SERVED, "toy-1", ran_s=0, now_s=100).ready_for_s == 70, "nobody knows when it ended"
    assert begin_after_end(SERVED, "toy-2", ran_s=50, now_s=100).ready_for_s is None, "another run: it never was"
    stopped = begin_after_end(STOPS, "toy-1", ran_s=50, now_s=100)
    assert (stopped.phase, stopped.goal, stopped.kind) == (Phase.STOPPING, Goal.RESTART, "hung")
