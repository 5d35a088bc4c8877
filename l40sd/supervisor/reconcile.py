"""Observed + wanted + limits -> what to do next.

``reconcile`` is asked again after every change, so nothing is a one-shot edge that can be lost: what it says may be
abandoned after any step and asked for anew (invariant 4). It never lets a GPU have two owners, because a worker is
created only when nobody observed holds any of its GPUs (invariant 1), and it never touches a worker that is wanted as
it is (invariant 5).

A change goes GPU group by GPU group. What has to go is retired only when

    a. the model keeps its floor of ready capacity without it, or nothing else is on its way (else nothing would move);
    b. everything started so far of a new kind has proven itself with one real answer;
    c. no more groups are on their way than may start at once: capacity is not given up before it can be rebuilt.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from l40sd.model import ModelName, ReplicaKind, WorkerId
from l40sd.workers.lifecycle import COMING_UP, Event, Goal, Phase
from l40sd.workers.slot import Observed, Wanted, is_kept

ON_TRIAL = COMING_UP | {Phase.WAITING, Phase.STOPPING, Phase.BACKOFF, Phase.QUARANTINED, Phase.FAILED}
"""Phases of a worker that has yet to give its first answer. One that is idle by the operator's wish has given it."""

HEAR_DRAIN = (Phase.WAITING, Phase.READY, Phase.UNREADY)
HEAR_UNDRAIN = (Phase.WAITING, Phase.STARTING, Phase.DRAINING, Phase.DRAINED)
"""Phases in which a worker can be told; it passes one of them before it serves, or rests, for the next time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a pass must respect.

    Attributes:
        baseline: Each model's capacity in GPUs when the change began; the floor is a share of the smaller of this
            and what is wanted. Empty outside a change: then nothing needs a floor.
        unproven: Kinds that have not yet given one real answer in this change.
    """

    start_parallel: int
    min_ready: float
    baseline: Mapping[ModelName, int]
    unproven: frozenset[ReplicaKind] = frozenset()


class Do(StrEnum):
    """A step's verb."""

    CREATE = "create"  # make the slot: its GPUs are free
    START = "start"  # let it start now
    RETIRE = "retire"  # drain, then stop
    FORGET = "forget"  # nothing is left of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One thing to do now."""

    do: Do
    worker: WorkerId
    why: str = ""


def reconcile(wanted: Sequence[Wanted], observed: Sequence[Observed], limits: Limits) -> tuple[Order, ...]:
    """Return what to do now, in this order; empty when there is nothing to do but wait, or nothing at all.

    1. Forget what is gone.
    2. Create wanted workers whose GPUs nobody holds.
    3. Let waiting workers start, those of the model with the least ready capacity first.
    4. Retire what is in the way of the next GPU group, or of nobody but not wanted.
    """
    return (
        *(Order(do=Do.FORGET, worker=o.worker) for o in observed if o.phase is Phase.STOPPED),  # 1
        *_creations(wanted, observed),  # 2
        *_starts(wanted, observed, limits),  # 3
        *_retirements(wanted, observed, limits),  # 4
    )


def is_settled(wanted: Sequence[Wanted], observed: Sequence[Observed]) -> bool:
    """Return whether exactly the wanted workers exist and each is ready, or idle by the operator's wish."""
    by_id = {o.worker: o for o in observed}
    return len(observed) == len(wanted) and all(
        (o := by_id.get(w.placement.worker)) is not None
        and o.fingerprint == w.fingerprint
        and o.phase in (Phase.READY, Phase.DRAINED)
        and o.goal is not Goal.GONE
        for w in wanted
    )


def ready_share(
    model: ModelName, wanted: Sequence[Wanted], observed: Iterable[Observed], baseline: Mapping[ModelName, int]
) -> float:
    """Return the model's ready capacity over what its floor is measured against; 1.0 for a model without one."""
    base = base_capacity(model, wanted, baseline)
    return 1.0 if base == 0 else min(1.0, _ready(model, observed) / base)


def _creations(wanted: Sequence[Wanted], observed: Sequence[Observed]) -> Iterable[Order]:
    held = {gpu for o in observed if o.phase is not Phase.STOPPED for gpu in o.gpus}
    taken = {o.worker for o in observed if o.phase is not Phase.STOPPED}
    for w in wanted:
        if w.placement.worker not in taken and held.isdisjoint(w.placement.gpus):
            yield Order(do=Do.CREATE, worker=w.placement.worker)


def _starts(wanted: Sequence[Wanted], observed: Sequence[Observed], limits: Limits) -> Iterable[Order]:
    """At most ``start_parallel`` at once, and of a kind that has yet to prove itself one."""
    coming = [o for o in observed if o.phase in COMING_UP]
    room = limits.start_parallel - len(coming)
    on_trial = {o.kind for o in coming} & limits.unproven
    by_id = {w.placement.worker: w for w in wanted}
    waiting = [o for o in observed if o.phase is Phase.WAITING and is_kept(o, by_id.get(o.worker))]
    order = {w.placement.worker: n for n, w in enumerate(wanted)}
    waiting.sort(key=lambda o: (ready_share(o.model, wanted, observed, limits.baseline), order[o.worker]))
    for o in waiting:
        if room <= 0:
            return
        if o.kind in on_trial:
            continue
        if o.kind in limits.unproven:
            on_trial.add(o.kind)
        room -= 1
        yield Order(do=Do.START, worker=o.worker)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """The alive workers, sorted by what is to become of them.

    Attributes:
        outgoing: Not wanted as they are, whether already told to go or not.
        sets: Each wanted worker that does not exist, and who is in its way.
        on_its_way: GPU groups being cleared or started. One behind a stuck worker is not on its way: the rest goes on.
        trial: Unproven kinds that are being started, or their GPUs being cleared for them.
    """

    alive: tuple[Observed, ...]
    outgoing: tuple[Observed, ...]
    missing: tuple[Wanted, ...]
    sets: tuple[tuple[Wanted, tuple[Observed, ...]], ...]
    on_its_way: int
    trial: frozenset[ReplicaKind]


def _scene(wanted: Sequence[Wanted], observed: Sequence[Observed], limits: Limits) -> _Scene:
    alive = tuple(o for o in observed if o.phase is not Phase.STOPPED)
    by_id = {w.placement.worker: w for w in wanted}
    kept = tuple(o for o in alive if is_kept(o, by_id.get(o.worker)))
    outgoing = tuple(o for o in alive if o not in kept)
    present = {o.worker for o in kept}
    missing = tuple(w for w in wanted if w.placement.worker not in present)
    sets = tuple((w, _in_the_way(w, outgoing)) for w in missing)
    clearing = [
        w for w, way in sets if all(o.goal is Goal.GONE for o in way) and not any(o.phase is Phase.STUCK for o in way)
    ]
    coming = [o for o in kept if o.phase in COMING_UP or o.phase is Phase.WAITING]
    return _Scene(
        alive=alive,
        outgoing=outgoing,
        missing=missing,
        sets=sets,
        on_its_way=len(clearing) + len(coming),
        trial=frozenset(({w.kind for w in clearing} | {o.kind for o in kept if o.phase in ON_TRIAL}) & limits.unproven),
    )


def _retirements(wanted: Sequence[Wanted], observed: Sequence[Observed], limits: Limits) -> Iterable[Order]:
    """Yield what to retire now, see a, b and c above.

    Candidates are whole sets: everything in the way of one wanted GPU group. The cheapest set comes first (fewest ready
    GPUs given up for each GPU gained), then the wanted order, which is the order of the host's GPUs.
    """
    scene = _scene(wanted, observed, limits)
    movable = [(w, way) for w, way in scene.sets if not any(o.phase is Phase.STUCK for o in way)]
    todo = [(w, tuple(o for o in way if o.goal is not Goal.GONE)) for w, way in movable]
    todo = sorted(((w, way) for w, way in todo if way), key=lambda pair: _cost(*pair))
    # What keeps the floor comes first: it may well be what makes room for the rest.
    todo.sort(key=lambda pair: not _keeps_floor(pair[1], wanted, scene.alive, (), limits))
    on_its_way, trial = scene.on_its_way, scene.trial
    gone: set[WorkerId] = set()
    for w, way in todo:
        if trial or on_its_way >= limits.start_parallel:  # b, c
            break
        if on_its_way and not _keeps_floor(way, wanted, scene.alive, gone, limits):  # a
            continue
        why = f"its GPUs are wanted for {w.placement.worker}"
        yield from (Order(do=Do.RETIRE, worker=o.worker, why=why) for o in way if o.worker not in gone)
        gone.update(o.worker for o in way)
        on_its_way += 1
        trial = trial | ({w.kind} & limits.unproven)
    if not trial:
        in_a_way = {o.worker for _, way in scene.sets for o in way}
        yield from _surplus(wanted, scene, in_a_way | gone, limits)


def _surplus(
    wanted: Sequence[Wanted], scene: _Scene, spoken_for: Collection[WorkerId], limits: Limits
) -> Iterable[Order]:
    """Retire what is in nobody's way but not wanted: it serves on until what replaces it does."""
    gone: set[WorkerId] = set()
    for o in scene.outgoing:
        if o.goal is Goal.GONE or o.worker in spoken_for:
            continue
        is_over = not scene.missing and not scene.on_its_way
        if is_over or not o.is_serving or _keeps_floor([o], wanted, scene.alive, {*spoken_for, *gone}, limits):
            gone.add(o.worker)
            yield Order(do=Do.RETIRE, worker=o.worker, why="not in the pattern any more")


def _in_the_way(w: Wanted, outgoing: Sequence[Observed]) -> tuple[Observed, ...]:
    """Return what has to go before ``w`` can exist: holders of its GPUs, and its own former self."""
    gpus = set(w.placement.gpus)
    return tuple(o for o in outgoing if o.worker == w.placement.worker or not gpus.isdisjoint(o.gpus))


def _cost(w: Wanted, way: Sequence[Observed]) -> float:
    return sum(o.weight for o in way if o.is_serving) / w.placement.weight


def base_capacity(model: ModelName, wanted: Sequence[Wanted], baseline: Mapping[ModelName, int]) -> int:
    """Return the capacity in GPUs that the model's floor is a share of: what was, or what shall be if that is less."""
    return min(baseline.get(model, 0), sum(w.placement.weight for w in wanted if w.placement.model == model))


def _ready(model: ModelName, observed: Iterable[Observed]) -> int:
    return sum(o.weight for o in observed if o.model == model and o.is_serving)


def _keeps_floor(
    way: Sequence[Observed],
    wanted: Sequence[Wanted],
    alive: Sequence[Observed],
    gone: Collection[WorkerId],
    limits: Limits,
) -> bool:
    """Return whether every model of ``way`` still has its share of ready capacity when ``way`` is retired too."""
    without = {o.worker for o in way} | set(gone)
    rest = [o for o in alive if o.worker not in without]
    return all(
        _ready(model, rest) >= limits.min_ready * base_capacity(model, wanted, limits.baseline)
        for model in {o.model for o in way if o.is_serving}
    )


def capacity(observed: Iterable[Observed]) -> dict[ModelName, int]:
    """Return each model's capacity in GPUs, whether ready or not, leaving out what is on its way out."""
    totals: dict[ModelName, int] = {}
    for o in observed:
        if o.goal is not Goal.GONE and o.phase is not Phase.STOPPED:
            totals[o.model] = totals.get(o.model, 0) + o.weight
    return totals


def drain_events(observed: Iterable[Observed], drained: Collection[WorkerId]) -> dict[WorkerId, Event]:
    """Return what to tell whom, so that every worker rests that shall and no other.

    A new one in a drained one's place is told, and one that was restarted. What a worker has been told already is late
    when it is told again.
    """
    events: dict[WorkerId, Event] = {}
    for o in observed:
        match o.goal:
            case Goal.SERVE if o.worker in drained and o.phase in HEAR_DRAIN:
                events[o.worker] = Event.DRAIN
            case Goal.REST if o.worker not in drained and o.phase in HEAR_UNDRAIN:
                events[o.worker] = Event.UNDRAIN
            case _:
                pass
    return events
