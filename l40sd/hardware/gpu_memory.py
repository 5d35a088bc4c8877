"""Whether the GPUs of a worker are really free: a process that has gone may leave its memory behind for a while."""

import asyncio
from collections.abc import Sequence

from l40sd.clock import now_s
from l40sd.hardware.host import GpuMemory, Host
from l40sd.model import GpuId

POLL_S = 0.5
FREE_BELOW_BYTES = 1 << 30
"""A GPU without compute processes still shows some hundred MiB: driver, ECC, display."""
GIB = 1 << 30


async def wait_until_free(host: Host, gpus: Sequence[GpuId], timeout_s: float) -> str:
    """Return "" once the GPUs' memory is free and has stopped shrinking, or who holds them at the deadline.

    A lost GPU is said at once: an engine could only fail on it, and be given up for it before it is back.

    A host file has no memory to wait for, and an NVML that does not answer is no reason to keep a worker waiting: its
    engine will say what it lacks.
    """
    deadline_s = now_s() + timeout_s
    before: list[int] | None = None
    while True:
        memory = await host.memory() if host.inventory.is_live else None
        if memory is None:
            return ""
        if lost := next((each for each in host.lost if each.id in gpus and each.is_gone), None):
            return f"{lost.name} is lost: {lost.reason}"
        used = [memory[g].used_bytes for g in gpus if g in memory]
        holder = next((h for g in gpus if g in memory and (h := _holder(host, g, memory[g]))), "")
        if not holder and (before is None or before == used):
            return ""
        if now_s() >= deadline_s:
            return holder
        before = used
        await asyncio.sleep(POLL_S)


def _holder(host: Host, gpu: GpuId, memory: GpuMemory) -> str:
    """Return e.g. ``GPU 3 holds 12.0 GiB of pid 4711 (python3)``; empty when it is free."""
    number = host.inventory.gpu(gpu).index
    for pid, command, size_bytes in memory.holders:
        if size_bytes < FREE_BELOW_BYTES:
            continue
        return f"GPU {number} holds {size_bytes / GIB:.1f} GiB of pid {pid} ({command})"
    if memory.used_bytes > FREE_BELOW_BYTES:
        return f"GPU {number} has {memory.used_bytes / GIB:.1f} GiB in use by a process that cannot be seen from here"
    return ""
