"""The machine that workers run on: this one, as NVML and the kernel describe it, or a recorded or invented one.

Owns NVML's helper process. A host file has no memory to read and nothing to pin to.
"""

import asyncio
import platform

from l40sd.adapters.hostfiles import bundled_hosts, read_host
from l40sd.adapters.modelfiles import read_model_facts
from l40sd.adapters.nvidiaproc import read_nvidia_proc
from l40sd.adapters.nvml import GpuMemory as GpuMemory
from l40sd.adapters.nvml import Nvml, NvmlSilentError
from l40sd.adapters.sysfs import read_sysfs
from l40sd.core.config import Config, HostConfig
from l40sd.core.errors import L40sError
from l40sd.core.model import GpuId, Inventory, ModelFacts, ModelName
from l40sd.core.topology import NvmlFacts, join

AUTO = "auto"
FACTS_TIMEOUT_S = 30.0
"""For all checkpoints together: a file system on the network may hang, and facts only make refusals better."""


class Host:
    """One machine: what it is made of, and on a live one how its GPUs' memory is used."""

    def __init__(self, inventory: Inventory, nvml: Nvml | None = None, *, note: str = "") -> None:
        self.inventory = inventory
        self._nvml = nvml
        self._note = note
        self._silent = ""

    @classmethod
    async def open(cls, config: HostConfig) -> "Host":
        """Return the host that the config names: ``auto``, a host file, or one of the bundled hosts.

        Raises:
            L40sError: No such file or name, a bad file, or no GPU on this machine.
        """
        if config.inventory != AUTO:
            return cls(await asyncio.to_thread(read_host, config.inventory))
        nvml = Nvml(timeout_s=config.nvml_timeout_s)
        try:
            return await cls._live(nvml)
        except BaseException:
            await nvml.close()
            raise

    @classmethod
    async def _live(cls, nvml: Nvml) -> "Host":
        note, why = "", "NVML finds none"
        try:
            facts = await nvml.inventory()
        except NvmlSilentError as error:
            facts = NvmlFacts(gpus=await asyncio.to_thread(read_nvidia_proc))
            why = f"NVML: {error.what}"
            note = "memory sizes and NVLinks are unknown: NVML did not answer at the start"
        if not facts.gpus:
            raise L40sError(
                f"no NVIDIA GPU on this machine ({why})",
                where="host.inventory",
                hint=f"see `nvidia-smi`; without GPUs name a host file or a bundled host: {', '.join(bundled_hosts())}",
                code="no_gpu",
            )
        sysfs = await asyncio.to_thread(read_sysfs, [gpu.pci for gpu in facts.gpus])
        return cls(join(platform.node() or "localhost", facts, sysfs), nvml, note=note)

    @property
    def degraded(self) -> tuple[str, ...]:
        """Sentences on what cannot be told at present."""
        lost = self._nvml.lost if self._nvml else ()
        silent = f"GPU memory is unknown: NVML: {self._silent}" if self._silent else ""
        return tuple(filter(None, (self._note, silent, *(f"lost: {gpu}" for gpu in lost))))

    async def memory(self) -> dict[GpuId, GpuMemory] | None:
        """Return every GPU's memory, without the GPUs that are lost; None while NVML is silent.

        All free on a host file.
        """
        if self._nvml is None:
            return {gpu.id: GpuMemory(used_bytes=0, total_bytes=gpu.memory_bytes) for gpu in self.inventory.gpus}
        try:
            memory = await self._nvml.memory()
        except NvmlSilentError as error:
            self._silent = error.what
            return None
        self._silent = ""
        return memory

    async def facts(self, config: Config) -> dict[ModelName, ModelFacts]:
        """Return what the checkpoints of all models say of themselves; unknown where they cannot be read in time."""
        sources = {model.name: model.source for model in config.models.values() if model.source}
        found = {model: ModelFacts() for model in config.models}
        try:
            async with asyncio.timeout(FACTS_TIMEOUT_S):
                for model, source in sources.items():
                    found[model] = await asyncio.to_thread(read_model_facts, source)
        except TimeoutError:
            pass
        return found

    async def close(self) -> None:
        """End NVML's helper; never waits for one that hangs."""
        if self._nvml is not None:
            await self._nvml.close()
