"""What a replica's GPU group looks like, and what a grouping costs."""

from typing import NamedTuple

from l40sd.model import Link
from l40sd.placement.pcie_tree import Part, span

Replica = tuple[tuple[int, ...], ...]
"""Positions of GPUs, a tuple per stage; one stage for plain TP, one GPU per stage for plain PP."""


class Parallelism(NamedTuple):
    """A replica's form. ``tp * pp`` is at least 2: a single GPU has no link to choose."""

    tp: int
    pp: int

    @property
    def has_stages(self) -> bool:
        """Both TP and PP: TP groups are completed first and then chained."""
        return self.tp > 1 and self.pp > 1

    @property
    def unit(self) -> int:
        """GPUs of what a tally counts: a stage where there are stages, else the whole replica."""
        return self.tp if self.has_stages else self.tp * self.pp


class Cost(NamedTuple):
    """What a grouping costs; less is better, compared in this order.

    1. The worst link inside a TP group: TP talks twice in every layer.
    2. The sum of every TP group's worst link.
    3. The worst link inside a PP replica: PP talks once per stage boundary.
    4. The sum of every PP replica's worst link.
    """

    worst_tp: Link = Link.X
    sum_tp: int = 0
    worst_pp: Link = Link.X
    sum_pp: int = 0

    def plus(self, other: "Cost") -> "Cost":
        """Return the cost of two groupings side by side."""
        return Cost(
            max(self.worst_tp, other.worst_tp),
            self.sum_tp + other.sum_tp,
            max(self.worst_pp, other.worst_pp),
            self.sum_pp + other.sum_pp,
        )


def cost_of(tree: Part, parallelism: Parallelism, replica: Replica) -> Cost:
    """Return what one given replica costs on this host."""
    worst = span(tree, [gpu for stage in replica for gpu in stage])
    if parallelism.pp == 1:
        return Cost(worst, int(worst))
    stages = [span(tree, stage) for stage in replica] if parallelism.tp > 1 else []
    return Cost(max(stages, default=Link.X), sum(stages), worst, int(worst))
