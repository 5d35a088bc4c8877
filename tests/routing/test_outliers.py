"""Which worker's failed requests are its own fault, and for how long it is then left alone."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from l40sd.config.options import HealthConfig
from l40sd.routing.outliers import Counts, Outlier, Peer, Standing

HEALTH = HealthConfig()  # 5 failures, half; out for 10 s doubling to 300 s; 30 s of slow start
WELL = Peer(is_routed=True, failed_share=0.0)
FAILING = Peer(is_routed=True, failed_share=1.0)
AWAY = Peer(is_routed=False, failed_share=0.0)


def judged(*fed: Counts, peers: tuple[Peer, ...] = (WELL,), config: HealthConfig = HEALTH) -> Standing:
    outlier = Outlier(config)
    outlier.feed(Counts(), 0.0)
    standing = Standing.IN
    for n, counts in enumerate(fed):
        outlier.feed(counts, 0.1 * (n + 1))
        standing = outlier.judge(peers, 0.1 * (n + 1))
    return standing


def test_a_worker_that_answers_with_errors_at_once_is_out_after_a_handful() -> None:
    """The black hole: the least busy of all took 93 % of the requests and stayed ready for ever."""
    assert judged(*(Counts(good=1000, failed=n, in_row=n) for n in range(1, 5))) is Standing.IN
    assert judged(*(Counts(good=1000, failed=n, in_row=n) for n in range(1, 6))) is Standing.OUT


def test_a_worker_that_fails_every_other_request_is_out_as_well() -> None:
    """Replies that break off among them: each was good when it began, so no row of failures ever gets longer."""
    assert judged(*(Counts(good=n // 2, failed=n - n // 2, in_row=n % 2) for n in range(1, 12))) is Standing.OUT
    assert judged(*(Counts(good=4 * n, failed=n, in_row=n % 2) for n in range(1, 12))) is Standing.IN


def test_what_happened_long_ago_is_forgotten() -> None:
    outlier = Outlier(HEALTH)
    outlier.feed(Counts(), 0.0)
    for minute in range(1, 60):
        outlier.feed(Counts(failed=minute), 60.0 * minute)
        assert outlier.judge([WELL], 60.0 * minute) is Standing.IN


def test_errors_that_all_workers_give_alike_are_the_requests_fault() -> None:
    """A client that sends what no worker can answer must not empty the host."""
    assert judged(Counts(failed=50, in_row=50), peers=(FAILING, FAILING)) is Standing.IN
    assert judged(Counts(failed=50, in_row=50), peers=(FAILING, WELL, FAILING, FAILING)) is Standing.OUT


@pytest.mark.parametrize(
    ("peers", "standing"),
    [
        ((), Standing.KEPT),
        ((AWAY,), Standing.KEPT),
        ((WELL,), Standing.OUT),
        ((WELL, AWAY), Standing.KEPT),
        ((WELL, WELL, AWAY), Standing.OUT),
        ((WELL, AWAY, AWAY), Standing.KEPT),
    ],
)
def test_the_last_worker_is_kept_and_no_more_than_half_are_out(peers: tuple[Peer, ...], standing: Standing) -> None:
    assert judged(Counts(failed=9, in_row=9), peers=peers) is standing


@example(routed=[], out_share=1.0)
@example(routed=[False, False], out_share=1.0)
@given(st.lists(st.booleans(), max_size=11), st.floats(0, 1))
def test_whoever_is_out_and_whatever_is_allowed_somebody_stays(routed: list[bool], out_share: float) -> None:
    peers = tuple(Peer(is_routed=is_routed, failed_share=0.0) for is_routed in routed)
    config = replace(HEALTH, eject_out_share=out_share)
    if judged(Counts(failed=9, in_row=9), peers=peers, config=config) is Standing.OUT:
        assert any(routed)
        assert routed.count(False) + 1 <= out_share * (len(routed) + 1)


def test_it_can_be_switched_off() -> None:
    assert judged(Counts(failed=99, in_row=99), config=replace(HEALTH, eject_failures=0)) is Standing.IN


def out(outlier: Outlier, now_s: float, failed: int) -> float:
    """Have it fail until it is out; return for how long."""
    outlier.feed(Counts(failed=failed - 9), now_s)
    outlier.feed(Counts(failed=failed, in_row=9), now_s)
    assert outlier.judge([WELL], now_s) is Standing.OUT
    return outlier.out_until_s - now_s


def test_it_stays_out_longer_each_time_and_a_long_good_time_clears_that() -> None:
    outlier, now_s, times = Outlier(HEALTH), 0.0, []
    for n in range(1, 8):
        times.append(out(outlier, now_s, 9 * n))
        assert not outlier.is_due(outlier.out_until_s - 0.1)
        assert outlier.is_due(outlier.out_until_s)
        now_s = outlier.out_until_s + 1
        outlier.come_back(now_s)
        assert outlier.judge([WELL], now_s) is Standing.IN
    assert times == [10, 20, 40, 80, 160, 300, 300]
    assert out(outlier, now_s + 301, 100) == 10


@pytest.mark.parametrize(("good_s", "out_s"), [(300.0, 20), (300.1, 10)])
def test_a_good_time_is_long_when_it_is_longer_than_the_longest_time_out(good_s: float, out_s: float) -> None:
    outlier = Outlier(HEALTH)
    out(outlier, 0.0, 9)
    outlier.come_back(1000.0)
    assert out(outlier, 1000.0 + good_s, 18) == pytest.approx(out_s)


def test_a_time_out_never_overflows() -> None:
    outlier = Outlier(replace(HEALTH, slow_start_s=0))
    for n in range(1, 1100):
        assert out(outlier, 0.0, 9 * n) <= 300
        outlier.come_back(0.0)


def test_one_that_is_back_gets_few_requests_first() -> None:
    outlier = Outlier(HEALTH)
    assert outlier.weight_share(0.0) == 1.0, "a worker that only started is not held back"
    out(outlier, 0.0, 9)
    outlier.come_back(100.0)
    shares = [outlier.weight_share(100.0 + s) for s in (0, 15, 30, 1000)]
    assert shares == [0.1, pytest.approx(0.55), 1.0, 1.0]
    at_once = Outlier(replace(HEALTH, slow_start_s=0))
    out(at_once, 0.0, 9)
    at_once.come_back(100.0)
    assert at_once.weight_share(100.0) == 1.0


def test_a_kept_one_is_in_again_when_its_requests_are_answered() -> None:
    outlier = Outlier(HEALTH)
    outlier.feed(Counts(), 0.0)
    outlier.feed(Counts(failed=9, in_row=9), 0.1)
    assert outlier.judge([], 0.1) is Standing.KEPT
    assert "the last 9 requests" in outlier.explain()
    outlier.feed(Counts(good=30, failed=9), 1.0)
    assert outlier.judge([], 1.0) is Standing.IN


def fed(*steps: tuple[Counts, float], config: HealthConfig = HEALTH) -> Outlier:
    outlier = Outlier(config)
    outlier.feed(Counts(), 0.0)
    for counts, now_s in steps:
        outlier.feed(counts, now_s)
    return outlier


def test_the_share_that_failed_is_of_late_and_none_of_less_than_one_request() -> None:
    assert fed().failed_share == 0
    assert fed((Counts(failed=1), 0.0)).failed_share == 1
    assert fed((Counts(good=3, failed=1), 0.0)).failed_share == 0.25
    half_life_s = HEALTH.eject_half_life_s
    later = fed((Counts(failed=4), 0.0), (Counts(failed=4, good=2), half_life_s))
    assert later.failed_share == 0.5, "four failures weigh like two after their half life"
    assert fed((Counts(failed=4), 0.0), (Counts(failed=4), 2 * half_life_s)).failed_share == 1
    assert fed((Counts(failed=4), 0.0), (Counts(failed=4), 2.1 * half_life_s)).failed_share == 0
    both = fed((Counts(good=4, failed=4), 0.0), (Counts(good=4, failed=6), half_life_s))
    assert both.failed_share == pytest.approx(4 / 6)


def test_a_good_reply_that_broke_off_is_taken_back_and_never_below_none() -> None:
    assert fed((Counts(good=4), 0.0), (Counts(good=3, failed=1), 0.0)).failed_share == 0.25
    taken = fed((Counts(good=1), 0.0), (Counts(good=0, failed=1), 1000.0), (Counts(good=1, failed=1), 1000.0))
    assert taken.failed_share == 0.5


def test_what_was_before_the_first_look_and_before_it_came_back_does_not_count() -> None:
    outlier = Outlier(HEALTH)
    outlier.feed(Counts(good=7, failed=99), 5.0)
    assert outlier.failed_share == 0
    out(outlier, 10.0, 200)
    outlier.come_back(20.0)
    outlier.feed(Counts(good=7, failed=201), 20.0)
    assert outlier.failed_share == 0
    outlier.feed(Counts(good=8, failed=202), 20.0)
    assert outlier.failed_share == 0.5


@pytest.mark.parametrize(
    ("good", "failed", "standing"),
    [(5, 5, Standing.OUT), (6, 5, Standing.IN), (0, 4, Standing.IN), (3, 4, Standing.IN), (0, 5, Standing.OUT)],
)
def test_half_of_late_and_no_fewer_than_a_handful_are_failing(good: int, failed: int, standing: Standing) -> None:
    outlier = fed((Counts(good=good, failed=failed), 0.0))
    assert outlier.judge([WELL], 0.0) is standing


@pytest.mark.parametrize(("share", "standing"), [(0.3, Standing.OUT), (0.31, Standing.IN)])
def test_another_one_is_clearly_better_when_it_fails_half_as_often(share: float, standing: Standing) -> None:
    other = Peer(is_routed=True, failed_share=share)
    assert fed((Counts(good=4, failed=6), 0.0)).judge([other, FAILING], 0.0) is standing


def test_one_whose_last_requests_all_failed_is_judged_as_if_all_had() -> None:
    """A row of failures is worse than its share of late says."""
    other = Peer(is_routed=True, failed_share=0.5)
    assert fed((Counts(good=100, failed=5, in_row=5), 0.0)).judge([other], 0.0) is Standing.OUT
    assert fed((Counts(good=100, failed=5, in_row=4), 0.0)).judge([other], 0.0) is Standing.IN


def test_one_that_gets_no_requests_is_no_measure_for_the_others() -> None:
    only_away = fed((Counts(failed=9, in_row=9), 0.0))
    assert only_away.judge([FAILING, AWAY], 0.0) is Standing.IN


def test_one_that_is_out_stays_out_whatever_is_fed_until_it_comes_back() -> None:
    outlier = Outlier(HEALTH)
    out(outlier, 0.0, 9)
    until_s = outlier.out_until_s
    outlier.feed(Counts(good=1000, failed=9), 1.0)
    assert outlier.judge([WELL], 1.0) is Standing.OUT
    assert outlier.out_until_s == until_s
    assert not Outlier(HEALTH).is_due(1000.0), "one that is in has no time to wait for"


def test_the_operator_is_told_what_its_requests_came_to_and_when_it_may_come_back() -> None:
    assert Outlier(HEALTH).explain() == "0 % of the requests on it failed of late"
    assert fed((Counts(good=1, failed=3, in_row=4), 0.0)).explain() == "75 % of the requests on it failed of late"
    assert fed((Counts(good=1, failed=3, in_row=5), 0.0)).explain() == "the last 5 requests on it failed"
    outlier = Outlier(HEALTH)
    assert outlier.way_back(0.0) == ""
    out(outlier, 100.0, 9)
    assert outlier.way_back(103.0) == "asked for a token in 7 s, then back"
    assert outlier.way_back(110.0) == "back as soon as it makes a token"
    outlier.come_back(110.0)
    assert outlier.way_back(110.0) == ""
