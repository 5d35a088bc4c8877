"""Which GPUs belong together: the exact optimum over a host's tree of switches, host bridges and sockets.

GPUs that share a switch are closest, switches that share a host bridge next, and so on: the links form a tree whose
inner parts each have one link, and any two GPUs are as far apart as the lowest part that holds both.

               SYS                 A group costs the link of the lowest part that holds all of it, however its GPUs
           NODE    NODE            are spread over the part's children. So below a part only one thing matters to the
          PIX PIX  PIX PIX         parts above it: how many groups of each parallelism it completes by itself. The GPUs
          0123 45  6789 ab         it has not used are all alike to the rest of the host.

That makes the best grouping a knapsack over the tree: for every part, the cheapest way to complete each *tally* (so
many groups of each parallelism); a part's tallies are its children's, added, plus what it completes itself at its own
link. Parts of one form (as most switches of a host are) share one table. Exact, and polynomial in the number of GPUs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from l40sd.model import Link
from l40sd.placement.parallelism import Cost, Parallelism, Replica
from l40sd.placement.pcie_tree import Form, FreePart, Part, links_in, without

Tally = int
"""Completed groups of each parallelism, 16 bits each: adding two is one addition, and that is where the time goes."""
_BITS = 16
_FIELD = (1 << _BITS) - 1
_STEP = 1 << 32
"""One link of TP outweighs any sum of links of PP; a sum is at most 6 x the number of GPUs."""


class _Table(NamedTuple):
    """What a part can complete.

    Attributes:
        costs: The least cost of each tally.
        base: For each tally the sum of the children's tallies that it is completed from.
        picked: For each child the sums of tallies up to it, and the child's own share in the cheapest way there.
    """

    costs: dict[Tally, int]
    base: dict[Tally, Tally]
    picked: list[dict[Tally, Tally]]


class Grouping:
    """One question: these parallelisms, so many of each, on this tree without these GPUs."""

    def __init__(self, tree: Part, demand: Mapping[Parallelism, int], *, used: Iterable[int] = ()) -> None:
        self.parallelisms = tuple(sorted(demand, key=lambda s: (-s.unit, s)))
        self._numbers = [demand[s] * (s.pp if s.has_stages else 1) for s in self.parallelisms]
        self._want = sum(number << _BITS * n for n, number in enumerate(self._numbers))
        self._guards = sum(1 << _BITS * n + _BITS - 1 for n in range(len(self.parallelisms)))
        self._root = without(tree, frozenset(used))
        self._links = links_in(tree)
        self._worst_tp = self._worst_pp = Link.SYS
        self._tables: dict[Form, _Table] = {}

    @property
    def form(self) -> Form:
        """What the answer depends on besides the demand: the free part of the host, alike parts taken as equal."""
        return self._root.form if self._root else ()

    def best(self, worst_allowed_tp: Link) -> Cost | None:
        """Return the least cost with no TP group beyond the given link; None when there is no such grouping.

        The limits are raised one link at a time: a sum of links says nothing about the worst of them.
        """
        limits = [link for link in self._links if link <= worst_allowed_tp]
        tp = next((link for link in limits if self.cost_within(link, Link.SYS) is not None), None)
        if tp is None:
            return None
        wanted = self.cost_within(tp, Link.SYS)
        assert wanted is not None
        for pp in self._links:
            cost = self.cost_within(tp, pp)
            if cost is not None and cost.sum_tp == wanted.sum_tp:
                return cost
        raise AssertionError("the loosest limit has been answered before")

    def cost_within(self, worst_tp: Link, worst_pp: Link) -> Cost | None:
        """Return the least sums of links with no group beyond the limits, the limits standing for the worst links."""
        if self._root is None:
            return None if self._want else Cost(worst_tp, 0, worst_pp, 0)
        self._worst_tp, self._worst_pp = worst_tp, worst_pp
        self._tables = {}
        cost = self._table(self._root, is_topmost=True).costs.get(self._want)
        return None if cost is None else Cost(worst_tp, cost // _STEP, worst_pp, cost % _STEP)

    def replicas(self) -> dict[Parallelism, list[Replica]]:
        """Return the grouping of the last ``cost_within`` that had an answer."""
        made: dict[Parallelism, list[Replica]] = {parallelism: [] for parallelism in self.parallelisms}
        if self._root is not None:
            _Carver(self.parallelisms, self._tables, made).carve(self._root, self._want)
        return made

    def _table(self, part: FreePart, *, is_topmost: bool = False) -> _Table:
        """Return what a part can complete; ``is_topmost``: no part above it can complete anything.

        A topmost part has to take all that the rest of the host has no room for, which leaves few tallies to look at.
        """
        known = self._tables.get(part.form)
        if known is None:
            known = self._tables[part.form] = self._made_table(part, is_topmost=is_topmost)
        return known

    def _made_table(self, part: FreePart, *, is_topmost: bool) -> _Table:
        completes = [parallelism for parallelism in self.parallelisms if self._may_complete(parallelism, part.link)]
        is_idle_top = is_topmost and not completes
        assert self._root is not None
        room = len(self._root.gpus) if is_idle_top else _STEP  # for what is not in the children so far
        costs: dict[Tally, int] = {0: 0}
        picked: list[dict[Tally, Tally]] = []
        for child in part.children:
            room -= len(child.gpus)
            costs, last = self._added(costs, self._passed_up(child, part.link, is_topmost=is_idle_top), room)
            picked.append(last)
        base = {tally: tally for tally in costs}
        for parallelism in completes:
            self._complete_here(costs, base, parallelism, part)
        final = {tally: cost + part.link * self._chained(tally) for tally, cost in costs.items()}
        return _Table(final, base, picked)

    def _added(
        self, costs: Mapping[Tally, int], child: Mapping[Tally, int], room: int
    ) -> tuple[dict[Tally, int], dict[Tally, Tally]]:
        """Return every sum of a tally so far and one of the next child's, with its least cost and the child's share.

        ``room``: GPUs elsewhere; a sum that leaves more than that to do is of no use.
        """
        sums: dict[Tally, int] = {}
        picked: dict[Tally, Tally] = {}
        useless: set[Tally] = set()
        limit, guards = self._want + self._guards, self._guards
        for tally, cost in costs.items():
            for more, its in child.items():
                both = tally + more
                known = sums.get(both)
                if known is None:
                    # A parallelism beyond what is wanted borrows from its guard bit.
                    if both in useless or (limit - both) & guards != guards or self._units(self._want - both) > room:
                        useless.add(both)
                        continue
                    known = cost + its
                if cost + its <= known:  # of equals the last one: more in the first children
                    sums[both] = cost + its
                    picked[both] = more
        return sums, picked

    def _passed_up(self, child: FreePart, link: Link, *, is_topmost: bool) -> Mapping[Tally, int]:
        """Return a child's costs as its parent may use them.

        Replicas with stages are chained as low as possible (never worse: it is TP that shapes the tally), so a part
        has chained ``tally // pp`` of them and pays its own link for those its children had not. Beyond the limit
        for PP none may be chained any more: a child then has to have no stage left over.
        """
        costs = self._table(child, is_topmost=is_topmost).costs
        if child.link <= self._worst_pp < link:
            costs = {tally: cost for tally, cost in costs.items() if not self._loose_stages(tally)}
        return {tally: cost - link * self._chained(tally) for tally, cost in costs.items()}

    def _may_complete(self, parallelism: Parallelism, link: Link) -> bool:
        return (parallelism.tp == 1 or link <= self._worst_tp) and (parallelism.pp == 1 or link <= self._worst_pp)

    def _complete_here(
        self, costs: dict[Tally, int], base: dict[Tally, Tally], parallelism: Parallelism, part: FreePart
    ) -> None:
        """Add the tallies reached by completing more groups of a parallelism over this part's own link."""
        number = self.parallelisms.index(parallelism)
        price = part.link * (_STEP if parallelism.tp > 1 else 1)
        one = 1 << _BITS * number
        by_number: list[list[Tally]] = [[] for _ in range(self._numbers[number] + 1)]
        for tally in costs:
            by_number[self._count(tally, number)].append(tally)
        for done, tallies in enumerate(by_number[:-1]):
            for tally in tallies:
                more = tally + one
                if more not in costs:
                    if self._units(more) > len(part.gpus):
                        continue
                    by_number[done + 1].append(more)
                elif costs[more] <= costs[tally] + price:
                    continue
                costs[more] = costs[tally] + price
                base[more] = base[tally]

    def _count(self, tally: Tally, number: int) -> int:
        return tally >> _BITS * number & _FIELD

    def _units(self, tally: Tally) -> int:
        """Return the GPUs that a tally uses."""
        return sum(self._count(tally, n) * parallelism.unit for n, parallelism in enumerate(self.parallelisms))

    def _chained(self, tally: Tally) -> int:
        return sum(self._count(tally, n) // s.pp for n, s in enumerate(self.parallelisms) if s.has_stages)

    def _loose_stages(self, tally: Tally) -> int:
        return sum(self._count(tally, n) % s.pp for n, s in enumerate(self.parallelisms) if s.has_stages)


class _Carver:
    """Walks the tables from the top and hands out real GPUs."""

    def __init__(
        self, parallelisms: Sequence[Parallelism], tables: Mapping[Form, _Table], made: dict[Parallelism, list[Replica]]
    ) -> None:
        self._parallelisms = parallelisms
        self._tables = tables
        self._made = made

    def carve(self, part: FreePart, tally: Tally) -> tuple[list[int], dict[Parallelism, list[tuple[int, ...]]]]:
        """Complete this part's groups; return its unused GPUs and its stages that are not chained yet."""
        below = self._shares(part, tally)
        pools: list[list[int]] = []
        loose: dict[Parallelism, list[tuple[int, ...]]] = {parallelism: [] for parallelism in self._parallelisms}
        for child, its_tally in zip(part.children, below, strict=True):
            unused, stages = self.carve(child, its_tally)
            pools.append(unused)
            for parallelism, more in stages.items():
                loose[parallelism] += more
        in_children = {gpu for child in part.children for gpu in child.gpus}
        pools += [[gpu] for gpu in part.gpus if gpu not in in_children]
        pools.sort()
        here = tally - sum(below)
        for number, parallelism in enumerate(self._parallelisms):
            for _ in range(here >> _BITS * number & _FIELD):
                unit = _take(pools, parallelism.unit)
                if parallelism.has_stages:
                    loose[parallelism].append(unit)
                else:
                    self._made[parallelism].append((unit,) if parallelism.pp == 1 else tuple((gpu,) for gpu in unit))
            if parallelism.has_stages:
                self._chain(parallelism, loose[parallelism])
        return [gpu for pool in pools for gpu in pool], loose

    def _shares(self, part: FreePart, tally: Tally) -> list[Tally]:
        """Return each child's part of a tally; what is missing from their sum the part completes itself."""
        table = self._tables[part.form]
        if not part.children:
            return []
        shares = []
        left = table.base[tally]
        for last in reversed(table.picked):
            shares.append(last[left])
            left -= last[left]
        return shares[::-1]

    def _chain(self, parallelism: Parallelism, stages: list[tuple[int, ...]]) -> None:
        stages.sort()
        while len(stages) >= parallelism.pp:
            self._made[parallelism].append(tuple(stages[: parallelism.pp]))
            del stages[: parallelism.pp]


def _take(pools: list[list[int]], count: int) -> tuple[int, ...]:
    """Take GPUs out of as few pools as possible: the smallest that suffices, else the fullest and go on."""
    taken: list[int] = []
    while len(taken) < count:
        missing = count - len(taken)
        enough = [pool for pool in pools if len(pool) >= missing]
        pool = min(enough, key=len) if enough else max(pools, key=len)
        taken += pool[:missing]
        del pool[:missing]
    return tuple(sorted(taken))
