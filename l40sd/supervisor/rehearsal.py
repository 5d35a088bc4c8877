"""A change as it would go: the reconciler and the judgement of a change, played ahead against a clock.

``--dry-run`` shows it, once with the host's past loads (how long it would take), once with every step as slow as the
configuration lets it be: that is the time after which a change is ended whatever moves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from l40sd.model import ModelName, WorkerId
from l40sd.supervisor.reconcile import Do, Order, ready_share
from l40sd.supervisor.rollout import Terms, decide
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.slot import Observed, Wanted, slot

HAS_NO_PROCESS = (Phase.WAITING, Phase.BACKOFF, Phase.QUARANTINED, Phase.FAILED)
COMES_UP = (Phase.SPAWNING, Phase.STARTING)
ENDS = (Phase.DRAINING, Phase.STOPPING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How many GPU groups move at once, and how long a step takes.

    Attributes:
        load_s: From a start until the first answer, per model.
        stop_s: From the beginning of a drain until nothing is left.
    """

    start_parallel: int
    min_ready: float
    load_s: Mapping[ModelName, float]
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One order, seconds after the beginning, and each model's ready share once it is done."""

    order: Order
    at_s: float
    ready: Mapping[ModelName, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """A change from its beginning to its end.

    Attributes:
        lowest: Each model's smallest ready share on the way, for those that are there before and after.
        waits_s: The longest time in a row without a ready worker, of each wanted model that has such a time.
        back: The worker for which everything would go back: it cannot come about as things are; None: it can.
    """

    steps: tuple[Step, ...]
    duration_s: float
    lowest: Mapping[ModelName, float]
    waits_s: Mapping[ModelName, float]
    back: WorkerId | None = None


@dataclass(slots=True)
class _Stage:
    """The world on which it is played: the workers, when each one's phase ends, and what was measured."""

    wanted: Sequence[Wanted]
    terms: Terms
    pace: Pace
    world: dict[WorkerId, Observed]
    due_s: dict[WorkerId, float] = field(default_factory=dict)
    now_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    started: dict[WorkerId, int] = field(default_factory=dict)
    lowest: dict[ModelName, float] = field(default_factory=dict)
    without_since_s: dict[ModelName, float] = field(default_factory=dict)
    waits_s: dict[ModelName, float] = field(default_factory=dict)


def rehearse(wanted: Sequence[Wanted], observed: Sequence[Observed], terms: Terms, pace: Pace) -> Rehearsal:
    """Return every order of a change from first to last, if each succeeds.

    Whoever comes up gets ready after its load, whoever is retired is gone after its stop; who is in trouble stays so.
    """
    stage = _Stage(wanted, terms, pace, {o.worker: o for o in observed})
    for o in observed:
        _expect(stage, o)
    _measure(stage)
    back: WorkerId | None = None
    for _ in range(8 * (len(wanted) + len(observed)) + 8):  # each is created, started, retired, forgotten once
        pace = stage.pace
        workers = tuple(stage.world.values())
        decision = decide(wanted, workers, stage.terms, start_parallel=pace.start_parallel, min_ready=pace.min_ready)
        stage.terms, back = decision.terms, decision.back
        for order in decision.orders:
            _carry_out(stage, order)
        if back is not None or (not decision.orders and not stage.due_s):
            break
        if not decision.orders:
            _go_on(stage)
    _measure(stage)
    return Rehearsal(
        steps=tuple(stage.steps), duration_s=stage.now_s, lowest=stage.lowest, waits_s=stage.waits_s, back=back
    )


def _carry_out(stage: _Stage, order: Order) -> None:
    world, worker = stage.world, order.worker
    match order.do:
        case Do.CREATE:
            wanted = next(w for w in stage.wanted if w.placement.worker == worker)
            world[worker] = slot(wanted, Phase.WAITING)
            stage.terms = replace(stage.terms, created=stage.terms.created | {worker})
        case Do.START:
            stage.started[worker] = len(stage.steps)
            _become(stage, replace(world[worker], phase=Phase.STARTING))
        case Do.RETIRE:
            o = world[worker]
            is_gone = o.phase in HAS_NO_PROCESS
            stays = o.phase in (Phase.STUCK, *ENDS)
            phase = Phase.STOPPED if is_gone else o.phase if stays else Phase.DRAINING
            due_s = stage.due_s.get(worker)
            _become(stage, replace(o, phase=phase, goal=Goal.GONE))
            if stays and due_s is not None:
                stage.due_s[worker] = due_s
        case Do.FORGET:
            del world[worker]
    _measure(stage)
    if order.do in (Do.START, Do.RETIRE):
        stage.steps.append(Step(order=order, at_s=stage.now_s, ready=_shares(stage)))


def _become(stage: _Stage, o: Observed) -> None:
    stage.world[o.worker] = o
    _expect(stage, o)


def _expect(stage: _Stage, o: Observed) -> None:
    """Note when this worker's phase ends; never, where that is not for it to say."""
    stage.due_s.pop(o.worker, None)
    if o.phase in COMES_UP:
        stage.due_s[o.worker] = stage.now_s + stage.pace.load_s.get(o.model, 0.0)
    elif o.phase in ENDS:
        stage.due_s[o.worker] = stage.now_s + stage.pace.stop_s
    elif o.phase is Phase.BACKOFF and o.goal is not Goal.GONE:
        stage.due_s[o.worker] = stage.now_s


def _go_on(stage: _Stage) -> None:
    """Go to the next moment at which something happens, and have all of it happen."""
    stage.now_s = min(stage.due_s.values())
    for worker in [worker for worker, due_s in stage.due_s.items() if due_s <= stage.now_s]:
        _become(stage, replace(stage.world[worker], phase=_next_phase(stage.world[worker])))
        if worker in stage.started and stage.world[worker].phase is Phase.READY:
            place = stage.started.pop(worker)
            stage.steps[place] = replace(stage.steps[place], ready=_shares(stage))
    _measure(stage)


def _next_phase(o: Observed) -> Phase:
    if o.phase is Phase.BACKOFF:
        return Phase.WAITING
    if o.goal is Goal.GONE:
        return Phase.STOPPED
    if o.goal is Goal.REST and o.phase is not Phase.STOPPING:
        return Phase.DRAINED
    return Phase.READY if o.phase in COMES_UP else Phase.WAITING


def _shares(stage: _Stage) -> dict[ModelName, float]:
    baseline, workers = stage.terms.baseline, stage.world.values()
    models = dict.fromkeys(w.placement.model for w in stage.wanted if baseline.get(w.placement.model))
    return {model: ready_share(model, stage.wanted, workers, baseline) for model in models}


def _measure(stage: _Stage) -> None:
    for model, share in _shares(stage).items():
        stage.lowest[model] = min(share, stage.lowest.get(model, 1.0))
    serving = {o.model for o in stage.world.values() if o.is_serving}
    for model in dict.fromkeys(w.placement.model for w in stage.wanted):
        if model in serving:
            since_s = stage.without_since_s.pop(model, stage.now_s)
        else:
            since_s = stage.without_since_s.setdefault(model, stage.now_s)
        if stage.now_s > since_s:
            stage.waits_s[model] = max(stage.now_s - since_s, stage.waits_s.get(model, 0.0))
