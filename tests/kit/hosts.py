"""Hosts made of nested lists, the way a machine is built: sockets of host bridges of PCIe switches of GPUs."""

from typing import Any

from hypothesis import strategies as st

from l40sd.hardware.cpus import cores_of
from l40sd.hardware.topology import invented_id, links_of
from l40sd.model import Gpu, GpuId, Inventory, NumaNode, PciAddress

Switch = list[Any]
"""Items are ``"g"``, a GPU, or a Switch below this one."""


def tree_host(
    sockets: list[list[list[Switch]]], *, node_ids: list[int] | None = None, cpus_each: int = 16
) -> Inventory:
    """sockets -> host bridges -> root ports, each with one switch; a switch of one GPU is a GPU by itself."""
    ids = node_ids or list(range(len(sockets)))
    nodes: list[NumaNode] = []
    gpus: list[Gpu] = []
    bus = iter(range(1, 60_000))

    def address() -> PciAddress:
        number = next(bus)
        return PciAddress(f"{number // 256:04x}:{number % 256:02x}:00.0")

    def add(items: Switch, path: tuple[PciAddress, ...], node: int) -> None:
        for item in items:
            below = (*path, address())
            if item != "g":
                add(item, (*below, address()), node)
                continue
            index = len(gpus)
            gpus.append(
                Gpu(
                    id=invented_id("tree", index),
                    index=index,
                    pci=address(),
                    name="NVIDIA L40S",
                    memory_bytes=46068 << 20,
                    numa_node=node,
                    cpus=nodes[-1].cpus,
                    path=below,
                )
            )

    for number, (node, bridges) in enumerate(zip(ids, sockets, strict=True)):
        cpus = frozenset(range(number * cpus_each, (number + 1) * cpus_each))
        nodes.append(NumaNode(id=node, cpus=cpus, memory_bytes=256 << 30, cores=cores_of(cpus)))
        for ports in bridges:
            bridge = PciAddress(f"pci{address()[:7]}")
            for items in ports:
                add(items, (bridge, address(), address()), node)
    links = links_of(gpus, nodes)
    return Inventory(host="tree", source="test", gpus=tuple(gpus), numa_nodes=tuple(nodes), links=links)


def gpus_of(inventory: Inventory, *numbers: int) -> tuple[GpuId, ...]:
    return tuple(gpu.id for number in numbers for gpu in inventory.gpus if gpu.index == number)


def _size(items: Any) -> int:
    return 1 if items == "g" else sum(map(_size, items))


_gpus = st.integers(1, 4).map(lambda count: ["g"] * count)
_switches = st.one_of(_gpus, st.lists(st.one_of(_gpus, st.just("g")), min_size=1, max_size=3))


def tree_hosts(limit: int) -> st.SearchStrategy[Inventory]:
    """Hosts of at most ``limit`` GPUs: uneven switches, cascades, lonely GPUs, NUMA ids with gaps."""
    sockets = st.lists(
        st.lists(st.lists(_switches, min_size=1, max_size=2), min_size=1, max_size=2), min_size=1, max_size=3
    )
    fitting = sockets.filter(lambda s: _size(s) <= limit)
    return fitting.map(lambda s: tree_host(s, node_ids=[3 * n for n in range(len(s))]))
