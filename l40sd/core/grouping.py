"""Which GPUs belong together: the exact optimum over a host's tree of switches, host bridges and sockets.

GPUs that share a switch are closest, switches that share a host bridge next, and so on: the links form a tree whose
inner parts each have one link, and any two GPUs are as far apart as the lowest part that holds both.

               SYS                 A group costs the link of the lowest part that holds all of it, however its GPUs
           NODE    NODE            are spread over the part's children. So below a part only one thing matters to the
          PIX PIX  PIX PIX         parts above it: how many groups of each shape it completes by itself. The GPUs it
          0123 45  6789 ab         has not used are all alike to the rest of the host.

That makes the best grouping a knapsack over the tree: for every part, the cheapest way to complete each *tally* (so
many groups of each shape); a part's tallies are its children's, added, plus what it completes itself at its own link.
Parts of one form (as most switches of a host are) share one table. Exact, and polynomial in the number of GPUs.

Cost, compared in this order (``Cost``):
1. the worst link inside a TP group: TP talks twice in every layer,
2. the sum of every TP group's worst link,
3. the worst link inside a PP replica: PP talks once per stage boundary,
4. the sum of every PP replica's worst link.

On a host whose links form no tree (NVLink bridges across switches) every GPU joins the parts all of whose GPUs it
reaches by that link or better. Costs are then upper bounds: a socket is never crossed unseen, but a cleverer
grouping may be missed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from l40sd.core.model import Link

Tally = tuple[int, ...]
"""Completed groups of each shape, in the order of the demand."""
_STEP = 1 << 32
"""One link of TP outweighs any sum of links of PP; a sum is at most 6 x the number of GPUs."""


class Shape(NamedTuple):
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
    """What a grouping costs; less is better, compared left to right."""

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


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the host: a GPU by itself, or parts that reach each other by ``link``.

    Attributes:
        gpus: Positions of all GPUs below, in PCI order within each child.
    """

    link: Link
    gpus: tuple[int, ...]
    children: tuple["Part", ...] = ()


Replica = tuple[tuple[int, ...], ...]
"""Positions of GPUs, a tuple per stage; one stage for plain TP, one GPU per stage for plain PP."""


@dataclass(frozen=True, slots=True)
class _Free:
    """A part with only its unused GPUs left; ``key`` is equal for parts of one form."""

    link: Link
    count: int
    gpus: tuple[int, ...]
    children: tuple["_Free", ...]
    key: tuple[object, ...]


class _Entry(NamedTuple):
    """The cheapest way to one tally: its cost, and the children's tallies (a list linked from the last)."""

    cost: int
    chain: "_Chain | None"


class _Chain(NamedTuple):
    before: "_Chain | None"
    tally: Tally


_Table = Mapping[Tally, _Entry]


def tree_of(count: int, link: Callable[[int, int], Link]) -> Part:
    """Return the host as a tree; ``link`` tells how the GPUs at two positions below ``count`` are linked."""
    parts = [Part(Link.X, (position,)) for position in range(count)]
    for level in list(Link)[1:]:
        sets: list[list[Part]] = []
        for part in parts:
            near = (s for s in sets if all(_reach(part, member, level, link) for member in s))
            home = next(near, None)
            if home is None:
                sets.append([part])
            else:
                home.append(part)
        parts = [_joined(level, members) for members in sets]
    assert len(parts) == 1, "every link is at most SYS"
    return parts[0]


def cost_of(tree: Part, shape: Shape, replica: Replica) -> Cost:
    """Return what one given replica costs on this host."""
    span = _lowest(tree, [gpu for stage in replica for gpu in stage]).link
    if shape.pp == 1:
        return Cost(span, int(span))
    stages = [_lowest(tree, stage).link for stage in replica] if shape.tp > 1 else []
    return Cost(max(stages, default=Link.X), sum(stages), span, int(span))


class Grouping:
    """The tables of one question: these shapes, so many of each, on this tree without these GPUs."""

    def __init__(self, tree: Part, demand: Mapping[Shape, int], *, used: Iterable[int] = ()) -> None:
        self.shapes = tuple(sorted(demand, key=lambda s: (-s.unit, s)))
        self._want = tuple(demand[s] * (s.pp if s.has_stages else 1) for s in self.shapes)
        self._root = _without(tree, frozenset(used))
        self._links = _links(tree)
        self._worst_tp = self._worst_pp = Link.SYS
        self._tables: dict[tuple[object, ...], _Table] = {}

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
            return None if any(self._want) else Cost(worst_tp, 0, worst_pp, 0)
        self._worst_tp, self._worst_pp = worst_tp, worst_pp
        self._tables = {}
        entry = self._table(self._root).get(self._want)
        if entry is None:
            return None
        return Cost(worst_tp, entry.cost // _STEP, worst_pp, entry.cost % _STEP)

    def replicas(self) -> dict[Shape, list[Replica]]:
        """Return the grouping of the last ``cost_within`` that had an answer."""
        made: dict[Shape, list[Replica]] = {shape: [] for shape in self.shapes}
        if self._root is not None:
            _Carver(self.shapes, self._tables, made).carve(self._root, self._want)
        return made

    def _table(self, part: _Free) -> _Table:
        known = self._tables.get(part.key)
        if known is None:
            known = self._tables[part.key] = self._made_table(part)
        return known

    def _made_table(self, part: _Free) -> _Table:
        table: dict[Tally, _Entry] = {(0,) * len(self.shapes): _Entry(0, None)}
        for child in part.children:
            table = self._added(table, self._passed_up(child, part.link))
        for number, shape in enumerate(self.shapes):
            self._complete_here(table, number, shape, part)
        return {
            tally: _Entry(entry.cost + part.link * self._chained(tally), entry.chain) for tally, entry in table.items()
        }

    def _added(self, table: Mapping[Tally, _Entry], child: _Table) -> dict[Tally, _Entry]:
        """Return every sum of a tally so far and one of the next child's, each with its cheapest way."""
        sums: dict[Tally, _Entry] = {}
        for tally, entry in table.items():
            for more, its in child.items():
                both = tuple(map(int.__add__, tally, more))
                if any(map(int.__gt__, both, self._want)):
                    continue
                cost = entry.cost + its.cost
                known = sums.get(both)
                if known is None or cost < known.cost:
                    sums[both] = _Entry(cost, _Chain(entry.chain, more))
        return sums

    def _passed_up(self, child: _Free, link: Link) -> _Table:
        """Return a child's table as its parent may use it.

        Replicas with stages are chained as low as possible (never worse: it is TP that shapes the tally), so a part
        has chained ``tally // pp`` of them and pays its own link for those its children had not. Beyond the limit
        for PP none may be chained any more: a child then has to have no stage left over.
        """
        table = self._table(child)
        if child.link <= self._worst_pp < link:
            table = {t: e for t, e in table.items() if not self._loose_stages(t)}
        return {t: _Entry(e.cost - link * self._chained(t), e.chain) for t, e in table.items()}

    def _complete_here(self, table: dict[Tally, _Entry], number: int, shape: Shape, part: _Free) -> None:
        """Add the tallies reached by completing more groups of a shape over this part's own link."""
        is_tp, is_pp = shape.tp > 1, shape.pp > 1
        if (is_tp and part.link > self._worst_tp) or (is_pp and part.link > self._worst_pp):
            return
        price = part.link * (_STEP if is_tp else 1)
        by_number: list[list[Tally]] = [[] for _ in range(self._want[number] + 1)]
        for tally in table:
            by_number[tally[number]].append(tally)
        for done, tallies in enumerate(by_number[:-1]):
            for tally in tallies:
                more = (*tally[:number], done + 1, *tally[number + 1 :])
                if sum(k * s.unit for k, s in zip(more, self.shapes, strict=True)) > part.count:
                    continue
                entry, known = table[tally], table.get(more)
                if known is None:
                    by_number[done + 1].append(more)
                if known is None or entry.cost + price < known.cost:
                    table[more] = _Entry(entry.cost + price, entry.chain)

    def _chained(self, tally: Tally) -> int:
        return sum(k // s.pp for k, s in zip(tally, self.shapes, strict=True) if s.has_stages)

    def _loose_stages(self, tally: Tally) -> int:
        return sum(k % s.pp for k, s in zip(tally, self.shapes, strict=True) if s.has_stages)


class _Carver:
    """Walks the tables from the top and hands out real GPUs."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        tables: Mapping[tuple[object, ...], _Table],
        made: dict[Shape, list[Replica]],
    ) -> None:
        self._shapes = shapes
        self._tables = tables
        self._made = made

    def carve(self, part: _Free, tally: Tally) -> tuple[list[int], dict[Shape, list[tuple[int, ...]]]]:
        """Complete this part's groups; return its unused GPUs and its stages that are not chained yet."""
        below = _unchained(self._tables[part.key][tally].chain)
        here = [k - sum(t[number] for t in below) for number, k in enumerate(tally)]
        pools: list[list[int]] = []
        loose: dict[Shape, list[tuple[int, ...]]] = {shape: [] for shape in self._shapes}
        for child, its_tally in zip(part.children, below, strict=True):
            unused, stages = self.carve(child, its_tally)
            pools.append(unused)
            for shape, more in stages.items():
                loose[shape] += more
        in_children = {gpu for child in part.children for gpu in child.gpus}
        pools += [[gpu] for gpu in part.gpus if gpu not in in_children]
        pools.sort()
        for shape, count in zip(self._shapes, here, strict=True):
            for _ in range(count):
                unit = _take(pools, shape.unit)
                if shape.has_stages:
                    loose[shape].append(unit)
                else:
                    self._made[shape].append((unit,) if shape.pp == 1 else tuple((gpu,) for gpu in unit))
            if shape.has_stages:
                self._chain(shape, loose[shape])
        return [gpu for pool in pools for gpu in pool], loose

    def _chain(self, shape: Shape, stages: list[tuple[int, ...]]) -> None:
        stages.sort()
        while len(stages) >= shape.pp:
            self._made[shape].append(tuple(stages[: shape.pp]))
            del stages[: shape.pp]


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


def _unchained(chain: _Chain | None) -> list[Tally]:
    tallies: list[Tally] = []
    while chain is not None:
        tallies.append(chain.tally)
        chain = chain.before
    return tallies[::-1]


def _without(part: Part, used: frozenset[int]) -> _Free | None:
    """Return the part without these GPUs, children in an order that parts of one form share; None if none is left."""
    if not part.children:
        gpu = part.gpus[0]
        return None if gpu in used else _Free(Link.X, 1, (gpu,), (), ())
    left = [free for child in part.children if (free := _without(child, used)) is not None]
    if len(left) <= 1:
        return left[0] if left else None
    children = tuple(sorted((free for free in left if free.count > 1), key=lambda free: (_form(free.key), free.gpus)))
    gpus = tuple(sorted(gpu for free in left for gpu in free.gpus))
    key = (int(part.link), len(gpus), tuple(child.key for child in children))
    return _Free(part.link, len(gpus), gpus, children, key)


def _form(key: tuple[object, ...]) -> str:
    return repr(key)


def _reach(one: Part, other: Part, level: Link, link: Callable[[int, int], Link]) -> bool:
    return all(link(a, b) <= level for a in one.gpus for b in other.gpus)


def _joined(level: Link, members: Sequence[Part]) -> Part:
    if len(members) == 1:
        return members[0]
    return Part(level, tuple(gpu for member in members for gpu in member.gpus), tuple(members))


def _lowest(part: Part, gpus: Sequence[int]) -> Part:
    for child in part.children:
        if all(gpu in child.gpus for gpu in gpus):
            return _lowest(child, gpus)
    return part


def _links(part: Part) -> list[Link]:
    """Return the tree's links, best first, X always among them (it is the worst link of no group at all)."""
    found = {Link.X}
    todo = [part]
    while todo:
        part = todo.pop()
        found.add(part.link)
        todo += part.children
    return sorted(found)
