"""A host as a tree: parts that reach each other by one link, down to single GPUs.

On a host whose links form no tree (NVLink bridges across switches) a GPU joins a part only if it reaches every GPU
there by that link or better. The tree then overstates some links: a socket is never crossed unseen, but a cleverer
grouping may be missed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from l40sd.model import Link

Form = tuple[Any, ...]
"""Link, number of GPUs, and the forms of the children that have more than one: equal for parts that are alike."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the host: a GPU by itself, or parts that reach each other by ``link``.

    Attributes:
        gpus: Positions of all GPUs below, child by child.
    """

    link: Link
    gpus: tuple[int, ...]
    children: tuple["Part", ...] = ()


@dataclass(frozen=True, slots=True)
class FreePart:
    """What is left of a part without the GPUs in use; ``children`` are only those with two or more GPUs."""

    link: Link
    gpus: tuple[int, ...]
    children: tuple["FreePart", ...]
    form: Form


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


def without(part: Part, used: frozenset[int]) -> FreePart | None:
    """Return the part without these GPUs, parts of one form next to each other; None if nothing is left."""
    if not part.children:
        return None if part.gpus[0] in used else FreePart(Link.X, part.gpus, (), ())
    left = [free for child in part.children if (free := without(child, used)) is not None]
    if len(left) <= 1:
        return left[0] if left else None
    children = tuple(sorted((c for c in left if len(c.gpus) > 1), key=lambda c: (c.form, c.gpus)))
    gpus = tuple(sorted(gpu for free in left for gpu in free.gpus))
    return FreePart(part.link, gpus, children, (int(part.link), len(gpus), tuple(c.form for c in children)))


def span(part: Part, gpus: Sequence[int]) -> Link:
    """Return the link of the lowest part that holds all of these GPUs."""
    for child in part.children:
        if all(gpu in child.gpus for gpu in gpus):
            return span(child, gpus)
    return part.link


def links_in(part: Part) -> list[Link]:
    """Return the tree's links, best first; X is always among them."""
    found = {Link.X}
    todo = [part]
    while todo:
        part = todo.pop()
        found.add(part.link)
        todo += part.children
    return sorted(found)


def _reach(one: Part, other: Part, level: Link, link: Callable[[int, int], Link]) -> bool:
    return all(link(a, b) <= level for a in one.gpus for b in other.gpus)


def _joined(level: Link, members: Sequence[Part]) -> Part:
    if len(members) == 1:
        return members[0]
    return Part(level, tuple(gpu for member in members for gpu in member.gpus), tuple(members))
