"""/proc/driver/nvidia -> the GPUs, as the kernel module knows them. For when NVML does not answer.

Memory sizes and links are not in it. Blocking: call from a thread.
"""

import re
from pathlib import Path

from l40sd.hardware.topology import NvmlGpu, normal_pci, pci_order
from l40sd.model import GpuId

_FIELD = re.compile(r"^([\w ]+?):\s*(\S.*?)\s*$", re.MULTILINE)


def read_nvidia_proc(*, root: Path = Path("/proc/driver/nvidia")) -> tuple[NvmlGpu, ...]:
    """Return the GPUs in order of their PCI address, numbered as nvidia-smi would; none without the kernel module.

    A GPU whose UUID the module has not read yet (``GPU-????...``, before its first use) cannot be told from another
    one and is left out.
    """
    found = []
    for folder in (root / "gpus").glob("*:*:*.*"):
        try:
            fields = dict(_FIELD.findall((folder / "information").read_text(errors="replace")))
        except OSError:
            continue
        uuid = fields.get("GPU UUID", "?")
        if "?" not in uuid:
            found.append((normal_pci(folder.name), GpuId(uuid), fields.get("Model", "unknown GPU")))
    found.sort(key=lambda gpu: pci_order(gpu[0]))
    return tuple(
        NvmlGpu(id=uuid, index=index, pci=pci, name=name, memory_bytes=0)
        for index, (pci, uuid, name) in enumerate(found)
    )
