"""What a request that finds no worker may hope for, for every phase and goal that a worker can be in."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.model import Outlook
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.outlook import LATEST_S, Patience, Slot, outlook

PATIENCE = Patience(queue_s=120.0, load_s=30.0, external_s=600.0)
ON_ITS_WAY = {Phase.WAITING, Phase.SPAWNING, Phase.STARTING, Phase.UNREADY, Phase.DRAINING, Phase.STOPPING}
GIVEN_UP = {Phase.QUARANTINED, Phase.FAILED}


def seen(*slots: Slot, is_wanted: bool = True) -> Outlook:
    return outlook(slots, PATIENCE, pattern="day", is_wanted=is_wanted)


@pytest.mark.parametrize(("phase", "goal"), list(itertools.product(Phase, Goal)))
def test_waiting_is_for_what_is_on_its_way(phase: Phase, goal: Goal) -> None:
    """Requests waited 120 s, and with their client's retries six minutes, for workers that were given up, drained by
    hand or not in the pattern."""
    may_wait = phase is Phase.READY or (phase in ON_ITS_WAY and goal in (Goal.SERVE, Goal.RESTART))
    assert seen(Slot(phase=phase, goal=goal)).is_coming == may_wait


@pytest.mark.parametrize("phase", sorted(GIVEN_UP))
def test_what_was_given_up_is_not_waited_for_although_it_is_tried_again(phase: Phase) -> None:
    found = seen(Slot(phase=phase, next_start_s=10))
    assert (found.is_coming, found.retry_after_s) == (False, 40)
    assert "next try in 40 s" in found.note


def test_a_next_try_is_waited_for_when_it_comes_within_the_longest_wait() -> None:
    near, far = (seen(Slot(phase=Phase.BACKOFF, next_start_s=s)) for s in (60, 100))
    assert (near.is_coming, near.retry_after_s) == (True, 90)
    assert (far.is_coming, far.retry_after_s) == (False, 130), "it also has to load"
    assert "next try in 130 s" in far.note


def test_a_model_that_is_not_in_the_pattern_says_so() -> None:
    found = seen(is_wanted=False)
    assert (found.is_coming, found.note, found.retry_after_s) == (False, "not in pattern day", 60)


def test_somebody_elses_worker_that_has_been_away_for_long_is_not_on_its_way() -> None:
    for phase in (Phase.STARTING, Phase.UNREADY):
        assert seen(Slot(phase=phase, is_external=True, since_s=10)).is_coming
        assert not seen(Slot(phase=phase, is_external=True, since_s=601)).is_coming
        assert seen(Slot(phase=phase, since_s=601)).is_coming, "ours is started again"


slots = st.builds(
    Slot,
    phase=st.sampled_from(Phase),
    goal=st.sampled_from(Goal),
    since_s=st.floats(0, 1e5),
    next_start_s=st.none() | st.floats(0, 1e6),
    is_external=st.booleans(),
)


@given(st.lists(slots, max_size=12), st.booleans())
def test_one_worker_on_its_way_is_enough_and_what_is_said_is_bounded(workers: list[Slot], is_wanted: bool) -> None:
    found = seen(*workers, is_wanted=is_wanted)
    assert found.is_coming == any(seen(worker).is_coming for worker in workers)
    assert 1 <= found.retry_after_s <= LATEST_S
    assert bool(found.note) != any(worker.phase is Phase.READY for worker in workers)
