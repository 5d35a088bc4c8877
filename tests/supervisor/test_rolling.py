"""Restarting several workers: the floor is kept, everybody's turn comes, and it ends when one does not come back."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from test_reconcile import layouts, ready, wanted_layout

from l40sd.model import ModelName
from l40sd.supervisor.rolling import next_restarts
from l40sd.workers.lifecycle import Phase
from l40sd.workers.slot import slot

M = ModelName("m")
A = wanted_layout([("m", 1)] * 12)
NAMES = [w.placement.worker for w in A]


def test_as_many_as_may_start_at_once_and_no_more_than_the_floor_allows() -> None:
    baseline = {M: 12}
    two = next_restarts(NAMES, (), ready(A), baseline=baseline, start_parallel=2, min_ready=0.5)
    assert list(two) == NAMES[:2]
    many = next_restarts(NAMES, (), ready(A), baseline=baseline, start_parallel=12, min_ready=0.5)
    assert list(many) == NAMES[:6]
    assert next_restarts(NAMES[2:], NAMES[:2], ready(A), baseline=baseline, start_parallel=2, min_ready=0.5) == ()


def test_one_goes_where_no_floor_can_be_kept_and_who_does_not_serve_costs_nothing() -> None:
    one = wanted_layout([("m", 12)])
    assert next_restarts(
        [one[0].placement.worker], (), ready(one), baseline={M: 12}, start_parallel=2, min_ready=0.5
    ) == (one[0].placement.worker,)
    strict = next_restarts(NAMES, (), ready(A), baseline={M: 12}, start_parallel=12, min_ready=1.0)
    assert list(strict) == NAMES[:1]
    idle = [*ready(A[:10]), slot(A[10], Phase.QUARANTINED), slot(A[11], Phase.DRAINED)]
    told = next_restarts(NAMES[9:], (), idle, baseline={M: 10}, start_parallel=12, min_ready=1.0)
    assert list(told) == [NAMES[9], NAMES[10], NAMES[11]]


@given(layouts, st.sampled_from([0.0, 0.5, 0.8, 1.0]), st.integers(1, 6), st.randoms(use_true_random=False))
def test_everybodys_turn_comes_and_the_floor_holds_where_more_than_one_is_away(
    widths: list[tuple[str, int]], min_ready: float, parallel: int, random: object
) -> None:
    world = {o.worker: o for o in ready(wanted_layout(widths))}
    baseline = {m: sum(o.weight for o in world.values() if o.model == m) for m in {o.model for o in world.values()}}
    pending, away, done = list(world), [], []
    while len(done) < len(world):
        told = next_restarts(
            pending, away, list(world.values()), baseline=baseline, start_parallel=parallel, min_ready=min_ready
        )
        for worker in told:
            pending.remove(worker)
            away.append(worker)
            world[worker] = replace(world[worker], phase=Phase.STOPPING)
        assert 0 < len(away) <= parallel
        for model, base in baseline.items():
            share = sum(o.weight for o in world.values() if o.model == model and o.is_serving) / base
            of_it = [worker for worker in away if world[worker].model == model]
            assert share >= min_ready or len(of_it) <= 1
        back = random.choice(away)  # type: ignore[attr-defined]
        away.remove(back)
        done.append(back)
        world[back] = replace(world[back], phase=Phase.READY)
