"""A slot for one replica, as it is wanted and as it is observed: what the reconciler and the workers both speak of."""

from dataclasses import dataclass

from l40sd.model import GpuId, ModelName, Placement, ReplicaKind, WorkerId
from l40sd.workers.lifecycle import Goal, Phase

SERVED = (Phase.READY, Phase.UNREADY, Phase.DRAINING, Phase.DRAINED)
"""Phases of a worker that receives requests, or did until it was asked not to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A placement that shall exist, and the fingerprint of its launch."""

    placement: Placement
    fingerprint: str

    @property
    def kind(self) -> ReplicaKind:
        """What this worker has in common with its equals."""
        return self.placement.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A worker as it is; ``failed_starts``: starts that failed since its failures were last cleared."""

    worker: WorkerId
    model: ModelName
    gpus: tuple[GpuId, ...]
    weight: int
    kind: ReplicaKind
    fingerprint: str
    phase: Phase
    goal: Goal
    failed_starts: int = 0

    @property
    def is_serving(self) -> bool:
        """Counts as ready capacity."""
        return self.phase is Phase.READY and self.goal is not Goal.GONE


def is_kept(o: Observed, w: Wanted | None) -> bool:
    """Return whether this worker is what ``w`` wants, and stays."""
    return w is not None and w.fingerprint == o.fingerprint and o.goal is not Goal.GONE


def slot(w: Wanted, phase: Phase) -> Observed:
    """Return the worker for ``w`` as it is observed in ``phase``."""
    p = w.placement
    return Observed(
        worker=p.worker,
        model=p.model,
        gpus=p.gpus,
        weight=p.weight,
        kind=w.kind,
        fingerprint=w.fingerprint,
        phase=phase,
        goal=Goal.SERVE,
    )
