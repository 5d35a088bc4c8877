"""What a worker's failures come to: counted, told, and answered with its next try."""

from dataclasses import dataclass, field, replace

from l40sd.config.options import WorkersConfig
from l40sd.workers.lifecycle import Event
from l40sd.workers.restart_policy import Record, decide_restart, forgiven, limits_of, refused_delay_s

EXIT_SEEN_WITHIN_S = 10.0
"""From a request's broken connection to the word that the worker's whole process tree is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """A worker's failures since they were last cleared.

    Attributes:
        restarts: Ends that nobody wished.
        failed_starts: Starts that were never ready.
        refusals: Times in a row that it could not be started as configured.
    """

    record: Record = field(default_factory=Record)
    restarts: int = 0
    failed_starts: int = 0
    refusals: int = 0

    def forgiven(self, ready_for_s: float, workers: WorkersConfig) -> "Failures":
        """Return them as they stand after ``ready_for_s`` of good health."""
        return replace(self, record=forgiven(self.record, ready_for_s=ready_for_s, limits=limits_of(workers)))

    def not_refused(self) -> "Failures":
        """Return them after a start that came up: the next refusal is the first again."""
        return replace(self, refusals=0)

    def refused(self, workers: WorkersConfig) -> tuple["Failures", float | None]:
        """Return them after one more look that found it cannot be started, and the time to the next; None: none."""
        delay_s = refused_delay_s(self.refusals, first_s=workers.refused_retry_s, limit_s=workers.given_up_retry_s)
        return replace(self, refusals=self.refusals + 1), delay_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One end that nobody wished.

    Attributes:
        kind: What it is filed under; empty for an end that says nothing of itself.
        reason: What came first: of a hung worker that was then killed, that it hung.
        ended: How it ended when it was stopped for that; empty: nothing of it is new.
        log_says: What its log said when it was stopped for that; empty: nothing, or it is the reason already.
        ready_for_s: How long it had been ready; None: it never was.
        excused_by: The worker that was ended before by the request that ended this one; empty: none.
    """

    kind: str
    reason: str
    ended: str = ""
    log_says: str = ""
    ready_for_s: float | None = None
    is_oom: bool = False
    excused_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What follows from a failure.

    Attributes:
        event: What happens to the worker at once: it is given up, or tried again; None: it waits.
        delay_s: How long it waits.
        reason: For the operator.
    """

    failures: Failures
    event: Event | None
    delay_s: float
    reason: str


def answer(failures: Failures, failure: Failure, workers: WorkersConfig, *, now_s: float, jitter: float) -> Answer:
    """Return what follows from a failure; the restart policy says when.

    Args:
        now_s: Monotonic.
        jitter: -1 to 1, as for ``decide_restart``.
    """
    verdict = decide_restart(
        failures.record,
        kind=failure.kind or "exit",
        ready_for_s=failure.ready_for_s,
        is_oom=failure.is_oom,
        now_s=now_s,
        jitter=jitter,
        limits=limits_of(workers),
        is_excused=bool(failure.excused_by),
    )
    counted = replace(
        failures,
        record=verdict.record,
        restarts=failures.restarts + 1,
        failed_starts=failures.failed_starts + (failure.ready_for_s is None),
    )
    reason = reason_of(failure)
    if verdict.delay_s is None:
        return Answer(failures=counted, event=Event.GIVEN_UP, delay_s=0.0, reason=f"{verdict.why}: {reason}")
    event = Event.RETRY_DUE if verdict.delay_s == 0.0 else None
    return Answer(failures=counted, event=event, delay_s=verdict.delay_s, reason=reason)


def reason_of(failure: Failure) -> str:
    """Return a failure in one line, for the operator."""
    text = failure.reason or failure.kind
    if failure.excused_by:
        text += f"; with a request that had ended {failure.excused_by} before, where it counts"
    if failure.is_oom and failure.ended:  # what runs out of memory stands still first: the kernel may come second
        return f"{text}; {failure.ended}"
    if failure.log_says:
        text += f"; its log: {failure.log_says}"
    return text


def excused_within_s(workers: WorkersConfig) -> float:
    """Return how long ago a request may have ended another worker for this one's end to be its doing, too."""
    return EXIT_SEEN_WITHIN_S + workers.term_timeout_s + workers.kill_timeout_s
