"""The ground that placement works on: the GPUs that may be used, by position, and the questions asked of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from l40sd.model import GpuId, Inventory, Link, ReplicaKind
from l40sd.placement.optimum import Grouping
from l40sd.placement.parallelism import Cost, Parallelism, Replica
from l40sd.placement.pcie_tree import Part, tree_of

Counts = Mapping[ReplicaKind, int]
"""How many of each kind."""


@dataclass(frozen=True)
class Ground:
    """The usable GPUs of a host, and the farthest link that TP may use.

    Attributes:
        gpus: By position: the GPUs of one part of the host side by side, parts in order of their lowest PCI address.
            So GPUs in order of position are a shortest way through them, and that is the rank order.
    """

    inventory: Inventory
    gpus: tuple[GpuId, ...]
    limit: Link

    @classmethod
    def of(cls, inventory: Inventory, gpus: Sequence[GpuId], limit: Link) -> "Ground":
        """Return the ground of these GPUs, given in order of their PCI address."""
        in_order = cls(inventory, tuple(gpus), limit)
        return cls(inventory, tuple(gpus[n] for n in in_order.tree.gpus) if gpus else (), limit)

    @cached_property
    def tree(self) -> Part:
        """The host's parts, by position in ``gpus``; there is at least one GPU."""
        links, gpus = self.inventory.links, self.gpus
        return tree_of(len(gpus), lambda a, b: links[(gpus[a], gpus[b])])

    def grouping(self, counts: Counts, used: Iterable[int] = ()) -> Grouping | None:
        """Return the question of grouping these counts on the GPUs not used; None when they are too few."""
        used = frozenset(used)
        if gpus_needed(counts) > len(self.gpus) - len(used):
            return None
        return Grouping(self.tree, _demand(counts), used=used)

    def fits(self, counts: Counts) -> bool:
        """Return whether so many fit without a TP group beyond the limit."""
        if not gpus_needed(counts):
            return True
        grouping = self.grouping(counts)
        return grouping is not None and grouping.cost_within(self.limit, Link.SYS) is not None

    def most(self, counts: Counts, kinds: Sequence[ReplicaKind], limit: int) -> int:
        """Return how many more of each of these kinds fit beside ``counts``, up to ``limit``."""
        room = len(self.gpus) - gpus_needed(counts)
        low, high = 0, min(limit, max(0, room // gpus_needed(dict.fromkeys(kinds, 1))))
        middle = high  # usually all that the number of GPUs allows fits: ask for that first
        while low < high:
            if self.fits(more(counts, kinds, middle)):
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low

    def best(self, counts: Counts, limit: Link) -> tuple[Grouping, Cost] | None:
        """Return the best grouping with no TP group beyond ``limit``; None when there is none."""
        grouping = self.grouping(counts)
        cost = grouping.best(limit) if grouping else None
        return (grouping, cost) if grouping and cost else None

    def far_pair(self, positions: Sequence[int]) -> "FarPair":
        """Return the worst link inside a group, with the first pair in rank order that has it."""
        pairs = (
            FarPair(self.inventory.link(self.gpus[a], self.gpus[b]), self._name(a), self._name(b))
            for number, a in enumerate(positions)
            for b in positions[number + 1 :]
        )
        alone = self._name(positions[0])
        return max(pairs, key=lambda pair: pair.link, default=FarPair(Link.X, alone, alone))

    def names(self, gpus: Iterable[GpuId]) -> str:
        """Return e.g. ``GPU0 GPU1``."""
        return " ".join(f"GPU{self.inventory.gpu(gpu).index}" for gpu in gpus)

    def _name(self, position: int) -> str:
        return self.names([self.gpus[position]])


@dataclass(frozen=True, slots=True)
class FarPair:
    """Two GPUs and their link; as text ``GPU3-GPU4 SYS``."""

    link: Link
    one: str
    other: str

    def __str__(self) -> str:
        return f"{self.one}-{self.other} {self.link.name}"


def more(counts: Counts, kinds: Sequence[ReplicaKind], number: int) -> dict[ReplicaKind, int]:
    """Return the counts with so many more of each of these kinds."""
    return {**counts, **{kind: counts.get(kind, 0) + number for kind in kinds}}


def gpus_needed(counts: Counts) -> int:
    """Return the GPUs that so many occupy."""
    return sum(count * tp * pp for (_, tp, pp), count in counts.items())


def positions_of(replicas: Iterable[Replica]) -> list[int]:
    """Return the GPUs of these replicas, in rank order."""
    return [position for replica in replicas for stage in replica for position in stage]


def _demand(counts: Counts) -> dict[Parallelism, int]:
    """Return what grouping has to decide: single GPUs have no links and take what is left."""
    demand: Counter[Parallelism] = Counter()
    for (_, tp, pp), count in counts.items():
        if tp * pp > 1:
            demand[Parallelism(tp, pp)] += count
    return demand
