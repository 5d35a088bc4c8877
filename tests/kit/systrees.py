"""/sys trees on disk: from a recording, or as the kernel would show an inventory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l40sd.hardware.cpus import format_cpu_list
from l40sd.model import Inventory

Recorded = Mapping[str, Any]
"""Path below /sys -> text, ``{"link": target}``, or None for a file that could not be read."""


def write_tree(root: Path, recorded: Recorded) -> Path:
    for name, value in sorted(recorded.items(), key=lambda item: not isinstance(item[1], dict)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, dict):
            (path.parent / value["link"]).resolve().mkdir(parents=True, exist_ok=True)
            path.symlink_to(value["link"])
        elif value is not None:
            path.write_text(value)
    return root


def tree_of_inventory(host: Inventory) -> dict[str, Any]:
    recorded: dict[str, Any] = {}
    for node in host.numa_nodes:
        folder = f"devices/system/node/node{node.id}"
        recorded[f"{folder}/cpulist"] = format_cpu_list(node.cpus) + "\n"
        recorded[f"{folder}/meminfo"] = (
            f"Node {node.id} MemTotal:       {node.memory_bytes >> 10} kB\nNode 0 MemFree: 1 kB\n"
        )
        for core in node.cores:
            for cpu in core:
                recorded[f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = format_cpu_list(core) + "\n"
    for gpu in host.gpus:
        entry = f"bus/pci/devices/{gpu.pci}"
        recorded[entry] = {"link": "/".join(["../../../devices", *gpu.path, gpu.pci])}
        recorded[f"{entry}/numa_node"] = f"{-1 if gpu.numa_node is None else gpu.numa_node}\n"
        recorded[f"{entry}/local_cpulist"] = format_cpu_list(gpu.cpus) + "\n"
    return recorded
