"""Which GPUs of this machine are there: known ones keep their numbers, lost ones are named, others are offered.

A GPU may be missing at boot, fall off the bus, or come back. NVML numbers those that it finds from 0, so the numbers
behind a missing one would all shift, and with them the workers' names. What is known of a GPU is therefore kept, over
restarts too, until the operator says that it was removed or another card is found in its place.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from l40sd.hardware.topology import NvmlGpu
from l40sd.model import Gpu, GpuId, Inventory

NOT_LISTED = "NVML does not list it"
NO_PERMISSION = "Insufficient Permissions"
"""NVML's words."""
NAMELESS = GpuId("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failing:
    """A GPU that NVML counts and cannot tell of; ``number`` is NVML's own, ``id`` is empty when it was not told."""

    number: int
    id: GpuId = NAMELESS
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What NVML said last: ``answering`` has NVML's own numbers in it."""

    answering: tuple[NvmlGpu, ...] = ()
    failing: tuple[Failing, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A GPU that does not answer: its id (empty: it never said), what it is called, and why as far as NVML says."""

    id: GpuId
    name: str
    reason: str

    @property
    def is_gone(self) -> bool:
        """Whether nobody can use it: of one that we may not ask, an engine may still make use."""
        return self.reason != NO_PERMISSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Every GPU that this host has had, with the number that it keeps."""

    gpus: Mapping[GpuId, NvmlGpu] = field(default_factory=dict)

    def with_found(self, found: Sequence[NvmlGpu], *, held: Collection[GpuId] = (), forget: bool = False) -> "Known":
        """Return what is known after these GPUs were found.

        1. A card that another one was found in the place of is no longer known; nor, with ``forget``, is any that was
           not found, but for those that workers hold.
        2. A GPU that was known keeps its number. A new one has NVML's, or the lowest that is free.
        """
        places, ids = {gpu.pci for gpu in found}, {gpu.id for gpu in found}
        gpus = {  # 1
            gpu.id: gpu
            for gpu in self.gpus.values()
            if gpu.id in ids or gpu.id in held or (gpu.pci not in places and not forget)
        }
        for gpu in found:  # 2
            taken = {each.index for each in gpus.values() if each.id != gpu.id}
            number = gpus[gpu.id].index if gpu.id in gpus else gpu.index
            gpus[gpu.id] = replace(gpu, index=number if number not in taken else _lowest_free(taken))
        return Known(gpus=gpus)

    def lost(self, heard: Heard) -> tuple[Lost, ...]:
        """Return the GPUs that do not answer: known ones by their numbers, then those that NVML only counts."""
        answering = {gpu.id for gpu in heard.answering}
        absent = sorted((gpu for gpu in self.gpus.values() if gpu.id not in answering), key=lambda gpu: gpu.index)
        by_id = {each.id: each.reason for each in heard.failing if each.id}
        nameless = {each.number: each.reason for each in heard.failing if not each.id}
        return (
            *(
                Lost(
                    id=gpu.id,
                    name=name_of(gpu),
                    reason=by_id.pop(gpu.id, "") or nameless.pop(gpu.index, "") or NOT_LISTED,
                )
                for gpu in absent
            ),
            *(Lost(id=each.id, name=f"GPU{each.number}", reason=each.reason)
              for each in heard.failing if each.id in by_id or (not each.id and each.number in nameless)),
        )  # fmt: skip

    def offered(self, heard: Heard, used: Collection[GpuId]) -> tuple[str, ...]:
        """Return the names of the GPUs that answer and are not in use on this host."""
        numbered = self.with_found(heard.answering).gpus
        return tuple(name_of(numbered[gpu.id]) for gpu in heard.answering if gpu.id not in used)


def changes(before: Inventory, after: Inventory) -> tuple[str, ...]:
    """Return which GPUs a look at the host added and took away, one sentence each."""
    was, now = {gpu.id: gpu for gpu in before.gpus}, {gpu.id: gpu for gpu in after.gpus}
    return (
        *(f"host: {name_of(gpu)} is gone" for gpu in before.gpus if gpu.id not in now),
        *(f"host: {name_of(gpu)} is taken in" for gpu in after.gpus if gpu.id not in was),
    )


def name_of(gpu: NvmlGpu | Gpu) -> str:
    """Return what a GPU is called: its number and place, e.g. ``GPU3 (0000:3b:00.0)``."""
    return f"GPU{gpu.index} ({gpu.pci})"


def _lowest_free(taken: Collection[int]) -> int:
    return next(number for number in range(len(taken) + 1) if number not in taken)
