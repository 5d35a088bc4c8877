"""``python -m l40sd.hardware.nvml_helper``: the process that NVML may hang in. The only importer of pynvml.

Reads one JSON line per question from stdin, ``{"id": 1, "ask": "inventory" | "memory"}``, and answers with one line,
``{"id": 1, "answer": {...}}`` or ``{"id": 1, "error": "..."}``. Ends when stdin does, or when its parent dies.

A GPU that does not answer (fallen off the bus, Xid 79) is left out and named under ``lost``, with its number, its UUID
where this process has read it before, and NVML's reason: it must not hide the rest. What is only not supported (memory
sizes of some GPUs, processes in a partitioned one) or not allowed to be known (processes) is left unknown.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1
NVLINKS_LIMIT = 36
NVLINK_TO_SWITCH = 2
"""nvmlIntNvLinkDeviceType_t: the other end is an NVSwitch."""
PCI_BRIDGES = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""nvmlGpuTopologyLevel_t in nvidia-smi's letters; 0 is two GPUs on one board."""
NOT_SUPPORTED = 3
"""nvmlReturn_t."""
GONE = (15, 16, 999)
"""nvmlReturn_t: GPU is lost, reset required, unknown error."""
GONE_WORDS = ("GPU is lost", "GPU requires reset", "Unknown Error")


def main(arguments: list[str]) -> int:
    """Answer questions until stdin ends; ``arguments`` may name another library, a module or a .py file."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a hung NVML would never see that stdin has ended
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the driver's library is closed source: whatever it prints must not be taken for an answer
    library: Any = None
    seen: dict[int, str] = {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            library = library or _started(arguments[0] if arguments else "pynvml")
            answer = (_inventory if question["ask"] == "inventory" else _memory)(library, seen)
        except Exception as error:  # noqa: BLE001  # whatever goes wrong here is an answer; the parent decides
            _reply(replies, {"id": question["id"], "error": f"{type(error).__name__}: {error}"})
        else:
            _reply(replies, {"id": question["id"], "answer": answer})
    return 0


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _started(name: str) -> Any:
    """Return the library, initialised."""
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location("nvml_library", name)
        assert spec is not None
        assert spec.loader is not None
        library = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(library)
    else:
        library = importlib.import_module(name)
    library.nvmlInit()
    return library


def _inventory(nvml: Any, seen: dict[int, str]) -> dict[str, Any]:
    lost: list[dict[str, Any]] = []
    gpus, handles = [], {}
    for index, handle in _handles(nvml, seen, lost):
        try:
            gpus.append({**_identity(nvml, index, handle, seen), "memory_bytes": _sizes(nvml, handle)[1] or 0})
            handles[index] = handle
        except nvml.NVMLError as error:
            lost.append(_lost(index, seen, error))
    pairs = [(a, b) for a in handles for b in handles if a < b]
    ends = {index: _nvlink_ends(nvml, handle) for index, handle in handles.items()}
    pci = {gpu["index"]: gpu["pci"] for gpu in gpus}
    links = [
        [a, b, "NV" if _are_bridged(ends[a], ends[b], pci[a], pci[b]) else _path(nvml, handles[a], handles[b])]
        for a, b in pairs
    ]
    return {"gpus": gpus, "links": [link for link in links if link[2]], "lost": lost}


def _memory(nvml: Any, seen: dict[int, str]) -> dict[str, Any]:
    lost: list[dict[str, Any]] = []
    gpus = []
    for index, handle in _handles(nvml, seen, lost):
        try:
            used, total = _sizes(nvml, handle)
            about = {"memory_bytes": total or 0, "used_bytes": used, "holders": _holders(nvml, handle)}
            gpus.append({**_identity(nvml, index, handle, seen), **about})
        except nvml.NVMLError as error:
            lost.append(_lost(index, seen, error))
    return {"gpus": gpus, "lost": lost}


def _handles(nvml: Any, seen: dict[int, str], lost: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield the GPUs that have a UUID, which is noted in ``seen``."""
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            seen[index] = _text(nvml.nvmlDeviceGetUUID(handle))
        except nvml.NVMLError as error:
            lost.append(_lost(index, seen, error))
        else:
            yield index, handle


def _identity(nvml: Any, index: int, handle: Any, seen: dict[int, str]) -> dict[str, Any]:
    return {
        "id": seen[index],
        "index": index,
        "pci": _text(nvml.nvmlDeviceGetPciInfo(handle).busId),
        "name": _text(nvml.nvmlDeviceGetName(handle)),
    }


def _lost(index: int, seen: dict[int, str], error: Exception) -> dict[str, Any]:
    return {"number": index, "id": seen.get(index, ""), "reason": str(error)}


def _sizes(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    """Return used and total bytes; None where this GPU has no memory of its own to tell of."""
    try:
        memory = _memory_info(nvml, handle)
    except nvml.NVMLError as error:
        if not _is(error, (NOT_SUPPORTED,), ("Not Supported",)):
            raise
        return None, None
    return memory.used, memory.total


def _holders(nvml: Any, handle: Any) -> list[list[Any]]:
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError as error:
        if _is(error, GONE, GONE_WORDS):
            raise
        return []
    return [[process.pid, _command(process.pid), process.usedGpuMemory or 0] for process in processes]


def _is(error: Exception, codes: tuple[int, ...], words: tuple[str, ...]) -> bool:
    return getattr(error, "value", None) in codes or str(error) in words


def _memory_info(nvml: Any, handle: Any) -> Any:
    """Return used and total as nvidia-smi has them: version 2 keeps what the driver reserves out of ``used``."""
    version = getattr(nvml, "nvmlMemory_v2", None)
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version) if version else nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:  # drivers before 510
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _path(nvml: Any, one: Any, other: Any) -> str:
    """Return the PCIe path between two GPUs; empty when NVML does not say."""
    try:
        return PCI_BRIDGES.get(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other), "")
    except nvml.NVMLError:
        return ""


def _nvlink_ends(nvml: Any, handle: Any) -> set[str]:
    """Return what this GPU's active NVLinks lead to: PCI addresses, or ``switch``."""
    ends: set[str] = set()
    for number in range(NVLINKS_LIMIT):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(handle, number):
                continue
            if nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, number) == NVLINK_TO_SWITCH:
                ends.add("switch")
            else:
                ends.add(_text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, number).busId))
        except nvml.NVMLError:  # no such link: this GPU has no more, or none at all
            break
    return ends


def _are_bridged(one: set[str], other: set[str], pci_one: str, pci_other: str) -> bool:
    return ("switch" in one and "switch" in other) or pci_other in one or pci_one in other


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:  # gone meanwhile, or of another container
        return "?"


def _text(value: bytes | str) -> str:
    """Return text; older versions of the library return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
