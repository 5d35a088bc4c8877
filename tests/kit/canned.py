"""Records as a daemon on a recorded host of 12 L40S would send them."""

from typing import Any

from l40sd.control.messages import (
    ChangePreview,
    ChangeStep,
    Check,
    Event,
    GpuStatus,
    GroupView,
    OperationStatus,
    PatternView,
    ProxyStatus,
    Status,
    Topology,
    TopologyGpu,
    WorkerStatus,
)

GIB = 1 << 30
BELOW = ((0, 1, 2, 3), (4, 5), (6, 7, 8, 9), (10, 11))  # PCIe switches of 4+2 GPUs on each socket


def gpu_id(index: int) -> str:
    return f"GPU-00000000-0000-0000-0000-{index:012d}"


def worker(first: int, phase: str = "ready", **more: Any) -> WorkerStatus:
    gpus = (first, first + 1)
    known: dict[str, Any] = {
        "id": f"smollm2-gpu{first}-{first + 1}",
        "model": "smollm2",
        "engine": "llama-cpp",
        "phase": phase,
        "tp": 2,
        "pp": 1,
        "gpus": gpus,
        "gpu_ids": tuple(gpu_id(index) for index in gpus),
        "numa": (first // 6,),
        "cpus": "0-31" if first < 6 else "32-63",
        "link": "PIX",
        "placement_reason": "both below one PCIe switch",
        "instance": f"smollm2-gpu{first}-{first + 1}-01jdx",
        "pid": 4000 + first,
        "address": f"127.0.0.1:{30000 + first}",
        "since_s": 3725.0,
    }
    return WorkerStatus(**(known | more))


WORKERS = (
    worker(0, in_flight=3, served=12345, ready_s=81.2),
    worker(2, in_flight=1, served=900),
    worker(4, "starting", progress=0.4, since_s=31.0),
    worker(
        6,
        "backoff",
        restarts=3,
        reason="exited with status 1 after 2.1 s: out of memory",
        next_start_s=12.0,
        since_s=8.0,
        last_lines=("loading model", "\x1b[31mCUDA error: out of memory\x1b[0m"),
    ),
    worker(8, "draining", in_flight=2),
    worker(10, "quarantined", restarts=6, reason="3 starts in a row failed alike; waits for `l40sctl reset`"),
)

OPERATION = OperationStatus(
    id="op1",
    pattern="B",
    previous="A",
    state="running",
    done=2,
    total=6,
    step="draining smollm2-gpu8",
    lowest_ready=0.5,
)

STATUS = Status(
    version="0.1.0",
    host="l40s-12",
    inventory="l40s-12-4+2",
    is_live=False,
    uptime_s=7800.0,
    pattern="B",
    operation=None,
    provider="cgroup",
    provider_note="/sys/fs/cgroup/l40sd.slice",
    workers=WORKERS,
    gpus=tuple(
        GpuStatus(
            index=index,
            id=gpu_id(index),
            pci=f"0000:{index + 1:02x}:00.0",
            name="NVIDIA L40S",
            numa_node=index // 6,
            memory_bytes=45 * GIB,
            used_bytes=(30 + index) * GIB,
            worker=f"smollm2-gpu{index // 2 * 2}-{index // 2 * 2 + 1}" if index < 10 else "",
            state="stuck" if index == 11 else "ok",
        )
        for index in range(12)
    ),
    proxy=ProxyStatus(
        listen=("127.0.0.1:8080",), connections=12, in_flight=6, waiting=0, served=13245, failed=0, retried=2
    ),
    warnings=("GPUs 10 and 11 are left over",),
    degraded=("NVML does not answer: GPU memory is as of 20 s ago",),
)


def groups(width: int = 2) -> tuple[GroupView, ...]:
    return tuple(
        GroupView(
            worker=f"smollm2-gpu{'-'.join(map(str, range(first, first + width)))}",
            model="smollm2",
            tp=width,
            pp=1,
            gpus=tuple(range(first, first + width)),
            link="PIX",
            numa=(first // 6,),
            cpus="0-31" if first < 6 else "32-63",
            pinning=f"numactl --cpunodebind={first // 6} --membind={first // 6}",
            reason="both below the PCIe switch at 0000:01:00.0; nothing closer is free",
        )
        for first in range(0, 12, width)
    )


def letters(one: int, other: int) -> str:
    if one == other:
        return "X"
    if any(one in part and other in part for part in BELOW):
        return "PIX"
    return "NODE" if one // 6 == other // 6 else "SYS"


TOPOLOGY = Topology(
    host="l40s-12",
    source="l40s-12-4+2",
    is_live=False,
    gpus=tuple(
        TopologyGpu(
            index=index,
            id=gpu_id(index),
            pci=f"0000:{index + 1:02x}:00.0",
            name="NVIDIA L40S",
            memory_bytes=45 * GIB,
            numa_node=index // 6,
            cpus="0-31" if index < 6 else "32-63",
            path=("pci0000:00", "0000:00:01.0"),
        )
        for index in range(12)
    ),
    matrix=tuple(tuple(letters(one, other) for other in range(12)) for one in range(12)),
    switches=tuple((f"PCIe switch {place}", gpus) for place, gpus in enumerate(BELOW)),
    numa_nodes=((0, "0-31", 256 * GIB), (1, "32-63", 256 * GIB)),
    pattern="B",
    groups=groups(),
    record='name = "l40s-12"\n',
)

PATTERNS = (
    PatternView(
        name="A", description="a replica on every GPU", is_current=False, fits=True, summary="12 x smollm2 TP1"
    ),
    PatternView(
        name="B",
        description="pairs below one PCIe switch",
        is_current=True,
        fits=True,
        summary="6 x smollm2 TP2",
        groups=groups(),
    ),
    PatternView(
        name="C",
        description="TP=4",
        is_current=False,
        fits=True,
        summary="2 x smollm2 TP4",
        leftover=(4, 5, 10, 11),
        warnings=("every layer of a TP=4 group talks over PCIe; measure it", "GPU4 GPU5 GPU10 GPU11 are left over"),
    ),
    PatternView(
        name="wide",
        description="",
        is_current=False,
        fits=False,
        problem="tp = 3 does not divide the 8 attention heads of smollm2",
        hint="use 1, 2, 4 or 8",
    ),
)

PREVIEW = ChangePreview(
    pattern="B",
    previous="A",
    gpus=(
        *((index, f"smollm2-gpu{index}", f"smollm2-gpu{index // 2 * 2}-{index // 2 * 2 + 1}") for index in range(11)),
        (11, "far", "far"),
    ),
    kept=("far",),
    steps=(
        ChangeStep(action="drain and stop", worker="smollm2-gpu0", gpus=(0,), ready_after=0.92),
        ChangeStep(action="drain and stop", worker="smollm2-gpu1", gpus=(1,), ready_after=0.83),
        ChangeStep(
            action="start and prove",
            worker="smollm2-gpu0-1",
            gpus=(0, 1),
            ready_after=1.0,
            note="the first of its shape: the others wait for its first answer",
        ),
    ),
    groups=groups(),
    lowest_ready={"smollm2": 0.5},
    leftover=(11,),
    warnings=("GPU 11 is left over",),
)

CHECKS = (
    Check(name="host", state="ok", found="12 GPUs, 2 NUMA nodes, from nvml"),
    Check(name="provider", state="warning", found="none: no cgroup", hint="install the units (scripts/install)"),
)

EVENTS = (
    Event(seq=1, time="2026-11-23T21:04:43.337+00:00", level="info", event="worker.ready", data={"gpus": [0, 1]}),
    Event(
        seq=2,
        time="2026-11-23T21:04:44.337+00:00",
        level="error",
        event="worker.failed",
        data={"reason": "exit 1\x1b["},
    ),
)
