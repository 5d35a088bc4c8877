"""The nouns: ids, GPUs, NUMA nodes, the inventory of a host, replicas and where they are placed.

Everything is keyed by identity (GPU UUID, PCI address), never by position: a position changes when a
card is pulled, an identity does not (invariant 9).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple, NewType

GpuId = NewType("GpuId", str)
"""A GPU's UUID as NVML gives it: ``GPU-`` and 36 characters."""
PciAddress = NewType("PciAddress", str)
"""``dddd:bb:dd.f``, lower case, as in /sys/bus/pci/devices; a host bridge is ``pcidddd:bb``."""
WorkerId = NewType("WorkerId", str)
"""One replica's slot, e.g. ``smollm2-gpu0-1``; only ``[a-z0-9-]``, so that it can be part of a unit's name."""
InstanceId = NewType("InstanceId", str)
"""One run of a worker: ``WORKER-ulid``, lower case."""
ModelName = NewType("ModelName", str)
"""A model's key in the config."""


class Link(IntEnum):
    """The closest path between two GPUs, best first, in nvidia-smi's letters."""

    X = 0  # the GPU itself
    NV = 1  # NVLink, any number of bonded links
    PIX = 2  # at most one PCIe bridge: one PCIe switch
    PXB = 3  # several PCIe bridges, no host bridge: cascaded PCIe switches
    PHB = 4  # through one PCIe host bridge
    NODE = 5  # between host bridges of one NUMA node
    SYS = 6  # across the sockets' interconnect


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, joined from NVML's and the kernel's facts.

    Attributes:
        index: nvidia-smi's number, for people only; may change between boots.
        numa_node: The NUMA node it hangs on; None when the host does not say.
        cpus: Logical CPUs nearest to it; empty when the host does not say.
        path: PCI addresses of the bridges above it, host bridge first (``pci0000:00``, then each upstream
            port); empty when only a link matrix is known.
    """

    id: GpuId
    index: int
    pci: PciAddress
    name: str
    memory_bytes: int
    numa_node: int | None = None
    cpus: frozenset[int] = frozenset()
    path: tuple[PciAddress, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """CPUs and memory at one distance. Ids may have gaps; a node may have no CPUs.

    Attributes:
        cores: The logical CPUs of each physical core, in order of the lowest; empty when the host does not say.
    """

    id: int
    cpus: frozenset[int]
    memory_bytes: int = 0
    cores: tuple[frozenset[int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What the host is made of.

    Attributes:
        source: ``"nvml"`` or the host file's path, for messages.
        gpus: In order of PCI address.
        links: Both orders of every pair of different GPUs.
        is_live: Made from this machine's own devices; only then may anything be pinned to its CPUs.
    """

    host: str
    source: str
    gpus: tuple[Gpu, ...]
    numa_nodes: tuple[NumaNode, ...]
    links: Mapping[tuple[GpuId, GpuId], Link]
    is_live: bool = False

    def gpu(self, gpu_id: GpuId) -> Gpu:
        """Return the GPU with this UUID.

        Raises:
            KeyError: This host has no such GPU.
        """
        for gpu in self.gpus:
            if gpu.id == gpu_id:
                return gpu
        raise KeyError(gpu_id)

    def link(self, one: GpuId, other: GpuId) -> Link:
        """Return the closest path between two GPUs of this host; ``Link.X`` from one to itself."""
        return Link.X if one == other else self.links[(one, other)]


class ReplicaKind(NamedTuple):
    """Replicas that are alike: what one of them has proven, its equals need not prove again."""

    model: ModelName
    tp: int
    pp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """One line of a pattern: so many replicas of a model, each so wide (TP) and so deep (PP).

    Attributes:
        count: How many; None means as many as fit ("fill").
    """

    model: ModelName
    count: int | None = None
    tp: int = 1
    pp: int = 1

    @property
    def kind(self) -> ReplicaKind:
        """What it has in common with its equals."""
        return ReplicaKind(self.model, self.tp, self.pp)

    @property
    def gpus_each(self) -> int:
        """GPUs one replica occupies."""
        return self.tp * self.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A named layout of the whole host."""

    name: str
    replicas: tuple[ReplicaSpec, ...]
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One replica's GPUs, CPUs and memory nodes, and why these.

    Attributes:
        gpus: The GPU group in rank order; empty for a worker that somebody else runs (external).
        cpus: Logical CPUs to bind to; empty means unbound.
        memory_nodes: NUMA nodes to take memory from; empty means unbound.
        worst_link: The slowest link inside the group; ``Link.X`` for one GPU.
        reason: One sentence for the operator.
        endpoint: ``http://host:port`` of an external worker; empty otherwise.
    """

    worker: WorkerId
    model: ModelName
    tp: int
    pp: int
    gpus: tuple[GpuId, ...]
    cpus: frozenset[int] = frozenset()
    memory_nodes: tuple[int, ...] = ()
    worst_link: Link = Link.X
    reason: str = ""
    endpoint: str = ""

    @property
    def kind(self) -> ReplicaKind:
        """What it has in common with its equals."""
        return ReplicaKind(self.model, self.tp, self.pp)

    @property
    def weight(self) -> int:
        """Relative capacity for balancing: its GPUs, at least 1."""
        return max(1, len(self.gpus))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A pattern placed on a host, whole.

    Attributes:
        leftover: GPUs that no replica uses.
        warnings: What an operator should know although it fits (TP=8 over PCIe, a crossed socket, ...).
    """

    pattern: str
    placements: tuple[Placement, ...]
    leftover: tuple[GpuId, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a checkpoint on disk says of itself; every field may be unknown (a hub id, an odd format).

    Attributes:
        attention_heads: TP must divide it.
        kv_heads: Grouped-query heads; TP above it copies the KV cache.
        layers: PP may not exceed it.
        size_bytes: Weights on disk.
        missing: The source is a local path and nothing is there.
    """

    attention_heads: int | None = None
    kv_heads: int | None = None
    layers: int | None = None
    size_bytes: int | None = None
    missing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel:
    """A model as an engine's ``/v1/models`` has it; 0 and empty: it does not say.

    Attributes:
        created: Seconds since 1970.
        owned_by: As a rule the engine's name: ``vllm``, ``sglang``, ``llamacpp``.
        max_model_len: Tokens of a prompt and its answer together.
    """

    id: str
    created: int = 0
    owned_by: str = ""
    max_model_len: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A ready worker as the proxy sees it.

    Attributes:
        weight: Relative capacity, at least 1.
        api_key: Sent to the worker in place of the client's; empty: the worker asks for none.
        served_name: The model name that the worker's engine answers to; empty: the model's own.
        ends_streams: Its engine ends a stream with the last event of its API (``[DONE]``) always.
        listed: What its engine says of the model, if it says anything.
    """

    worker: WorkerId
    model: ModelName
    host: str
    port: int
    weight: int = 1
    api_key: str = ""
    served_name: str = ""
    ends_streams: bool = field(default=False, compare=False)
    listed: ListedModel | None = field(default=None, compare=False)


SOON_S = 5
"""When to come again where something is on its way and nobody knows for how long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What may still come for a model, as the proxy sees it; workers/outlook.py makes it.

    Attributes:
        is_wanted: It is in the pattern.
        is_coming: A worker of it serves or is on its way: a request may wait.
        note: What its workers do, in one clause; empty when one serves.
        retry_after_s: When to come again.
    """

    is_wanted: bool = True
    is_coming: bool = True
    note: str = ""
    retry_after_s: int = SOON_S


class OperationKind(StrEnum):
    """What takes a while and can be followed."""

    CHANGE = "change"  # of the pattern, or of what its workers are started with
    RESTART = "restart"  # of several workers, one after the other


class OperationState(StrEnum):
    """Where an operation stands."""

    RUNNING = "running"
    ROLLING_BACK = "rolling_back"  # what was wanted before is wanted again
    DONE = "done"
    INCOMPLETE = "incomplete"  # in place but for some workers, which are tried again as ever
    ROLLED_BACK = "rolled_back"
    REPLACED = "replaced"  # by another operation
    FAILED = "failed"

    @property
    def is_under_way(self) -> bool:
        """Whether it has not ended yet."""
        return self in UNDER_WAY


UNDER_WAY = (OperationState.RUNNING, OperationState.ROLLING_BACK)
