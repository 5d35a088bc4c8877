"""The text that ``nvidia-smi topo -m`` prints, pasted from a terminal or an issue, read as a host.

Seen in the field (tests/fixtures/topo has the texts): columns apart by tabs or by spaces, ANSI underlines around the
header, older drivers without "GPU NUMA ID" or with SOC for SYS, no affinity columns at all, an empty one of CPUs, NICs
between and below the GPUs, legends, a shell prompt before it. Only the rows and columns of GPUs are read; everything
else is passed over.
"""

import re
from collections.abc import Mapping

from l40sd.errors import L40sError
from l40sd.hardware.cpus import cores_of, parse_cpu_list
from l40sd.hardware.topology import invented_id, invented_pci
from l40sd.model import Gpu, GpuId, Inventory, Link, NumaNode

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_GPU = re.compile(r"GPU(\d{1,4})$")
_DEVICE = re.compile(r"(GPU\d{1,4}|NIC\d{1,4}|(mlx|bnxt|irdma|hfi|efa|roce|rdmap|ib)\w*)$")
_CPUS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*$")
_OLD_NAMES = {"SOC": "SYS", "PSB": "PIX"}
"""Before 2018 drivers said SOC; PSB is a board of two GPUs behind one bridge."""


def is_smi_text(text: str) -> bool:
    """Return whether the text has a row of the matrix: a GPU's name, then links."""
    return any(_is_row(line.split()) for line in _ANSI.sub("", text).splitlines())


def parse_smi_text(text: str, *, source: str) -> Inventory:
    """Return the host that the matrix tells of; names, memory sizes and addresses are not in it.

    UUIDs and PCI addresses are made up, always alike for the same matrix.

    Raises:
        L40sError: A row or column is missing, or a cell is no link.
    """
    lines = [line.expandtabs() for line in _ANSI.sub("", text).splitlines() if line.strip()]
    header, columns = _columns(lines, source)
    whole = {int(words[0][3:]): line for line in lines if _is_row(words := line.split())}
    rows = {number: line.split()[1:] for number, line in whole.items()}
    numbers = [int(name[3:]) for name in columns if _GPU.match(name)]
    if sorted(rows) != sorted(numbers):
        shown = f"columns for GPUs {sorted(numbers)}, rows for {sorted(rows)}"
        raise _bad(source, shown, "paste the whole output of `nvidia-smi topo -m`")
    ids = {number: invented_id("pasted", number) for number in numbers}
    links: dict[tuple[GpuId, GpuId], Link] = {}
    for number in numbers:
        if len(rows[number]) < len(columns):
            raise _bad(source, f"the row of GPU{number} ends early", "paste it whole, with its line breaks")
        for name, cell in zip(columns, rows[number], strict=False):
            other = int(name[3:]) if _GPU.match(name) else number
            if other != number:
                worse = max(_link(cell, number, source), links.get((ids[other], ids[number]), Link.X))
                links[(ids[number], ids[other])] = links[(ids[other], ids[number])] = worse
    after_cpus = header.find("NUMA Affinity")
    near = {number: _affinity(_from_word(whole[number], len(columns) + 1), after_cpus) for number in numbers}
    gpus = tuple(
        Gpu(
            id=ids[number],
            index=number,
            pci=invented_pci(number),
            name="unknown GPU",
            memory_bytes=0,
            numa_node=near[number][1],
            cpus=near[number][0],
        )
        for number in sorted(numbers)
    )
    return Inventory(host="pasted", source=source, gpus=gpus, numa_nodes=_numa_nodes(near), links=links)


def _is_row(words: list[str]) -> bool:
    return len(words) > 1 and bool(_GPU.match(words[0])) and (words[1] == "X" or _is_link(words[1]))


def _columns(lines: list[str], source: str) -> tuple[str, list[str]]:
    """Return the header, and its devices in order, GPUs and NICs; NICs are known by number or by the kernel's name."""
    for line in lines:
        words = line.split()
        if _GPU.match(words[0]) and not _is_row(words):
            names: list[str] = []
            for word in words:
                if not _DEVICE.match(word):
                    break
                names.append(word)
            return line, names
    raise _bad(source, "no header line of GPU names", "paste the whole output of `nvidia-smi topo -m`")


def _is_link(cell: str) -> bool:
    return _OLD_NAMES.get(cell, cell) in Link.__members__ or re.fullmatch(r"NV\d+", cell) is not None


def _link(cell: str, number: int, source: str) -> Link:
    if cell == "X" or not _is_link(cell):
        raise _bad(source, f"{cell!r} in the row of GPU{number}", "links are NV1, NV2, ... PIX PXB PHB NODE SYS")
    return Link.NV if cell.startswith("NV") else Link[_OLD_NAMES.get(cell, cell)]


def _from_word(line: str, place: int) -> list[tuple[int, str]]:
    """Return the words of a line from this one on, each with the column that it begins in."""
    return [(match.start(), match[0]) for match in re.finditer(r"\S+", line)][place:]


def _affinity(words: list[tuple[int, str]], after_cpus: int) -> tuple[frozenset[int], int | None]:
    """Return a GPU's CPUs and NUMA node from what follows its links: CPU list, NUMA nodes, GPU's own NUMA node.

    A GPU near several NUMA nodes at once, or near none (``N/A``), has none that is known. The CPU list is empty where
    the driver was not told: then the first word stands below the next heading, which begins at ``after_cpus``.
    """
    cells = [word for _, word in words]
    if words and 0 <= after_cpus <= words[0][0]:
        cells.insert(0, "")
    cpus = parse_cpu_list(cells[0]) if cells and _CPUS.match(cells[0]) else frozenset[int]()
    node = int(cells[1]) if len(cells) > 1 and cells[1].isdigit() else None
    return cpus, node


def _numa_nodes(near: Mapping[int, tuple[frozenset[int], int | None]]) -> tuple[NumaNode, ...]:
    """Return the nodes that are named, each with the CPUs of all GPUs that name it."""
    found: dict[int, frozenset[int]] = {}
    for cpus, node in near.values():
        if node is not None:
            found[node] = found.get(node, frozenset()) | cpus
    return tuple(NumaNode(id=node, cpus=cpus, cores=cores_of(cpus)) for node, cpus in sorted(found.items()))


def _bad(source: str, what: str, hint: str) -> L40sError:
    return L40sError(what, where=source, hint=hint, code="bad_host_file")
