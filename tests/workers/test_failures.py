"""What a failure is counted as, how it is told, and what follows."""

import pytest

from l40sd.config.options import WorkersConfig
from l40sd.workers.failures import Failure, Failures, answer, excused_within_s, reason_of
from l40sd.workers.lifecycle import Event, Phase
from l40sd.workers.phase_log import line_of
from l40sd.workers.restart_policy import Record

WORKERS = WorkersConfig(quarantine_alike=2, given_up_retry_s=3600, refused_retry_s=60)
START = Failure(kind="exit 1", reason="exited with status 1")


def test_a_worker_that_was_ready_is_tried_again_at_once() -> None:
    found = answer(Failures(), Failure(kind="signal 9", reason="", ready_for_s=20), WORKERS, now_s=0, jitter=0)
    assert (found.event, found.delay_s, found.reason) == (Event.RETRY_DUE, 0.0, "signal 9")
    assert (found.failures.restarts, found.failures.failed_starts) == (1, 0)


def test_a_start_that_fails_waits_and_one_that_fails_alike_is_given_up() -> None:
    first = answer(Failures(), START, WORKERS, now_s=0, jitter=0)
    assert (first.event, first.delay_s) == (None, WORKERS.backoff_never_ready_first_s)
    second = answer(first.failures, START, WORKERS, now_s=60, jitter=0)
    assert second.event is Event.GIVEN_UP
    assert second.reason == "2 starts in a row failed alike (exit 1): exited with status 1"
    assert (second.failures.restarts, second.failures.failed_starts) == (2, 2)


def test_an_end_that_says_nothing_of_itself_is_filed_under_exit() -> None:
    assert answer(Failures(), Failure(kind="", reason=""), WORKERS, now_s=0, jitter=0).failures.record.kind == "exit"


def test_out_of_memory_waits_twice_as_long() -> None:
    oom = Failure(kind="oom", reason="", is_oom=True)
    assert answer(Failures(), oom, WORKERS, now_s=0, jitter=0).delay_s == 2 * WORKERS.backoff_never_ready_first_s


def test_an_end_by_a_request_that_ended_another_one_counts_there() -> None:
    found = answer(Failures(), Failure(kind="signal 11", reason="", excused_by="toy-2"), WORKERS, now_s=0, jitter=0)
    assert (found.event, found.failures.record) == (Event.RETRY_DUE, Record())


def test_a_reason_names_what_came_first_then_whose_request_it_was_then_the_log() -> None:
    failure = Failure(kind="hung", reason="one token did not come", log_says="CUDA error", excused_by="toy-2")
    assert reason_of(failure) == (
        "one token did not come; with a request that had ended toy-2 before, where it counts; its log: CUDA error"
    )


def test_a_run_that_the_kernel_killed_while_it_was_ended_for_another_reason_is_told_as_out_of_memory() -> None:
    """A worker at its memory's limit stands still before it is killed: it was told as hung, and nothing of memory."""
    hung = Failure(
        kind="hung", reason="one token did not come", ended="out of memory: ...", log_says="bye", is_oom=True
    )
    assert reason_of(hung) == "one token did not come; out of memory: ..."
    assert reason_of(Failure(kind="oom", reason="out of memory: ...", is_oom=True)) == "out of memory: ..."


def test_refusals_are_counted_until_a_start_comes_up_and_good_health_clears_the_record_only() -> None:
    one, delay_s = Failures(restarts=2).refused(WORKERS)
    two, later_s = one.refused(WORKERS)
    assert (delay_s, later_s, two.refusals) == (60, 120, 2)
    assert two.not_refused() == Failures(restarts=2)
    assert Failures().refused(WorkersConfig(given_up_retry_s=0))[1] is None
    failed = answer(two, START, WORKERS, now_s=0, jitter=0).failures
    assert failed.forgiven(1.0, WORKERS).record.alike == 0
    assert failed.forgiven(WORKERS.healthy_after_s, WORKERS).record == Record()
    assert failed.forgiven(WORKERS.healthy_after_s, WORKERS).restarts == 3


def test_an_excuse_lasts_as_long_as_a_stop_may_take() -> None:
    assert excused_within_s(WorkersConfig(term_timeout_s=20, kill_timeout_s=5)) == 35


@pytest.mark.parametrize(
    ("before", "phase", "is_wish", "is_ejected", "line"),
    [
        (Phase.STARTING, Phase.READY, False, False, ("info", "worker.ready")),
        (Phase.READY, Phase.UNREADY, False, False, ("warning", "worker.unready")),
        (Phase.READY, Phase.UNREADY, False, True, ("warning", "worker.ejected")),
        (Phase.STARTING, Phase.BACKOFF, False, False, ("warning", "worker.backoff")),
        (Phase.STARTING, Phase.QUARANTINED, False, False, ("error", "worker.quarantined")),
        (Phase.SPAWNING, Phase.FAILED, False, False, ("error", "worker.failed")),
        (Phase.STOPPING, Phase.STUCK, False, False, ("error", "worker.stuck")),
        (Phase.STOPPING, Phase.WAITING, True, False, ("info", "worker.exited")),
        (Phase.READY, Phase.WAITING, False, False, ("warning", "worker.exited")),
        (Phase.BACKOFF, Phase.WAITING, False, False, ("info", "worker.waiting")),
        (Phase.STOPPING, Phase.STOPPED, False, False, ("info", "worker.stopped")),
    ],
)
def test_a_change_is_told_at_the_level_at_which_somebody_must_act(
    before: Phase, phase: Phase, is_wish: bool, is_ejected: bool, line: tuple[str, str]
) -> None:
    assert line_of(before, phase, is_wish=is_wish, is_ejected=is_ejected) == line
