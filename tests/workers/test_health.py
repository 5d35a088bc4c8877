"""Has it come up, may it receive requests, is it making tokens: every answer, in every order that matters."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.config.options import Config, HealthConfig, ModelConfig
from l40sd.engines.table import ENGINES, Probes
from l40sd.model import ModelFacts, ModelName
from l40sd.workers.health import (
    PROLONGED_AT_MOST,
    Activity,
    Counters,
    Pace,
    ProbeResult,
    Progress,
    Readiness,
    Stage,
    Startup,
    StartVerdict,
    Turn,
    startup_timeout_s,
)

OK = ProbeResult(ok=True, status=200)
REFUSED = ProbeResult(ok=False, error="refused")
TIMEOUT = ProbeResult(ok=False, error="timeout")
LOADING = ProbeResult(ok=False, status=503, error="status 503")
BROKEN = ProbeResult(ok=False, status=500, error="status 500")


def starting(*, probes: Probes = ENGINES["vllm"].probes, deadline_s: float = 100, stall_s: float = 30) -> Startup:
    return Startup(probes, deadline_s=deadline_s, stall_s=stall_s, now_s=1000)


# --- startup


def test_a_start_goes_through_port_health_model_and_token() -> None:
    start = starting()
    assert start.feed_health(REFUSED, 1001) is StartVerdict.WAITING
    assert (start.stage, start.reason) == (Stage.PORT, "health: refused")
    assert start.feed_health(LOADING, 1002) is StartVerdict.WAITING
    assert (start.stage, start.reason) == (Stage.HEALTH, "health: status 503")
    assert start.feed_health(OK, 1003) is StartVerdict.WAITING
    assert start.stage is Stage.MODEL
    assert start.feed_models(["other"], "llama", 1004) is StartVerdict.WAITING
    assert start.reason == "lists other, not llama"
    assert start.feed_models(["other", "llama"], "llama", 1005) is StartVerdict.WAITING
    assert start.feed_token(BROKEN, 1006) is StartVerdict.WAITING
    assert (start.stage, start.reason) == (Stage.TOKEN, "first token: status 500")
    assert start.feed_token(OK, 1007) is StartVerdict.READY
    assert (start.reason, start.check(99_999)) == ("", StartVerdict.READY)


def test_a_start_that_cannot_succeed_names_the_setting_that_mends_it() -> None:
    """ "lists no model" was said of an engine with another key, and a bare status of one whose health is elsewhere."""
    start = starting()
    start.feed_health(ProbeResult(ok=False, status=404, error="status 404"), 1001)
    assert start.reason.startswith("health: status 404 (it has no /health: set health_path of its [engines] entry")
    start.feed_health(OK, 1002)
    start.feed_models([], "llama", 1003, ProbeResult(ok=False, status=401, error="status 401"))
    assert "list of models: status 401 (it wants another API key" in start.reason
    assert "{api_key} in env" in start.reason
    start.feed_models([], "llama", 1004, ProbeResult(ok=False, error="timeout"))
    assert start.reason == "list of models: timeout"
    start.feed_models([], "llama", 1005)
    assert start.reason == "lists no model, not llama"


def test_an_engine_without_a_list_or_a_token_is_not_asked_for_one() -> None:
    assert starting(probes=ENGINES["torchrun"].probes).feed_health(OK, 1001) is StartVerdict.READY
    only_token = replace(ENGINES["vllm"].probes, models_path="")
    start = starting(probes=only_token)
    assert start.feed_health(OK, 1001) is StartVerdict.WAITING
    assert start.stage is Stage.TOKEN


@pytest.mark.parametrize("status", [400, 404, 405, 501])
def test_an_engine_that_completes_no_text_is_ready_without_a_token(status: int) -> None:
    """An embedding model answers so; it would never come up otherwise."""
    start = starting()
    start.feed_health(OK, 1001)
    start.feed_models(["llama"], "llama", 1001)
    assert start.feed_token(ProbeResult(ok=False, status=status, error="x"), 1002) is StartVerdict.READY


def test_a_wrong_key_is_no_readiness() -> None:
    start = starting()
    start.feed_health(OK, 1001)
    start.feed_models(["llama"], "llama", 1001)
    assert start.feed_token(ProbeResult(ok=False, status=401, error="status 401"), 1002) is StartVerdict.WAITING


@pytest.mark.parametrize("answer", [REFUSED, LOADING, TIMEOUT])
def test_an_engine_that_never_comes_up_is_late_at_the_deadline(answer: ProbeResult) -> None:
    """Faults 23 and 24: also where it opened its port at once and said 503 ever after."""
    start = starting(deadline_s=4, stall_s=300)
    verdicts = [start.feed_health(answer, 1000 + second) for second in (0.1, 1, 2, 3, 3.9, 4)]
    assert verdicts == [StartVerdict.WAITING] * 5 + [StartVerdict.LATE]


@pytest.mark.parametrize(
    "step",
    [Activity(cpu_s=1), Activity(read_bytes=2 << 20), Activity(log_bytes=1)],
    ids=["computing", "reading", "writing"],
)
def test_a_start_that_shows_progress_outlives_its_deadline_but_not_for_ever(step: Activity) -> None:
    start = starting()
    verdicts = {}
    for second in range(PROLONGED_AT_MOST * 100 + 1):
        done = Activity(
            cpu_s=step.cpu_s * second, read_bytes=step.read_bytes * second, log_bytes=step.log_bytes * second
        )
        verdicts[second] = start.feed_activity(done, 1000 + second)
    assert [second for second, verdict in verdicts.items() if verdict is StartVerdict.LATE] == [PROLONGED_AT_MOST * 100]


def test_progress_that_ended_ends_the_patience() -> None:
    start = starting()
    start.feed_activity(Activity(), 1000)
    start.feed_activity(Activity(read_bytes=1 << 30), 1095)
    assert start.check(1124) is StartVerdict.WAITING
    assert start.check(1125) is StartVerdict.LATE


def test_lines_about_our_own_probes_are_no_progress() -> None:
    start = starting()
    for second in range(100):
        start.feed_health(LOADING, 1000 + second)
        start.feed_activity(Activity(log_bytes=80 * second, cpu_s=0.002 * second), 1000 + second)
    assert start.check(1100) is StartVerdict.LATE


PROBES_SEEN = [REFUSED, TIMEOUT, LOADING, OK]
EVENTS = [
    *(("health", answer) for answer in PROBES_SEEN),
    ("models", True),
    ("models", False),
    ("token", OK),
    ("token", BROKEN),
]


def test_a_stage_is_never_lost_and_ready_needs_every_one_before() -> None:
    ready = []
    for events in itertools.product(EVENTS, repeat=4):
        start = starting()
        for second, (kind, answer) in enumerate(events):
            before = start.stage
            if kind == "models":
                names = ["llama"] if answer and before >= Stage.MODEL else []
                start.feed_models(names, "llama", 1000 + second)
            elif isinstance(answer, ProbeResult) and (kind == "health" or before >= Stage.TOKEN):
                (start.feed_health if kind == "health" else start.feed_token)(answer, 1000 + second)
            assert start.stage >= before
        if start.stage is Stage.READY:
            ready.append(events)
    needed = [("health", OK), ("models", True), ("token", OK)]
    assert ready == [events for events in itertools.product(EVENTS, repeat=4) if _has_in_order(events, needed)]


def _has_in_order(events: tuple[tuple[str, object], ...], needed: list[tuple[str, object]]) -> bool:
    remaining = iter(events)
    return all(any(event == one for event in remaining) for one in needed)


def test_the_share_done_is_judged_by_past_loads() -> None:
    start = Startup(Probes(), deadline_s=600, stall_s=300, now_s=0, past_loads_s=(10, 20, 90))
    assert [start.fraction(now_s) for now_s in (0, 10, 500)] == [0, 0.5, 0.99]
    assert Startup(Probes(), deadline_s=600, stall_s=300, now_s=0).fraction(5) is None


def test_the_deadline_of_a_start_grows_with_the_checkpoint_and_with_past_loads() -> None:
    llama, own = ModelName("llama"), ModelName("own")
    config = Config(
        health=HealthConfig(startup_timeout_s=600, load_bytes_per_s=100_000_000),
        models={llama: ModelConfig(name=llama), own: ModelConfig(name=own, startup_timeout_s=7)},
    )
    facts = ModelFacts(size_bytes=70_000_000_000)
    assert startup_timeout_s(config, llama) == 600
    assert startup_timeout_s(config, llama, facts) == 1300
    assert startup_timeout_s(config, llama, facts, (30, 900)) == 1800
    assert startup_timeout_s(config, own, facts, (30, 900)) == 7


# --- readiness


def test_only_enough_answers_in_a_row_turn_readiness() -> None:
    for seen in itertools.product([True, False], repeat=10):
        readiness = Readiness(fall=3, rise=2)
        in_a_row, last = 0, None
        for ok in seen:
            in_a_row, last = (in_a_row + 1 if ok == last else 1), ok
            was_ready = readiness.is_ready
            turns = in_a_row >= (3 if was_ready else 2) and ok != was_ready
            expected = {(True, True): Turn.FELL, (True, False): Turn.ROSE}.get((turns, was_ready), Turn.NONE)
            assert readiness.feed(OK if ok else LOADING) is expected
            assert readiness.is_ready == (was_ready ^ turns)


def test_a_closed_port_takes_a_worker_out_at_once_and_only_once() -> None:
    readiness = Readiness(fall=3, rise=2)
    assert [readiness.trip(), readiness.trip()] == [Turn.FELL, Turn.NONE]
    assert [readiness.feed(OK), readiness.feed(OK)] == [Turn.NONE, Turn.ROSE]


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
    """Fault 27: whatever the probes say; they are not even asked here."""
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
    """Fault 25: /health says 200; the gauge of running requests may or may not show the canary itself."""
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
    assert until(progress, busy(5, running=3), Pace.STALLED, since=until_busy, leases=2) <= 64


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
    """Fault 6, SIGSTOP: idle when it froze, and busy when it froze."""
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
