"""What a worker begins as: new, or as an earlier daemon left it."""

from dataclasses import dataclass, field, replace

from l40sd.workers.failures import Failures
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.saved import SavedWorker

UNKILLABLE = "SIGKILL has not ended it: its GPUs stay out of use until it is gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """A worker before its first event.

    Attributes:
        since_s: Since when it is in its phase, monotonic; None: since now.
        kind: What the failure is filed under that it is being stopped for, or waits for; empty: for none.
        ready_for_s: Of a run that ended while no daemon watched: how long it had been ready; None: it never was.
    """

    phase: Phase = Phase.WAITING
    goal: Goal = Goal.SERVE
    since_s: float | None = None
    reason: str = ""
    last_lines: tuple[str, ...] = ()
    next_start_at_s: float | None = None
    kind: str = ""
    failures: Failures = field(default_factory=Failures)
    ready_for_s: float | None = None


def begin(saved: SavedWorker | None) -> Beginning:
    """Return what a worker without a process begins as: who waits for its next try, or was given up, goes on so."""
    if saved is None or saved.goal is Goal.RESTART:  # by wish: its failures were to be forgotten
        return Beginning()
    failures = Failures(record=saved.record, restarts=saved.restarts, failed_starts=saved.failed_starts)
    if saved.phase in (Phase.BACKOFF, Phase.QUARANTINED):
        return _as_saved(saved, failures)
    return Beginning(failures=failures)


def begin_with_run(saved: SavedWorker | None, run: str, *, is_running: bool) -> Beginning:
    """Return what the worker of an adopted run begins as: WAITING to be told so, or the stop under way goes on.

    Args:
        run: The instance's name.
        is_running: False: its shim is gone, and what it left cannot be killed.
    """
    found = replace(begin(saved), phase=Phase.WAITING, next_start_at_s=None)
    found = _stop_of(saved, run, found)
    return found if is_running else replace(found, phase=Phase.STUCK, reason=UNKILLABLE)


def begin_after_end(saved: SavedWorker | None, run: str, *, ran_s: float, now_s: float) -> Beginning:
    """Return what the worker begins as whose run ended while no daemon watched: before the event that tells it so.

    Args:
        run: The instance's name.
        ran_s: How long it ran; 0: nobody knows.
        now_s: Monotonic.
    """
    ready_for_s = ran_s if saved is None else saved.of(run).ready_for_s(ran_s, now_s)
    found = _stop_of(saved, run, replace(begin(saved), phase=Phase.STARTING))
    return replace(found, ready_for_s=ready_for_s)


def _stop_of(saved: SavedWorker | None, run: str, found: Beginning) -> Beginning:
    own = saved.of(run) if saved is not None else None
    if own is None or own.phase not in (Phase.STOPPING, Phase.STUCK):
        return found
    return _as_saved(own, found.failures)


def _as_saved(saved: SavedWorker, failures: Failures) -> Beginning:
    return Beginning(
        phase=saved.phase,
        goal=saved.goal,
        since_s=saved.since_s,
        reason=saved.reason,
        last_lines=saved.last_lines,
        next_start_at_s=saved.next_start_at_s,
        kind=saved.kind,
        failures=failures,
    )
