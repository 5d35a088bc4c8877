"""A change, from its beginning to one of its ends: it always has one, and the dry run shows the same orders.

``Play`` is the supervisor without processes: the same decisions, turn by turn, and workers that do as their fate is.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reconcile import layouts, one_owner_each, ready, wanted_layout

from l40sd.model import ModelName, OperationState, WorkerId
from l40sd.supervisor.pace import bound_back_s, bound_s
from l40sd.supervisor.reconcile import Do, Order, is_settled, ready_share
from l40sd.supervisor.rehearsal import Pace, rehearse
from l40sd.supervisor.rollout import (
    GIVEN_UP,
    End,
    Terms,
    begin,
    decide,
    keep,
    limits_for,
    models_leaving,
    newly_proven,
    not_in_place,
    speaks_against,
    state_at,
)
from l40sd.workers.lifecycle import COMING_UP, Goal, Phase
from l40sd.workers.slot import Observed, Wanted, slot

M = ModelName("m")
A = wanted_layout([("m", 1)] * 12)
B = wanted_layout([("m", 2)] * 6)


class Fate(StrEnum):
    """What becomes of a worker that is started."""

    COMES_UP = "comes up"
    NEVER_UP = "never comes up, nor fails"
    DIES = "fails until it is given up"
    REFUSED = "cannot be started"
    BLOCKED = "its GPUs are never free"
    FALLS = "comes up and answers no more probes"


ENDLESS = (Fate.NEVER_UP, Fate.BLOCKED)
QUARANTINE = 3


@dataclass
class Play:
    """One change, in passes of a second."""

    wanted: list[Wanted]
    previous: list[Wanted]
    world: dict[WorkerId, Observed]
    fates: dict[WorkerId, Fate]
    unkillable: frozenset[WorkerId]
    pace: Pace
    remembered: frozenset[str] = frozenset()
    limit_s: float | None = None  # None: as computed beforehand
    now_s: float = 0.0
    is_back: bool = False
    why: WorkerId | None = None
    turned_at: int | None = None
    orders: list[tuple[Do, WorkerId]] = field(default_factory=list)
    due_s: dict[WorkerId, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now = list(self.world.values())
        self.terms = begin(self.wanted, now, former=None, is_trial=True, remembered=self.remembered)
        self.forward_s = self.limit_s or bound_s(self.wanted, now, self.terms, self.pace)
        self.back_s = self.limit_s or bound_back_s(self.wanted, self.previous, self.pace)
        self.late_at_s = self.forward_s

    def run(self) -> End:
        """Take passes until the change has ended; it may not take longer than was known before."""
        for o in self.world.values():
            self._expect(o)
        while self.now_s <= self.forward_s + self.back_s + 1:
            decision = decide(
                self.wanted,
                list(self.world.values()),
                self.terms,
                start_parallel=self.pace.start_parallel,
                min_ready=self.pace.min_ready,
                is_late=self.now_s >= self.late_at_s,
            )
            self.terms = decision.terms
            if decision.back is not None:
                assert not self.is_back, "it went back twice"
                self.is_back, self.why, self.turned_at = True, decision.back, len(self.orders)
                self.wanted, self.terms = self.previous, replace(self.terms, is_trial=False)
                self.late_at_s = self.now_s + self.back_s
                continue
            serving = {o.worker for o in self.world.values() if o.is_serving}
            is_moving = any(o.phase in COMING_UP for o in kept(self.wanted, self.world))
            for order in decision.orders:
                self._carry_out(order)
            assert one_owner_each(self.world)
            gone = {order.worker for order in decision.orders if order.do is Do.RETIRE} & serving
            for model in {self.world[worker].model for worker in gone} if is_moving else ():
                assert self._share(model) >= self.pace.min_ready, "nothing is given up below the floor"
            if decision.end is not None:
                return decision.end
            if not decision.orders:
                self._go_on()
        raise AssertionError(f"not ended after {self.now_s} s: {self.world}")

    def _share(self, model: ModelName) -> float:
        return ready_share(model, self.wanted, self.world.values(), self.terms.baseline)

    def _carry_out(self, order: Order) -> None:
        if order.do in (Do.START, Do.RETIRE):
            self.orders.append((order.do, order.worker))
        match order.do:
            case Do.CREATE:
                self.world[order.worker] = slot(
                    next(w for w in self.wanted if w.placement.worker == order.worker), Phase.WAITING
                )
                self.terms = replace(self.terms, created=self.terms.created | {order.worker})
            case Do.START:
                self._become(replace(self.world[order.worker], phase=Phase.SPAWNING))
            case Do.RETIRE:
                self._retire(self.world[order.worker])
            case Do.FORGET:
                del self.world[order.worker]
                self.terms = replace(self.terms, created=self.terms.created - {order.worker})

    def _retire(self, o: Observed) -> None:
        if o.phase in (Phase.WAITING, Phase.BACKOFF, Phase.QUARANTINED, Phase.FAILED):
            self._become(replace(o, phase=Phase.STOPPED, goal=Goal.GONE))
        elif o.phase in (Phase.STOPPING, Phase.STUCK):
            self.world[o.worker] = replace(o, goal=Goal.GONE)
        else:
            self._become(replace(o, phase=Phase.DRAINING, goal=Goal.GONE))

    def _become(self, o: Observed) -> None:
        self.world[o.worker] = o
        self._expect(o)

    def _expect(self, o: Observed) -> None:
        self.due_s.pop(o.worker, None)
        match o.phase:
            case Phase.STARTING | Phase.SPAWNING:
                if self.fates.get(o.worker) is not Fate.NEVER_UP or o.phase is Phase.SPAWNING:
                    part_s = self.pace.load_s[o.model] / 2
                    self.due_s[o.worker] = self.now_s + part_s
            case Phase.DRAINING | Phase.STOPPING:
                self.due_s[o.worker] = self.now_s + self.pace.stop_s / 2
            case Phase.BACKOFF:
                self.due_s[o.worker] = self.now_s
            case _:
                pass

    def _go_on(self) -> None:
        """Go to the next moment at which something happens, or at which the time is up."""
        moments = [s for s in self.due_s.values() if s > self.now_s or s == self.now_s]
        self.now_s = max(self.now_s, min([*moments, max(self.late_at_s, self.now_s + 1)]))
        for worker in [w for w, due_s in self.due_s.items() if due_s <= self.now_s]:
            self._become(self._after(self.world[worker]))

    def _after(self, o: Observed) -> Observed:
        fate = self.fates.get(o.worker, Fate.COMES_UP)
        match o.phase:
            case Phase.BACKOFF:
                return replace(o, phase=Phase.WAITING)
            case Phase.DRAINING:
                return replace(o, phase=Phase.STOPPING)
            case Phase.STOPPING:
                return replace(o, phase=Phase.STUCK if o.worker in self.unkillable else Phase.STOPPED)
            case Phase.SPAWNING if fate is Fate.REFUSED:
                return replace(o, phase=Phase.FAILED)
            case Phase.SPAWNING if fate is Fate.BLOCKED:
                return replace(o, phase=Phase.BACKOFF)
            case Phase.SPAWNING:
                return replace(o, phase=Phase.STARTING)
            case Phase.STARTING if fate is Fate.DIES:
                failed = o.failed_starts + 1
                phase = Phase.QUARANTINED if failed >= QUARANTINE else Phase.BACKOFF
                return replace(o, phase=phase, failed_starts=failed)
            case Phase.STARTING if fate is Fate.FALLS:
                return replace(o, phase=Phase.UNREADY)
            case _:
                return replace(o, phase=Phase.READY)


def kept(wanted: list[Wanted], world: dict[WorkerId, Observed]) -> list[Observed]:
    """Return the workers that are wanted as they are."""
    there = [(w, world.get(w.placement.worker)) for w in wanted]
    return [o for w, o in there if o is not None and o.fingerprint == w.fingerprint and o.goal is not Goal.GONE]


def play(
    wanted: list[Wanted],
    previous: list[Wanted],
    *,
    fates: dict[str, Fate] | None = None,
    unkillable: frozenset[WorkerId] = frozenset(),
    world: list[Observed] | None = None,
    min_ready: float = 0.5,
    parallel: int = 2,
    limit_s: float | None = None,
    remembered: frozenset[str] = frozenset(),
) -> Play:
    return Play(
        wanted,
        previous,
        {o.worker: o for o in (ready(previous) if world is None else world)},
        {WorkerId(worker): fate for worker, fate in (fates or {}).items()},
        unkillable,
        Pace(start_parallel=parallel, min_ready=min_ready, load_s={M: 10.0, ModelName("n"): 6.0}, stop_s=4.0),
        remembered,
        limit_s,
    )


def test_a_change_whose_workers_come_up_is_done() -> None:
    change = play(B, A)
    assert change.run() == End()
    assert not change.is_back


def test_one_dead_gpu_is_no_reason_to_give_up_the_others_and_the_change_ends() -> None:
    """Seen: a worker of a proven kind was given up, everything went back, and the way back never ended."""
    change = play(B, A, fates={"m-gpu10-11": Fate.DIES})
    assert change.run() == End(missing=(WorkerId("m-gpu10-11"),))
    assert not change.is_back
    assert sum(o.phase is Phase.READY for o in change.world.values()) == 5


def test_a_way_back_ends_although_a_worker_of_before_does_not_come_back() -> None:
    """Seen: "going back ... 10 min", for ever: the first new worker failed, and so did an old one on that GPU."""
    change = play(B, A, fates={"m-gpu0-1": Fate.DIES, "m-gpu1": Fate.DIES})
    assert change.run() == End(missing=(WorkerId("m-gpu1"),))
    assert change.why == "m-gpu0-1"
    assert sum(o.phase is Phase.READY for o in change.world.values()) == 11


@pytest.mark.parametrize("phase", [Phase.QUARANTINED, Phase.FAILED, Phase.BACKOFF, Phase.UNREADY])
def test_a_worker_that_was_in_trouble_before_does_not_hold_up_the_change(phase: Phase) -> None:
    """It is wanted as it is, so nothing touches it, and the change waited for it for ever."""
    n = [*wanted_layout([("m", 1)] * 10), *wanted_layout([("m", 1)] * 10 + [("n", 2)])[-1:]]
    world = [replace(o, phase=phase) if o.worker == "m-gpu0" else o for o in ready(A)]
    change = play(n, A, world=world, fates={"m-gpu0": Fate.BLOCKED}, min_ready=1.0)
    assert change.run() == End(missing=(WorkerId("m-gpu0"),))  # nor is it late, nor is going back any use
    assert not change.is_back
    assert change.world[WorkerId("n-gpu10-11")].phase is Phase.READY


@pytest.mark.parametrize("fate", ENDLESS)
def test_a_worker_that_never_comes_up_nor_fails_takes_the_change_back_at_its_deadline(fate: Fate) -> None:
    change = play(B, A, fates={"m-gpu0-1": fate})
    assert change.run() == End()
    assert (change.is_back, change.why) == (True, "m-gpu0-1")


def test_what_the_floor_can_do_without_is_late_and_the_rest_stays() -> None:
    change = play(B, A, fates={"m-gpu10-11": Fate.NEVER_UP})
    assert change.run() == End(missing=(WorkerId("m-gpu10-11"),), is_late=True)
    assert not change.is_back


def test_when_the_floor_is_lost_everything_goes_back() -> None:
    change = play(B, A, fates={w.placement.worker: Fate.DIES for w in B[1:]})
    assert change.run() == End()
    assert change.is_back
    assert change.terms.is_trial is False
    assert is_settled(A, list(change.world.values()))


def test_it_goes_back_when_the_floor_is_lost_and_not_when_all_have_been_tried() -> None:
    change = play(B, A, fates={w.placement.worker: Fate.DIES for w in B[1:]}, min_ready=0.8)
    change.run()
    assert (Do.RETIRE, "m-gpu11") not in change.orders[: change.turned_at]


def test_all_of_the_capacity_is_a_floor_as_well() -> None:
    change = play(B, A, fates={"m-gpu10-11": Fate.DIES}, min_ready=1.0)
    change.run()
    assert change.is_back


def test_a_worker_that_cannot_be_killed_is_named_and_the_rest_is_in_place() -> None:
    change = play(B, A, unkillable=frozenset({WorkerId("m-gpu4")}))
    assert set(change.run().missing) == {"m-gpu4-5", "m-gpu4"}
    assert sum(o.phase is Phase.READY for o in change.world.values()) == 5


def test_who_waits_beside_a_worker_that_cannot_be_killed_is_not_waited_for() -> None:
    """Neither wanted nor retired, because the way is not free anyway: found by the walk below."""
    world = [replace(slot(A[0], Phase.STUCK)), slot(A[1], Phase.BACKOFF), *ready(A[2:])]
    assert set(play(B, A, world=world).run().missing) == {"m-gpu0-1", "m-gpu0", "m-gpu1"}


def test_which_models_leave_service_is_known_before() -> None:
    n = wanted_layout([("n", 4)])
    assert models_leaving(n, begin(n, ready(A), former=None, is_trial=True).baseline) == ("m",)
    assert models_leaving(B, begin(B, ready(A), former=None, is_trial=True).baseline) == ()


def test_a_worker_that_is_wanted_as_it_is_has_nothing_to_prove_unless_a_replaced_change_made_it() -> None:
    unready = [replace(slot(A[0], Phase.UNREADY)), *ready(A[1:])]
    assert begin(A, unready[:1], former=None, is_trial=True).proven == {A[0].kind}
    former = Terms(baseline={}, created=frozenset({A[0].placement.worker}))
    assert begin(A, unready[:1], former=former, is_trial=True).proven == frozenset()
    assert begin(A, unready, former=former, is_trial=True).proven == {A[0].kind}


def test_a_launch_that_served_a_short_while_ago_is_not_put_on_trial_again() -> None:
    """Seen: D -> A left a GPU empty for a minute, although A had served minutes ago."""
    once = play(B, A, parallel=12)
    once.run()
    again = play(B, A, parallel=12, remembered=frozenset({B[0].fingerprint}))
    again.run()
    assert once.orders[:3] == [(Do.RETIRE, "m-gpu0"), (Do.RETIRE, "m-gpu1"), (Do.START, "m-gpu0-1")]
    assert [do for do, _ in again.orders[:6]] == [Do.RETIRE] * 6
    assert again.now_s < once.now_s


@pytest.mark.parametrize("min_ready", [0.0, 0.5, 1.0])
def test_every_fate_of_every_worker_has_its_end(min_ready: float) -> None:
    """Walked completely for three workers in new launches; a fate is that of the GPU, so the old worker shares it."""
    old, new = wanted_layout([("m", 1)] * 3), wanted_layout([("m", 1)] * 3, fingerprint="g")
    for fated in product(Fate, repeat=3):
        fates = {w.placement.worker: fate for w, fate in zip(new, fated, strict=True)}
        change = play(new, old, fates=dict(fates), min_ready=min_ready)
        end = change.run()
        unlucky = {worker for worker, fate in fates.items() if fate is not Fate.COMES_UP}
        assert end.missing or change.is_back or not unlucky, fated
        if not set(fated) & set(ENDLESS):
            fails_trial = fated[0] not in (Fate.COMES_UP, Fate.FALLS)
            assert change.is_back == (fails_trial or 3 - len(unlucky) < 3 * min_ready), fated
            assert set(end.missing) <= unlucky, fated
            assert not end.is_late, fated


fates = st.dictionaries(st.integers(0, 11), st.sampled_from(list(Fate)), max_size=4)
troubles = st.sampled_from([*GIVEN_UP, Phase.BACKOFF, Phase.UNREADY, Phase.STARTING, Phase.READY, Phase.READY])


@st.composite
def changes(draw: st.DrawFn, *, endless: bool = True) -> Play:
    """Any change, with any subset of its workers, old and new, in any trouble."""
    previous = wanted_layout(draw(layouts), fingerprint="f")
    wanted = wanted_layout(draw(layouts), fingerprint=draw(st.sampled_from("fg")))
    world = [slot(w, draw(troubles)) for w in previous]
    names = sorted({w.placement.worker for w in (*wanted, *previous)})
    drawn = {names[n % len(names)]: fate for n, fate in draw(fates).items()} if names else {}
    return play(
        wanted,
        previous,
        world=world,
        fates={name: fate for name, fate in drawn.items() if endless or fate not in ENDLESS},
        unkillable=frozenset(draw(st.sets(st.sampled_from(names), max_size=2))) if names else frozenset(),
        min_ready=draw(st.sampled_from([0.0, 0.5, 1.0])),
        parallel=draw(st.integers(1, 4)),
    )


@settings(max_examples=400, deadline=None)
@given(changes())
def test_every_change_ends_within_the_time_known_beforehand_and_says_what_is_missing(change: Play) -> None:
    end = change.run()
    now = list(change.world.values())
    assert change.now_s <= change.forward_s + change.back_s + 1
    assert end.missing == not_in_place(change.wanted, now)
    assert (end == End()) == is_settled(change.wanted, now)
    assert change.wanted == change.previous or not change.is_back


@settings(max_examples=400, deadline=None)
@given(changes(endless=False))
def test_a_change_whose_workers_all_come_to_rest_ends_without_its_deadline(change: Play) -> None:
    change.forward_s = change.back_s = change.late_at_s = 1e6
    end = change.run()
    assert not end.is_late
    assert change.now_s < 1e5


@settings(max_examples=400, deadline=None)
@given(changes())
def test_who_is_wanted_as_it_is_is_not_touched(change: Play) -> None:
    """Invariant 5, whatever becomes of the others."""
    untouched = {o.worker for o in kept(change.wanted, change.world)}
    change.run()
    if not change.is_back:
        assert not {worker for do, worker in change.orders if do is Do.RETIRE} & untouched


@settings(max_examples=400, deadline=None)
@given(
    layouts,
    layouts,
    st.lists(st.sampled_from([Phase.READY, Phase.READY, Phase.UNREADY, *GIVEN_UP]), min_size=12, max_size=12),
    st.sampled_from(["f", "g"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(1, 6),
)
def test_the_orders_that_a_dry_run_shows_are_those_of_the_change(
    before: list[tuple[str, int]],
    after: list[tuple[str, int]],
    phases: list[Phase],
    fingerprint: str,
    min_ready: float,
    parallel: int,
) -> None:
    """A kept worker whose probes fail counted as proven in the change and not in the dry run."""
    previous, wanted = wanted_layout(before), wanted_layout(after, fingerprint=fingerprint)
    world = [slot(w, phase) for w, phase in zip(previous, phases, strict=False)]
    change = play(wanted, previous, world=world, min_ready=min_ready, parallel=parallel)
    shown = rehearse(wanted, world, change.terms, change.pace)
    change.run()
    assert [(step.order.do, step.order.worker) for step in shown.steps] == change.orders[: change.turned_at]
    assert (shown.back is not None) == change.is_back
    assert change.is_back or shown.duration_s <= change.now_s <= change.forward_s


FOUR = wanted_layout([("m", 1)] * 4, fingerprint="g")
NAMES = [w.placement.worker for w in FOUR]


def made(*, is_proven: bool = True, is_trial: bool = True, created: Collection[WorkerId] = NAMES) -> Terms:
    proven = frozenset({FOUR[0].kind}) if is_proven else frozenset()
    return Terms(baseline={M: 4}, proven=proven, created=frozenset(created), is_trial=is_trial)


def as_they_are(*phases: Phase, fingerprint: str = "g") -> list[Observed]:
    return [replace(slot(w, phase), fingerprint=fingerprint) for w, phase in zip(FOUR, phases, strict=False)]


def against(
    world: list[Observed], terms: Terms, *, min_ready: float = 0.5, is_late: bool = False, is_still: bool = False
) -> WorkerId | None:
    return speaks_against(FOUR, world, terms, min_ready=min_ready, is_late=is_late, is_still=is_still)


READY, STARTING, WAITING = Phase.READY, Phase.STARTING, Phase.WAITING


@pytest.mark.parametrize("phase", [*sorted(GIVEN_UP), Phase.BACKOFF])
def test_one_failure_of_what_is_on_trial_speaks_against_the_change(phase: Phase) -> None:
    world = as_they_are(STARTING, phase, WAITING, WAITING)
    assert against(world, made(is_proven=False)) == NAMES[1]
    assert against(world, made()) is None, "another one has proven it: the floor decides"
    assert against(world, made(is_proven=False, is_trial=False)) is None, "there is nothing to go back to"
    assert against(world, made(is_proven=False, created=NAMES[:1])) is None, "it was in trouble before"
    assert against([replace(o, fingerprint="f") for o in world], made(is_proven=False)) is None, "it is not wanted"


def test_one_that_starts_again_after_it_failed_has_failed() -> None:
    world = as_they_are(STARTING, STARTING)
    assert against(world, made(is_proven=False)) is None
    assert against([world[0], replace(world[1], failed_starts=1)], made(is_proven=False)) == NAMES[1]


def test_those_given_up_speak_against_the_change_once_the_rest_is_less_than_the_floor() -> None:
    half = as_they_are(READY, READY, Phase.QUARANTINED, Phase.FAILED)
    assert against(half, made()) is None
    assert against(half, made(), min_ready=0.51) == NAMES[2]
    assert against(as_they_are(READY, Phase.BACKOFF, Phase.FAILED, Phase.BACKOFF), made()) is None, (
        "they are tried again"
    )
    assert against(as_they_are(Phase.STUCK, Phase.BACKOFF, Phase.FAILED, Phase.FAILED), made()) == NAMES[0]


def test_at_the_end_what_is_missing_speaks_against_the_change_unless_the_floor_can_do_without() -> None:
    half = as_they_are(READY, READY, STARTING, STARTING)
    assert against(half, made(), min_ready=1.0) is None, "its time is not up"
    for is_late, is_still in ((True, False), (False, True)):
        assert against(half, made(), is_late=is_late, is_still=is_still) is None
        assert against(half, made(), min_ready=0.51, is_late=is_late, is_still=is_still) == NAMES[2]
        settled = as_they_are(READY, READY, Phase.DRAINED, READY)
        assert against(settled, made(), min_ready=1.0, is_late=is_late, is_still=is_still) is None
        before = made(created=NAMES[:2])
        assert against(half, before, min_ready=1.0, is_late=is_late, is_still=is_still) is None, "as they were before"


def test_at_the_deadline_every_shape_has_proven_itself_and_nothing_of_before_is_left() -> None:
    three = as_they_are(READY, READY, READY)
    assert against(three, made(is_proven=False), is_late=True) == NAMES[3]
    assert against(three, made(is_proven=False), is_still=True) is None
    left = [*three, slot(A[4], READY)]
    assert against(left, made(), is_late=True) == NAMES[3]
    assert against(left, made(), is_still=True) is None
    for phase in (Phase.STUCK, Phase.STOPPED):  # nothing can be done about it
        assert against([*three, slot(A[4], phase)], made(), is_late=True) is None


def test_a_shape_is_proven_by_the_first_of_this_change_that_came_up() -> None:
    both = [*FOUR[:2], *wanted_layout([("m", 1), ("m", 1), ("n", 2)], fingerprint="g")[2:]]
    terms = Terms(baseline={}, created=frozenset(w.placement.worker for w in both))
    for phase in (READY, Phase.UNREADY, Phase.DRAINED):
        world = [slot(both[0], STARTING), slot(both[1], phase), slot(both[2], phase)]
        assert newly_proven(both, world, terms) == {both[1].kind: NAMES[1], both[2].kind: both[2].placement.worker}
    world = [slot(both[0], READY), slot(both[1], READY), slot(both[2], STARTING)]
    assert newly_proven(both, world, terms) == {both[0].kind: NAMES[0]}
    assert newly_proven(both, world, replace(terms, proven=frozenset({both[0].kind}))) == {}
    assert newly_proven(both, world, replace(terms, created=frozenset())) == {}


def test_what_has_to_prove_itself_is_all_that_is_wanted_and_has_not_unless_there_is_no_way_back() -> None:
    for terms, unproven in (
        (made(is_proven=False), {FOUR[0].kind}),
        (made(), set()),
        (made(is_proven=False, is_trial=False), set()),
    ):
        limits = limits_for(FOUR, terms, start_parallel=3, min_ready=0.25)
        assert limits.unproven == unproven
        assert (limits.start_parallel, limits.min_ready, limits.baseline) == (3, 0.25, {M: 4})


def test_a_change_is_measured_by_the_capacity_before_the_first_of_those_that_it_replaces() -> None:
    going = replace(slot(A[2], READY), goal=Goal.GONE)
    world = [*ready(A[:2]), going, *ready(wanted_layout([("m", 1)] * 3 + [("n", 2)])[3:])]
    n = ModelName("n")
    assert begin(FOUR, world, former=None, is_trial=True).baseline == {M: 2, n: 2}
    former = Terms(baseline={M: 12}, created=frozenset({NAMES[3]}))
    again = begin(FOUR, world, former=former, is_trial=True)
    assert (again.baseline, again.created) == ({M: 12, n: 2}, {NAMES[3]})
    assert begin(FOUR, world, former=None, is_trial=True).created == frozenset()
    leaving = [replace(o, goal=Goal.GONE) for o in ready(FOUR)]
    assert begin(FOUR, leaving, former=None, is_trial=True).proven == frozenset(), "what goes proves nothing"
    assert begin(FOUR, [], former=None, is_trial=True, remembered={"g"}).proven == {FOUR[0].kind}
    assert begin(FOUR, [], former=None, is_trial=True, remembered={"f"}).proven == frozenset()


def test_not_in_place_is_who_is_wanted_and_does_not_serve_then_who_should_be_gone() -> None:
    world = [*as_they_are(READY, Phase.DRAINED, Phase.UNREADY), slot(A[5], READY), slot(A[6], Phase.STOPPED)]
    assert not_in_place(FOUR, world) == (NAMES[2], NAMES[3], "m-gpu5")
    gone = replace(slot(FOUR[0], READY), goal=Goal.GONE)
    assert not_in_place(FOUR[:1], [gone]) == (NAMES[0], NAMES[0])


def test_a_model_leaves_service_when_it_had_workers_and_none_is_wanted() -> None:
    n, z = ModelName("n"), ModelName("z")
    assert models_leaving(FOUR, {z: 1, M: 4, n: 2, ModelName("none"): 0}) == ("n", "z")


@pytest.mark.parametrize(
    ("phase", "is_waited_for"),
    [
        (Phase.SPAWNING, True),
        (STARTING, True),
        (Phase.DRAINING, True),
        (Phase.STOPPING, True),
        (WAITING, True),
        (Phase.BACKOFF, True),
        (Phase.UNREADY, False),
        (Phase.QUARANTINED, False),
        (Phase.FAILED, False),
        (Phase.STUCK, False),
    ],
)
def test_a_change_goes_on_while_one_of_it_moves(phase: Phase, is_waited_for: bool) -> None:
    world = as_they_are(READY, READY, READY, phase)
    terms = made(is_trial=False)
    now = decide(FOUR, world, terms, start_parallel=0, min_ready=0.5)
    assert (now.orders, now.back) == ((), None)
    assert now.end == (None if is_waited_for else End(missing=(NAMES[3],)))
    late = decide(FOUR, world, terms, start_parallel=0, min_ready=0.5, is_late=True)
    assert late.end == End(missing=(NAMES[3],), is_late=is_waited_for)


def test_one_that_fails_again_and_again_is_waited_for_only_where_this_change_made_it() -> None:
    world = as_they_are(READY, READY, READY, Phase.BACKOFF)
    ended = decide(FOUR, world, made(created=NAMES[:3]), start_parallel=0, min_ready=0.5).end
    assert ended == End(missing=(NAMES[3],))


def test_one_that_is_told_to_go_is_waited_for_unless_it_cannot_be_killed() -> None:
    for phase, end in ((READY, None), (Phase.STUCK, End(missing=(A[5].placement.worker,)))):
        leaving = replace(slot(A[5], phase), goal=Goal.GONE)
        world = [*as_they_are(READY, READY, READY, READY), leaving]
        assert decide(FOUR, world, made(), start_parallel=2, min_ready=0.5).end == end


def test_a_decision_that_goes_back_gives_no_orders_and_knows_what_was_proven() -> None:
    world = [*as_they_are(READY, Phase.QUARANTINED, Phase.QUARANTINED, Phase.QUARANTINED)]
    back = decide(FOUR, world, made(is_proven=False), start_parallel=2, min_ready=0.5)
    assert (back.back, back.orders, back.end) == (NAMES[1], (), None)
    assert back.proven == {FOUR[0].kind: NAMES[0]}
    assert back.terms.proven == {FOUR[0].kind}
    without_trial = decide(FOUR, world, made(is_proven=False, is_trial=False), start_parallel=2, min_ready=0.5)
    assert (without_trial.back, without_trial.proven) == (None, {})


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (End(), OperationState.DONE),
        (End(missing=(A[0].placement.worker,)), OperationState.INCOMPLETE),
        (End(is_late=True), OperationState.INCOMPLETE),
    ],
)
def test_a_change_is_done_only_when_all_of_it_is_in_place_in_time(end: End, state: OperationState) -> None:
    assert state_at(end, is_back=False) is state
    assert state_at(end, is_back=True) is OperationState.ROLLED_BACK


def test_outside_a_change_nothing_is_on_trial_and_the_floor_of_an_incomplete_one_holds() -> None:
    there = ready(A)
    settled = keep(A, there, {}, start_parallel=12, min_ready=1.0)
    assert (settled.orders, settled.end, settled.back) == ((), End(), None)
    free = keep(B, there, {}, start_parallel=12, min_ready=1.0)
    floored = keep(B, there, {M: 12}, start_parallel=12, min_ready=1.0)
    assert sum(order.do is Do.RETIRE for order in free.orders) == 12, "no floor: all at once, none on trial"
    assert sum(order.do is Do.RETIRE for order in floored.orders) == 2, "one group goes, or nothing would move"
    assert (free.end, floored.end, floored.proven) == (None, None, {})
