"""What the control API says, as records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from l40sd.model import UNDER_WAY, OperationKind
from l40sd.workers.last_end import LastEnd


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker as `l40sctl status` shows it.

    Attributes:
        phase: A ``lifecycle.Phase`` value.
        gpus: nvidia-smi's numbers, in rank order; ``gpu_ids`` are the UUIDs.
        numa: NUMA nodes it is bound to, or would be on a live host.
        reason: Why it is in this phase; empty when all is well.
        last_lines: The end of its output, for a worker that failed.
        since_s: Seconds in this phase.
        progress: 0 to 1 while starting, as far as can be told; None otherwise.
        restarts: Restarts since the failures were last cleared, or the host was started.
        ready_s: Seconds since its process came up; None when it has not.
        next_start_s: Seconds until the next start; None when none is due.
        last_end: How its latest run ended that did; None when none has.
    """

    id: str
    model: str
    engine: str
    phase: str
    tp: int
    pp: int
    gpus: tuple[int, ...]
    gpu_ids: tuple[str, ...]
    numa: tuple[int, ...] = ()
    cpus: str = ""
    link: str = ""
    placement_reason: str = ""
    instance: str = ""
    pid: int | None = None
    address: str = ""
    in_flight: int = 0
    served: int = 0
    restarts: int = 0
    reason: str = ""
    last_lines: tuple[str, ...] = ()
    since_s: float = 0.0
    ready_s: float | None = None
    progress: float | None = None
    next_start_s: float | None = None
    last_end: LastEnd | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStatus:
    """One GPU and who has it.

    Attributes:
        state: ``ok``, ``unknown`` (NVML does not answer), ``lost`` (this GPU does not), ``stuck``, or ``recorded``
            (from a host file).
        used_bytes: None when it cannot be told.
    """

    index: int
    id: str
    pci: str
    name: str
    numa_node: int | None
    memory_bytes: int
    used_bytes: int | None
    worker: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyStatus:
    """The endpoint's state; counts since the daemon started."""

    listen: tuple[str, ...]
    connections: int
    in_flight: int
    waiting: int
    served: int
    failed: int
    retried: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationStatus:
    """A pattern change, or a rolling restart, under way or ended.

    Attributes:
        kind: A ``model.OperationKind`` value.
        state: A ``model.OperationState`` value: ``running``, ``rolling_back``, ``done``, ``incomplete`` (in place but
            for some workers, which are tried again as ever), ``rolled_back``, ``replaced`` or ``failed``.
        done: Workers of the pattern that it is at that are ready; ``total``: of how many.
        lowest_ready: The smallest share of ready capacity so far, 0 to 1, of models that are there before and after.
        why: For anything but ``running`` and ``done``.
        ends_within_s: It has ended after so many seconds from now, whatever happens.
        leaving: Models that it takes out of service.
        by: Who asked for it: a user's name.
    """

    id: str
    pattern: str
    previous: str
    state: str
    done: int
    total: int
    step: str = ""
    lowest_ready: float = 1.0
    why: str = ""
    duration_s: float = 0.0
    ends_within_s: float = 0.0
    leaving: tuple[str, ...] = ()
    kind: str = OperationKind.CHANGE
    by: str = ""

    @property
    def is_under_way(self) -> bool:
        """Whether it has not ended yet."""
        return self.state in UNDER_WAY


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything of `l40sctl status`.

    Attributes:
        provider: Who holds the workers' processes: ``unit``, ``cgroup`` or ``none``; the note says what it cannot do.
        degraded: Sentences for what does not work at present (state on a full disk, NVML silent, ...).
    """

    version: str
    host: str
    inventory: str
    is_live: bool
    uptime_s: float
    pattern: str
    operation: OperationStatus | None
    provider: str
    provider_note: str
    workers: tuple[WorkerStatus, ...]
    gpus: tuple[GpuStatus, ...]
    proxy: ProxyStatus
    warnings: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """One replica in a layout, for people."""

    worker: str
    model: str
    tp: int
    pp: int
    gpus: tuple[int, ...]
    link: str
    numa: tuple[int, ...]
    cpus: str
    pinning: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternView:
    """One pattern as it would be on this host."""

    name: str
    description: str
    is_current: bool
    fits: bool
    problem: str = ""
    hint: str = ""
    summary: str = ""
    groups: tuple[GroupView, ...] = ()
    leftover: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyGpu:
    """One GPU in the topology."""

    index: int
    id: str
    pci: str
    name: str
    memory_bytes: int
    numa_node: int | None
    cpus: str
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The link matrix, and the chosen GPU groups.

    Attributes:
        matrix: Letters as nvidia-smi prints them, row and column order as ``gpus``.
        switches: GPU numbers below each common PCIe switch, host bridge and NUMA node, with its name.
        record: The whole inventory as a host file (TOML), for ``--record``.
        leftover: GPU numbers that no replica of the pattern uses.
        warnings: What the pattern's layout warns of.
    """

    host: str
    source: str
    is_live: bool
    gpus: tuple[TopologyGpu, ...]
    matrix: tuple[tuple[str, ...], ...]
    switches: tuple[tuple[str, tuple[int, ...]], ...]
    numa_nodes: tuple[tuple[int, str, int], ...]
    pattern: str
    groups: tuple[GroupView, ...]
    record: str
    leftover: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeStep:
    """One step of a pattern change, in order.

    Attributes:
        ready_after: The share of capacity ready when it is done, of models that are there before and after; None: none.
    """

    action: str
    worker: str
    gpus: tuple[int, ...]
    ready_after: float | None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePreview:
    """`switch-pattern --dry-run`.

    Attributes:
        gpus: GPU number, worker now, worker then; empty names where there is none.
        kept: Workers that are not touched.
        lowest_ready: The smallest share of ready capacity on the way, 0 to 1, per model that is there before and after.
        leaving: Models that are out of service then.
        expected_s: How long it takes by this host's past loads, besides the drains; None: a model was never loaded.
        waits_s: Longest time without a ready worker by the same measure, for each model that has such a time.
        ends_within_s: Done, or back, or in place but for some workers, whatever happens; ``drain_timeout_s`` is part.
        replaces: The change under way that it would replace, in words; empty: there is none.
    """

    pattern: str
    previous: str
    gpus: tuple[tuple[int, str, str], ...]
    kept: tuple[str, ...]
    steps: tuple[ChangeStep, ...]
    groups: tuple[GroupView, ...]
    lowest_ready: Mapping[str, float] = field(default_factory=dict)
    leftover: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    expected_s: float | None = None
    waits_s: Mapping[str, float] = field(default_factory=dict)
    ends_within_s: float = 0.0
    replaces: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened; ``seq`` grows by one, from one daemon to the next.

    Attributes:
        time: Wall clock, ISO 8601 with offset.
        level: info, warning or error.
        event: ``thing.happened``.
    """

    seq: int
    time: str
    level: str
    event: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPart:
    """Some whole lines of a worker's output; following goes on at ``position``, at this daemon or at the next."""

    text: str
    position: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of `l40sctl doctor`: ``state`` is ok, warning or failed."""

    name: str
    state: str
    found: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternRequest:
    """Body of ``POST /v1/pattern``."""

    name: str
    dry_run: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Reply to what is done over a while; ``notes``: what whoever asked should know, in sentences."""

    operation: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartRequest:
    """Body of ``POST /v1/restart``: one after the other. All at once is ``POST /v1/workers/{id}/restart`` for each."""

    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """The inside of ``{"error": ...}``."""

    code: str
    what: str
    where: str = ""
    hint: str = ""
