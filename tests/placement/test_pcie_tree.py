"""A host as a tree of parts, what is left of it, and what a replica costs on it."""

from collections.abc import Callable

import pytest

from l40sd.model import Link, ModelName
from l40sd.placement.candidates import gpus_needed, more, positions_of
from l40sd.placement.parallelism import Cost, Parallelism, cost_of
from l40sd.placement.pcie_tree import Part, links_in, span, tree_of, without

M, N = ModelName("llama"), ModelName("qwen")


def linked(switches: list[int], sockets: list[int]) -> Callable[[int, int], Link]:
    """Return how GPUs are linked: PIX below one switch, NODE in one socket, else SYS."""

    def link(a: int, b: int) -> Link:
        if switches[a] == switches[b]:
            return Link.PIX
        return Link.NODE if sockets[a] == sockets[b] else Link.SYS

    return link


# Two switches of two GPUs and a single one on the first socket, a pair on the second.
TREE = tree_of(7, linked([0, 0, 1, 1, 2, 3, 3], [0, 0, 0, 0, 0, 1, 1]))


def test_a_part_holds_what_reaches_each_other_by_its_link() -> None:
    assert (TREE.link, TREE.gpus) == (Link.SYS, (0, 1, 2, 3, 4, 5, 6))
    assert [(part.link, part.gpus) for part in TREE.children] == [(Link.NODE, (0, 1, 2, 3, 4)), (Link.PIX, (5, 6))]
    assert [part.gpus for part in TREE.children[0].children] == [(0, 1), (2, 3), (4,)]
    assert tree_of(1, lambda a, b: Link.SYS) == Part(Link.X, (0,))


@pytest.mark.parametrize("link", list(Link)[1:])
def test_any_link_but_that_to_itself_makes_a_part(link: Link) -> None:
    assert tree_of(2, lambda a, b: link).link is link


def test_a_gpu_joins_a_part_only_if_it_reaches_every_gpu_there() -> None:
    """A bridge between GPU1 and GPU2, of two pairs: no tree has it."""

    def link(a: int, b: int) -> Link:
        return Link.PIX if {a, b} in ({0, 1}, {2, 3}, {1, 2}) else Link.SYS

    assert [part.gpus for part in tree_of(4, link).children] == [(0, 1), (2, 3)]


def test_the_worst_link_of_some_gpus_is_that_of_the_lowest_part_that_holds_them() -> None:
    for gpus, link in (
        ((3,), Link.X),
        ((0, 1), Link.PIX),
        ((1, 2), Link.NODE),
        ((0, 4), Link.NODE),
        ((4, 5), Link.SYS),
    ):
        assert span(TREE, gpus) is link
    assert links_in(TREE) == [Link.X, Link.PIX, Link.NODE, Link.SYS]
    assert links_in(Part(Link.X, (0,))) == [Link.X]


def test_what_is_left_without_some_gpus_has_no_empty_parts_and_none_with_one_way_on() -> None:
    whole = without(TREE, frozenset())
    assert whole is not None
    assert (whole.link, whole.gpus) == (Link.SYS, (0, 1, 2, 3, 4, 5, 6))
    assert [part.gpus for part in whole.children] == [(5, 6), (0, 1, 2, 3, 4)]
    left = without(TREE, frozenset({0, 1, 4}))
    assert left is not None
    assert [(part.link, part.gpus) for part in left.children] == [(Link.PIX, (2, 3)), (Link.PIX, (5, 6))]
    assert left.children[0].form == left.children[1].form, "they are alike"
    pair = without(TREE, frozenset({2, 3, 4, 5, 6}))
    assert pair is not None
    assert (pair.link, pair.gpus, pair.children) == (Link.PIX, (0, 1), ())
    one = without(TREE, frozenset({0, 1, 2, 3, 4, 5}))
    assert one is not None
    assert (one.link, one.gpus, one.form) == (Link.X, (6,), ())
    assert without(TREE, frozenset(range(7))) is None


def test_parts_differ_in_form_by_their_link_their_size_and_what_is_below() -> None:
    forms = [
        form
        for used in ({0}, {2}, {4}, {0, 2}, set(), {5}, {0, 1})
        if (left := without(TREE, frozenset(used))) is not None and (form := left.form)
    ]
    assert forms[0] == forms[1]
    assert len(set(forms)) == len(forms) - 1


@pytest.mark.parametrize(
    ("tp", "pp", "has_stages", "unit"),
    [(2, 1, False, 2), (4, 1, False, 4), (1, 3, False, 3), (2, 2, True, 2), (3, 2, True, 3)],
)
def test_a_stage_is_counted_where_there_are_stages_else_the_replica(
    tp: int, pp: int, *, has_stages: bool, unit: int
) -> None:
    assert (Parallelism(tp, pp).has_stages, Parallelism(tp, pp).unit) == (has_stages, unit)


def test_a_replica_costs_its_worst_links_inside_tp_groups_and_inside_pipelines() -> None:
    assert cost_of(TREE, Parallelism(2, 1), ((0, 1),)) == Cost(Link.PIX, int(Link.PIX))
    assert cost_of(TREE, Parallelism(2, 1), ((0, 5),)) == Cost(Link.SYS, int(Link.SYS))
    assert cost_of(TREE, Parallelism(1, 2), ((0,), (2,))) == Cost(Link.X, 0, Link.NODE, int(Link.NODE))
    both = int(Link.PIX) + int(Link.NODE)
    assert cost_of(TREE, Parallelism(2, 2), ((0, 1), (2, 4))) == Cost(Link.NODE, both, Link.NODE, int(Link.NODE))
    assert cost_of(TREE, Parallelism(2, 2), ((0, 1), (5, 6))) == Cost(
        Link.PIX, 2 * int(Link.PIX), Link.SYS, int(Link.SYS)
    )


def test_two_groupings_side_by_side_cost_the_worse_link_and_both_sums() -> None:
    one, other = Cost(Link.PIX, 3, Link.SYS, 5), Cost(Link.NODE, 4, Link.X, 0)
    assert one.plus(other) == other.plus(one) == Cost(Link.NODE, 7, Link.SYS, 5)
    assert Cost().plus(one) == one
    assert Cost() == (Link.X, 0, Link.X, 0)


def test_replicas_are_counted_in_gpus() -> None:
    counts = {(M, 2, 2): 3, (N, 1, 1): 4}
    assert gpus_needed(counts) == 16
    assert gpus_needed({}) == 0
    assert more(counts, [(M, 2, 2), (N, 4, 1)], 2) == {(M, 2, 2): 5, (N, 1, 1): 4, (N, 4, 1): 2}
    assert positions_of([((0, 1), (4, 5)), ((2,),)]) == [0, 1, 4, 5, 2]
