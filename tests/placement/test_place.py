"""Where replicas go: the reference host by name, and small hosts of every shape against brute force."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations, pairwise, permutations, product
from pathlib import Path

import pytest
from examples import examples
from hosts import gpus_of, tree_host, tree_hosts
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from l40sd.config.options import Config, ModelConfig
from l40sd.errors import DoesNotFit, L40sError
from l40sd.hardware.host_file import parse_host_file
from l40sd.model import (
    Gpu,
    GpuId,
    Inventory,
    Layout,
    Link,
    ModelFacts,
    ModelName,
    Pattern,
    PciAddress,
    Placement,
    ReplicaSpec,
    WorkerId,
)
from l40sd.placement.patterns import patterns_of
from l40sd.placement.place import place, worker_prefix

M, N = ModelName("llama"), ModelName("qwen")
CONFIG = Config(models={M: ModelConfig(name=M), N: ModelConfig(name=N)})
HOSTS = Path(__file__).parents[2] / "l40sd/sim/hosts"


def bundled(name: str) -> Inventory:
    return parse_host_file((HOSTS / f"{name}.toml").read_text(), source=name)


def pattern(*specs: tuple[ModelName, int | None, int, int]) -> Pattern:
    return Pattern(name="test", replicas=tuple(ReplicaSpec(model=m, count=c, tp=tp, pp=pp) for m, c, tp, pp in specs))


def groups(layout: Layout, host: Inventory) -> list[list[int]]:
    return [[host.gpu(gpu).index for gpu in p.gpus] for p in layout.placements]


def built_in(name: str, host: Inventory, *, force: bool = False) -> Layout:
    return place(patterns_of(CONFIG, host)[name], CONFIG, host, facts={}, force=force)


# -- the reference host --------------------------------------------------------------------------------------------


def test_pattern_a_gives_every_gpu_a_replica() -> None:
    layout = built_in("A", bundled("l40s-12-4+2"))
    assert [p.worker for p in layout.placements] == [f"llama-gpu{n}" for n in range(12)]
    assert layout.placements[7].reason == "GPU7 by itself, on NUMA node 1"
    assert layout.placements[7].memory_nodes == (1,)


def test_pattern_b_pairs_below_one_switch() -> None:
    host = bundled("l40s-12-4+2")
    layout = built_in("B", host)
    assert groups(layout, host) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert {p.worst_link for p in layout.placements} == {Link.PIX}
    assert layout.placements[2].reason == "GPU4 GPU5 share PCIe switch 0000:38:00.0 (PIX)"


def test_pattern_c_leaves_what_would_cross_sockets_and_says_so() -> None:
    host = bundled("l40s-12-4+2")
    layout = built_in("C", host)
    assert groups(layout, host) == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert "GPU4 GPU5 GPU10 GPU11 are left over" in layout.warnings
    assert "1 x llama (tp=4) more would cross sockets (GPU4-GPU10 SYS); --force takes it" in layout.warnings


def test_pattern_c_with_force_is_three_quads_and_a_warning() -> None:
    host = bundled("l40s-12-4+2")
    layout = built_in("C", host, force=True)
    assert groups(layout, host) == [[0, 1, 2, 3], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert "TP groups that cross sockets, slow in every layer: GPU4-GPU10 SYS" in layout.warnings
    assert layout.placements[1].memory_nodes == (0, 1)


def test_pattern_c_on_eight_and_four_needs_no_force() -> None:
    host = bundled("l40s-12-8+4")
    layout = built_in("C", host)
    assert groups(layout, host) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert not [w for w in layout.warnings if "socket" in w or "left over" in w]


def test_pattern_d_may_cross_sockets_between_stages_and_names_the_step() -> None:
    host = bundled("l40s-12-4+2")
    layout = built_in("D", host)
    assert groups(layout, host) == [[0, 1, 2, 3], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert layout.placements[1].reason.endswith("from stage to stage over PIX SYS PIX")
    assert "pipelines that cross sockets, once per stage boundary: GPU4-GPU10 SYS" in layout.warnings
    assert layout.placements[1].worker == "llama-gpu4-5-10-11-pp4"


def test_several_models_share_the_host_wide_ones_in_the_best_places() -> None:
    host = bundled("l40s-12-4+2")
    layout = place(pattern((N, 4, 1, 1), (M, 2, 2, 1), (N, 1, 4, 1)), CONFIG, host, facts={})
    assert {p.worst_link for p in layout.placements} == {Link.X, Link.PIX}
    assert not layout.leftover


def test_the_awkward_host_takes_every_pattern() -> None:
    host = bundled("l40s-11-awkward")
    assert len(built_in("A", host).placements) == 11
    b = built_in("B", host)
    assert [p.worst_link.name for p in b.placements] == ["PIX", "PIX", "PIX", "PHB", "PIX"]
    assert b.leftover == gpus_of(host, 2)
    assert len(built_in("C", host).placements) == 2
    assert len(built_in("D", host).placements) == 2


def test_wide_tp_is_placed_and_advised_against() -> None:
    layout = place(pattern((M, 1, 8, 1)), CONFIG, bundled("l40s-12-8+4"), facts={})
    assert any("TP=8 over PCIe hardly pays" in warning for warning in layout.warnings)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "what", "hint"),
    [
        ([(M, 7, 2, 1)], "7 x llama (tp=2) needs 14 GPUs, this host has 12", "6 x llama (tp=2) would fit"),
        ([(M, 3, 4, 1)], "cross sockets (GPU4-GPU10 SYS)", "2 x llama (tp=4) would fit; or --force"),
        ([(M, None, 8, 1)], "cross sockets (GPU0-GPU6 SYS)", "a TP group within a socket has at most 6 GPUs"),
        ([(M, None, 16, 1)], "needs 16 GPUs", "a TP group within a socket has at most 6 GPUs"),
        ([(M, None, 1, 13)], "needs 13 GPUs", "a replica has at most 12 GPUs here"),
        ([(M, 12, 1, 1), (N, None, 1, 1)], "needs 13 GPUs", "12 x llama (tp=1) would fit"),
        ([(M, 1, 4, 1), (N, 2, 4, 1)], "cross sockets", "1 x llama (tp=4) + 1 x qwen (tp=4) would fit"),
        ([(M, 0, 1, 1)], "count = 0", "at least 1"),
        ([(ModelName("gpt"), 1, 1, 1)], "model 'gpt' is not configured", "llama, qwen"),
    ],
)
def test_a_refusal_says_what_would_fit(asked: list[tuple[ModelName, int, int, int]], what: str, hint: str) -> None:
    with pytest.raises(L40sError) as caught:
        place(pattern(*asked), CONFIG, bundled("l40s-12-4+2"), facts={})
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_tp_must_divide_the_heads_the_config_before_the_checkpoint() -> None:
    host = bundled("l40s-8")
    with pytest.raises(DoesNotFit, match="tp = 4 does not divide the model's 30 attention heads") as caught:
        place(pattern((M, 1, 4, 1)), CONFIG, host, facts={M: ModelFacts(attention_heads=30)})
    assert "use tp = 1, 2, 3, 5 or 6" in caught.value.hint
    config = Config(models={M: ModelConfig(name=M, attention_heads=32)})
    place(pattern((M, 1, 4, 1)), config, host, facts={M: ModelFacts(attention_heads=30)})


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(DoesNotFit, match="pp = 4 is more than the model's 3 layers"):
        place(pattern((M, 1, 1, 4)), CONFIG, bundled("l40s-8"), facts={M: ModelFacts(layers=3)})


def test_unusable_gpus_are_left_alone_and_named() -> None:
    host = bundled("l40s-8")
    bad = frozenset(gpus_of(host, 2))
    layout = place(pattern((M, None, 2, 1)), CONFIG, host, facts={}, unusable=bad)
    assert groups(layout, host) == [[0, 1], [4, 5], [6, 7]]
    assert any(warning.startswith("GPU2 left out") for warning in layout.warnings)
    everything = frozenset(gpu.id for gpu in host.gpus)
    with pytest.raises(DoesNotFit, match="this host has 0"):
        place(pattern((M, None, 1, 1)), CONFIG, host, facts={}, unusable=everything)


# -- external models, names ----------------------------------------------------------------------------------------


def test_external_workers_are_part_of_every_layout() -> None:
    models = {
        M: ModelConfig(name=M),
        N: ModelConfig(name=N, engine="external", endpoints=("http://a:1", "http://b:1")),
    }
    layout = place(pattern((M, 1, 1, 1)), Config(models=models), bundled("l40s-8"), facts={})
    assert [(p.worker, p.endpoint, p.weight) for p in layout.placements[1:]] == [
        ("qwen-ext0", "http://a:1", 1),
        ("qwen-ext1", "http://b:1", 1),
    ]


@given(st.text())
def test_a_models_name_becomes_part_of_a_workers(name: str) -> None:
    word = worker_prefix(name)
    assert 0 < len(word) <= 48
    assert set(word) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_names_that_differ_only_in_their_dots_give_different_external_workers() -> None:
    models = {
        ModelName(name): ModelConfig(name=ModelName(name), engine="external", endpoints=(f"http://{name}:1",))
        for name in ("a.b", "a-b")
    }
    layout = place(pattern(), Config(models=models), bundled("l40s-8"), facts={})
    assert [p.worker for p in layout.placements] == ["a-b-ext0", "a-b-ext1"]


# -- against brute force -------------------------------------------------------------------------------------------

Kind = tuple[ModelName, int, int]
Stages = tuple[tuple[int, ...], ...]


def every_layout(free: tuple[int, ...], kinds: list[Kind]) -> Iterator[list[tuple[Kind, Stages]]]:
    """Every way to give each kind in the list its GPUs; alike ones in order of their lowest GPU, so each way once."""
    if not kinds:
        yield []
        return
    kind, rest = kinds[0], kinds[1:]
    for stages in every_replica(free, kind[1], kind[2]):
        used = {gpu for stage in stages for gpu in stage}
        left = tuple(gpu for gpu in free if gpu not in used)
        for others in every_layout(left, rest):
            if others and others[0][0] == kind and others[0][1] < stages:
                continue
            yield [(kind, stages), *others]


def every_replica(free: tuple[int, ...], tp: int, pp: int) -> Iterator[Stages]:
    """Every set of ``pp`` sets of ``tp`` GPUs, in order of their lowest GPU."""
    if pp == 0:
        yield ()
        return
    for stage in combinations(free, tp):
        later = tuple(gpu for gpu in free if gpu not in stage and gpu > stage[0])
        for others in every_replica(later, tp, pp - 1):
            yield (stage, *others)


Cost = tuple[Link, int, Link, int]


def cost(layout: list[tuple[Kind, Stages]], host: Inventory) -> Cost:
    """The objective, written down once more from the documents: nothing of optimum.py."""
    ids = [gpu.id for gpu in host.gpus]

    def worst(gpus: tuple[int, ...]) -> Link:
        return max((host.link(ids[a], ids[b]) for a, b in combinations(gpus, 2)), default=Link.X)

    tp = [worst(stage) for (_, width, _), stages in layout if width > 1 for stage in stages]
    pp = [worst(tuple(g for stage in stages for g in stage)) for (_, _, depth), stages in layout if depth > 1]
    return max(tp, default=Link.X), sum(tp), max(pp, default=Link.X), sum(pp)


def kept_gpus(layout: list[tuple[Kind, Stages]], current: list[tuple[Kind, Stages]]) -> int:
    running = Counter((kind, frozenset(map(frozenset, stages))) for kind, stages in current)
    wanted = Counter((kind, frozenset(map(frozenset, stages))) for kind, stages in layout)
    return sum(n * kind[1] * kind[2] for (kind, _), n in (running & wanted).items())


def as_stages(layout: Layout, host: Inventory) -> list[tuple[Kind, Stages]]:
    position = {gpu.id: number for number, gpu in enumerate(host.gpus)}
    found = []
    for p in layout.placements:
        gpus = [position[gpu] for gpu in p.gpus]
        found.append(((p.model, p.tp, p.pp), tuple(tuple(gpus[n : n + p.tp]) for n in range(0, len(gpus), p.tp))))
    return found


def as_placements(layout: list[tuple[Kind, Stages]], host: Inventory) -> list[Placement]:
    return [
        Placement(
            worker=WorkerId(f"w{number}"),
            model=model,
            tp=tp,
            pp=pp,
            gpus=tuple(host.gpus[gpu].id for stage in stages for gpu in stage),
        )
        for number, ((model, tp, pp), stages) in enumerate(layout)
    ]


kinds = st.tuples(st.sampled_from([M, N]), st.sampled_from([1, 1, 2, 2, 3, 4]), st.sampled_from([1, 1, 1, 2, 3]))


@st.composite
def what_runs(draw: st.DrawFn, host: Inventory, asked: list[Kind]) -> list[tuple[Kind, Stages]]:
    """Some replicas that run now, of kinds that may or may not be asked for, on any GPUs."""
    free = draw(st.permutations(range(len(host.gpus))))
    running: list[tuple[Kind, Stages]] = []
    for _ in range(draw(st.integers(0, len(free)))):
        kind = draw(st.one_of(st.sampled_from(asked), kinds))
        _, tp, pp = kind
        if tp * pp > len(free):
            break
        taken, free = free[: tp * pp], free[tp * pp :]
        running.append((kind, tuple(tuple(taken[n : n + tp]) for n in range(0, tp * pp, tp))))
    return running


def check_against_brute_force(
    host: Inventory, asked: list[Kind], running: list[tuple[Kind, Stages]], *, force: bool
) -> None:
    """The cost is the least that any layout has, and of the layouts of that cost none moves less."""
    limit = Link.SYS if force else Link.NODE
    every = ((cost(layout, host), layout) for layout in every_layout(tuple(range(len(host.gpus))), sorted(asked)))
    allowed = [(its, layout) for its, layout in every if its[0] <= limit]
    wanted = pattern(*((model, count, tp, pp) for (model, tp, pp), count in Counter(asked).items()))
    current = as_placements(running, host)
    if not allowed:
        with pytest.raises(DoesNotFit):
            place(wanted, CONFIG, host, facts={}, force=force, current=current)
        return
    chosen = as_stages(place(wanted, CONFIG, host, facts={}, force=force, current=current), host)
    best = min(its for its, _ in allowed)
    assert cost(chosen, host) == best
    assert kept_gpus(chosen, running) == max(kept_gpus(layout, running) for its, layout in allowed if its == best)


@settings(max_examples=examples(200), deadline=None)
@given(st.data())
def test_no_layout_is_better_than_the_one_chosen(data: st.DataObject) -> None:
    host = data.draw(tree_hosts(7))
    asked = data.draw(st.lists(kinds, min_size=1, max_size=4))
    assume(sum(tp * pp for _, tp, pp in asked) <= len(host.gpus))
    running = data.draw(what_runs(host, asked))
    check_against_brute_force(host, asked, running, force=data.draw(st.booleans()))


@settings(max_examples=examples(80), deadline=None)
@given(st.data())
def test_no_layout_is_better_for_pipelines_of_tp_groups(data: st.DataObject) -> None:
    """Two pipelines of two pairs take eight GPUs, beyond what every kind at once leaves time for."""
    host = data.draw(tree_hosts(9).filter(lambda host: len(host.gpus) >= 8))
    asked = data.draw(st.sampled_from([[(M, 2, 2)] * 2, [(M, 2, 2), (N, 2, 2)], [(M, 2, 2), (N, 2, 1), (N, 2, 1)]]))
    running = data.draw(what_runs(host, asked))
    check_against_brute_force(host, asked, running, force=data.draw(st.booleans()))


def test_a_shorter_pipeline_does_not_pay_for_slower_tp() -> None:
    """The triple makes PHB the worst TP link anyway; still the pipeline takes two PIX pairs, a socket apart."""
    host = tree_host([[[["g", "g"], ["g"], ["g"]]], [[["g", "g"]]], [[["g"], ["g"], ["g"]]]])
    check_against_brute_force(host, [(M, 2, 2), (N, 3, 1)], [], force=False)
    layout = place(pattern((M, 1, 2, 2)), CONFIG, host, facts={})
    assert groups(layout, host) == [[0, 1, 4, 5]]


@settings(max_examples=examples(100), deadline=None)
@given(tree_hosts(7), kinds, st.booleans())
def test_fill_is_the_most_that_any_layout_holds(host: Inventory, kind: Kind, force: bool) -> None:
    model, tp, pp = kind
    limit = Link.SYS if force else Link.NODE
    free = tuple(range(len(host.gpus)))

    def fits(count: int) -> bool:
        return any(cost(layout, host)[0] <= limit for layout in every_layout(free, [kind] * count))

    most = max(count for count in range(len(free) // (tp * pp) + 1) if count == 0 or fits(count))
    if most == 0:
        with pytest.raises(DoesNotFit):
            place(pattern((model, None, tp, pp)), CONFIG, host, facts={}, force=force)
        return
    layout = place(pattern((model, None, tp, pp)), CONFIG, host, facts={}, force=force)
    assert len(layout.placements) == most
    assert len(layout.leftover) == len(free) - most * tp * pp


# -- what holds on any host ----------------------------------------------------------------------------------------


@st.composite
def any_hosts(draw: st.DrawFn) -> Inventory:
    """Links drawn at random: no tree, as with NVLink bridges, or a virtual machine that invents them."""
    count = draw(st.integers(1, 10))
    gpus = tuple(
        Gpu(id=GpuId(f"GPU-{n}"), index=n, pci=PciAddress(f"0000:{n:02x}:00.0"), name="x", memory_bytes=0)
        for n in range(count)
    )
    links = {}
    for a, b in combinations(gpus, 2):
        links[(a.id, b.id)] = links[(b.id, a.id)] = draw(st.sampled_from(list(Link)[1:]))
    return Inventory(host="any", source="", gpus=gpus, numa_nodes=(), links=links)


@settings(max_examples=examples(200), deadline=None)
@given(st.one_of(any_hosts(), tree_hosts(14)), st.lists(kinds, min_size=1, max_size=3), st.data())
def test_whatever_is_placed_is_sound(host: Inventory, asked: list[Kind], data: st.DataObject) -> None:
    """No GPU twice, nobody across sockets unasked, everything named once; asking again changes nothing."""
    counts = {kind: data.draw(st.one_of(st.none(), st.integers(1, 3))) for kind in asked}
    wanted = pattern(*((model, count, tp, pp) for (model, tp, pp), count in counts.items()))
    running = as_placements(data.draw(what_runs(host, asked)), host)
    unusable = frozenset(data.draw(st.sets(st.sampled_from([gpu.id for gpu in host.gpus]), max_size=2)))
    try:
        layout = place(wanted, CONFIG, host, facts={}, current=running, unusable=unusable)
    except DoesNotFit:
        return
    used = [gpu for p in layout.placements for gpu in p.gpus]
    assert sorted([*used, *layout.leftover, *unusable]) == sorted(gpu.id for gpu in host.gpus)
    assert len({p.worker for p in layout.placements}) == len(layout.placements)
    for kind, stages in as_stages(layout, host):
        assert cost([(kind, stages)], host)[0] < Link.SYS
    for kind, count in counts.items():
        assert Counter((p.model, p.tp, p.pp) for p in layout.placements)[kind] >= (count or 1)
    again = place(wanted, CONFIG, host, facts={}, current=layout.placements, unusable=unusable)
    assert again == layout
    assert place(wanted, CONFIG, host, facts={}, current=running, unusable=unusable) == layout


@given(tree_hosts(12), st.sampled_from([2, 3, 4]))
def test_stages_next_to_each_other_are_as_close_as_any_order_gets_them(host: Inventory, depth: int) -> None:
    try:
        layout = place(pattern((M, 1, 1, depth)), CONFIG, host, facts={})
    except DoesNotFit:
        return
    gpus = layout.placements[0].gpus

    def way(order: tuple[GpuId, ...]) -> int:
        return sum(host.link(a, b) for a, b in pairwise(order))

    assert way(gpus) == min(map(way, permutations(gpus)))


def test_several_fills_take_turns() -> None:
    layout = place(pattern((M, None, 1, 1), (N, None, 2, 1)), CONFIG, bundled("l40s-8"), facts={})
    models: Mapping[ModelName, int] = Counter(p.model for p in layout.placements)
    assert models == {M: 4, N: 2}


def test_a_replica_that_can_stay_stays_with_its_rank_order() -> None:
    host = bundled("l40s-8")
    running = Placement(worker=WorkerId("x"), model=M, tp=2, pp=1, gpus=gpus_of(host, 3, 1))
    layout = place(pattern((M, None, 2, 1)), CONFIG, host, facts={}, current=[running])
    assert "llama-gpu3-1" in [p.worker for p in layout.placements]
    assert groups(layout, host)[:2] == [[0, 2], [3, 1]]


def test_one_worker_moves_so_that_two_can_stay() -> None:
    """Keeping GPU0's worker would leave the triple only the switch of the two others."""
    host = tree_host([[[["g"] * 3], [["g"] * 3]]])
    running = [Placement(worker=WorkerId(f"x{n}"), model=N, tp=1, pp=1, gpus=gpus_of(host, n)) for n in (0, 3, 4)]
    layout = place(pattern((N, 3, 1, 1), (M, 1, 3, 1)), CONFIG, host, facts={}, current=running)
    assert groups(layout, host) == [[3], [4], [5], [0, 1, 2]]


def test_a_replica_in_a_bad_place_moves() -> None:
    host = bundled("l40s-8")
    running = Placement(worker=WorkerId("x"), model=M, tp=2, pp=1, gpus=gpus_of(host, 0, 4))
    layout = place(pattern((M, 1, 2, 1)), CONFIG, host, facts={}, current=[running], force=True)
    assert groups(layout, host) == [[0, 1]]


@pytest.mark.parametrize(("tp", "pp"), list(product([1, 2, 4], [1, 2, 4])))
def test_a_host_of_128_takes_every_shape_whole(tp: int, pp: int) -> None:
    host = tree_host([[[["g"] * 8], [["g"] * 4, ["g"] * 4]] * 2] * 4)
    layout = place(pattern((M, None, tp, pp)), CONFIG, host, facts={})
    assert len(layout.placements) == len(host.gpus) // (tp * pp)
    assert not layout.leftover
