"""What takes a while (a pattern change, a rolling restart) as it stood at one moment: what is asked for by its id."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from l40sd.codec import plain, restore
from l40sd.model import ModelName, OperationKind, OperationState

KEPT = 50
ENDED_SAVED = 10
"""Operations whose end the next daemon still knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A pattern change or a rolling restart, under way or ended.

    Attributes:
        previous: The pattern that a change came from; empty when there was none.
        done: Workers of the pattern that it is at that are ready; ``total``: of how many.
        lowest_ready: The smallest share of ready capacity so far, 0 to 1, of models that are there before and after.
        ends_within_s: It has ended after so many seconds from then, whatever happens; 0 when it has ended.
        leaving: Models that it takes out of service.
        by: Who asked for it: a user's name; empty: a reload.
    """

    id: str
    kind: OperationKind = OperationKind.CHANGE
    pattern: str
    previous: str = ""
    state: OperationState
    done: int
    total: int
    step: str = ""
    lowest_ready: float = 1.0
    why: str = ""
    duration_s: float = 0.0
    ends_within_s: float = 0.0
    leaving: tuple[ModelName, ...] = ()
    by: str = ""


class Operations:
    """The latest operations by their id, the oldest forgotten; written by whoever carries one out."""

    def __init__(self) -> None:
        self._by_id: dict[str, Operation] = {}

    def note(self, operation: Operation) -> None:
        """Keep how an operation stands, for whoever asks."""
        self._by_id[operation.id] = operation
        while len(self._by_id) > KEPT:
            self._by_id.pop(next(iter(self._by_id)))

    def get(self, operation_id: str) -> Operation | None:
        """Return how this one stood when it was last noted; None: it is not known, or not any more."""
        return self._by_id.get(operation_id)

    def saved(self) -> Any:
        """Return what the next daemon is told: how the latest ended."""
        return plain(list(self._ended())[-ENDED_SAVED:])

    def _ended(self) -> Iterator[Operation]:
        return (operation for operation in self._by_id.values() if not operation.state.is_under_way)


def ended_of(stored: Any) -> tuple[Operation, ...]:
    """Return what ``Operations.saved`` gave; nothing of what another l40sd wrote."""
    try:
        return restore(tuple[Operation, ...], stored or ())
    except msgspec.ValidationError:
        return ()
