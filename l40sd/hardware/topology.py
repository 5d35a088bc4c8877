"""Join what NVML and the kernel say into an Inventory, and tell how any two GPUs are linked.

The two sources disagree in the field, so each fact has one order of trust:

1. A link between two GPUs: NVML's answer; else the bridges above them; else their NUMA nodes; else the worst.
2. A GPU's NUMA node: the kernel's ``numa_node``; where that is -1 (most virtual machines, some BIOSes) the one node
   whose CPUs hold the device's local CPUs; else the only node that has CPUs; else unknown.
3. What nobody knows counts as the worst: two GPUs of unknown nodes on a host with several are SYS apart.
"""

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from l40sd.errors import L40sError
from l40sd.model import Gpu, GpuId, Inventory, Link, NumaNode, PciAddress

_PCI = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlGpu:
    """One GPU as NVML describes it; its PCI address is already in the kernel's form."""

    id: GpuId
    index: int
    pci: PciAddress
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlFacts:
    """What NVML says of the host; ``links`` holds what it answered, one order of a pair is enough."""

    gpus: tuple[NvmlGpu, ...]
    links: Mapping[tuple[GpuId, GpuId], Link] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PciFacts:
    """One device as the kernel describes it.

    Attributes:
        path: Bridges above it, host bridge first; empty when there is no such device in /sys.
        numa_node: None where the kernel says -1 or nothing.
    """

    path: tuple[PciAddress, ...] = ()
    numa_node: int | None = None
    cpus: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class SysfsFacts:
    """What /sys says of the host."""

    devices: Mapping[PciAddress, PciFacts]
    numa_nodes: tuple[NumaNode, ...] = ()


def join(host: str, nvml: NvmlFacts, sysfs: SysfsFacts) -> Inventory:
    """Return the live inventory of this machine."""
    gpus = tuple(
        _gpu(gpu, sysfs.devices.get(gpu.pci, PciFacts()), sysfs.numa_nodes)
        for gpu in sorted(nvml.gpus, key=lambda gpu: pci_order(gpu.pci))
    )
    links = dict(links_of(gpus, sysfs.numa_nodes))
    for (one, other), link in nvml.links.items():
        if (one, other) in links:
            links[(one, other)] = links[(other, one)] = link
    return Inventory(host=host, source="nvml", gpus=gpus, numa_nodes=sysfs.numa_nodes, links=links, is_live=True)


def links_of(gpus: Sequence[Gpu], numa_nodes: Sequence[NumaNode]) -> dict[tuple[GpuId, GpuId], Link]:
    """Return how every two GPUs are linked as far as bridges and NUMA nodes tell; both orders of each pair."""
    is_one_node = sum(bool(node.cpus) for node in numa_nodes) <= 1
    return {
        (one.id, other.id): _link(one, other, is_one_node=is_one_node)
        for one in gpus
        for other in gpus
        if one.id != other.id
    }


def normal_pci(text: str) -> PciAddress:
    """Return a PCI address as /sys writes it, from any usual form (NVML: ``00000000:3B:00.0``).

    Raises:
        L40sError: It is not a PCI address.
    """
    match = _PCI.fullmatch(text.strip().lower())
    if match is None:
        raise L40sError(f"{text!r} is not a PCI address", hint="such as 0000:3b:00.0", code="bad_pci_address")
    domain, bus, device, function = match.groups(default="0")
    return PciAddress(f"{int(domain, 16):04x}:{bus}:{device}.{function}")


def pci_order(pci: PciAddress) -> tuple[int, ...]:
    """Return a sort key: domain, bus, device, function as numbers (a domain can have more than four digits)."""
    return tuple(int(part, 16) for part in re.split("[:.]", pci))


def invented_id(host: str, index: int) -> GpuId:
    """Return a UUID for a GPU of a host that gives none: always the same for the same host and number."""
    return GpuId(f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{index}.gpu.{host}')}")


def invented_pci(index: int) -> PciAddress:
    """Return a PCI address for a GPU of a host that gives none, in the order of the numbers.

    Domain ``f0de`` is beyond those that hosts use, so that it cannot be taken for a device of this machine.
    """
    return PciAddress(f"f0de:{index // 32:02x}:{index % 32:02x}.0")


def switches_of(inventory: Inventory) -> tuple[tuple[str, tuple[GpuId, ...]], ...]:
    """Return what two or more GPUs share, tightest first: PCIe switches, host bridges, NUMA nodes; each with its name.

    A NUMA node is listed with any number of GPUs. Parts of a host of which only the link matrix is known are numbered.
    """
    found: list[tuple[str, tuple[GpuId, ...]]] = []
    for limit, word in ((Link.PIX, "PCIe switch"), (Link.PXB, "cascaded PCIe switches"), (Link.PHB, "host bridge")):
        for number, gpus in enumerate(_within(inventory, limit)):
            if len(gpus) > 1 and all(gpus != known for _, known in found):
                found.append((f"{word} {_shared_bridge(inventory, gpus, limit) or f'#{number}'}", gpus))
    for node in inventory.numa_nodes:
        found.append((f"NUMA node {node.id}", tuple(gpu.id for gpu in inventory.gpus if gpu.numa_node == node.id)))
    return tuple(found)


def shared_part(inventory: Inventory, gpus: Iterable[GpuId], link: Link) -> str:
    """Return, for a sentence, what these GPUs have in common when ``link`` is the worst between them."""
    members = [inventory.gpu(gpu) for gpu in gpus]
    bridge = _shared_bridge(inventory, tuple(gpu.id for gpu in members), link)
    nodes = sorted({gpu.numa_node for gpu in members if gpu.numa_node is not None})
    match link:
        case Link.X:
            return f"NUMA node {nodes[0]}" if nodes else "the host"
        case Link.NV:
            return "NVLink"
        case Link.PIX:
            return f"PCIe switch {bridge}" if bridge else "one PCIe switch"
        case Link.PXB:
            return f"the cascaded PCIe switches below {bridge}" if bridge else "cascaded PCIe switches"
        case Link.PHB:
            return f"host bridge {bridge}" if bridge else "one host bridge"
        case Link.NODE:
            return f"NUMA node {nodes[0]}" if len(nodes) == 1 else "one NUMA node"
        case Link.SYS:
            return "only the interconnect between sockets"


def _gpu(gpu: NvmlGpu, facts: PciFacts, numa_nodes: Sequence[NumaNode]) -> Gpu:
    return Gpu(
        id=gpu.id,
        index=gpu.index,
        pci=gpu.pci,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        numa_node=_numa_node(facts, numa_nodes),
        cpus=facts.cpus,
        path=facts.path,
    )


def _numa_node(facts: PciFacts, numa_nodes: Sequence[NumaNode]) -> int | None:
    if facts.numa_node is not None:
        return facts.numa_node
    around = [node.id for node in numa_nodes if facts.cpus and facts.cpus <= node.cpus]
    with_cpus = [node.id for node in numa_nodes if node.cpus]
    if len(around) == 1:
        return around[0]
    return with_cpus[0] if len(with_cpus) == 1 else None


def _link(one: Gpu, other: Gpu, *, is_one_node: bool) -> Link:
    """Return the link that the bridges tell; a switch is an upstream port with one downstream port to each device.

    Below their last common bridge two GPUs of one switch have one more each (their downstream ports); with more than
    that on either side the way leads through a second switch. Both counts are what NVML prints on the hosts recorded
    in tests/fixtures/topo.
    """
    common = _common(one.path, other.path)
    if common >= 2:
        return Link.PIX if max(len(one.path), len(other.path)) - common <= 1 else Link.PXB
    if common == 1:
        return Link.PHB
    if one.numa_node is None or other.numa_node is None:
        return Link.NODE if is_one_node else Link.SYS
    return Link.NODE if one.numa_node == other.numa_node else Link.SYS


def _common(one: Sequence[PciAddress], other: Sequence[PciAddress]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _within(inventory: Inventory, limit: Link) -> list[tuple[GpuId, ...]]:
    """Return the GPUs in sets whose members all reach each other within ``limit``, in inventory order.

    NVLink is not asked here: this is about what is soldered below which bridge.
    """
    sets: list[list[GpuId]] = []
    for gpu in inventory.gpus:
        home = next((s for s in sets if all(Link.NV < inventory.link(gpu.id, m) <= limit for m in s)), None)
        if home is None:
            sets.append([gpu.id])
        else:
            home.append(gpu.id)
    return [tuple(members) for members in sets]


def _shared_bridge(inventory: Inventory, gpus: Sequence[GpuId], link: Link) -> str:
    """Return the address of the lowest bridge above all of them; empty where no path is known or none is shared."""
    paths = [inventory.gpu(gpu).path for gpu in gpus]
    common = min((_common(paths[0], path) for path in paths), default=0)
    if common == 0 or (common == 1) != (link is Link.PHB):
        return ""
    return paths[0][common - 1]
