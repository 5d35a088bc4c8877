"""Reconciling: never two owners of a GPU, always gets there, keeps the floor, tries one before it touches the next."""

from dataclasses import replace

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from l40sd.model import GpuId, ModelName, Placement, WorkerId
from l40sd.supervisor.reconcile import (
    Do,
    Limits,
    Order,
    base_capacity,
    capacity,
    drain_events,
    is_settled,
    ready_share,
    reconcile,
)
from l40sd.supervisor.rehearsal import Pace, Step, rehearse
from l40sd.supervisor.rollout import begin, limits_for
from l40sd.workers.lifecycle import Event, Goal, Phase
from l40sd.workers.slot import Observed, Wanted, slot

GPUS = [GpuId(f"GPU-{i:02}") for i in range(12)]


def wanted_layout(widths: list[tuple[str, int]], fingerprint: str = "f", pp: int = 1) -> list[Wanted]:
    """Return workers side by side on the host's GPUs: (model, GPUs each)."""
    out: list[Wanted] = []
    at = 0
    for model, width in widths:
        gpus = tuple(GPUS[at : at + width])
        at += width
        name = WorkerId(f"{model}-gpu{'-'.join(str(GPUS.index(g)) for g in gpus)}" + (f"-pp{pp}" if pp > 1 else ""))
        placement = Placement(worker=name, model=ModelName(model), tp=width // pp, pp=pp, gpus=gpus)
        out.append(Wanted(placement=placement, fingerprint=fingerprint))
    return out


A = wanted_layout([("m", 1)] * 12)
B = wanted_layout([("m", 2)] * 6)
C = wanted_layout([("m", 4)] * 3)


def ready(wanted: list[Wanted]) -> list[Observed]:
    return [slot(w, Phase.READY) for w in wanted]


def limits_of(observed: list[Observed], wanted: list[Wanted], *, min_ready: float = 0.5, parallel: int = 2) -> Limits:
    terms = begin(wanted, observed, former=None, is_trial=True)
    return limits_for(wanted, terms, start_parallel=parallel, min_ready=min_ready)


def steps_of(observed: list[Observed], wanted: list[Wanted], *, min_ready: float = 0.5) -> tuple[Step, ...]:
    pace = Pace(start_parallel=2, min_ready=min_ready, load_s={}, stop_s=0.0)
    return rehearse(wanted, observed, begin(wanted, observed, former=None, is_trial=True), pace).steps


def test_an_empty_host_starts_two_at_a_time() -> None:
    orders = reconcile(A, [], Limits(start_parallel=2, min_ready=0.5, baseline={}))
    assert [o.do for o in orders] == [Do.CREATE] * 12
    waiting = [slot(w, Phase.WAITING) for w in A]
    starts = reconcile(A, waiting, Limits(start_parallel=2, min_ready=0.5, baseline={}))
    assert [(o.do, o.worker) for o in starts] == [(Do.START, A[0].placement.worker), (Do.START, A[1].placement.worker)]


def test_a_settled_host_is_left_alone() -> None:
    assert reconcile(A, ready(A), limits_of(ready(A), A)) == ()
    assert is_settled(A, ready(A))
    assert not is_settled(B, ready(A))


def test_the_first_new_worker_proves_itself_before_the_next_is_touched() -> None:
    limits = limits_of(ready(A), B)
    first = reconcile(B, ready(A), limits)
    assert [(o.do, o.worker) for o in first] == [(Do.RETIRE, "m-gpu0"), (Do.RETIRE, "m-gpu1")]
    world = [o for o in ready(A) if o.worker not in ("m-gpu0", "m-gpu1")]
    for phase in (Phase.WAITING, Phase.SPAWNING, Phase.STARTING, Phase.BACKOFF):
        orders = reconcile(B, [*world, slot(B[0], phase)], limits)
        assert not [o for o in orders if o.do is Do.RETIRE], phase
    proven = replace(limits, unproven=frozenset())
    after = reconcile(B, [*world, slot(B[0], Phase.READY)], proven)
    assert len([o for o in after if o.do is Do.RETIRE]) == 4  # two pairs: as many as may start at once


def test_the_floor_of_ready_capacity_is_kept() -> None:
    for wanted in (B, C):
        steps = steps_of(ready(A), wanted)
        assert min(s.ready[ModelName("m")] for s in steps) >= 0.5
    strict = steps_of(ready(A), B, min_ready=0.8)
    assert min(s.ready[ModelName("m")] for s in strict) >= 0.8


def test_one_replica_on_all_gpus_is_replaced_although_no_floor_can_be_kept() -> None:
    one = wanted_layout([("m", 12)])
    steps = steps_of(ready(one), A)
    assert steps[0].order.do is Do.RETIRE
    assert len([s for s in steps if s.order.do is Do.START]) == 12


def test_a_stuck_worker_holds_its_gpus_and_the_rest_goes_on() -> None:
    stuck = replace(slot(A[0], Phase.STUCK), goal=Goal.GONE)
    world = [stuck, *ready(A)[1:]]
    orders = reconcile(B, world, replace(limits_of(world, B), unproven=frozenset()))
    assert {o.worker for o in orders if o.do is Do.RETIRE} == {"m-gpu2", "m-gpu3", "m-gpu4", "m-gpu5"}


def test_an_unchanged_worker_is_not_touched() -> None:
    mixed = [*wanted_layout([("m", 1)] * 4), *wanted_layout([("m", 1)] * 4 + [("n", 4), ("n", 4)])[4:]]
    for step in steps_of(ready(A), mixed):
        assert step.order.worker not in {"m-gpu0", "m-gpu1", "m-gpu2", "m-gpu3"}


def test_a_new_launch_replaces_a_worker_in_place_and_one_at_a_time_until_proven() -> None:
    renewed = wanted_layout([("m", 1)] * 12, fingerprint="g")
    limits = limits_of(ready(A), renewed)
    first = reconcile(renewed, ready(A), limits)
    assert [(o.do, o.worker) for o in first] == [(Do.RETIRE, "m-gpu0")]


layouts = st.lists(st.tuples(st.sampled_from(["m", "n"]), st.sampled_from([1, 2, 3, 4])), min_size=0, max_size=12).map(
    lambda widths: [w for i, w in enumerate(widths) if sum(g for _, g in widths[: i + 1]) <= 12]
)
phases = st.sampled_from([p for p in Phase if p is not Phase.STOPPED])


@st.composite
def worlds(draw: st.DrawFn) -> list[Observed]:
    """Any set of workers in any phase that owns each GPU at most once."""
    present = wanted_layout(draw(layouts), fingerprint=draw(st.sampled_from("fg")))
    return [
        replace(slot(w, draw(phases)), goal=draw(st.sampled_from([Goal.SERVE, Goal.SERVE, Goal.GONE, Goal.REST])))
        for w in present
    ]


def carry_out(world: dict[WorkerId, Observed], order: Order, wanted: list[Wanted]) -> None:
    """Do one order the way a worker does it: a retired one stays on its GPUs until it has stopped."""
    by_id = {w.placement.worker: w for w in wanted}
    match order.do:
        case Do.CREATE:
            assert order.worker not in world
            world[order.worker] = slot(by_id[order.worker], Phase.WAITING)
        case Do.START:
            assert world[order.worker].phase is Phase.WAITING
            world[order.worker] = replace(world[order.worker], phase=Phase.STARTING)
        case Do.RETIRE:
            assert world[order.worker].goal is not Goal.GONE
            world[order.worker] = replace(world[order.worker], goal=Goal.GONE)
        case Do.FORGET:
            assert world[order.worker].phase is Phase.STOPPED
            del world[order.worker]


def one_owner_each(world: dict[WorkerId, Observed]) -> bool:
    held = [g for o in world.values() if o.phase is not Phase.STOPPED for g in o.gpus]
    return len(held) == len(set(held))


@settings(max_examples=examples(400), deadline=None)
@given(worlds(), layouts, st.randoms(use_true_random=False), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 4))
def test_from_any_state_in_any_order_of_events_the_wanted_layout_is_reached_and_no_gpu_ever_has_two_owners(
    start: list[Observed], widths: list[tuple[str, int]], random: object, min_ready: float, parallel: int
) -> None:
    """Orders are abandoned half way and asked again; workers move on at random (invariants 1 and 4)."""
    wanted = wanted_layout(widths)
    world = {o.worker: o for o in start}
    limits = limits_of(start, wanted, min_ready=min_ready, parallel=parallel)
    for turn in range(600):
        now = list(world.values())
        if is_settled(wanted, now):
            return
        orders = list(reconcile(wanted, now, limits))
        done = len(orders) if turn % 3 == 2 else random.randint(0, len(orders))  # type: ignore[attr-defined]
        for order in orders[:done]:
            carry_out(world, order, wanted)
            assert one_owner_each(world)
        movable = [o for o in world.values() if next_phase(o) is not o.phase]
        if movable:
            o = random.choice(movable)  # type: ignore[attr-defined]
            world[o.worker] = replace(o, phase=next_phase(o))
            if world[o.worker].is_serving:
                limits = replace(limits, unproven=limits.unproven - {o.kind})
        assert len([o for o in world.values() if o.phase in (Phase.STARTING, Phase.SPAWNING)]) <= max(
            parallel, len([o for o in start if o.phase in (Phase.STARTING, Phase.SPAWNING)])
        )
    raise AssertionError(f"not settled: {world}")


def next_phase(o: Observed) -> Phase:
    """Return where a worker goes when all goes well."""
    if o.goal is Goal.GONE:
        return Phase.STOPPED
    match o.phase:
        case Phase.SPAWNING | Phase.STARTING | Phase.UNREADY | Phase.DRAINING:
            return Phase.READY
        case Phase.BACKOFF | Phase.QUARANTINED | Phase.FAILED | Phase.STUCK | Phase.STOPPING:
            return Phase.WAITING
        case _:
            return o.phase


def test_what_keeps_the_floor_goes_first_so_that_it_makes_room_for_the_rest() -> None:
    """Seen with 8B on GPUs 0-3 and 70B on three TP2 groups: the 8B went to nothing although it need not."""
    day = wanted_layout([("small", 1)] * 4 + [("large", 2)] * 4)
    night = [
        *wanted_layout([("large", 4)]),
        *wanted_layout([("small", 1)] * 4 + [("large", 2)] * 3 + [("small", 2)])[-1:],
        *wanted_layout([("small", 1)] * 4 + [("small", 2)])[-1:],
        *wanted_layout([("small", 1)] * 6 + [("large", 4)])[-1:],
    ]
    steps = steps_of(ready(day), night)
    assert min(s.ready[ModelName("small")] for s in steps) >= 0.5
    assert min(s.ready[ModelName("large")] for s in steps) >= 0.5


M, N = ModelName("m"), ModelName("n")


def going(o: Observed) -> Observed:
    return replace(o, goal=Goal.GONE)


def did(orders: tuple[Order, ...], do: Do) -> list[WorkerId]:
    return [o.worker for o in orders if o.do is do]


def test_the_floor_is_a_share_of_what_was_or_of_what_shall_be_if_that_is_less() -> None:
    both = wanted_layout([("m", 2), ("m", 2), ("n", 4)])
    assert base_capacity(M, both, {M: 12}) == 4
    assert base_capacity(M, both, {M: 3}) == 3
    assert base_capacity(N, both, {M: 12}) == 0, "it was not there: nothing of it can be kept"
    assert base_capacity(N, both, {N: 1}) == 1


def test_the_share_of_ready_capacity_counts_gpus_that_serve_this_model_and_is_at_most_all() -> None:
    both = wanted_layout([("m", 2), ("m", 2), ("n", 4)])
    one_of_two = [slot(both[0], Phase.READY), slot(both[1], Phase.STARTING), slot(both[2], Phase.READY)]
    assert ready_share(M, both, one_of_two, {M: 4}) == 0.5
    assert ready_share(M, both, [*ready(both[:1]), going(slot(both[1], Phase.READY))], {M: 4}) == 0.5
    assert ready_share(M, both, ready(both), {M: 2}) == 1.0
    assert ready_share(M, both, [], {N: 4}) == 1.0, "it has no floor"


def test_the_capacity_of_a_model_is_in_gpus_and_leaves_out_what_goes() -> None:
    three = wanted_layout([("m", 2), ("m", 3), ("n", 4)])
    world = [slot(three[0], Phase.READY), slot(three[1], Phase.BACKOFF), slot(three[2], Phase.WAITING)]
    assert capacity(world) == {M: 5, N: 4}
    assert capacity([going(world[0]), *world[1:]]) == {M: 3, N: 4}
    assert capacity([world[0], slot(three[1], Phase.STOPPED), going(slot(three[2], Phase.STOPPED))]) == {M: 2}
    assert capacity([slot(three[2], Phase.STOPPED)]) == {}


def test_a_host_is_settled_when_exactly_what_is_wanted_is_there_and_serves_or_rests() -> None:
    two = wanted_layout([("m", 1), ("m", 1)])
    assert is_settled(two, ready(two))
    assert is_settled(two, [slot(two[0], Phase.READY), slot(two[1], Phase.DRAINED)])
    assert not is_settled(two, ready(two[:1]))
    assert not is_settled(two[:1], ready(two)), "one too many"
    assert not is_settled(two, [slot(two[0], Phase.READY), slot(two[1], Phase.UNREADY)])
    assert not is_settled(two, [slot(two[0], Phase.READY), going(slot(two[1], Phase.READY))])
    assert not is_settled(two, ready(wanted_layout([("m", 1), ("m", 1)], fingerprint="g")))


def test_a_slot_is_made_once_and_not_before_its_gpus_are_free() -> None:
    renewed = wanted_layout([("m", 1)], fingerprint="g")
    limits = Limits(start_parallel=2, min_ready=0.5, baseline={})
    elsewhere = replace(slot(renewed[0], Phase.WAITING), gpus=(GPUS[5],))
    assert did(reconcile(renewed, [elsewhere], limits), Do.CREATE) == [], "its name is taken"
    assert did(reconcile(renewed, [slot(B[0], Phase.STOPPING)], limits), Do.CREATE) == [], "its GPU is held"
    gone = reconcile(renewed, [slot(A[0], Phase.STOPPED)], limits)
    assert [o.do for o in gone] == [Do.FORGET, Do.CREATE], "made in the same pass in which the former one is forgotten"


def test_the_floor_may_be_reached_but_not_crossed() -> None:
    """Half of four GPUs may go, not one more; b and c leave it to the floor."""
    four, renewed = A[:4], wanted_layout([("m", 1)] * 4, fingerprint="g")
    limits = Limits(start_parallel=9, min_ready=0.5, baseline={M: 4})
    assert did(reconcile(renewed, ready(four), limits), Do.RETIRE) == ["m-gpu0", "m-gpu1"]
    assert did(reconcile(renewed, ready(four), replace(limits, min_ready=0.51)), Do.RETIRE) == ["m-gpu0"]


def test_what_is_being_cleared_and_what_is_coming_up_are_both_on_their_way() -> None:
    renewed = wanted_layout([("m", 1)] * 6, fingerprint="g")
    world = [going(slot(A[0], Phase.DRAINING)), slot(renewed[1], Phase.STARTING), *ready(A[2:6])]
    limits = Limits(start_parallel=3, min_ready=0.0, baseline={M: 6})
    assert did(reconcile(renewed, world, limits), Do.RETIRE) == ["m-gpu2"]
    assert did(reconcile(renewed, world, replace(limits, start_parallel=2)), Do.RETIRE) == []
    waiting = [going(slot(A[0], Phase.DRAINING)), slot(renewed[1], Phase.WAITING), *ready(A[2:6])]
    assert did(reconcile(renewed, waiting, limits), Do.RETIRE) == ["m-gpu2"]


def test_the_cheapest_way_comes_first_by_ready_gpus_given_up_for_each_gpu_gained() -> None:
    """Two GPUs for a group of four cost less than one for one; a group whose GPUs serve nobody costs nothing."""
    night = wanted_layout([("m", 1), ("m", 4), ("m", 1)], fingerprint="g")
    day = [slot(A[0], Phase.READY), slot(A[1], Phase.READY), slot(A[2], Phase.READY), slot(A[5], Phase.READY)]
    limits = Limits(start_parallel=1, min_ready=0.0, baseline={M: 4})
    assert did(reconcile(night, day, limits), Do.RETIRE) == ["m-gpu1", "m-gpu2"]
    idle = [*day[:3], slot(A[5], Phase.UNREADY)]
    assert did(reconcile(night, idle, limits), Do.RETIRE) == ["m-gpu5"]


def test_one_group_that_the_floor_holds_back_does_not_hold_back_the_next() -> None:
    night = wanted_layout([("m", 1), ("m", 1), ("n", 1), ("n", 1)], fingerprint="g")
    day = ready(wanted_layout([("m", 1), ("m", 1), ("n", 1), ("n", 1)]))
    limits = Limits(start_parallel=3, min_ready=0.5, baseline={M: 2, N: 2})
    assert did(reconcile(night, day, limits), Do.RETIRE) == ["m-gpu0", "n-gpu2"]


def test_a_kind_on_trial_starts_one_and_lets_the_others_pass() -> None:
    waiting = [slot(w, Phase.WAITING) for w in wanted_layout([("m", 1), ("m", 1), ("n", 1)])]
    limits = Limits(start_parallel=3, min_ready=0.0, baseline={}, unproven=frozenset({waiting[0].kind}))
    wanted = wanted_layout([("m", 1), ("m", 1), ("n", 1)])
    assert did(reconcile(wanted, waiting, limits), Do.START) == ["m-gpu0", "n-gpu2"]
    on_trial = [slot(wanted[0], Phase.STARTING), *waiting[1:]]
    assert did(reconcile(wanted, on_trial, limits), Do.START) == ["n-gpu2"]


def test_the_model_with_the_least_ready_capacity_starts_first() -> None:
    wanted = wanted_layout([("m", 1), ("m", 1), ("n", 1), ("n", 1)])
    world = [slot(wanted[0], Phase.READY), *(slot(w, Phase.WAITING) for w in wanted[1:])]
    limits = Limits(start_parallel=1, min_ready=0.0, baseline={M: 2, N: 2})
    assert did(reconcile(wanted, world, limits), Do.START) == ["n-gpu2"]


def test_what_is_in_nobodys_way_goes_when_all_else_is_done() -> None:
    """It serves on until what replaces it does."""
    wanted, extra = A[:2], ready(A[2:4])
    limits = Limits(start_parallel=2, min_ready=1.0, baseline={M: 4})
    assert did(reconcile(wanted, [*ready(wanted), *extra], limits), Do.RETIRE) == ["m-gpu2", "m-gpu3"]
    assert did(reconcile(wanted, [slot(A[0], Phase.READY), *extra], limits), Do.RETIRE) == ["m-gpu2"], "one is missing"
    coming = [slot(A[0], Phase.READY), slot(A[1], Phase.STARTING), *extra]
    assert did(reconcile(wanted, coming, limits), Do.RETIRE) == ["m-gpu2"], "one is coming up"
    given_up = [slot(A[0], Phase.READY), slot(A[1], Phase.QUARANTINED), *extra]
    assert did(reconcile(wanted, given_up, limits), Do.RETIRE) == ["m-gpu2", "m-gpu3"], "nothing more will come"
    stuck = going(replace(slot(A[1], Phase.STUCK), worker=WorkerId("old")))
    assert did(reconcile(wanted, [slot(A[0], Phase.READY), stuck, *extra], limits), Do.RETIRE) == ["m-gpu2"], (
        "it may let go"
    )
    useless = [slot(A[0], Phase.STARTING), slot(A[1], Phase.STARTING), slot(A[2], Phase.UNREADY)]
    assert did(reconcile(wanted, useless, limits), Do.RETIRE) == ["m-gpu2"], "it serves nobody"
    first_goes = [*ready(wanted), going(extra[0]), extra[1]]
    assert did(reconcile(wanted, first_goes, limits), Do.RETIRE) == ["m-gpu3"], "the other is told already"


def test_what_is_not_wanted_any_more_stays_while_something_is_on_trial() -> None:
    wanted = A[:2]
    limits = Limits(
        start_parallel=2, min_ready=0.0, baseline={M: 3}, unproven=frozenset({slot(A[0], Phase.READY).kind})
    )
    world = [slot(A[0], Phase.STARTING), slot(A[1], Phase.WAITING), slot(A[2], Phase.UNREADY)]
    assert did(reconcile(wanted, world, limits), Do.RETIRE) == []
    assert did(reconcile(wanted, world, replace(limits, unproven=frozenset())), Do.RETIRE) == ["m-gpu2"]


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("goal", Goal)
def test_who_was_drained_is_told_to_rest_and_nobody_else(phase: Phase, goal: Goal) -> None:
    """In every other phase it would not be heard, and is told later; what restarts or goes is left to that."""
    o = replace(slot(A[0], phase), goal=goal)
    rests = goal is Goal.SERVE and phase in (Phase.WAITING, Phase.READY, Phase.UNREADY)
    serves = goal is Goal.REST and phase in (Phase.WAITING, Phase.STARTING, Phase.DRAINING, Phase.DRAINED)
    assert drain_events([o], {o.worker}) == ({o.worker: Event.DRAIN} if rests else {})
    assert drain_events([o], set()) == ({o.worker: Event.UNDRAIN} if serves else {})
