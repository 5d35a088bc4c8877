"""Which CPUs and memory a worker gets: the fixed shares of its GPUs.

Every GPU of a NUMA node owns a fixed share of the node's physical cores, whether or not a worker runs on it; a worker
gets its GPUs' shares. So a worker's CPUs depend on its own GPUs alone, and a pattern change does not disturb the
workers it keeps (invariant 5) only because their neighbours are now more or fewer. The price: the shares of GPUs that
nobody uses stay idle.

A share is a block of whole cores, contiguous in the kernel's numbering, with all their hardware threads: neighbours
then share caches and no two workers share a core. Blocks differ by at most one core.
"""

from collections.abc import Sequence

from l40sd.hardware.cpus import cores_of
from l40sd.model import Gpu, GpuId, Inventory, NumaNode


def pin(inventory: Inventory, gpus: Sequence[GpuId]) -> tuple[frozenset[int], tuple[int, ...]]:
    """Return the CPUs and the memory nodes for a worker on these GPUs; empty where the host does not say.

    Memory comes from the nodes of those CPUs. A GPU on a node without CPUs gets the CPUs nearest to it: such a node is
    often the memory of an accelerator, and nothing that a host program should be bound to. Nor is a node without
    memory, where the host tells sizes at all.
    """
    cpus = frozenset[int]().union(*(_share(inventory, inventory.gpu(gpu)) for gpu in gpus))
    are_sizes_known = any(node.memory_bytes for node in inventory.numa_nodes)
    nodes = (n.id for n in inventory.numa_nodes if n.cpus & cpus and (n.memory_bytes or not are_sizes_known))
    return cpus, tuple(sorted(nodes))


def _share(inventory: Inventory, gpu: Gpu) -> frozenset[int]:
    home = _home(inventory, gpu)
    if home is not None:
        neighbours = [g.id for g in inventory.gpus if g.numa_node == home.id]
        return _block(home.cores or cores_of(home.cpus), neighbours.index(gpu.id), len(neighbours))
    if not gpu.cpus:
        return frozenset()
    neighbours = [g.id for g in inventory.gpus if g.cpus == gpu.cpus and _home(inventory, g) is None]
    return _block(cores_of(gpu.cpus), neighbours.index(gpu.id), len(neighbours))


def _block(cores: Sequence[frozenset[int]], number: int, count: int) -> frozenset[int]:
    """Return one of ``count`` blocks, the first ones a core larger; everything to everybody when cores are too few."""
    if len(cores) < count:
        return frozenset[int]().union(*cores)
    least, more = divmod(len(cores), count)
    first = number * least + min(number, more)
    return frozenset[int]().union(*cores[first : first + least + (number < more)])


def _home(inventory: Inventory, gpu: Gpu) -> NumaNode | None:
    return next((node for node in inventory.numa_nodes if node.id == gpu.numa_node and node.cpus), None)
