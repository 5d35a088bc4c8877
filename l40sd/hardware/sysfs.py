"""/sys -> plain facts about PCIe devices, NUMA nodes and physical cores.

Every file may be missing (containers, virtual machines, other architectures); what is missing is unknown, not an
error. All reads are small and never wait on a device, but they are blocking: call from a thread.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from l40sd.errors import L40sError
from l40sd.hardware.cpus import parse_cpu_list
from l40sd.hardware.topology import PciFacts, SysfsFacts
from l40sd.model import NumaNode, PciAddress

_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}|[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_TOTAL = re.compile(r"MemTotal:\s*(\d+) kB")


def read_sysfs(devices: Iterable[PciAddress], *, root: Path = Path("/sys")) -> SysfsFacts:
    """Return what the kernel says of these devices and of the host's NUMA nodes.

    Args:
        root: Where the tree is mounted, or a recorded one.
    """
    cores = _cores(root)
    nodes = (_node(folder, cores) for folder in (root / "devices/system/node").glob("node[0-9]*"))
    return SysfsFacts(
        devices={pci: facts for pci in devices if (facts := _device(root, pci)) is not None},
        numa_nodes=tuple(sorted(nodes, key=lambda node: node.id)),
    )


def _device(root: Path, pci: PciAddress) -> PciFacts | None:
    """Return one device's facts; its entry is a link to where it hangs: pci0000:15/0000:15:01.0/.../0000:18:00.0."""
    entry = root / "bus/pci/devices" / pci
    if not entry.exists():
        return None
    node = _text(entry / "numa_node").strip()
    return PciFacts(
        path=tuple(PciAddress(part) for part in entry.resolve().parts if _BRIDGE.fullmatch(part) and part != pci),
        numa_node=int(node) if node.isdigit() else None,
        cpus=_cpus(entry / "local_cpulist"),
    )


def _node(folder: Path, cores: dict[int, frozenset[int]]) -> NumaNode:
    cpus = _cpus(folder / "cpulist")
    total = _TOTAL.search(_text(folder / "meminfo"))
    known = {cores[cpu] & cpus for cpu in cpus if cpu in cores}
    return NumaNode(
        id=int(folder.name.removeprefix("node")),
        cpus=cpus,
        memory_bytes=int(total[1]) << 10 if total else 0,
        cores=tuple(sorted(known, key=min)) if frozenset[int]().union(*known) == cpus else (),
    )


def _cores(root: Path) -> dict[int, frozenset[int]]:
    """Return, for every CPU that is online, the CPUs of its core."""
    siblings = (root / "devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return {int(file.parts[-3].removeprefix("cpu")): cpus for file in siblings if (cpus := _cpus(file))}


def _cpus(file: Path) -> frozenset[int]:
    try:
        return parse_cpu_list(_text(file))
    except L40sError:  # a kernel that writes something else says nothing we could use
        return frozenset()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
