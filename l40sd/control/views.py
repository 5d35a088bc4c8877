"""An inventory and a layout on it, as the records that people are shown."""

from collections.abc import Sequence

from l40sd.config.options import Config
from l40sd.control.messages import GroupView, Topology, TopologyGpu
from l40sd.engines import launch as launching
from l40sd.hardware.cpus import format_cpu_list
from l40sd.hardware.host_file import format_host_file
from l40sd.hardware.topology import switches_of
from l40sd.model import GpuId, Inventory, Layout, Link


def topology(
    inventory: Inventory,
    *,
    pattern: str = "",
    groups: Sequence[GroupView] = (),
    leftover: Sequence[GpuId] = (),
    warnings: Sequence[str] = (),
) -> Topology:
    """Return the link matrix, what the GPUs hang on, and a pattern's GPU groups (from ``groups`` below)."""
    number = {gpu.id: gpu.index for gpu in inventory.gpus}
    return Topology(
        host=inventory.host,
        source=inventory.source,
        is_live=inventory.is_live,
        gpus=tuple(
            TopologyGpu(
                index=gpu.index,
                id=gpu.id,
                pci=gpu.pci,
                name=gpu.name,
                memory_bytes=gpu.memory_bytes,
                numa_node=gpu.numa_node,
                cpus=format_cpu_list(gpu.cpus),
                path=gpu.path,
            )
            for gpu in inventory.gpus
        ),
        matrix=tuple(tuple(inventory.link(a.id, b.id).name for b in inventory.gpus) for a in inventory.gpus),
        switches=tuple((name, tuple(number[gpu] for gpu in gpus)) for name, gpus in switches_of(inventory)),
        numa_nodes=tuple((n.id, format_cpu_list(n.cpus), n.memory_bytes) for n in inventory.numa_nodes),
        pattern=pattern,
        groups=tuple(groups),
        record=format_host_file(inventory),
        leftover=tuple(number[gpu] for gpu in leftover if gpu in number),
        warnings=tuple(warnings),
    )


def groups(layout: Layout, config: Config, inventory: Inventory) -> tuple[GroupView, ...]:
    """Return a layout's replicas, each with where it is, what it is pinned to, and why it is there."""
    number = {gpu.id: gpu.index for gpu in inventory.gpus}
    return tuple(
        GroupView(
            worker=p.worker,
            model=p.model,
            tp=p.tp,
            pp=p.pp,
            gpus=tuple(number[gpu] for gpu in p.gpus if gpu in number),
            link="" if p.worst_link is Link.X else p.worst_link.name,
            numa=p.memory_nodes,
            cpus=format_cpu_list(p.cpus),
            pinning=launching.build(p, config, inventory, port=0, api_key="").pinning,
            reason=p.reason,
        )
        for p in layout.placements
    )
