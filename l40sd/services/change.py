"""What is wanted, and the way from one want to another, as they are held in memory and on disk."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from l40sd.adapters.clock import now_s
from l40sd.core.config import Config
from l40sd.core.messages import OperationStatus, plain
from l40sd.core.model import Layout, ModelName, WorkerId
from l40sd.core.plan import Shape, Wanted

UNDER_WAY = ("running", "rolling_back")


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
        baseline: Each model's capacity in GPUs when the change began.
        proven: Shapes that have given one real answer, or serve unchanged.
        created: Workers made for this change: only their failures speak against it.
    """

    id: str
    pattern: str
    previous: Want | None
    baseline: Mapping[ModelName, int]
    proven: set[Shape] = field(default_factory=set)
    created: set[WorkerId] = field(default_factory=set)
    state: str = "running"
    why: str = ""
    step: str = ""
    lowest_ready: float = 1.0
    began_at_s: float = field(default_factory=now_s)

    @property
    def previous_pattern(self) -> str:
        """Name of the pattern it came from; empty when there was none."""
        return self.previous.pattern if self.previous else ""

    @property
    def is_trial(self) -> bool:
        """Whether something has to prove itself: going back needs no trial, nor does what has no alternative."""
        return self.previous is not None and self.state == "running"

    def status(self, *, done: int, total: int) -> OperationStatus:
        """Return the change as it is shown."""
        return OperationStatus(
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
        )

    def journal(self) -> dict[str, Any]:
        """Return what the next daemon needs to carry it on."""
        return {
            "id": self.id,
            "pattern": self.pattern,
            "previous": self.previous_pattern,
            "placements": plain(self.previous.layout.placements) if self.previous else [],
            "baseline": dict(self.baseline),
            "proven": [list(shape) for shape in sorted(self.proven)],
            "created": sorted(self.created),
            "state": self.state,
            "why": self.why,
        }

    @classmethod
    def resumed(cls, journal: Mapping[str, Any], previous: Want | None) -> "Change":
        """Return a change that an earlier daemon was at."""
        return cls(
            id=str(journal.get("id")),
            pattern=str(journal.get("pattern")),
            previous=previous,
            baseline={ModelName(k): int(v) for k, v in dict(journal.get("baseline", {})).items()},
            proven={(ModelName(model), int(tp), int(pp)) for model, tp, pp in journal.get("proven", [])},
            created={WorkerId(str(worker)) for worker in journal.get("created", [])},
            state=str(journal.get("state", "running")),
            why=str(journal.get("why", "")),
        )


def state_of(want: Want, change: Change | None, drained: Collection[WorkerId]) -> dict[str, Any]:
    """Return what is kept on disk, over reboots too; beside it stands what ``past`` says of the workers."""
    return {
        "pattern": want.pattern,
        "force": want.force,
        "placements": plain(want.layout.placements),
        "drained": sorted(drained),
        "change": change.journal() if change is not None and change.state in UNDER_WAY else None,
    }
