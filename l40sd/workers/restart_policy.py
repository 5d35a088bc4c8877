"""When a worker that failed is tried again, and when it is given up.

The worker asks after every end that nobody wished (``Action.ASK_POLICY`` of the table in lifecycle.py).
"""

from dataclasses import dataclass, replace

from l40sd.config.options import WorkersConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimits:
    """The restart policy's figures; see ``[workers]`` in the config for each."""

    backoff_first_s: float
    backoff_limit_s: float
    never_ready_first_s: float
    never_ready_limit_s: float
    quarantine_alike: int
    quarantine_per_hour: int
    healthy_after_s: float


def limits_of(workers: WorkersConfig) -> RestartLimits:
    """Return its figures from the configuration."""
    return RestartLimits(
        backoff_first_s=workers.backoff_first_s,
        backoff_limit_s=workers.backoff_limit_s,
        never_ready_first_s=workers.backoff_never_ready_first_s,
        never_ready_limit_s=workers.backoff_never_ready_limit_s,
        quarantine_alike=workers.quarantine_alike,
        quarantine_per_hour=workers.quarantine_per_hour,
        healthy_after_s=workers.healthy_after_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A worker's failures since they were last cleared.

    Attributes:
        kind: The last failure's kind, e.g. ``"exit 1"``, ``"signal 11"``, ``"start deadline"``.
        alike: Starts in a row that failed with this kind without ever being ready.
        streak: Failures in a row.
        failed_at_s: Monotonic times of the failures of the last hour.
    """

    kind: str = ""
    alike: int = 0
    streak: int = 0
    failed_at_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the restart policy says.

    Attributes:
        delay_s: Until the next try; None: it is given up, and tried again after long or at a reset.
        why: For the operator, when it is given up.
    """

    record: Record
    delay_s: float | None
    why: str = ""


HOUR_S = 3600.0
OOM_DELAY_FACTOR = 2.0


def decide_restart(
    record: Record,
    *,
    kind: str,
    ready_for_s: float | None,
    is_oom: bool,
    now_s: float,
    jitter: float,
    limits: RestartLimits,
    is_excused: bool = False,
) -> Verdict:
    """Return when a failed worker is tried again, or that it is not.

    0. It ended with a request that had been the end of another worker: that counted there. Again at once.
    1. Healthy for long enough: the record starts anew.
    2. So many starts in a row that fail alike, or so many failures within an hour: it is given up.
    3. A worker that was ready: at once, then ``backoff_first_s`` doubling to its limit.
       One that never was: ``never_ready_first_s`` doubling to its limit. Out of memory: twice that.

    Args:
        ready_for_s: How long it had been ready; None when it never was.
        now_s: Monotonic.
        jitter: -1 to 1, stretches the delay by up to a tenth so that twelve workers do not return as one.
        is_excused: A request that ends workers ended it, and its first one was counted.
    """
    if is_excused:  # 0
        return Verdict(record=record, delay_s=0.0)
    if ready_for_s is not None and ready_for_s >= limits.healthy_after_s:  # 1
        record = Record()
    never_ready = ready_for_s is None
    recent = (*(t for t in record.failed_at_s if now_s - t < HOUR_S), now_s)
    alike = (record.alike + 1 if record.kind == kind else 1) if never_ready else 0
    updated = Record(kind=kind, alike=alike, streak=record.streak + 1, failed_at_s=recent)
    if alike >= limits.quarantine_alike:  # 2
        return Verdict(record=updated, delay_s=None, why=f"{alike} starts in a row failed alike ({kind})")
    if len(recent) >= limits.quarantine_per_hour:
        return Verdict(record=updated, delay_s=None, why=f"{len(recent)} failures within an hour, last: {kind}")
    if never_ready:  # 3
        delay_s = _doubled(limits.never_ready_first_s, updated.streak - 1, limits.never_ready_limit_s)
    elif updated.streak == 1 and not is_oom:
        return Verdict(record=updated, delay_s=0.0)
    else:
        delay_s = _doubled(limits.backoff_first_s, max(0, updated.streak - 2), limits.backoff_limit_s)
    if is_oom:
        delay_s *= OOM_DELAY_FACTOR
    return Verdict(record=updated, delay_s=delay_s * (1 + 0.1 * jitter))


def refused_delay_s(times: int, *, first_s: float, limit_s: float) -> float | None:
    """Return until when it is looked at again whether a worker can be started, after so many looks; None: never.

    It costs nothing but a line in the log, so it begins soon and becomes rare.
    """
    return _doubled(min(first_s, limit_s), times, limit_s) if limit_s else None


def forgiven(record: Record, *, ready_for_s: float, limits: RestartLimits) -> Record:
    """Return the record as it stands after ``ready_for_s`` of good health: empty once that is long enough."""
    return Record() if ready_for_s >= limits.healthy_after_s else replace(record, alike=0)


def _doubled(first_s: float, times: int, limit_s: float) -> float:
    return min(limit_s, first_s * 2.0 ** min(times, 30))
