"""Whether requests fail on one worker more than on its equals, and for how long it then gets none.

A worker that answers every request with an error at once is the least busy of all, so that nearly all of them go to it,
while its probes say that it is well. What requests see is therefore fed here, and judged against the model's other
workers: errors that all of them give alike are the requests' fault.

      in ──enough failures, clearly worse than the best other──> out ──its time is up, and it made a token──> slow start
      ^  └──the same, but too many would be out──> kept (and all get the same share of the requests)             │
      └──────────────────────────────────────────────────────────────────────────────────────────────────────────┘

What counts as failed: 5xx, no connection, a connection lost before or within the reply, silence; not 4xx.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from l40sd.config.options import HealthConfig

BETTER = 0.5
"""Another worker is clearly better when it fails at most this part as often."""
SLOW_START_FIRST = 0.1
"""Share of its weight that a worker begins with when it is back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What requests saw of a worker, since the daemon started: only ever growing, but ``in_row``.

    Attributes:
        good: Replies that came whole, or come at present.
        in_row: Failed since the last good one.
    """

    good: int = 0
    failed: int = 0
    in_row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another live worker of the same model: whether it receives requests, and the share that failed of late."""

    is_routed: bool
    failed_share: float


class Standing(StrEnum):
    """What a worker's failed requests have come to."""

    IN = "in"
    KEPT = "kept"  # it should be out, but too many would be
    OUT = "out"


class Outlier:
    """One run of a worker, judged by its requests. Starts in."""

    __slots__ = ("_back_s", "_config", "_counts", "_failed", "_fed_s", "_good", "_times", "out_until_s", "standing")

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._counts: Counts | None = None  # as last fed
        self._good = self._failed = 0.0  # of late
        self._fed_s = 0.0
        self._times = 0  # it went out, since it was well for long
        self._back_s: float | None = None
        self.out_until_s = 0.0
        self.standing = Standing.IN

    @property
    def failed_share(self) -> float:
        """The share of its requests that failed of late, 0 to 1; 0 for less than one."""
        total = self._good + self._failed
        return self._failed / total if total >= 1 else 0.0

    def feed(self, counts: Counts, now_s: float) -> None:
        """Take what requests have seen so far; what was before the first call does not count."""
        before, self._counts = self._counts or counts, counts
        kept = 0.5 ** ((now_s - self._fed_s) / self._config.eject_half_life_s)
        # A reply that broke off was good when it began: the count of good ones may shrink.
        self._good = max(0.0, self._good * kept + counts.good - before.good)
        self._failed = self._failed * kept + counts.failed - before.failed
        self._fed_s = now_s

    def judge(self, peers: Iterable[Peer], now_s: float) -> Standing:
        """Return what follows from what was fed; one that is out stays so until ``come_back``.

        1. Failing: so many in a row, or the larger part of so many of late; and clearly more than the best other one.
        2. With it, too many of the model's live workers would be out, or the last would: it is kept.
        3. Else it is out, each time for twice as long as the time before.
        """
        if self.standing is Standing.OUT:
            return self.standing
        others = list(peers)
        if not self._is_failing() or not self._is_worst(others):  # 1
            self.standing = Standing.IN
        elif not self._may_go(others):  # 2
            self.standing = Standing.KEPT
        else:  # 3
            if self._back_s is not None and now_s - self._back_s > self._config.eject_limit_s:
                self._times = 0
            self.out_until_s = now_s + self._out_for_s()
            self._times += 1
            self.standing, self._back_s = Standing.OUT, None
        return self.standing

    def is_due(self, now_s: float) -> bool:
        """Return whether its time is up: one token, and it may come back."""
        return self.standing is Standing.OUT and now_s >= self.out_until_s

    def come_back(self, now_s: float) -> None:
        """Let it receive requests again, few at first; its failures of before do not count."""
        self.standing, self._back_s = Standing.IN, now_s
        self._good = self._failed = 0.0
        self._counts = None

    def weight_share(self, now_s: float) -> float:
        """Return the part of its weight that it is to be given, above 0 to 1."""
        slow_s = self._config.slow_start_s
        if self._back_s is None or now_s - self._back_s >= slow_s:
            return 1.0
        return SLOW_START_FIRST + (1 - SLOW_START_FIRST) * (now_s - self._back_s) / slow_s

    def explain(self) -> str:
        """Return what its requests came to, for the operator."""
        in_row = self._counts.in_row if self._counts else 0
        if in_row >= self._config.eject_failures:
            return f"the last {in_row} requests on it failed"
        return f"{self.failed_share * 100:.0f} % of the requests on it failed of late"

    def way_back(self, now_s: float) -> str:
        """Return when one that is out may come back, for the operator; empty for one that is not out."""
        if self.standing is not Standing.OUT:
            return ""
        if self.is_due(now_s):
            return "back as soon as it makes a token"
        return f"asked for a token in {self.out_until_s - now_s:.0f} s, then back"

    def _is_failing(self) -> bool:
        enough = self._config.eject_failures
        if not enough or self._counts is None:
            return False
        return self._is_row() or (self._failed >= enough and self.failed_share >= self._config.eject_share)

    def _is_row(self) -> bool:
        return self._counts is not None and self._counts.in_row >= self._config.eject_failures

    def _is_worst(self, others: list[Peer]) -> bool:
        """Whether another one is clearly better; one alone is judged by itself."""
        mine = 1.0 if self._is_row() else self.failed_share
        routed = [peer.failed_share for peer in others if peer.is_routed]
        return not routed or min(routed) <= BETTER * mine

    def _may_go(self, others: list[Peer]) -> bool:
        out = sum(not peer.is_routed for peer in others) + 1
        return any(peer.is_routed for peer in others) and out <= self._config.eject_out_share * (len(others) + 1)

    def _out_for_s(self) -> float:
        return min(self._config.eject_limit_s, self._config.eject_first_s * 2.0 ** min(self._times, 30))
