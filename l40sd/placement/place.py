"""A pattern on a host: which GPUs each replica gets, in which order, with which CPUs, and why.

Decided in this order:
1. Is the pattern possible at all (models, heads, layers)?
2. How many of each: the numbers given, then "fill" as many as fit, several fills in turn. TP groups stay within a
   socket (with ``force``: may cross).
3. The least cost that so many can have (optimum.py): the worst TP link, the sum of TP links, then PP's.
4. Of all groupings of that cost one that moves the least: as many GPUs as possible keep their worker (stability.py).
5. Of those the one that optimum.py carves first, low PCI addresses first. So the same question has the same answer,
   and asking again with the answer as ``current`` changes nothing.
6. Ranks: GPUs of one switch, then of one host bridge, side by side, each in order of PCI address.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from l40sd.config.options import Config, slug
from l40sd.model import GpuId, Inventory, Layout, Link, ModelFacts, ModelName, Pattern, Placement, ReplicaKind, WorkerId
from l40sd.placement.candidates import Counts, Ground, more, positions_of
from l40sd.placement.explain import leftover_warnings, link_warnings, reason, refusal, unusable_warnings
from l40sd.placement.parallelism import Parallelism, Replica
from l40sd.placement.patterns import check_pattern, external_models, warnings_of
from l40sd.placement.pinning import pin
from l40sd.placement.stability import Keeper


def place(
    pattern: Pattern,
    config: Config,
    inventory: Inventory,
    *,
    facts: Mapping[ModelName, ModelFacts],
    current: Sequence[Placement] = (),
    force: bool = False,
    unusable: frozenset[GpuId] = frozenset(),
) -> Layout:
    """Return the pattern placed on this host, whole.

    Args:
        current: What runs now; replicas stay where they are when that is as good as any other place.
        force: TP groups may cross sockets.
        unusable: GPUs to leave alone, e.g. held by a worker that cannot be killed.

    Raises:
        DoesNotFit: Too few GPUs, or a TP group would cross sockets; the hint says what would fit.
        L40sError: The pattern itself is wrong (unknown model, ...).
    """
    gpus = tuple(gpu.id for gpu in inventory.gpus if gpu.id not in unusable)
    check_pattern(pattern, config, len(gpus), facts)
    ground = Ground.of(inventory, gpus, Link.SYS if force else Link.NODE)
    fills = list(dict.fromkeys(s.kind for s in pattern.replicas if s.count is None))
    counts = _counts(pattern, fills, ground)
    replicas = _replicas(counts, ground, current)
    used = {ground.gpus[position] for position in positions_of(r for made in replicas.values() for r in made)}
    leftover = tuple(gpu for gpu in gpus if gpu not in used)
    return Layout(
        pattern=pattern.name,
        placements=(
            *(_placement(kind, replica, ground) for kind, made in replicas.items() for replica in made),
            *_external(config),
        ),
        leftover=leftover,
        warnings=(
            *warnings_of(pattern, config, facts),
            *link_warnings(replicas, ground),
            *leftover_warnings(leftover, fills, counts, ground),
            *unusable_warnings(unusable, inventory),
        ),
    )


def part_of(pattern: str, former: Sequence[Placement], config: Config, inventory: Inventory) -> Layout:
    """Return what of a former layout this host can still hold, for when the whole pattern does not fit any more."""
    gpus = {gpu.id for gpu in inventory.gpus}
    own = (p for p in former if p.gpus and p.model in config.models and gpus.issuperset(p.gpus))
    return Layout(pattern=pattern, placements=(*own, *_external(config)))


def worker_prefix(model: str) -> str:
    """Return what the names of a model's workers begin with: its slug, never empty, at most 48 characters."""
    return slug(model)[:48].strip("-") or "model"


def _counts(pattern: Pattern, fills: Sequence[ReplicaKind], ground: Ground) -> dict[ReplicaKind, int]:
    """Return how many of each kind, in the pattern's order.

    Raises:
        DoesNotFit: The numbers given do not fit, or a fill finds no room for a single one.
    """
    counts: dict[ReplicaKind, int] = {}
    for spec in pattern.replicas:
        kind = spec.kind
        counts[kind] = counts.get(kind, 0) + (spec.count or 0)
    given = dict(counts)
    if not ground.fits(given):
        raise refusal(pattern.name, given, ground)
    filling = list(fills)
    while filling:
        rounds = ground.most(counts, filling, len(ground.gpus))
        counts = more(counts, filling, rounds)
        still = []
        for kind in filling:
            if ground.fits(one_more := more(counts, [kind], 1)):
                counts = one_more
                still.append(kind)
        filling = still
    if empty := [kind for kind in fills if not counts[kind]]:
        raise refusal(pattern.name, more(given, empty, 1), ground)
    return counts


def _replicas(counts: Counts, ground: Ground, current: Sequence[Placement]) -> dict[ReplicaKind, list[Replica]]:
    """Return the GPUs of every replica, by position, each kind's in PCI order."""
    if not any(counts.values()):
        return {}
    found = ground.best(counts, ground.limit)
    assert found is not None, "these counts have been found to fit"
    _, best = found
    kept = Keeper(counts, ground, best).keep(current)
    left = {kind: count - sum(kind == its_kind for its_kind, _ in kept) for kind, count in counts.items()}
    used = positions_of(replica for _, replica in kept)
    grouping = ground.grouping(left, used)
    assert grouping is not None
    cost = grouping.cost_within(best.worst_tp, best.worst_pp)
    assert cost is not None, "what is kept leaves room for the rest"
    pools = {parallelism: sorted(made) for parallelism, made in grouping.replicas().items()}
    taken = {*used, *positions_of(replica for made in pools.values() for replica in made)}
    pools[Parallelism(1, 1)] = [((position,),) for position in range(len(ground.gpus)) if position not in taken]
    replicas: dict[ReplicaKind, list[Replica]] = {}
    for kind, number in left.items():
        pool = pools[Parallelism(kind.tp, kind.pp)]
        replicas[kind] = sorted([*(r for k, r in kept if k == kind), *pool[:number]])
        del pool[:number]
    return replicas


def _placement(kind: ReplicaKind, replica: Replica, ground: Ground) -> Placement:
    model, tp, pp = kind
    positions = positions_of([replica])
    gpus = tuple(ground.gpus[position] for position in positions)
    cpus, memory_nodes = pin(ground.inventory, gpus)
    numbers = "-".join(str(ground.inventory.gpu(gpu).index) for gpu in gpus)
    return Placement(
        worker=WorkerId(f"{worker_prefix(model)}-gpu{numbers}" + (f"-pp{pp}" if pp > 1 else "")),
        model=model,
        tp=tp,
        pp=pp,
        gpus=gpus,
        cpus=cpus,
        memory_nodes=memory_nodes,
        worst_link=ground.far_pair(positions).link,
        reason=reason(kind, replica, ground),
    )


def _external(config: Config) -> Iterator[Placement]:
    """Yield a placement for every worker that somebody else runs: they are part of every layout."""
    numbers: Counter[str] = Counter()
    for model in external_models(config):
        name = worker_prefix(model.name)
        for endpoint in model.endpoints:
            yield Placement(
                worker=WorkerId(f"{name}-ext{numbers[name]}"),
                model=model.name,
                tp=1,
                pp=1,
                gpus=(),
                reason=f"runs elsewhere, at {endpoint}",
                endpoint=endpoint,
            )
            numbers[name] += 1
