"""Records what /sys answers in the virtual machine, for tests that need no machine.

.venv/bin/python tests/systemd/sysrecord.py     boots each layout and writes tests/fixtures/pcie/LAYOUT.json
"""

import json
from pathlib import Path
from typing import Any

from disk import build_disk, missing_vm_tools
from image import REPOSITORY
from pcie import LAYOUTS, links, numa_nodes
from vm import Machine

FIXTURES = REPOSITORY / "tests" / "fixtures" / "pcie"
_LOOK = r"""
import glob, json, os
found = {}
def text(path):
    try:
        with open(path) as file:
            found[path] = file.read()
    except OSError:
        found[path] = None
os.chdir("/sys")
for entry in sorted(glob.glob("bus/pci/devices/*")):
    found[entry] = {"link": os.readlink(entry)}
    for name in ("class", "device", "local_cpulist", "numa_node", "vendor"):
        text(f"{entry}/{name}")
for node in sorted(glob.glob("devices/system/node/node[0-9]*")):
    for name in ("cpulist", "distance", "meminfo"):
        text(f"{node}/{name}")
    found[f"{node}/meminfo"] = "".join(line for line in found[f"{node}/meminfo"].splitlines(True) if "MemTotal" in line)
for file in sorted(glob.glob("devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")):
    text(file)
print(json.dumps(found))
"""


def record(machine: Machine) -> dict[str, Any]:
    """Return the parts of /sys that l40sd reads: path below it -> text, or ``{"link": target}``."""
    found: dict[str, Any] = json.loads(machine.run("python3 -", given=_LOOK).stdout)
    return found


def main() -> None:
    """Record all layouts, each with what it must be read as."""
    if reason := missing_vm_tools():
        raise SystemExit(reason)
    FIXTURES.mkdir(exist_ok=True)
    for name, layout in LAYOUTS.items():
        with Machine(build_disk(), layout) as machine:
            answers = record(machine)
        rows = ",\n".join(json.dumps(row) for row in links(layout))
        lines = ",\n".join(f"{json.dumps(path)}: {json.dumps(value)}" for path, value in answers.items())
        text = f'{{"numa_nodes": {json.dumps(numa_nodes(layout))},\n"links": [\n{rows}\n],\n"sys": {{\n{lines}\n}}}}\n'
        Path(FIXTURES, f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
