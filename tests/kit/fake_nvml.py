"""A stand-in for pynvml at NVML's edge, loaded by the helper process from this file.

What it answers is read afresh from the JSON file in ``$FAKE_NVML``, so that a test can change it at any time. But for
which GPUs there are: as with the real one, that is found out by nvmlInit, and one that is gone from the file is lost.

    gpus: [{uuid, busId, name, total, used, processes: [[pid, bytes]], lost: bool, nvlinks: ["switch" | PCI address],
            errors: {"nvmlDeviceGetMemoryInfo": "Not Supported", "*": "GPU is lost", ...}}]
    levels: {"0-1": 30}          nvmlGpuTopologyLevel_t; a pair that is not there is not supported
    fail: "..."                  nvmlInit raises this
    hang: true                   every call for a GPU sleeps for ever
    noise: "..."                 nvmlInit prints this to stdout
    crash: true                  the process ends in the middle of a call
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As pynvml's."""


_listed: list[str] = []


def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(Path(os.environ["FAKE_NVML"]).read_text())
    return facts


def _gpu(handle: int, call: str = "") -> dict[str, Any]:
    facts = _facts()
    if facts.get("hang"):
        signal.pause()
    if facts.get("crash"):
        os._exit(3)
    gpu: dict[str, Any] | None = next((each for each in facts["gpus"] if each["uuid"] == _listed[handle]), None)
    if gpu is None:
        raise NVMLError("GPU is lost")
    errors = {"*": "GPU is lost"} if gpu.get("lost") else gpu.get("errors", {})
    if reason := errors.get(call) or errors.get("*"):
        raise NVMLError(reason)
    return gpu


def nvmlInit() -> None:  # noqa: N802  # NVML's names
    facts = _facts()
    sys.stdout.write(facts.get("noise", "") + "\n")
    sys.stdout.flush()
    if "fail" in facts:
        raise NVMLError(facts["fail"])
    _listed[:] = [gpu["uuid"] for gpu in facts["gpus"]]


def nvmlDeviceGetCount() -> int:  # noqa: N802
    return len(_listed)


def nvmlDeviceGetHandleByIndex(index: int) -> int:  # noqa: N802
    _gpu(index, "nvmlDeviceGetHandleByIndex")
    return index


def nvmlDeviceGetUUID(handle: int) -> str:  # noqa: N802
    return str(_gpu(handle, "nvmlDeviceGetUUID")["uuid"])


def nvmlDeviceGetName(handle: int) -> bytes:  # noqa: N802
    return str(
        _gpu(handle, "nvmlDeviceGetName").get("name", "NVIDIA L40S")
    ).encode()  # older versions of the library return bytes


def nvmlDeviceGetPciInfo(handle: int) -> SimpleNamespace:  # noqa: N802
    return SimpleNamespace(busId=_gpu(handle, "nvmlDeviceGetPciInfo")["busId"])


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:  # noqa: N802
    gpu = _gpu(handle, "nvmlDeviceGetMemoryInfo")
    return SimpleNamespace(total=gpu.get("total", 0), used=gpu.get("used", 0))


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[SimpleNamespace]:  # noqa: N802
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=size)
        for pid, size in _gpu(handle, "nvmlDeviceGetComputeRunningProcesses").get("processes", [])
    ]


def nvmlDeviceGetTopologyCommonAncestor(one: int, other: int) -> int:  # noqa: N802
    level = _facts().get("levels", {}).get(f"{one}-{other}")
    if level is None:
        raise NVMLError("Not Supported")
    return int(level)


def nvmlDeviceGetNvLinkState(handle: int, link: int) -> int:  # noqa: N802
    if link >= len(_gpu(handle).get("nvlinks", [])):
        raise NVMLError("Invalid Argument")
    return 1


def nvmlDeviceGetNvLinkRemoteDeviceType(handle: int, link: int) -> int:  # noqa: N802
    return 2 if _gpu(handle)["nvlinks"][link] == "switch" else 0


def nvmlDeviceGetNvLinkRemotePciInfo(handle: int, link: int) -> SimpleNamespace:  # noqa: N802
    return SimpleNamespace(busId=_gpu(handle)["nvlinks"][link])
