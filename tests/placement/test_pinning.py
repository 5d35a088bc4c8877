"""Which CPUs and memory a worker is bound to."""

from dataclasses import replace

from hosts import gpus_of, tree_host, tree_hosts
from hypothesis import given

from l40sd.hardware.cpus import cores_of, parse_cpu_list
from l40sd.model import Inventory, NumaNode
from l40sd.placement.pinning import pin


def on_node(cpus: str, gpu_count: int, **node: object) -> Inventory:
    host = tree_host([[[["g"] * gpu_count]]])
    numa = NumaNode(id=0, cpus=parse_cpu_list(cpus), **{"memory_bytes": 1, **node})  # type: ignore[arg-type]
    return replace(host, numa_nodes=(numa,), gpus=tuple(replace(gpu, cpus=numa.cpus) for gpu in host.gpus))


def shares(host: Inventory) -> list[set[int]]:
    return [set(pin(host, [gpu.id])[0]) for gpu in host.gpus]


def test_neighbours_get_blocks_of_whole_cores_of_nearly_one_size() -> None:
    host = on_node("0-7,16-23", 3)
    assert shares(host) == [{0, 1, 2, 16, 17, 18}, {3, 4, 5, 19, 20, 21}, {6, 7, 22, 23}]


def test_cores_whose_threads_are_numbered_side_by_side_stay_whole() -> None:
    cores = tuple(frozenset((cpu, cpu + 1)) for cpu in range(0, 8, 2))
    assert shares(on_node("0-7", 2, cores=cores)) == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_more_gpus_than_cores_share_them_all() -> None:
    assert shares(on_node("0-1", 3)) == [{0, 1}] * 3


@given(tree_hosts(12))
def test_all_gpus_of_a_numa_node_together_own_it_and_nobody_owns_a_cpu_twice(host: Inventory) -> None:
    for node in host.numa_nodes:
        gpus = [gpu.id for gpu in host.gpus if gpu.numa_node == node.id]
        cpus, memory = pin(host, gpus)
        assert (cpus, memory) == (node.cpus, (node.id,))
        assert sum(len(pin(host, [gpu])[0]) for gpu in gpus) == len(node.cpus)


def test_a_group_over_two_sockets_gets_cpus_and_memory_of_both() -> None:
    host = tree_host([[[["g"]]], [[["g"]]]], node_ids=[0, 4])
    cpus, memory = pin(host, gpus_of(host, 0, 1))
    assert cpus == host.numa_nodes[0].cpus | host.numa_nodes[1].cpus
    assert memory == (0, 4)


def test_a_gpu_on_a_numa_node_without_cpus_is_bound_to_the_nearest_ones() -> None:
    host = on_node("0-7", 2)
    nodes = (*host.numa_nodes, NumaNode(id=9, cpus=frozenset(), memory_bytes=1))
    host = replace(host, numa_nodes=nodes, gpus=tuple(replace(gpu, numa_node=9) for gpu in host.gpus))
    assert [pin(host, [gpu.id]) for gpu in host.gpus] == [({0, 1, 2, 3}, (0,)), ({4, 5, 6, 7}, (0,))]


def test_a_numa_node_without_memory_is_not_bound_to() -> None:
    host = on_node("0-7", 1, memory_bytes=0)
    nodes = (*host.numa_nodes, NumaNode(id=1, cpus=frozenset({8}), memory_bytes=1))
    assert pin(replace(host, numa_nodes=nodes), gpus_of(host, 0)) == (frozenset(range(8)), ())


def test_where_the_host_says_nothing_nothing_is_bound() -> None:
    host = tree_host([[[["g"]]]])
    host = replace(host, numa_nodes=(), gpus=(replace(host.gpus[0], numa_node=None, cpus=frozenset()),))
    assert pin(host, gpus_of(host, 0)) == (frozenset(), ())


def test_a_share_does_not_depend_on_who_else_runs() -> None:
    host = on_node("0-31,64-95", 6)
    alone = pin(host, gpus_of(host, 2))[0]
    assert alone < pin(host, gpus_of(host, 2, 3))[0]
    assert all(core <= alone or not core & alone for core in cores_of(host.numa_nodes[0].cpus))


def test_the_first_gpus_own_the_cores_that_are_left_over() -> None:
    assert [len(share) for share in shares(on_node("0-10", 4))] == [3, 3, 3, 2]
    assert shares(on_node("0-2", 3)) == [{0}, {1}, {2}], "one each is enough"


def test_memory_is_not_bound_to_where_only_another_node_has_any_and_is_where_no_node_tells() -> None:
    host = on_node("0-7", 1, memory_bytes=0)
    assert pin(host, gpus_of(host, 0)) == (frozenset(range(8)), (0,)), "the host tells no sizes at all"
    elsewhere = NumaNode(id=1, cpus=frozenset({8}), memory_bytes=1)
    both = replace(host, numa_nodes=(replace(host.numa_nodes[0], memory_bytes=1), elsewhere))
    assert pin(both, gpus_of(both, 0))[1] == (0,), "only nodes of its own CPUs"


def test_a_gpu_whose_node_is_unknown_shares_the_cpus_nearest_to_it_with_its_likes_only() -> None:
    host = on_node("0-7", 4)
    far = [replace(gpu, numa_node=None) for gpu in host.gpus[2:]]
    host = replace(host, gpus=(*host.gpus[:2], *far))
    assert shares(host) == [{0, 1, 2, 3}, {4, 5, 6, 7}] * 2
