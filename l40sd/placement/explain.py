"""What an operator reads about a layout: why these GPUs, what to watch, and why not."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from l40sd.errors import DoesNotFit
from l40sd.hardware.topology import shared_part
from l40sd.model import GpuId, Inventory, Link, ReplicaKind
from l40sd.placement.candidates import Counts, FarPair, Ground, gpus_needed, positions_of
from l40sd.placement.parallelism import Replica
from l40sd.placement.pcie_tree import Part


def reason(kind: ReplicaKind, replica: Replica, ground: Ground) -> str:
    """Return one sentence on one replica's GPUs.

    It depends on the placement alone, so that a worker which is not touched keeps its sentence too.
    """
    _, tp, pp = kind
    positions = positions_of([replica])
    gpus = [ground.gpus[position] for position in positions]
    names, span = ground.names(gpus), ground.far_pair(positions).link
    part = shared_part(ground.inventory, gpus, span)
    if len(gpus) == 1:
        return f"{names} by itself" + (f", on {part}" if ground.inventory.gpu(gpus[0]).numa_node is not None else "")
    if pp == 1:
        return f"{names} share {part} ({span.name})"
    if tp == 1:
        steps = [ground.inventory.link(a, b).name for a, b in pairwise(gpus)]
        return f"{names} share {part}; from stage to stage over {' '.join(steps)}"
    inner = max(ground.far_pair(stage).link for stage in replica)
    return f"{pp} stages of {tp} GPUs, each within {inner.name}; {names} share {part} ({span.name})"


def link_warnings(replicas: Mapping[ReplicaKind, Sequence[Replica]], ground: Ground) -> Iterator[str]:
    """Yield where TP groups leave a PCIe switch or a socket, and where a pipeline does the latter."""
    tp = [ground.far_pair(stage) for (_, tp, _), made in replicas.items() if tp > 1 for r in made for stage in r]
    pp = [ground.far_pair(positions_of([r])) for (_, _, pp), made in replicas.items() if pp > 1 for r in made]
    wide = [pair for pair in tp if Link.PIX < pair.link < Link.SYS]
    if wide:
        yield f"TP groups that span several PCIe switches: {_listed(wide)}"
    if crossed := [pair for pair in tp if pair.link is Link.SYS]:
        yield f"TP groups that cross sockets, slow in every layer: {_listed(crossed)}"
    if crossed := [pair for pair in pp if pair.link is Link.SYS]:
        yield f"pipelines that cross sockets, once per stage boundary: {_listed(crossed)}"


def leftover_warnings(
    leftover: Sequence[GpuId], fills: Sequence[ReplicaKind], counts: Counts, ground: Ground
) -> Iterator[str]:
    """Yield which GPUs no replica uses, and what could be done with them."""
    if not leftover:
        return
    verb = "is" if len(leftover) == 1 else "are"
    yield f"{ground.names(leftover)} {verb} left over"
    for kind in fills:
        crossing = crossing_pair({**counts, kind: counts[kind] + 1}, ground)
        if crossing is not None:
            yield f"{words(kind, 1)} more would cross sockets ({crossing}); --force takes it"
            return


def unusable_warnings(unusable: frozenset[GpuId], inventory: Inventory) -> Iterator[str]:
    """Yield which GPUs of this host were left out."""
    names = [f"GPU{gpu.index}" for gpu in inventory.gpus if gpu.id in unusable]
    if names:
        yield f"{' '.join(names)} left out: held by a worker that cannot be killed, or lost"


def refusal(pattern: str, counts: Counts, ground: Ground) -> DoesNotFit:
    """Return what is missing for these counts, and what would fit."""
    where = f"pattern {pattern}"
    asked = " + ".join(words(kind, count) for kind, count in counts.items() if count)
    would_fit = _would_fit(counts, ground)
    crossing = crossing_pair(counts, ground)
    if crossing is None:
        usable = len(ground.gpus)
        what = f"{asked} needs {gpus_needed(counts)} GPUs, this host has {usable} that can be used"
        return DoesNotFit(what, where=where, hint=would_fit, code="does_not_fit")
    what = f"{asked}: a TP group would have to cross sockets ({crossing})"
    return DoesNotFit(what, where=where, hint=f"{would_fit}; or --force", code="crosses_sockets")


def crossing_pair(counts: Counts, ground: Ground) -> FarPair | None:
    """Return a link between sockets that TP needs for these counts; None when there are too few GPUs even so."""
    found = ground.best(counts, Link.SYS)
    if found is None or found[1].worst_tp <= ground.limit:
        return None
    stages = [
        stage for parallelism, made in found[0].replicas().items() if parallelism.tp > 1 for r in made for stage in r
    ]
    return max((ground.far_pair(stage) for stage in stages), key=lambda pair: pair.link)


def words(kind: ReplicaKind, count: int) -> str:
    """Return e.g. ``3 x llama (tp=2 pp=2)``."""
    model, tp, pp = kind
    shape = " ".join([f"tp={tp}"] * (tp > 1 or pp == 1) + [f"pp={pp}"] * (pp > 1))
    return f"{count} x {model} ({shape})"


def _would_fit(counts: Counts, ground: Ground) -> str:
    """Return a sentence on fewer replicas that fit: the fewest possible less of the last kinds, first kinds first."""
    fewer: dict[ReplicaKind, int] = {}
    for kind, count in counts.items():
        fewer[kind] = ground.most(fewer, [kind], count)
    if any(fewer.values()):
        return f"{' + '.join(words(kind, count) for kind, count in fewer.items() if count)} would fit"
    if not ground.gpus:
        return "no GPU of this host can be used"
    if all(tp == 1 for _, tp, _ in counts):
        return f"a replica has at most {len(ground.gpus)} GPUs here"
    return f"a TP group within a socket has at most {max(_within(ground.tree, ground.limit))} GPUs"


def _within(part: Part, limit: Link) -> Iterator[int]:
    if part.link <= limit:
        yield len(part.gpus)
    else:
        for child in part.children:
            yield from _within(child, limit)


def _listed(pairs: Sequence[FarPair]) -> str:
    return ", ".join(map(str, pairs))
