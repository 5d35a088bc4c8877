"""Restarting several workers one after the other, so that each model keeps its floor of ready capacity."""

from collections.abc import Collection, Mapping, Sequence

from l40sd.model import ModelName, WorkerId
from l40sd.workers.slot import Observed


def next_restarts(
    pending: Sequence[WorkerId],
    under_way: Collection[WorkerId],
    observed: Sequence[Observed],
    *,
    baseline: Mapping[ModelName, int],
    start_parallel: int,
    min_ready: float,
) -> tuple[WorkerId, ...]:
    """Return who is told to restart now, in the order of ``pending``.

    1. No more are on their way than may start at once.
    2. A model keeps its floor without those that are told; one worker goes in any case when nothing else is on its
       way, or nothing would ever move.
    3. Who does not serve costs nothing.

    Args:
        pending: Who is still to be restarted.
        under_way: Who was told and is not back yet.
        baseline: Each model's ready capacity in GPUs when the restarts began.
    """
    by_id = {o.worker: o for o in observed}
    away = set(under_way)
    told: list[WorkerId] = []
    for worker in pending:
        o = by_id.get(worker)
        if o is None:
            continue
        if len(away) >= start_parallel:  # 1
            break
        serving = (x for x in observed if x.model == o.model and x.is_serving and x.worker not in {*away, worker})
        ready = sum(x.weight for x in serving)
        if away and o.is_serving and ready < min_ready * baseline.get(o.model, 0):  # 2, 3
            continue
        away.add(worker)
        told.append(worker)
    return tuple(told)
