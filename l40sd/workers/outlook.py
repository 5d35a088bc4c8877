"""Can anything still come for a model: what a request that finds no worker is told, and whether it may wait for one.

Waiting is for what is on its way. A request for a model that is not in the pattern, or whose workers have all been
given up or drained by hand, is answered at once; it would only learn the same after the longest wait, three times over
with the retries of its client's library.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from l40sd.model import SOON_S, Outlook
from l40sd.workers.lifecycle import Goal, Phase

UNKNOWN_S = 60.0
"""The same where nothing is, and only an operator can change that."""
LATEST_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One worker of a model, there or still to be made (then it is WAITING).

    Attributes:
        since_s: Seconds in its phase.
        next_start_s: Seconds until the next try; None when none is due.
        is_external: Somebody else starts it.
    """

    phase: Phase
    goal: Goal = Goal.SERVE
    since_s: float = 0.0
    next_start_s: float | None = None
    is_external: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long is long.

    Attributes:
        queue_s: The longest wait for a worker: what comes later is not waited for.
        load_s: How long this model takes to load; None when it never has.
        external_s: A worker that somebody else runs and that has been away for longer is not on its way.
    """

    queue_s: float
    load_s: float | None = None
    external_s: float = 600.0


def outlook(slots: Sequence[Slot], patience: Patience, *, pattern: str, is_wanted: bool) -> Outlook:
    """Return what can be said of the model that these are all the workers of.

    1. One serves: nothing to say.
    2. One will serve within the longest wait, as far as can be told: wait for it.
    3. None will: answer at once, and say when the next try is, if there is one.
    """
    if any(s.phase is Phase.READY for s in slots):  # 1
        return Outlook(is_wanted=is_wanted)
    waits = [(s, wait_s(s, patience)) for s in slots]
    coming = [wait for s, wait in waits if wait is not None and _is_near(s, wait, patience)]  # 2
    later = [wait for _, wait in waits if wait is not None]
    within_s = min(coming or later, default=UNKNOWN_S)
    note = _note(slots) if is_wanted or slots else f"not in pattern {pattern}"
    if not coming and later:
        note += f", next try in {within_s:.0f} s"
    return Outlook(
        is_wanted=is_wanted,
        is_coming=bool(coming),
        note=note,
        retry_after_s=max(1, ceil(min(within_s, LATEST_S))),
    )


def wait_s(slot: Slot, patience: Patience) -> float | None:
    """Return in how many seconds this worker may serve, as far as can be told; None when it will not by itself."""
    if slot.goal in (Goal.GONE, Goal.REST):
        return None
    load_s = patience.load_s or 0.0
    match slot.phase:
        case Phase.READY:
            return 0.0
        case Phase.STARTING | Phase.UNREADY if slot.is_external and slot.since_s > patience.external_s:
            return None
        case Phase.STARTING:
            return max(load_s - slot.since_s, SOON_S)
        case Phase.UNREADY:
            return SOON_S
        case Phase.WAITING | Phase.SPAWNING | Phase.DRAINING | Phase.STOPPING:
            return max(load_s, SOON_S)
        case Phase.BACKOFF | Phase.QUARANTINED | Phase.FAILED:
            return None if slot.next_start_s is None else slot.next_start_s + load_s
        case Phase.DRAINED | Phase.STUCK | Phase.STOPPED:
            return None


def _is_near(slot: Slot, wait: float, patience: Patience) -> bool:
    """Whether it is worth waiting for: what is under way always is, a next try if it comes within the longest wait.

    What was given up is not: its next try will most likely end as those before.
    """
    if slot.phase in (Phase.QUARANTINED, Phase.FAILED):
        return False
    return slot.next_start_s is None or wait <= patience.queue_s


def _note(slots: Sequence[Slot]) -> str:
    counts = Counter(str(slot.phase) for slot in slots)
    return "workers: " + (", ".join(f"{n} {phase}" for phase, n in sorted(counts.items())) or "none yet")
