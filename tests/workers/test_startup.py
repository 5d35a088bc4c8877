"""Has it come up: every answer, in every order that matters."""

import itertools
from dataclasses import replace

import pytest

from l40sd.config.options import Config, HealthConfig, ModelConfig
from l40sd.engines.table import ENGINES, Probes
from l40sd.model import ModelFacts, ModelName
from l40sd.workers.health import ProbeResult
from l40sd.workers.startup import Activity, Stage, Startup, StartVerdict, startup_timeout_s

OK = ProbeResult(ok=True, status=200)
REFUSED = ProbeResult(ok=False, error="refused")
TIMEOUT = ProbeResult(ok=False, error="timeout")
LOADING = ProbeResult(ok=False, status=503, error="status 503")
BROKEN = ProbeResult(ok=False, status=500, error="status 500")


def starting(*, probes: Probes = ENGINES["vllm"].probes, deadline_s: float = 100, stall_s: float = 30) -> Startup:
    return Startup(probes, deadline_s=deadline_s, stall_s=stall_s, now_s=1000)


def test_a_start_goes_through_port_health_model_and_token() -> None:
    start = starting()
    assert start.feed_health(REFUSED, 1001) is StartVerdict.WAITING
    assert (start.stage, start.reason) == (Stage.PORT, "health: refused")
    assert start.feed_health(LOADING, 1002) is StartVerdict.WAITING
    assert (start.stage, start.reason) == (Stage.HEALTH, "health: status 503")
    assert start.feed_health(OK, 1003) is StartVerdict.WAITING
    assert (start.stage, start.reason) == (Stage.MODEL, "")
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


@pytest.mark.parametrize("status", [400, 404, 405, 422, 501])
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
    """Faults 23 and 24 of docs/what-happens-when.md: also where it opened its port at once and said 503 ever after."""
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
    for second in range(4 * 100 + 1):
        done = Activity(
            cpu_s=step.cpu_s * second, read_bytes=step.read_bytes * second, log_bytes=step.log_bytes * second
        )
        verdicts[second] = start.feed_activity(done, 1000 + second)
    assert [second for second, verdict in verdicts.items() if verdict is StartVerdict.LATE] == [4 * 100]


def test_progress_that_ended_ends_the_patience() -> None:
    start = starting()
    start.feed_activity(Activity(), 1000)
    start.feed_activity(Activity(read_bytes=1 << 30), 1095)
    assert start.check(1124) is StartVerdict.WAITING
    assert start.check(1125) is StartVerdict.LATE


def test_a_long_patience_is_half_a_short_deadline() -> None:
    start = starting(deadline_s=100, stall_s=300)
    start.feed_activity(Activity(), 1000)
    start.feed_activity(Activity(read_bytes=1 << 30), 1090)
    assert start.check(1139) is StartVerdict.WAITING
    assert start.check(1140) is StartVerdict.LATE


@pytest.mark.parametrize(
    ("done", "verdict"),
    [
        (Activity(cpu_s=0.2 * 10), StartVerdict.LATE),
        (Activity(cpu_s=0.2 * 10 + 0.01), StartVerdict.WAITING),
        (Activity(read_bytes=(1 << 20) - 1), StartVerdict.LATE),
        (Activity(read_bytes=1 << 20), StartVerdict.WAITING),
        (Activity(log_bytes=0), StartVerdict.LATE),
        (Activity(log_bytes=1), StartVerdict.WAITING),
    ],
)
def test_a_fifth_of_a_core_is_idling_and_a_mebibyte_between_two_looks_is_loading(
    done: Activity, verdict: StartVerdict
) -> None:
    """Whatever it had done before: it is what was added since the last look that counts."""
    assert Activity() == Activity(cpu_s=0, read_bytes=0, log_bytes=0)
    before = Activity(cpu_s=500, read_bytes=1 << 40, log_bytes=9999)
    start = starting()
    start.feed_activity(before, 1090)
    now = Activity(
        cpu_s=before.cpu_s + done.cpu_s,
        read_bytes=before.read_bytes + done.read_bytes,
        log_bytes=before.log_bytes + done.log_bytes,
    )
    assert start.feed_activity(now, 1100) is verdict


def test_each_way_to_say_no_names_what_mends_it() -> None:
    def said(status: int) -> ProbeResult:
        return ProbeResult(ok=False, status=status, error=f"status {status}")

    start = starting()
    for status in (401, 403):
        start.feed_health(said(status), 1001)
        assert "it wants another API key" in start.reason
        start.feed_models([], "llama", 1001, said(status))
        assert "it wants another API key" in start.reason
        start.feed_token(said(status), 1001)
        assert "it wants another API key" in start.reason
    start.feed_models([], "llama", 1002, said(404))
    assert (
        start.reason == "list of models: status 404 (it has no /v1/models: its API is elsewhere, e.g. below a prefix)"
    )
    start.feed_models([], "llama", 1003, said(500))
    assert start.reason == "list of models: status 500"
    start.feed_models(["llama"], "llama", 1004)
    assert start.reason == ""


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
    later = Startup(ENGINES["torchrun"].probes, deadline_s=600, stall_s=300, now_s=100, past_loads_s=(20,))
    assert later.fraction(110) == 0.5
    assert later.feed_health(OK, 111) is StartVerdict.READY
    assert later.fraction(112) == 1
    assert Startup(Probes(), deadline_s=600, stall_s=300, now_s=0).fraction(5) is None


def test_the_deadline_of_a_start_grows_with_the_checkpoint_and_with_past_loads() -> None:
    llama, own = ModelName("llama"), ModelName("own")
    config = Config(
        health=HealthConfig(startup_timeout_s=600, load_bytes_per_s=100_000_000),
        models={llama: ModelConfig(name=llama), own: ModelConfig(name=own, startup_timeout_s=1)},
    )
    facts = ModelFacts(size_bytes=70_000_000_000)
    assert startup_timeout_s(config, llama) == 600
    assert startup_timeout_s(config, llama, facts) == 1300
    assert startup_timeout_s(config, llama, facts, (30, 900)) == 1800
    assert startup_timeout_s(config, own, facts, (30, 900)) == 1
    short = replace(config, health=HealthConfig(startup_timeout_s=1))
    assert startup_timeout_s(short, llama) == 1
    assert startup_timeout_s(short, llama, None, (0.5, 0.75)) == 1.5
