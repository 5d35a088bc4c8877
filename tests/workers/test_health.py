"""May it receive requests, is it making tokens: every answer, in every order that matters."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.config.options import HealthConfig
from l40sd.workers.health import Counters, Pace, ProbeResult, Progress, Readiness, ReadinessChange

OK = ProbeResult(ok=True, status=200)
REFUSED = ProbeResult(ok=False, error="refused")
TIMEOUT = ProbeResult(ok=False, error="timeout")
LOADING = ProbeResult(ok=False, status=503, error="status 503")
BROKEN = ProbeResult(ok=False, status=500, error="status 500")


@pytest.mark.parametrize(
    ("status", "says_no", "is_well"),
    [
        (399, False, False),
        (400, False, True),
        (499, False, True),
        (500, True, False),
        (501, True, True),
        (502, True, False),
        (503, True, False),
    ],
)
def test_a_worker_says_no_by_an_error_of_its_own_and_is_well_when_it_refuses_politely(
    status: int, says_no: bool, is_well: bool
) -> None:
    answer = ProbeResult(ok=False, status=status, error=f"status {status}")
    assert (answer.says_no, answer.is_well) == (says_no, is_well)


def test_a_closed_port_says_no_and_silence_says_nothing() -> None:
    assert [answer.says_no for answer in (REFUSED, TIMEOUT, OK)] == [True, False, False]
    assert [answer.is_well for answer in (REFUSED, TIMEOUT, OK)] == [False, False, True]


# --- readiness


def test_only_enough_answers_in_a_row_turn_readiness() -> None:
    for seen in itertools.product([True, False], repeat=10):
        readiness = Readiness(fall=3, rise=2)
        in_a_row, last = 0, None
        for ok in seen:
            in_a_row, last = (in_a_row + 1 if ok == last else 1), ok
            was_ready = readiness.is_ready
            turns = in_a_row >= (3 if was_ready else 2) and ok != was_ready
            expected = {(True, True): ReadinessChange.FELL, (True, False): ReadinessChange.ROSE}.get(
                (turns, was_ready), ReadinessChange.NONE
            )
            assert readiness.feed(OK if ok else LOADING) is expected
            assert readiness.is_ready == (was_ready ^ turns)


def test_a_closed_port_takes_a_worker_out_at_once_and_only_once() -> None:
    readiness = Readiness(fall=3, rise=2)
    assert [readiness.trip(), readiness.trip()] == [ReadinessChange.FELL, ReadinessChange.NONE]
    assert [readiness.feed(OK), readiness.feed(OK)] == [ReadinessChange.NONE, ReadinessChange.ROSE]


def test_one_that_is_taken_out_again_starts_its_way_back_anew() -> None:
    readiness = Readiness(fall=3, rise=2)
    readiness.trip()
    assert readiness.feed(OK) is ReadinessChange.NONE
    assert readiness.trip() is ReadinessChange.NONE
    assert [readiness.feed(OK), readiness.feed(OK)] == [ReadinessChange.NONE, ReadinessChange.ROSE]


# --- progress

HEALTH = HealthConfig()  # hung after 120 s; a canary every 60 s, which may take 60 s


def watching() -> Progress:
    return Progress(HEALTH, now_s=0)


def busy(tokens: float, running: float = 4) -> Counters:
    return Counters(running=running, waiting=0, tokens=tokens)


def idle(tokens: float) -> Counters:
    return Counters(running=0, waiting=0, tokens=tokens)


def until(
    progress: Progress, counters: Counters | None, pace: Pace, *, since: int, leases: int = 0, limit: int = 600
) -> int:
    """Feed the same scrape every two seconds until this verdict; return how many seconds that took."""
    for now_s in range(since, since + limit, 2):
        seen = progress.feed(counters, leases=leases, replies=0, now_s=now_s)
        if seen is pace:
            return now_s - since
        assert seen is Pace.FINE
    raise AssertionError(f"never {pace}")


def test_requests_running_and_no_token_for_two_minutes_is_a_hang() -> None:
    progress = watching()
    progress.feed(busy(10), leases=4, replies=0, now_s=0)
    assert until(progress, busy(10), Pace.STALLED, since=2, leases=4) == 118


@given(st.lists(st.integers(1, 119), min_size=1, max_size=30))
def test_an_engine_that_moves_a_token_every_two_minutes_is_slow_not_hung(gaps: list[int]) -> None:
    """Fault 27 of docs/what-happens-when.md: whatever the probes say; they are not even asked here."""
    progress = watching()
    now_s, tokens = 0, 0
    for gap in gaps:
        for second in range(0, gap, 2):
            assert progress.feed(busy(tokens), leases=9, replies=0, now_s=now_s + second) is Pace.FINE
        now_s, tokens = now_s + gap, tokens + 1


def test_work_that_has_only_just_come_is_not_blamed_for_the_silence_before_it() -> None:
    progress = watching()
    until(progress, idle(5), Pace.CANARY_DUE, since=0)
    progress.feed_canary(OK)
    progress.feed(idle(5), leases=0, replies=0, now_s=110)
    assert until(progress, busy(5), Pace.STALLED, since=112, leases=1) >= 118


def test_an_idle_engine_is_asked_for_a_token_each_minute_and_answers() -> None:
    progress = watching()
    asked = []
    for now_s in range(0, 600, 2):
        if progress.feed(idle(5), leases=0, replies=0, now_s=now_s) is Pace.CANARY_DUE:
            asked.append(now_s)
            assert progress.feed_canary(OK) is Pace.FINE
    assert len(asked) == 9


def test_a_canary_is_asked_for_once_while_it_is_under_way() -> None:
    progress = watching()
    due = until(progress, idle(5), Pace.CANARY_DUE, since=0)
    later = [progress.feed(idle(5), leases=0, replies=0, now_s=due + s) for s in range(2, 60, 2)]
    assert set(later) == {Pace.FINE}


@pytest.mark.parametrize("gauge", [0, 1], ids=["gauge frozen", "gauge counts the canary"])
def test_an_engine_that_hangs_while_idle_is_found_within_130_s(gauge: int) -> None:
    """/health says 200; the gauge of running requests may or may not show the canary itself.

    Fault 25 of docs/what-happens-when.md.
    """
    progress = watching()
    progress.feed(idle(5), leases=0, replies=0, now_s=0)
    due = until(progress, idle(5), Pace.CANARY_DUE, since=2) + 2
    for now_s in range(due, due + 60, 2):
        assert progress.feed(busy(5, running=gauge), leases=0, replies=0, now_s=now_s) is Pace.FINE
    assert progress.feed_canary(TIMEOUT) is Pace.STALLED
    assert due + 60 <= 130


def test_a_canary_that_waits_behind_real_work_proves_nothing() -> None:
    progress = watching()
    due = until(progress, idle(5), Pace.CANARY_DUE, since=0)
    assert progress.feed(busy(5, running=8), leases=7, replies=0, now_s=due + 2) is Pace.FINE
    assert progress.feed_canary(TIMEOUT) is Pace.FINE
    assert progress.feed(busy(6, running=8), leases=7, replies=0, now_s=due + 62) is Pace.FINE


def test_a_canary_that_is_late_while_tokens_move_is_only_late() -> None:
    progress = watching()
    due = until(progress, idle(5), Pace.CANARY_DUE, since=0)
    assert progress.feed(idle(9), leases=0, replies=0, now_s=due + 30) is Pace.FINE
    assert progress.feed_canary(TIMEOUT) is Pace.FINE


def test_work_that_meets_a_hung_canary_counts_from_the_canary_on() -> None:
    progress = watching()
    due = until(progress, idle(5), Pace.CANARY_DUE, since=0)
    until_busy = due + 58
    for now_s in range(due + 2, until_busy, 2):
        progress.feed(idle(5), leases=0, replies=0, now_s=now_s)
    assert until(progress, busy(5, running=3), Pace.STALLED, since=until_busy, leases=2) == 62


def test_one_canary_refused_with_an_error_is_asked_again_and_two_are_a_hang() -> None:
    progress = watching()
    due = until(progress, idle(5), Pace.CANARY_DUE, since=0)
    assert progress.feed_canary(BROKEN) is Pace.FINE
    assert progress.feed(idle(5), leases=0, replies=0, now_s=due + 2) is Pace.CANARY_DUE
    assert progress.feed_canary(BROKEN) is Pace.STALLED


@pytest.mark.parametrize("status", [400, 404, 429, 501])
def test_an_engine_with_no_token_to_give_is_not_hung(status: int) -> None:
    progress = watching()
    for _ in range(5):
        until(progress, idle(5), Pace.CANARY_DUE, since=0)
        assert progress.feed_canary(ProbeResult(ok=False, status=status, error=f"status {status}")) is Pace.FINE
        progress = watching()


def test_a_frozen_engine_is_found_although_nothing_can_be_scraped() -> None:
    """Fault 6 of docs/what-happens-when.md, SIGSTOP: idle when it froze, and busy when it froze."""
    frozen_idle = watching()
    frozen_idle.feed(idle(5), leases=0, replies=0, now_s=0)
    until(frozen_idle, None, Pace.CANARY_DUE, since=2, leases=3)
    assert frozen_idle.feed_canary(TIMEOUT) is Pace.STALLED
    frozen_busy = watching()
    frozen_busy.feed(busy(5), leases=3, replies=0, now_s=0)
    assert until(frozen_busy, None, Pace.STALLED, since=2, leases=3) <= 120


def test_replies_through_the_proxy_stand_in_for_scrapes_that_time_out() -> None:
    progress = watching()
    progress.feed(busy(5), leases=3, replies=0, now_s=0)
    seen = {progress.feed(None, leases=3, replies=now_s // 100, now_s=now_s) for now_s in range(2, 2000, 2)}
    assert seen == {Pace.FINE}


def test_an_engine_without_counters_is_judged_only_while_it_is_idle() -> None:
    progress = watching()
    assert {progress.feed(None, leases=1, replies=0, now_s=now_s) for now_s in range(0, 1000, 2)} == {Pace.FINE}
    assert until(progress, None, Pace.CANARY_DUE, since=1000) >= 58


def test_a_pause_of_the_daemon_is_not_held_against_the_engine() -> None:
    progress = watching()
    progress.feed(busy(5), leases=1, replies=0, now_s=0)
    assert progress.feed(busy(5), leases=1, replies=0, now_s=10_000) is Pace.FINE


def test_the_canary_can_be_switched_off() -> None:
    progress = Progress(replace(HEALTH, canary_interval_s=0), now_s=0)
    assert {progress.feed(idle(5), leases=0, replies=0, now_s=now_s) for now_s in range(0, 1000, 2)} == {Pace.FINE}


def test_a_canary_of_suspicion_that_fails_twice_is_a_hang_whatever_moved_before_it_was_asked() -> None:
    """A worker that answered every request with 500 stayed ready for ever: the first scrape counts as a move, and the
    canary of suspicion, which nobody had asked this tracker for, was taken for well because of it."""
    progress = watching()
    progress.feed(idle(1), leases=0, replies=0, now_s=2)
    assert progress.suspect(2) is Pace.CANARY_DUE
    assert progress.feed_canary(BROKEN) is Pace.FINE
    assert progress.suspect(2.5) is Pace.FINE, "two within a moment are one mishap"
    assert progress.feed(idle(1), leases=0, replies=0, now_s=4) is Pace.CANARY_DUE, "asked again at the next look"
    assert progress.feed_canary(BROKEN) is Pace.STALLED


def test_an_answer_to_one_canary_is_not_taken_for_anothers() -> None:
    """A canary of suspicion was under way when the regular one came due: its answer zeroed the regular one."""
    progress = watching()
    assert progress.suspect(0) is Pace.CANARY_DUE
    assert progress.suspect(2) is Pace.FINE
    seen = {progress.feed(idle(1), leases=0, replies=0, now_s=now_s) for now_s in range(0, 300, 2)}
    assert seen == {Pace.FINE}, "none is due while one is under way"
    progress.feed_canary(OK)
    with pytest.raises(AssertionError, match="nobody asked"):
        progress.feed_canary(OK)


def test_an_engine_that_claims_to_be_busy_and_answers_one_token_with_500_twice_is_hung() -> None:
    """The core is dead and its gauges stand where they stood: 120 s of errors for what two answers say."""
    progress = watching()
    progress.feed(busy(10), leases=4, replies=0, now_s=0)
    for now_s in (2, 4):
        assert progress.suspect(now_s) is Pace.CANARY_DUE
        pace = progress.feed_canary(BROKEN)
        progress.feed(busy(10), leases=4, replies=0, now_s=now_s)
    assert pace is Pace.STALLED


@pytest.mark.parametrize("answer", [TIMEOUT, LOADING, REFUSED], ids=["timeout", "503", "no connection"])
def test_no_answer_to_a_canary_proves_nothing_against_an_engine_that_has_work(answer: ProbeResult) -> None:
    for counters in (busy(10), None):  # None: it never told its counters
        progress = watching()
        for now_s in range(0, 100, 2):
            assert progress.feed(counters, leases=1, replies=0, now_s=now_s) is Pace.FINE
            assert progress.suspect(now_s) is Pace.CANARY_DUE
            assert progress.feed_canary(answer) is Pace.FINE
            assert not progress.is_stalled


def test_a_hang_is_over_when_a_canary_is_answered() -> None:
    progress = watching()
    progress.feed(idle(1), leases=0, replies=0, now_s=0)
    progress.suspect(0)
    assert progress.feed_canary(TIMEOUT) is Pace.STALLED
    assert progress.feed(idle(1), leases=0, replies=0, now_s=2) is Pace.CANARY_DUE, "asked again at once"
    assert progress.feed_canary(OK) is Pace.FINE
    assert not progress.is_stalled


def test_an_engine_whose_metrics_broke_while_it_was_busy_is_idle_once_it_has_nothing_of_ours() -> None:
    """It was restarted after 120 s without a request, for a gauge that nobody could read any more."""
    progress = watching()
    progress.feed(busy(10), leases=1, replies=0, now_s=0)
    for now_s in range(2, 1000, 2):
        pace = progress.feed(None, leases=0, replies=1, now_s=now_s)
        assert pace is not Pace.STALLED
        if pace is Pace.CANARY_DUE:
            progress.feed_canary(OK)


def watch(progress: Progress, counters: Counters | None, *times_s: float, leases: int = 0) -> list[Pace]:
    return [progress.feed(counters, leases=leases, replies=0, now_s=now_s) for now_s in times_s]


DUE, FINE, STALLED = Pace.CANARY_DUE, Pace.FINE, Pace.STALLED


def test_a_canary_is_due_when_the_silence_is_a_minute_long_to_the_second() -> None:
    assert watch(watching(), None, 30, 59.5, 60) == [FINE, FINE, DUE]
    progress = watching()
    assert watch(progress, idle(5), 10, 40, 69.5, 70) == [FINE, FINE, FINE, DUE], "from the last move on"
    progress.feed_canary(OK)
    assert watch(progress, idle(5), 100, 129.5, 130) == [FINE, FINE, DUE], "an answer is a move"


def test_a_busy_engine_is_hung_when_the_silence_is_two_minutes_long_to_the_second() -> None:
    progress = watching()
    assert watch(progress, busy(5), 10, 40, 70, 100, 129.5, leases=1) == [FINE] * 5
    assert not progress.is_stalled
    assert watch(progress, busy(5), 130, leases=1) == [STALLED]
    assert progress.is_stalled
    assert watch(progress, busy(6), 131, leases=1) == [FINE]
    assert not progress.is_stalled


def test_silence_counts_against_work_from_when_the_work_came() -> None:
    progress = watching()
    watch(progress, idle(5), 0, 30, 50)
    assert watch(progress, busy(5), 60, 90, 120, 150, 179.5, 180, leases=1) == [*[FINE] * 5, STALLED]


def test_one_look_counts_for_no_more_than_a_quarter_of_the_time_a_hang_takes() -> None:
    assert watch(watching(), busy(5), *(n * 1000 for n in range(5)), leases=1) == [*[FINE] * 4, STALLED]


def test_silence_that_could_not_be_judged_does_not_count_afterwards() -> None:
    progress = watching()
    assert watch(progress, None, 10, 40, 70, 100, leases=1) == [FINE] * 4
    assert watch(progress, None, 130, 159.5, 160) == [FINE, FINE, DUE]


def test_one_that_was_never_looked_at_is_idle_and_well_until_it_is_asked() -> None:
    fresh = watching()
    assert not fresh.is_stalled
    assert not fresh.is_doubted
    assert fresh.suspect(0) is DUE
    assert fresh.feed_canary(TIMEOUT) is STALLED
    twice = watching()
    for now_s, pace in ((0, FINE), (2, STALLED)):
        assert twice.suspect(now_s) is DUE
        assert twice.feed_canary(BROKEN) is pace


def test_two_canaries_are_three_quarters_of_a_probe_interval_apart() -> None:
    progress = watching()
    assert progress.suspect(100) is DUE
    progress.feed_canary(OK)
    assert [progress.suspect(now_s) for now_s in (101, 101.49, 101.5)] == [FINE, FINE, DUE]


def test_a_move_between_two_failed_canaries_clears_the_first() -> None:
    progress = watching()
    for now_s in (10, 20, 30):
        watch(progress, idle(now_s), now_s)
        assert not progress.is_doubted
        assert progress.suspect(now_s) is DUE
        assert progress.feed_canary(BROKEN) is FINE
        assert progress.is_doubted
    assert progress.suspect(40) is DUE
    assert progress.feed_canary(BROKEN) is STALLED


@pytest.mark.parametrize(
    ("running", "waiting", "is_busy"),
    [(0, 0, False), (1, None, True), (None, 1, True), (0, 1, True), (1, 0, True), (None, 0, False), (0, None, False)],
)
def test_requests_running_or_waiting_are_work_whichever_of_them_an_engine_tells(
    running: float | None, waiting: float | None, is_busy: bool
) -> None:
    progress = watching()
    watch(progress, Counters(running=running, waiting=waiting, tokens=5), 10, leases=1)
    progress.suspect(10)
    assert progress.feed_canary(TIMEOUT) is (FINE if is_busy else STALLED)


@pytest.mark.parametrize("counters", [None, Counters(tokens=5)])
@pytest.mark.parametrize("leases", [0, 1])
def test_an_engine_that_stops_telling_its_load_is_as_busy_as_it_was_while_it_has_requests_of_ours(
    counters: Counters | None, leases: int
) -> None:
    progress = watching()
    watch(progress, busy(5), 10, leases=1)
    watch(progress, counters, 12, leases=leases)
    progress.suspect(12)
    assert progress.feed_canary(TIMEOUT) is (FINE if leases else STALLED)


def test_the_time_of_a_canary_is_taken_off_once_however_often_the_gauge_turns() -> None:
    """It was asked after 60 s; what came while it was out waited for 10 s when the gauge had turned there and back."""
    progress = watching()
    assert watch(progress, idle(5), 0, 30, 60) == [FINE, FINE, DUE]
    assert watch(progress, busy(5), 62, leases=1) == [FINE]
    assert watch(progress, idle(5), 66, leases=1) == [FINE]
    assert watch(progress, busy(5), 70, 100, 130, 160, 179.5, 180, leases=1) == [*[FINE] * 5, STALLED]


def test_work_that_meets_a_canary_after_a_move_counts_from_the_move_on() -> None:
    progress = watching()
    watch(progress, idle(5), 0, 30, 60)
    watch(progress, idle(6), 70)
    assert watch(progress, busy(6), 80, 110, 140, 170, 189.5, 190, leases=1) == [*[FINE] * 5, STALLED]


def test_hung_for_good_is_what_an_error_leaves_hung() -> None:
    progress = watching()
    watch(progress, busy(5), 0, 30, 60, 90, 120, leases=1)
    assert progress.is_stalled
    assert progress.suspect(121) is DUE
    assert progress.feed_canary(BROKEN) is STALLED
    progress.excuse()
    assert not progress.is_stalled
    assert watch(progress, busy(5), 122, leases=1) == [FINE]


scrapes = st.one_of(
    st.none(),
    st.builds(
        Counters,
        running=st.sampled_from([None, 0, 1, 5]),
        waiting=st.sampled_from([None, 0, 3]),
        tokens=st.sampled_from([None, 0, 1, 2]),
    ),
)


@given(st.lists(st.tuples(scrapes, st.integers(0, 3), st.integers(0, 2), st.integers(0, 40), st.booleans())))
def test_a_hang_is_never_found_before_its_time_has_been_watched(
    steps: list[tuple[Counters | None, int, int, int, bool]],
) -> None:
    """Whatever is fed: no verdict against an engine whose tokens moved less than the stall time ago."""
    progress = watching()
    now_s, moved_s, last_tokens = 0, 0, None
    for counters, leases, replies, wait_s, is_ok in steps:
        now_s += wait_s
        if counters and counters.tokens is not None and counters.tokens != last_tokens:
            moved_s, last_tokens = now_s, counters.tokens
        pace = progress.feed(counters, leases=leases, replies=replies, now_s=now_s)
        if pace is Pace.STALLED:
            assert now_s - moved_s >= HEALTH.stall_timeout_s
            return
        if pace is Pace.CANARY_DUE:
            assert now_s - moved_s >= HEALTH.canary_interval_s
            assert progress.feed_canary(OK if is_ok else LOADING) in {Pace.FINE, Pace.STALLED}
