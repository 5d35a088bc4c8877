"""A change of what is wanted: what it goes by, what speaks against it, and how it ends.

The supervisor asks these functions at every pass, and the dry run (rehearsal.py) plays them ahead: there is no second
copy of a decision. A change ends in one of three ways, and within a time that is known before it begins:

    done            exactly what is wanted is there and ready
    back            what was wanted before is wanted again, because what was on trial failed or the floor is lost
    all but some    in place but for workers that are given up, or late; they are tried again as ever

It ends as soon as nothing of it moves any more, and at its deadline whatever moves.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from l40sd.model import ModelName, OperationState, ReplicaKind, WorkerId
from l40sd.supervisor.reconcile import Limits, Order, base_capacity, capacity, is_settled, reconcile
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.slot import Observed, Wanted, is_kept

GIVEN_UP = frozenset({Phase.QUARANTINED, Phase.FAILED, Phase.STUCK})
"""Phases that only the operator, or the kernel, ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a change goes by.

    Attributes:
        baseline: Each model's capacity in GPUs when the change began.
        proven: Kinds that have given one real answer, or serve unchanged.
        created: Workers made for this change, or for one that it replaced: only their failures speak against it.
        is_trial: Whether something has to prove itself: going back needs no trial, nor does what has no alternative.
    """

    baseline: Mapping[ModelName, int]
    proven: frozenset[ReplicaKind] = frozenset()
    created: frozenset[WorkerId] = frozenset()
    is_trial: bool = True


def begin(
    wanted: Sequence[Wanted],
    observed: Sequence[Observed],
    *,
    former: Terms | None,
    is_trial: bool,
    remembered: Collection[str] = (),
) -> Terms:
    """Return what a change to ``wanted`` goes by.

    1. What was there before has nothing to prove, whatever state it is in: it is not this change's doing.
    2. Unless a change that this one replaces made it and it does not serve: it has yet to give its first answer.
    3. A launch that served a short while ago has proven its kind.

    Args:
        former: Of the change that this one replaces, if one is under way.
        is_trial: Whether there is something to go back to.
        remembered: Fingerprints of launches that served a short while ago.
    """
    created = former.created if former else frozenset()
    there = {(o.worker, o.fingerprint): o for o in observed if o.goal is not Goal.GONE}
    kept = [o for w in wanted if (o := there.get((w.placement.worker, w.fingerprint))) is not None]
    served = {w.kind for w in wanted if w.fingerprint in remembered}  # 3
    return Terms(
        baseline={**capacity(observed), **(former.baseline if former else {})},
        proven=frozenset({o.kind for o in kept if o.is_serving or o.worker not in created} | served),  # 1, 2
        created=created,
        is_trial=is_trial,
    )


def limits_for(wanted: Sequence[Wanted], terms: Terms, *, start_parallel: int, min_ready: float) -> Limits:
    """Return what a reconcile pass must respect."""
    unproven = frozenset(w.kind for w in wanted) - terms.proven if terms.is_trial else frozenset()
    return Limits(start_parallel=start_parallel, min_ready=min_ready, baseline=terms.baseline, unproven=unproven)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a change has ended: in place but for ``missing``; ``is_late``: it was not waited for any longer."""

    missing: tuple[WorkerId, ...] = ()
    is_late: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether everything is in place, and was in time."""
        return not self.missing and not self.is_late


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows from one look at the workers.

    Attributes:
        proven: Kinds that have proven themselves since, each with the worker that did; ``terms`` has them.
        back: The worker for which what was wanted before is wanted again; there are no orders then.
        orders: What to do now.
        end: How the change has ended; None while it goes on.
    """

    terms: Terms
    proven: Mapping[ReplicaKind, WorkerId]
    back: WorkerId | None = None
    orders: tuple[Order, ...] = ()
    end: End | None = None


def decide(
    wanted: Sequence[Wanted],
    observed: Sequence[Observed],
    terms: Terms,
    *,
    start_parallel: int,
    min_ready: float,
    is_late: bool = False,
) -> Decision:
    """Return what follows during a change: 1. what is proven, 2. whether it goes back, 3. what to do, 4. its end."""
    proven = newly_proven(wanted, observed, terms) if terms.is_trial else {}  # 1
    terms = replace(terms, proven=terms.proven | proven.keys())
    orders = reconcile(wanted, observed, limits_for(wanted, terms, start_parallel=start_parallel, min_ready=min_ready))
    kept = _kept(wanted, observed)
    is_still = not orders and not any(_moves(o, terms, is_wanted=o in kept) for o in observed)
    back = speaks_against(wanted, observed, terms, min_ready=min_ready, is_late=is_late, is_still=is_still)  # 2
    if back is not None:
        return Decision(terms=terms, proven=proven, back=back)
    end = _end_of(wanted, observed, is_late=is_late, is_still=is_still)  # 4
    return Decision(terms=terms, proven=proven, orders=orders, end=end)  # 3


def keep(
    wanted: Sequence[Wanted],
    observed: Sequence[Observed],
    floor: Mapping[ModelName, int],
    *,
    start_parallel: int,
    min_ready: float,
) -> Decision:
    """Return what follows outside a change: what to do, and whether everything is as it is wanted.

    Args:
        floor: The baseline of a change that ended incomplete, to which what it left to be done keeps; empty: none.
    """
    terms = Terms(baseline=floor, is_trial=False)
    limits = limits_for(wanted, terms, start_parallel=start_parallel, min_ready=min_ready)
    end = End() if is_settled(wanted, observed) else None
    return Decision(terms=terms, proven={}, orders=reconcile(wanted, observed, limits), end=end)


def state_at(end: End, *, is_back: bool) -> OperationState:
    """Return the state in which a change has ended so; ``is_back``: on its way back to what was wanted before."""
    if is_back:
        return OperationState.ROLLED_BACK
    return OperationState.DONE if end.is_whole else OperationState.INCOMPLETE


def newly_proven(wanted: Sequence[Wanted], observed: Sequence[Observed], terms: Terms) -> dict[ReplicaKind, WorkerId]:
    """Return the kinds that a worker of this change has proven since, each with the first that did."""
    found: dict[ReplicaKind, WorkerId] = {}
    for o in _newcomers(wanted, observed, terms):
        if o.phase in (Phase.READY, Phase.UNREADY, Phase.DRAINED) and o.kind not in terms.proven:
            found.setdefault(o.kind, o.worker)
    return found


def speaks_against(
    wanted: Sequence[Wanted],
    observed: Sequence[Observed],
    terms: Terms,
    *,
    min_ready: float,
    is_late: bool,
    is_still: bool,
) -> WorkerId | None:
    """Return the worker for which everything goes back; None: the change goes on, or has nowhere to go back to.

    1. One on trial that failed once.
    2. One that is given up, when without such its model's capacity would stay below the floor. Above it the change
       goes on without: one dead GPU is no reason to give up the others.
    3. At the deadline, or when nothing moves any more: one that is missing, unless the floor can do without all of
       them. At the deadline every kind must have proven itself as well, and nothing of before be left.

    Those that were in trouble before the change do not count: going back would not mend them.
    """
    if not terms.is_trial:
        return None
    newcomers = _newcomers(wanted, observed, terms)
    for o in newcomers:
        if o.kind not in terms.proven and (o.phase in GIVEN_UP or o.phase is Phase.BACKOFF or o.failed_starts > 0):
            return o.worker  # 1
    given_up = {o.worker for o in newcomers if o.phase in GIVEN_UP}
    for o in newcomers:
        if o.worker in given_up and not _holds_floor(o.model, wanted, given_up, terms, min_ready):
            return o.worker  # 2
    if is_late or is_still:  # 3
        kept = _kept(wanted, observed)
        excused = {o.worker for o in kept} - {o.worker for o in newcomers}
        missing = [worker for worker in not_in_place(wanted, observed) if worker not in excused]
        holds = all(_holds_floor(w.placement.model, wanted, missing, terms, min_ready) for w in wanted)
        is_through = all(o in kept or o.phase in (Phase.STOPPED, Phase.STUCK) for o in observed)
        is_proven = all(w.kind in terms.proven for w in wanted)
        if missing and not (holds and (is_still or (is_through and is_proven))):
            return missing[0]
    return None


def _end_of(wanted: Sequence[Wanted], observed: Sequence[Observed], *, is_late: bool, is_still: bool) -> End | None:
    """Return how the change has ended; None while it goes on.

    1. Everything is as it is wanted.
    2. There is nothing to do and nothing moves: what is missing is given up, or fails for reasons of its own.
    3. Its time is up.
    """
    if is_settled(wanted, observed):
        return End()  # 1
    if is_still:
        return End(missing=not_in_place(wanted, observed))  # 2
    return End(missing=not_in_place(wanted, observed), is_late=True) if is_late else None  # 3


def not_in_place(wanted: Sequence[Wanted], observed: Sequence[Observed]) -> tuple[WorkerId, ...]:
    """Return the wanted workers that do not serve, nor rest by the operator's wish; then who should be gone."""
    there = {o.worker for o in _kept(wanted, observed) if o.phase in (Phase.READY, Phase.DRAINED)}
    kept = {o.worker for o in _kept(wanted, observed)}
    left = (o.worker for o in observed if o.worker not in kept and o.phase is not Phase.STOPPED)
    return (*(w.placement.worker for w in wanted if w.placement.worker not in there), *left)


def models_leaving(wanted: Sequence[Wanted], baseline: Mapping[ModelName, int]) -> tuple[ModelName, ...]:
    """Return the models that had workers before and have none in what is wanted."""
    return tuple(sorted(model for model, gpus in baseline.items() if gpus and not _width(model, wanted)))


def _moves(o: Observed, terms: Terms, *, is_wanted: bool) -> bool:
    """Whether it is waited for. One that came up and answers no more is not: nobody knows for how long.

    Nor is one that fails again and again, unless this change made it: then it comes up, or is given up. One that waits
    is started only when it is wanted; beside a worker that cannot be killed it may be neither wanted nor retired.
    """
    match o.phase:
        case Phase.STUCK:
            return False
        case _ if o.goal is Goal.GONE:
            return True
        case Phase.READY | Phase.DRAINED | Phase.UNREADY | Phase.QUARANTINED | Phase.FAILED:
            return False
        case Phase.WAITING:
            return is_wanted
        case Phase.BACKOFF:
            return is_wanted and o.worker in terms.created
        case _:
            return True


def _holds_floor(
    model: ModelName, wanted: Sequence[Wanted], lost: Collection[WorkerId], terms: Terms, min_ready: float
) -> bool:
    left = sum(w.placement.weight for w in wanted if w.placement.model == model and w.placement.worker not in lost)
    return left >= min_ready * base_capacity(model, wanted, terms.baseline)


def _width(model: ModelName, wanted: Sequence[Wanted]) -> int:
    return sum(w.placement.weight for w in wanted if w.placement.model == model)


def _kept(wanted: Sequence[Wanted], observed: Sequence[Observed]) -> list[Observed]:
    by_id = {w.placement.worker: w for w in wanted}
    return [o for o in observed if o.phase is not Phase.STOPPED and is_kept(o, by_id.get(o.worker))]


def _newcomers(wanted: Sequence[Wanted], observed: Sequence[Observed], terms: Terms) -> list[Observed]:
    return [o for o in _kept(wanted, observed) if o.worker in terms.created]
