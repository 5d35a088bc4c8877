"""Which worker's failed requests are its own fault, and for how long it is then left alone."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from l40sd.config.options import HealthConfig
from l40sd.routing.outliers import SLOW_START_FIRST, Counts, Outlier, Peer, Standing

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


def test_one_that_is_back_gets_few_requests_first() -> None:
    outlier = Outlier(HEALTH)
    assert outlier.weight_share(0.0) == 1.0, "a worker that only started is not held back"
    out(outlier, 0.0, 9)
    outlier.come_back(100.0)
    shares = [outlier.weight_share(100.0 + s) for s in (0, 15, 30, 1000)]
    assert shares == [SLOW_START_FIRST, pytest.approx(0.55), 1.0, 1.0]
    assert Outlier(replace(HEALTH, slow_start_s=0)).weight_share(0.0) == 1.0


def test_a_kept_one_is_in_again_when_its_requests_are_answered() -> None:
    outlier = Outlier(HEALTH)
    outlier.feed(Counts(), 0.0)
    outlier.feed(Counts(failed=9, in_row=9), 0.1)
    assert outlier.judge([], 0.1) is Standing.KEPT
    assert "the last 9 requests" in outlier.explain()
    outlier.feed(Counts(good=30, failed=9), 1.0)
    assert outlier.judge([], 1.0) is Standing.IN
