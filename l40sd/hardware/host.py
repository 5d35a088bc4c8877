"""The machine that workers run on: this one, as NVML and the kernel describe it, or a recorded or invented one.

Owns NVML's helper process. A host file has no memory to read and nothing to pin to.
"""

import asyncio
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from l40sd.config.options import Config, HostConfig
from l40sd.hardware.host_files import bundled_hosts, read_host
from l40sd.hardware.nvidia_proc import read_nvidia_proc
from l40sd.hardware.nvml import GpuMemory as GpuMemory
from l40sd.hardware.nvml import Nvml, NvmlSilentError
from l40sd.hardware.presence import Heard, Known, Lost
from l40sd.hardware.sysfs import read_sysfs
from l40sd.hardware.topology import NvmlFacts, NvmlGpu, join
from l40sd.model import GpuId, Inventory, ModelFacts, ModelName
from l40sd.sizing.model_files import read_model_facts

AUTO = "auto"
FACTS_TIMEOUT_S = 30.0
"""For all checkpoints together: a file system on the network may hang, and facts only make refusals better."""


NOTHING = NvmlFacts(gpus=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A look at what the machine is made of.

    Attributes:
        facts: What NVML said.
        known: The GPUs that it has had, those of ``inventory`` among them.
        note: What could not be told; empty when nothing is missing.
    """

    inventory: Inventory
    facts: NvmlFacts = NOTHING
    known: Known = field(default_factory=Known)
    note: str = ""


class Host:
    """One machine: what it is made of, and on a live one which GPUs answer and how their memory is used."""

    def __init__(self, found: Found, nvml: Nvml | None = None) -> None:
        self._found = found
        self._nvml = nvml
        self._silent = ""

    @classmethod
    async def open(cls, config: HostConfig) -> "Host":
        """Return the host that the config names: ``auto``, a host file, or one of the bundled hosts.

        A machine without a GPU, or without a driver yet, is one with no GPUs: they may come.

        Raises:
            L40sError: No such file or name, or a bad file.
        """
        if config.inventory != AUTO:
            return cls(Found(inventory=await asyncio.to_thread(read_host, config.inventory)))
        nvml = Nvml(timeout_s=config.nvml_timeout_s)
        try:
            return cls(await _look(nvml, Known()), nvml)
        except BaseException:
            await nvml.close()
            raise

    @property
    def inventory(self) -> Inventory:
        """What the host is made of, as it was found by the last look that was taken over."""
        return self._found.inventory

    @property
    def known(self) -> tuple[NvmlGpu, ...]:
        """Every GPU that this machine has had, to be kept over restarts; none of a host file."""
        return tuple(self._found.known.gpus.values())

    @property
    def lost(self) -> tuple[Lost, ...]:
        """The GPUs that did not answer when NVML last did."""
        return self._found.known.lost(heard) if (heard := self._heard()) is not None else ()

    @property
    def offered(self) -> tuple[str, ...]:
        """The names of GPUs that answer and are not in the inventory."""
        used = {gpu.id for gpu in self.inventory.gpus}
        return self._found.known.offered(heard, used) if (heard := self._heard()) is not None else ()

    def _heard(self) -> Heard | None:
        return self._nvml.heard if self._nvml is not None else None

    @property
    def degraded(self) -> tuple[str, ...]:
        """Sentences on what cannot be told at present, which GPUs are missing and which could be used again."""
        silent = f"GPU memory is unknown: NVML: {self._silent}" if self._silent and self.inventory.gpus else ""
        lost = (f"lost: {gpu.name}: {gpu.reason}" for gpu in self.lost)
        offered = (f"{name} answers and is not in use: `l40sctl reload` takes it in" for name in self.offered)
        return tuple(filter(None, (self._found.note, silent, *lost, *offered)))

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

    async def renew(self) -> None:
        """Have NVML look for GPUs anew at the next question: those that came back meanwhile are found then."""
        if self._nvml is not None:
            await self._nvml.renew()

    async def look(self, *, held: Collection[GpuId], forget: bool = False) -> Found:
        """Return what the machine is made of now, for ``take``; nothing has changed yet.

        A host file stays what it was, and so does a machine whose NVML does not answer.

        Args:
            held: GPUs that workers have: they stay, lost or not.
            forget: GPUs that are missing were removed.
        """
        if self._nvml is None or (self._silent and self.inventory.gpus):  # it is asked again and again anyway
            return self._found
        await self._nvml.renew()
        found = await _look(self._nvml, self._found.known, held=held, forget=forget)
        return self._found if found.note and self.inventory.gpus else found

    async def adopt(self, known: Sequence[NvmlGpu], *, held: Collection[GpuId]) -> None:
        """Go by what earlier daemons knew of this machine's GPUs; their workers hold some of them."""
        if self._nvml is None:
            return
        before = Known(gpus={gpu.id: gpu for gpu in known})
        self._found = await _joined(self._found.facts, before, note=self._found.note, held=held)

    def take(self, found: Found) -> Found:
        """Take a look over; return what was there before, so that it can be taken back."""
        former, self._found = self._found, found
        return former

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


async def _look(nvml: Nvml, known: Known, *, held: Collection[GpuId] = (), forget: bool = False) -> Found:
    """Ask NVML, and where it does not answer the kernel's module, then the kernel."""
    note, why = "", "NVML finds none"
    try:
        facts = await nvml.inventory()
    except NvmlSilentError as error:
        facts = NvmlFacts(gpus=await asyncio.to_thread(read_nvidia_proc))
        why = f"NVML: {error.what}"
        note = "memory sizes and NVLinks are unknown: NVML did not answer at the start"
    if not facts.gpus:
        note = (
            f"no NVIDIA GPU on this machine ({why}); it is looked for again and again: see `nvidia-smi`, or name a host"
            f" file or a bundled host in [host] inventory, e.g. {bundled_hosts()[0]}"
        )
    return await _joined(facts, known, note=note, held=held, forget=forget)


async def _joined(
    facts: NvmlFacts, known: Known, *, note: str, held: Collection[GpuId] = (), forget: bool = False
) -> Found:
    """Return these GPUs, and the known ones that are held, as an inventory."""
    known = known.with_found(facts.gpus, held=held, forget=forget)
    there = {gpu.id for gpu in facts.gpus}.union(held)
    gpus = tuple(gpu for gpu in known.gpus.values() if gpu.id in there)
    sysfs = await asyncio.to_thread(read_sysfs, [gpu.pci for gpu in gpus])
    inventory = join(platform.node() or "localhost", NvmlFacts(gpus=gpus, links=facts.links), sysfs)
    return Found(inventory=inventory, facts=facts, known=known, note=note)
