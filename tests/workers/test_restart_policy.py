"""When a worker that failed is tried again: every kind of failure, by the policy alone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.config.options import WorkersConfig
from l40sd.workers.restart_policy import (
    Record,
    RestartLimits,
    Verdict,
    decide_restart,
    forgiven,
    limits_of,
    refused_delay_s,
)

LIMITS = RestartLimits(
    backoff_first_s=5,
    backoff_limit_s=300,
    never_ready_first_s=15,
    never_ready_limit_s=600,
    quarantine_alike=3,
    quarantine_per_hour=6,
    healthy_after_s=600,
)


def fail(
    record: Record, at_s: float, *, ready_for_s: float | None = None, kind: str = "exit 1"
) -> tuple[Record, float | None]:
    verdict = decide_restart(
        record, kind=kind, ready_for_s=ready_for_s, is_oom=False, now_s=at_s, jitter=0.0, limits=LIMITS
    )
    return verdict.record, verdict.delay_s


def test_a_worker_that_cannot_be_started_is_looked_at_again_ever_later() -> None:
    delays = [refused_delay_s(n, first_s=60, limit_s=3600) for n in range(8)]
    assert delays == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert refused_delay_s(0, first_s=60, limit_s=0) is None


def test_one_that_is_tried_again_after_it_was_given_up_has_one_try() -> None:
    record = Record()
    for n in range(3):
        record, delay = fail(record, at_s=n * 60.0)
    assert delay is None
    for n in range(1, 4):
        record, delay = fail(record, at_s=n * 3600.0 + 200)
        assert delay is None, "it fails as before"


def test_a_worker_that_was_ready_comes_back_at_once_then_ever_later() -> None:
    """Fault 30 of docs/what-happens-when.md: flapping is not healed by being ready for 20 s."""
    record, delays = Record(), []
    for n in range(6):
        record, delay = fail(record, at_s=n * 60.0, ready_for_s=20)
        delays.append(delay)
    assert delays == [0.0, 5.0, 10.0, 20.0, 40.0, None]


def test_a_worker_that_never_was_ready_is_quarantined_after_three_that_fail_alike() -> None:
    """Fault 28 of docs/what-happens-when.md."""
    record, delays = Record(), []
    for n in range(3):
        record, delay = fail(record, at_s=n * 60.0)
        delays.append(delay)
    assert delays == [15.0, 30.0, None]


def test_failures_of_different_kinds_are_not_alike() -> None:
    record = Record()
    for n, kind in enumerate(["exit 1", "signal 11", "exit 1", "signal 11"]):
        record, delay = fail(record, at_s=n * 700.0, kind=kind)
        assert delay is not None


def test_ten_healthy_minutes_clear_the_record() -> None:
    record = Record()
    for n in range(5):
        record, _ = fail(record, at_s=float(n), ready_for_s=20)
    assert forgiven(record, ready_for_s=600, limits=LIMITS) == Record(kind="", alike=0, streak=0, failed_at_s=())
    record, delay = fail(record, at_s=1000.0, ready_for_s=700)
    assert delay == 0.0
    assert record.streak == 1


@pytest.mark.parametrize("ready_for_s", [0.5, 20.0, 700.0])
def test_a_worker_that_ended_with_a_request_that_ends_workers_has_nothing_on_its_record(ready_for_s: float) -> None:
    """Six calls of one poisoned request put a host of eight GPUs into quarantine until somebody reset it."""
    before, _ = fail(Record(), at_s=0.0, ready_for_s=20)
    record = before
    for n in range(20):
        verdict = decide_restart(
            record,
            kind="exit 1",
            ready_for_s=ready_for_s,
            is_oom=False,
            now_s=float(n),
            jitter=0.0,
            limits=LIMITS,
            is_excused=True,
        )
        record = verdict.record
        assert verdict.delay_s == 0.0
    assert record == before


def test_out_of_memory_waits_longer() -> None:
    plain = decide_restart(Record(streak=1), kind="oom", ready_for_s=30, is_oom=False, now_s=0, jitter=0, limits=LIMITS)
    oom = decide_restart(Record(streak=1), kind="oom", ready_for_s=30, is_oom=True, now_s=0, jitter=0, limits=LIMITS)
    assert plain.delay_s is not None
    assert oom.delay_s == 2 * plain.delay_s


@given(
    st.lists(
        st.tuples(st.floats(0, 4000), st.none() | st.floats(0, 2000), st.sampled_from(["exit 1", "signal 9"])),
        max_size=40,
    ),
    st.floats(-1, 1),
)
def test_no_worker_is_tried_more_than_six_times_an_hour(
    failures: list[tuple[float, float | None, str]], jitter: float
) -> None:
    record, now_s, tried_at = Record(), 0.0, []
    for gap_s, ready_for_s, kind in failures:
        now_s += gap_s
        verdict = decide_restart(
            record, kind=kind, ready_for_s=ready_for_s, is_oom=False, now_s=now_s, jitter=jitter, limits=LIMITS
        )
        record = verdict.record
        if verdict.delay_s is None:
            assert verdict.why
            return
        assert 0 <= verdict.delay_s <= 1.1 * LIMITS.never_ready_limit_s
        if ready_for_s is None or ready_for_s < LIMITS.healthy_after_s:
            tried_at.append(now_s)
        else:
            tried_at = [now_s]
        assert len([t for t in tried_at if now_s - t < 3600]) < LIMITS.quarantine_per_hour


def verdict_on(record: Record, *, ready_for_s: float | None, jitter: float = 0.0, is_oom: bool = False) -> Verdict:
    return decide_restart(
        record, kind="exit 1", ready_for_s=ready_for_s, is_oom=is_oom, now_s=0, jitter=jitter, limits=LIMITS
    )


@pytest.mark.parametrize(("jitter", "delay_s"), [(-1, 4.5), (0, 5), (1, 5.5)])
def test_jitter_stretches_a_delay_by_up_to_a_tenth(jitter: float, delay_s: float) -> None:
    assert verdict_on(Record(streak=1), ready_for_s=30, jitter=jitter).delay_s == pytest.approx(delay_s)


def test_out_of_memory_waits_even_the_first_time() -> None:
    """What filled the memory is there still a moment later."""
    assert verdict_on(Record(), ready_for_s=30, is_oom=True).delay_s == 2 * LIMITS.backoff_first_s
    assert verdict_on(Record(), ready_for_s=None, is_oom=True).delay_s == 2 * LIMITS.never_ready_first_s


@pytest.mark.parametrize(("ready_for_s", "streak"), [(599.9, 4), (600.0, 1), (600.1, 1)])
def test_a_record_starts_anew_once_it_was_healthy_for_long_enough(ready_for_s: float, streak: int) -> None:
    assert verdict_on(Record(streak=3), ready_for_s=ready_for_s).record.streak == streak


def test_a_start_that_came_up_and_was_not_healthy_for_long_forgives_only_what_failed_alike() -> None:
    record = Record(kind="exit 1", alike=2, streak=3, failed_at_s=(1.0,))
    assert forgiven(record, ready_for_s=599.9, limits=LIMITS) == replace(record, alike=0)
    assert verdict_on(record, ready_for_s=0.0).record.alike == 0


def test_a_failure_counts_for_an_hour() -> None:
    for age_s, left in ((3599.9, 2), (3600.0, 1), (3600.1, 1)):
        assert len(verdict_on(Record(failed_at_s=(-age_s,)), ready_for_s=20).record.failed_at_s) == left
    within = tuple(-60.0 * n for n in range(1, LIMITS.quarantine_per_hour))
    assert verdict_on(Record(failed_at_s=within[1:], streak=4), ready_for_s=20).delay_s is not None
    given_up = verdict_on(Record(failed_at_s=within, streak=5), ready_for_s=20)
    assert (given_up.delay_s, given_up.why) == (None, "6 failures within an hour, last: exit 1")


def test_delays_double_up_to_their_limits_and_never_overflow() -> None:
    for streak, delay_s in ((6, 160), (7, 300), (5000, 300)):
        assert verdict_on(Record(streak=streak), ready_for_s=20).delay_s == delay_s
    for streak, delay_s in ((5, 480), (6, 600), (5000, 600)):
        assert verdict_on(Record(streak=streak), ready_for_s=None).delay_s == delay_s
    assert refused_delay_s(5000, first_s=60, limit_s=3600) == 3600
    assert refused_delay_s(0, first_s=60, limit_s=1) == 1, "a limit below the first delay holds from the first on"


def test_the_policys_figures_are_the_configurations() -> None:
    workers = WorkersConfig()
    assert limits_of(workers).never_ready_limit_s == workers.backoff_never_ready_limit_s
    assert limits_of(workers).never_ready_first_s == workers.backoff_never_ready_first_s
