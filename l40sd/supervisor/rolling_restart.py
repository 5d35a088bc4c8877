"""A rolling restart under way: who was told, who is back, and how it ends."""

import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from l40sd.clock import now_s
from l40sd.model import ModelName, OperationKind, OperationState, WorkerId
from l40sd.supervisor.operation import Operation
from l40sd.supervisor.pace import SLACK_S
from l40sd.supervisor.rehearsal import Pace
from l40sd.supervisor.rolling import next_restarts
from l40sd.workers.lifecycle import Event, Goal, Phase
from l40sd.workers.slot import Observed
from l40sd.workers.worker import Worker

FAILED = (Phase.BACKOFF, Phase.QUARANTINED, Phase.FAILED, Phase.STUCK)


@dataclass(slots=True, kw_only=True)
class RollingRestart:
    """Workers restarted one after the other.

    Attributes:
        pattern: The pattern in force, for people.
        asked: All of them.
        pending: Who has not been told yet.
        told_at_s: When each that is on its way was told.
        baseline: Each model's ready capacity in GPUs when it began.
        bound_s: It is ended after so long, whatever moves.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(4))
    pattern: str
    asked: tuple[WorkerId, ...]
    pending: list[WorkerId]
    baseline: Mapping[ModelName, int]
    bound_s: float
    by: str = ""
    told_at_s: dict[WorkerId, float] = field(default_factory=dict)
    state: OperationState = OperationState.RUNNING
    why: str = ""
    step: str = ""
    lowest_ready: float = 1.0
    began_at_s: float = field(default_factory=now_s)

    @classmethod
    def of(
        cls, chosen: Sequence[WorkerId], observed: Sequence[Observed], pace: Pace, *, pattern: str, by: str
    ) -> "RollingRestart":
        """Return the restart of these workers; as late as if each took all its time, one after the other."""
        baseline = Counter[ModelName]()
        for o in observed:
            baseline[o.model] += o.weight if o.is_serving else 0
        loads_s = (pace.load_s.get(o.model, 0.0) for o in observed if o.worker in chosen)
        return cls(
            pattern=pattern,
            asked=tuple(chosen),
            pending=list(chosen),
            baseline=+baseline,
            bound_s=sum(load_s + pace.stop_s for load_s in loads_s) + SLACK_S,
            by=by,
        )

    def advance(self, workers: Mapping[WorkerId, Worker], *, start_parallel: int, min_ready: float) -> bool:
        """Tell who can be told now; return whether it has ended.

        1. Who is back is done; the first that does not come back ends it, the rest is not touched.
        2. Its time is up.
        3. The next.
        """
        self.pending = [w for w in self.pending if w in workers and workers[w].goal is not Goal.GONE]
        for worker_id in [*self.told_at_s]:
            worker = workers.get(worker_id)
            if worker is None or worker.goal is Goal.GONE or self._is_back(worker):
                del self.told_at_s[worker_id]  # 1
            elif worker.phase in FAILED and worker.since_s >= self.told_at_s[worker_id]:
                return self._end(f"{worker_id} did not come back: {worker.reason or worker.phase}")
        if now_s() >= self.began_at_s + self.bound_s:  # 2
            return self._end(f"not done within {self.bound_s:.0f} s")
        observed = [w.observed() for w in workers.values()]
        self._measure(observed)
        for worker_id in next_restarts(  # 3
            self.pending,
            self.told_at_s,
            observed,
            baseline=self.baseline,
            start_parallel=start_parallel,
            min_ready=min_ready,
        ):
            self.pending.remove(worker_id)
            self.told_at_s[worker_id] = now_s()
            self.step = f"restarting {worker_id}"
            workers[worker_id].post(Event.RESTART, "restart by the operator")
        if not self.pending and not self.told_at_s:
            self.state, self.step = OperationState.DONE, ""
        return not self.state.is_under_way

    def _is_back(self, worker: Worker) -> bool:
        ready_at_s = worker.run.ready_at_s if worker.run is not None else None
        is_up = worker.phase in (Phase.READY, Phase.UNREADY, Phase.DRAINED)
        return is_up and ready_at_s is not None and ready_at_s >= self.told_at_s[worker.id]

    def _end(self, why: str) -> bool:
        left = f"; not restarted: {', '.join(self.pending)}" if self.pending else ""
        self.state, self.why, self.step = OperationState.FAILED, why + left, ""
        return True

    def replaced(self, why: str) -> None:
        """End it in favour of something else."""
        self._end(why)
        self.state = OperationState.REPLACED

    def tell_end(self, log: structlog.stdlib.BoundLogger) -> None:
        """Log how it ended."""
        keys: dict[str, Any] = {"operation": self.id, "lowest_ready": round(self.lowest_ready, 2)}
        if self.state is OperationState.DONE:
            log.info("workers.restart.complete", workers=len(self.asked), **keys)
        else:
            log.warning("workers.restart.ended", state=self.state, why=self.why, **keys)

    def _measure(self, observed: Iterable[Observed]) -> None:
        for model, base in self.baseline.items():
            ready = sum(o.weight for o in observed if o.model == model and o.is_serving)
            self.lowest_ready = min(self.lowest_ready, ready / base)

    def operation(self) -> Operation:
        """Return how it stands."""
        return Operation(
            id=self.id,
            kind=OperationKind.RESTART,
            pattern=self.pattern,
            state=self.state,
            done=len(self.asked) - len(self.pending) - len(self.told_at_s),
            total=len(self.asked),
            step=self.step,
            lowest_ready=self.lowest_ready,
            why=self.why,
            duration_s=now_s() - self.began_at_s,
            ends_within_s=max(0.0, self.began_at_s + self.bound_s - now_s()) if self.state.is_under_way else 0.0,
            by=self.by,
        )

    def saved(self) -> dict[str, Any]:
        """Return what the next daemon needs to go on with it: who was told and is not back is told again."""
        return {
            "id": self.id,
            "pattern": self.pattern,
            "asked": list(self.asked),
            "pending": [*self.told_at_s, *self.pending],
            "baseline": dict(self.baseline),
            "bound_s": self.bound_s,
            "by": self.by,
        }

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> "RollingRestart":
        """Return a rolling restart that an earlier daemon was at; its time begins anew."""
        return cls(
            id=str(saved["id"]),
            pattern=str(saved["pattern"]),
            asked=tuple(WorkerId(str(w)) for w in saved["asked"]),
            pending=[WorkerId(str(w)) for w in saved["pending"]],
            baseline={ModelName(str(m)): int(n) for m, n in dict(saved["baseline"]).items()},
            bound_s=float(saved["bound_s"]),
            by=str(saved.get("by", "")),
        )
