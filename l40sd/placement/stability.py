"""Which workers can stay where they are, in a layout that is as good as any."""

from collections import Counter
from collections.abc import Sequence

from l40sd.model import Placement, ReplicaKind
from l40sd.placement.candidates import Counts, Ground, positions_of
from l40sd.placement.parallelism import Cost, Parallelism, Replica, cost_of

TRIES_LEAST = 32
TRIES_FOR = 20_000
"""Groupings looked at, at most: ``TRIES_FOR / GPUs²``, so 312 for 8 GPUs (every subset of 8 workers), 138 for 12, and
``TRIES_LEAST`` for the largest hosts, whose groupings take longer. A count and not a time: the same question has to
have the same answer. Usually one is enough (all can stay), or none is needed (nothing is of a wanted kind)."""

Kept = tuple[ReplicaKind, Replica]


class Keeper:
    """Finds the most GPUs that can keep their worker in a layout of the least cost.

    If a set of workers can stay, so can each of its subsets. So the search takes or leaves one worker after another,
    largest first, and a set that cannot stay ends its branch.
    """

    def __init__(self, counts: Counts, ground: Ground, best: Cost) -> None:
        self._counts = counts
        self._ground = ground
        self._best = best
        self._tries = max(TRIES_LEAST, TRIES_FOR // max(1, len(ground.gpus)) ** 2)
        self._most: list[Kept] = []
        self._known: dict[object, Cost | None] = {}

    def keep(self, current: Sequence[Placement]) -> list[Kept]:
        """Return the replicas of ``current`` that stay: a good set first, by halves, then the best by search."""
        candidates = self._candidates(current)
        if candidates:
            self._add(candidates)
            self._search([], candidates)
        return self._most

    def _add(self, chunk: list[Kept]) -> None:
        """Add to what stays as much of the chunk as can, without going back on anything."""
        if self._can_stay([*self._most, *chunk]):
            self._most = [*self._most, *chunk]
        elif len(chunk) > 1:
            self._add(chunk[: len(chunk) // 2])
            self._add(chunk[len(chunk) // 2 :])

    def _candidates(self, current: Sequence[Placement]) -> list[Kept]:
        """Return what runs now and is of a wanted kind on usable GPUs, largest first."""
        position = {gpu: number for number, gpu in enumerate(self._ground.gpus)}
        candidates = [
            (p.kind, _stages([position[gpu] for gpu in p.gpus], p.tp))
            for p in current
            if self._counts.get(p.kind) and len(p.gpus) == p.tp * p.pp and all(gpu in position for gpu in p.gpus)
        ]
        return sorted(candidates, key=lambda candidate: (-_size(candidate[0]), candidate))

    def _search(self, kept: list[Kept], rest: Sequence[Kept]) -> None:
        if _size_of(kept) > _size_of(self._most):
            self._most = kept
        if not rest or self._tries <= 0 or _size_of(kept) + self._at_most(kept, rest) <= _size_of(self._most):
            return
        if self._can_stay([*kept, rest[0]]):
            self._search([*kept, rest[0]], rest[1:])
        self._search(kept, rest[1:])

    def _at_most(self, kept: Sequence[Kept], rest: Sequence[Kept]) -> int:
        """Return how many more GPUs could stay, were there only the numbers to respect."""
        have, more = Counter(kind for kind, _ in kept), Counter(kind for kind, _ in rest)
        return sum(min(number, self._counts[kind] - have[kind]) * _size(kind) for kind, number in more.items())

    def _can_stay(self, kept: Sequence[Kept]) -> bool:
        """Return whether the rest can still be placed so that the whole costs no more than the best."""
        number = Counter(kind for kind, _ in kept)
        used = positions_of(replica for _, replica in kept)
        if any(number[kind] > self._counts[kind] for kind in number) or len(set(used)) < len(used):
            return False
        cost = Cost()
        for (_, tp, pp), replica in kept:
            if tp * pp > 1:
                cost = cost.plus(cost_of(self._ground.tree, Parallelism(tp, pp), replica))
        if cost > self._best:
            return False
        rest = self._cost_of_rest({kind: count - number[kind] for kind, count in self._counts.items()}, used)
        return rest is not None and cost.plus(rest) == self._best

    def _cost_of_rest(self, left: Counts, used: Sequence[int]) -> Cost | None:
        grouping = self._ground.grouping(left, used)
        if grouping is None:
            return None
        question = (grouping.form, *left.values())
        if question not in self._known and self._tries > 0:
            self._tries -= 1
            self._known[question] = grouping.cost_within(self._best.worst_tp, self._best.worst_pp)
        return self._known.get(question)


def _stages(gpus: Sequence[int], tp: int) -> Replica:
    return tuple(tuple(gpus[first : first + tp]) for first in range(0, len(gpus), tp))


def _size(kind: ReplicaKind) -> int:
    return kind[1] * kind[2]


def _size_of(kept: Sequence[Kept]) -> int:
    return sum(_size(kind) for kind, _ in kept)
