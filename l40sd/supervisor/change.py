"""What is wanted, and the way from one want to another, as they are held in memory and on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from l40sd.clock import boot_id, now_s
from l40sd.codec import plain
from l40sd.config.options import Config
from l40sd.model import Layout, ModelName, OperationState, ReplicaKind, WorkerId
from l40sd.supervisor.operation import Operation
from l40sd.supervisor.rollout import Terms
from l40sd.workers.slot import Wanted

UNKNOWN_BOUND_S = 3600.0
"""For a change that an older l40sd began, which wrote down no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A layout that shall be, with the configuration that its workers are started from."""

    layout: Layout
    config: Config
    force: bool = False
    wanted: tuple[Wanted, ...] = ()

    @property
    def pattern(self) -> str:
        """The pattern's name."""
        return self.layout.pattern


@dataclass(slots=True, kw_only=True)
class Change:
    """The way from one want to another.

    Attributes:
        previous: What everything goes back to when the first new worker does not prove itself; None: nowhere to go.
        terms: What the change goes by.
        forward_s: After so long everything goes back, or the change ends as it is.
        back_s: After so long on the way back it ends as it is.
        leaving: Models that are out of service when it has ended.
        by: Who asked for it: a user's name; empty: a reload.
        turned_at_s: When everything began to go back; None: it does not.
    """

    id: str
    pattern: str
    previous: Want | None
    terms: Terms
    forward_s: float
    back_s: float
    leaving: tuple[ModelName, ...] = ()
    by: str = ""
    state: OperationState = OperationState.RUNNING
    why: str = ""
    step: str = ""
    lowest_ready: float = 1.0
    began_at_s: float = field(default_factory=now_s)
    turned_at_s: float | None = None

    @property
    def previous_pattern(self) -> str:
        """Name of the pattern it came from; empty when there was none."""
        return self.previous.pattern if self.previous else ""

    @property
    def ends_in_s(self) -> float:
        """Seconds until it has ended at the latest, whatever happens."""
        if self.turned_at_s is not None:
            return self.turned_at_s + self.back_s - now_s()
        return self.began_at_s + self.forward_s - now_s() + (self.back_s if self.terms.is_trial else 0.0)

    @property
    def is_late(self) -> bool:
        """Whether the time for the way that it is on is up."""
        if self.turned_at_s is not None:
            return now_s() >= self.turned_at_s + self.back_s
        return now_s() >= self.began_at_s + self.forward_s

    def turn_back(self, why: str) -> None:
        """Go back from here: nothing has to prove itself on that way."""
        self.state, self.why, self.turned_at_s = OperationState.ROLLING_BACK, why, now_s()
        self.terms = replace(self.terms, is_trial=False)

    def operation(self, *, done: int, total: int) -> Operation:
        """Return how it stands."""
        return Operation(
            id=self.id,
            pattern=self.pattern,
            previous=self.previous_pattern,
            state=self.state,
            done=done,
            total=total,
            step=self.step,
            lowest_ready=self.lowest_ready,
            why=self.why,
            duration_s=now_s() - self.began_at_s,
            ends_within_s=max(0.0, self.ends_in_s) if self.state.is_under_way else 0.0,
            leaving=() if self.turned_at_s is not None else self.leaving,
            by=self.by,
        )

    def saved(self) -> dict[str, Any]:
        """Return what the next daemon needs to carry it on."""
        return {
            "id": self.id,
            "pattern": self.pattern,
            "previous": self.previous_pattern,
            "placements": plain(self.previous.layout.placements) if self.previous else [],
            "baseline": dict(self.terms.baseline),
            "proven": [list(kind) for kind in sorted(self.terms.proven)],
            "created": sorted(self.terms.created),
            "state": self.state,
            "why": self.why,
            "leaving": list(self.leaving),
            "by": self.by,
            "boot_id": boot_id(),
            "began_at_s": self.began_at_s,
            "turned_at_s": self.turned_at_s,
            "forward_s": self.forward_s,
            "back_s": self.back_s,
        }

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any], previous: Want | None) -> "Change":
        """Return a change that an earlier daemon was at. Its time goes on; after a boot it begins anew."""
        state = OperationState(str(saved.get("state", OperationState.RUNNING)))
        began_at_s, turned_at_s = now_s(), now_s() if state is OperationState.ROLLING_BACK else None
        if saved.get("boot_id") == boot_id():
            began_at_s = float(saved.get("began_at_s") or began_at_s)
            turned_at_s = None if turned_at_s is None else float(saved.get("turned_at_s") or turned_at_s)
        return cls(
            id=str(saved.get("id")),
            pattern=str(saved.get("pattern")),
            previous=previous,
            terms=Terms(
                baseline={ModelName(k): int(v) for k, v in dict(saved.get("baseline", {})).items()},
                proven=frozenset(ReplicaKind(ModelName(m), int(tp), int(pp)) for m, tp, pp in saved.get("proven", [])),
                created=frozenset(WorkerId(str(worker)) for worker in saved.get("created", [])),
                is_trial=previous is not None and state is OperationState.RUNNING,
            ),
            forward_s=float(saved.get("forward_s") or UNKNOWN_BOUND_S),
            back_s=float(saved.get("back_s") or UNKNOWN_BOUND_S),
            leaving=tuple(ModelName(str(model)) for model in saved.get("leaving", [])),
            by=str(saved.get("by", "")),
            state=state,
            why=str(saved.get("why", "")),
            began_at_s=began_at_s,
            turned_at_s=turned_at_s,
        )


def saved_want(want: Want) -> dict[str, Any]:
    """Return what the next daemon needs to place it again as it is."""
    return {"pattern": want.pattern, "force": want.force, "placements": plain(want.layout.placements)}
