"""Host files: a recorded or invented machine as TOML, or the pasted text of ``nvidia-smi topo -m``.

```toml
host = "l40s-8"
[[numa_nodes]]
id = 0
cpus = "0-31,64-95"
memory_mib = 262144
[[gpus]]
index = 0                                       # the rest may be left out: it is then made up, always alike
pci = "0000:16:00.0"
id = "GPU-..."
name = "NVIDIA L40S"
memory_mib = 46068
numa_node = 0
cpus = "0-31,64-95"                             # left out: the NUMA node's
path = ["pci0000:15", "0000:15:01.0", ...]      # bridges above it
[links]                                         # only where bridges and NUMA nodes do not tell it all
rows = ["X PIX SYS", ...]                       # in the order of the GPUs above
```
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from l40sd.errors import ConfigError, L40sError
from l40sd.hardware.cpus import cores_of, format_cpu_list, parse_cpu_list
from l40sd.hardware.nvidia_smi import is_smi_text, parse_smi_text
from l40sd.hardware.topology import invented_id, invented_pci, links_of, normal_pci, pci_order
from l40sd.model import Gpu, GpuId, Inventory, Link, NumaNode, PciAddress

MIB = 1 << 20
GPU_LIMIT = 1024
"""GPUs of one host; more than any host has, and few enough for a matrix of links."""


def parse_host_file(text: str, *, source: str) -> Inventory:
    """Return the host that a TOML host file or a pasted ``nvidia-smi topo -m`` describes.

    Args:
        source: Where the text comes from, for messages and ``Inventory.source``.

    Raises:
        L40sError: One problem, or a ConfigError with all of them, each with its place in the file.
    """
    if is_smi_text(text):
        return parse_smi_text(text, source=source)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = "a host file is TOML or the output of `nvidia-smi topo -m`; `l40sctl topology --record` writes one"
        raise L40sError(f"not a host file: {error}", where=source, hint=hint, code="bad_host_file") from error
    return _Reader(source).inventory(table)


def format_host_file(inventory: Inventory) -> str:
    """Return the inventory as a host file, which reads back as the same but for ``source`` and ``is_live``."""
    return "\n".join(_lines(inventory)) + "\n"


def _lines(inventory: Inventory) -> Iterator[str]:
    yield f"host = {_quoted(inventory.host)}"
    cpus_of = {node.id: node.cpus for node in inventory.numa_nodes}
    for node in inventory.numa_nodes:
        yield from ("", "[[numa_nodes]]", f"id = {node.id}", f"cpus = {_quoted(format_cpu_list(node.cpus))}")
        yield _memory(node.memory_bytes)
        if node.cores and node.cores != cores_of(node.cpus):
            yield f"cores = [{', '.join(_quoted(format_cpu_list(core)) for core in node.cores)}]"
    for gpu in inventory.gpus:
        yield from ("", "[[gpus]]", f"index = {gpu.index}", f"id = {_quoted(gpu.id)}", f"pci = {_quoted(gpu.pci)}")
        yield from (f"name = {_quoted(gpu.name)}", _memory(gpu.memory_bytes))
        if gpu.numa_node is not None:
            yield f"numa_node = {gpu.numa_node}"
        if gpu.cpus != cpus_of.get(gpu.numa_node, frozenset()):  # type: ignore[arg-type]  # None is in no host
            yield f"cpus = {_quoted(format_cpu_list(gpu.cpus))}"
        yield f"path = [{', '.join(map(_quoted, gpu.path))}]"
    if inventory.links != links_of(inventory.gpus, inventory.numa_nodes):
        yield from ("", "[links]", "rows = [")
        for one in inventory.gpus:
            row = " ".join(f"{inventory.link(one.id, other.id).name:4}" for other in inventory.gpus)
            yield f'    "{row.rstrip()}",'
        yield "]"


def _memory(size_bytes: int) -> str:
    return f"memory_bytes = {size_bytes}" if size_bytes % MIB else f"memory_mib = {size_bytes // MIB}"


def _quoted(text: str) -> str:
    """Return a TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\u{ord(match[0]):04x}", escaped) + '"'


class _Reader:
    """Reads tables into records and collects every problem on the way."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._problems: list[L40sError] = []

    def inventory(self, table: Mapping[str, Any]) -> Inventory:
        self._known("", table, ("host", "numa_nodes", "gpus", "links"))
        host = self._get(table, "", "host", str, "recorded")
        nodes = tuple(self._node(f"numa_nodes[{n}]", t) for n, t in enumerate(self._tables(table, "numa_nodes")))
        gpus = [self._gpu(n, t, nodes, host) for n, t in enumerate(self._tables(table, "gpus"))]
        if not 0 < len(gpus) <= GPU_LIMIT:
            self._problem("gpus", f"{len(gpus)} GPUs", f"between 1 and {GPU_LIMIT} [[gpus]] tables")
        for word, values in (
            ("gpus: index", [gpu.index for gpu in gpus]),
            ("gpus: id", [gpu.id for gpu in gpus]),
            ("gpus: pci", [gpu.pci for gpu in gpus]),
            ("numa_nodes: id", [node.id for node in nodes]),
        ):
            if twice := [str(value) for value, count in Counter(values).items() if count > 1]:
                self._problem(word, f"{', '.join(twice)} more than once", "each must be different")
        if self._problems:
            raise self._problems[0] if len(self._problems) == 1 else ConfigError(self._problems)
        links = links_of(gpus, nodes) | self._links(table, gpus)
        if self._problems:
            raise self._problems[0]
        gpus.sort(key=lambda gpu: pci_order(gpu.pci))
        return Inventory(host=host, source=self._source, gpus=tuple(gpus), numa_nodes=nodes, links=links)

    def _node(self, where: str, table: Mapping[str, Any]) -> NumaNode:
        self._known(where, table, ("id", "cpus", "memory_mib", "memory_bytes", "cores"))
        cpus = self._cpus(where, "cpus", self._get(table, where, "cpus", str, ""))
        cores = tuple(self._cpus(where, "cores", text) for text in self._strings(table, where, "cores"))
        return NumaNode(
            id=self._number(table, where, "id", 0),
            cpus=cpus,
            memory_bytes=self._size(table, where),
            cores=cores or cores_of(cpus),
        )

    def _gpu(self, number: int, table: Mapping[str, Any], nodes: Sequence[NumaNode], host: str) -> Gpu:
        where = f"gpus[{number}]"
        self._known(
            where, table, ("index", "id", "pci", "name", "memory_mib", "memory_bytes", "numa_node", "cpus", "path")
        )
        index = self._number(table, where, "index", number)
        node = self._number(table, where, "numa_node", 0) if "numa_node" in table else None
        if node is not None and node not in [n.id for n in nodes]:
            self._problem(f"{where}.numa_node", f"there is no NUMA node {node}", "add it under [[numa_nodes]]")
        near = next((format_cpu_list(n.cpus) for n in nodes if n.id == node), "")
        return Gpu(
            id=GpuId(self._get(table, where, "id", str, invented_id(host, index))),
            index=index,
            pci=self._pci(where, self._get(table, where, "pci", str, invented_pci(index))),
            name=self._get(table, where, "name", str, "unknown GPU"),
            memory_bytes=self._size(table, where),
            numa_node=node,
            cpus=self._cpus(where, "cpus", self._get(table, where, "cpus", str, near)),
            path=tuple(PciAddress(bridge) for bridge in self._strings(table, where, "path")),
        )

    def _links(self, table: Mapping[str, Any], gpus: Sequence[Gpu]) -> dict[tuple[GpuId, GpuId], Link]:
        links = self._get(table, "", "links", dict, {})
        self._known("links", links, ("rows",))
        rows = [row.split() for row in self._strings(links, "links", "rows")]
        if not rows:
            return {}
        if [len(row) for row in rows] != [len(gpus)] * len(gpus):
            self._problem("links.rows", "not a square of the GPUs", f"{len(gpus)} rows of {len(gpus)} links each")
            return {}
        found: dict[tuple[GpuId, GpuId], Link] = {}
        for one, row in zip(gpus, rows, strict=True):
            for other, letters in zip(gpus, row, strict=True):
                if letters not in Link.__members__ or (letters == "X") != (one.id == other.id):
                    self._problem("links.rows", f"{letters!r} between GPU{one.index} and GPU{other.index}", _LETTERS)
                elif one.id != other.id:
                    found[(one.id, other.id)] = max(Link[letters], found.get((other.id, one.id), Link.X))
                    found[(other.id, one.id)] = found[(one.id, other.id)]
        return found

    # -- values --------------------------------------------------------------------------------------------------------

    def _problem(self, where: str, what: str, hint: str) -> None:
        place = f"{self._source}: {where}"
        self._problems.append(L40sError(what, where=place, hint=hint, code="bad_host_file"))

    def _known(self, where: str, table: Mapping[str, Any], keys: Sequence[str]) -> None:
        for key in table:
            if key not in keys:
                self._problem(f"{where}.{key}".lstrip("."), "unknown key", f"known: {', '.join(keys)}")

    def _get(self, table: Mapping[str, Any], where: str, key: str, kind: type, default: Any) -> Any:
        value = table.get(key, default)
        if type(value) is kind:
            return value
        self._problem(f"{where}.{key}".lstrip("."), f"{value!r} is not {_KINDS[kind]}", f"write {_KINDS[kind]}")
        return default

    def _number(self, table: Mapping[str, Any], where: str, key: str, default: int) -> int:
        number: int = self._get(table, where, key, int, default)
        if number < 0:
            self._problem(f"{where}.{key}", f"{number} is negative", "leave it out where it is unknown")
        return number

    def _size(self, table: Mapping[str, Any], where: str) -> int:
        mib = self._number(table, where, "memory_mib", 0)
        return mib * MIB if mib else self._number(table, where, "memory_bytes", 0)

    def _strings(self, table: Mapping[str, Any], where: str, key: str) -> list[str]:
        values = self._get(table, where, key, list, [])
        return [self._get({key: value}, where, key, str, "") for value in values]

    def _tables(self, table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        values = self._get(table, "", key, list, [])
        return [self._get({key: value}, "", key, dict, {}) for value in values]

    def _cpus(self, where: str, key: str, text: str) -> frozenset[int]:
        try:
            return parse_cpu_list(text)
        except L40sError as error:
            self._problem(f"{where}.{key}", error.what, error.hint)
            return frozenset()

    def _pci(self, where: str, text: str) -> PciAddress:
        try:
            return normal_pci(text)
        except L40sError as error:
            self._problem(f"{where}.pci", error.what, error.hint)
            return PciAddress("0000:00:00.0")


_KINDS = {str: "a text in quotes", int: "a whole number", list: "a list", dict: "a table"}
_LETTERS = f"one of {' '.join(Link.__members__)}, X for the GPU itself only"
