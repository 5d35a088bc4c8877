"""One verdict on a worker that has come up: may it receive requests, and must it be restarted?

Three trackers have a say: what its health probe answers (readiness), whether it makes tokens (progress), and what
requests see of it (outliers). Each may object, each takes its own objection back, and only when none is left the
worker receives requests. The verdict is a **level**, not an edge: ``follows`` compares it with the phase that the
worker is in and says what follows, as often as it is asked. An answer that came while the worker was being drained,
say, is therefore not lost: with edges, a worker that was undrained went on receiving requests although its probes had
failed, and one whose canary had failed never came back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from l40sd.config.options import HealthConfig
from l40sd.model import ModelName
from l40sd.routing.outliers import Counts, Outlier, Peer, Standing
from l40sd.workers.health import TIMEOUT, Counters, Pace, ProbeResult, Progress, Readiness
from l40sd.workers.lifecycle import Event, Goal, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look at a worker found.

    Attributes:
        counters: None when the scrape failed or there is none.
        leases: Requests that the proxy has on it.
        replies: Requests that were answered by it so far; ``replied_meanwhile``: some while the probe was under way.
        is_suspected: A request failed on it since the last look.
    """

    health: ProbeResult
    counters: Counters | None
    leases: int
    replies: float
    replied_meanwhile: bool = False
    is_suspected: bool = False


class Fitness:
    """The trackers of one run, from its first token to its end.

    Attributes:
        health_error: Why the health probe counts as failed; empty while it does not.
        canary_error: What the latest canary that failed came to; empty when the last one was well.
    """

    __slots__ = (
        "_config",
        "_fed_s",
        "_unready_s",
        "canary_error",
        "health_error",
        "outlier",
        "progress",
        "readiness",
    )

    def __init__(self, config: HealthConfig, *, now_s: float) -> None:
        self._config = config
        self.readiness = Readiness(fall=config.fall, rise=config.rise)
        self.progress = Progress(config, now_s=now_s)
        self.outlier = Outlier(config)
        self.health_error = self.canary_error = ""
        self._fed_s = now_s
        self._unready_s = 0.0  # that somebody looked, without a request on it

    def feed(self, look: Look, now_s: float) -> bool:
        """Take what a look found; return whether to ask for one token now, and give its result to ``feed_canary``.

        1. A probe that is late while replies come is no failure: the worker is busy, not gone.
        2. Suspected, and it says itself that it cannot serve (closed port, 5xx): out at once, not after ``fall`` times.
        3. A canary: as its progress asks for it; on suspicion, because an engine's front may say 200 while what is
           behind it is dead; while its progress is in doubt; and when its time out is up.
        """
        health = look.health
        if health.error == TIMEOUT and look.replied_meanwhile:  # 1
            health = ProbeResult(ok=True)
        if look.is_suspected and health.says_no:  # 2
            self.readiness.trip()
        else:
            self.readiness.feed(health)
        self.health_error = "" if self.readiness.is_ready else health.error or self.health_error
        is_of_no_use = not self.readiness.is_ready and not look.leases
        looked_s = min(now_s - self._fed_s, self._config.unready_timeout_s / 4)  # as progress: not over a pause
        self._unready_s, self._fed_s = self._unready_s + looked_s if is_of_no_use else 0.0, now_s
        pace = self.progress.feed(look.counters, leases=look.leases, replies=look.replies, now_s=now_s)
        if pace is not Pace.CANARY_DUE and (  # 3
            look.is_suspected or self.progress.is_doubted or self.outlier.is_due(now_s)
        ):
            pace = self.progress.suspect(now_s)
        return pace is Pace.CANARY_DUE

    def feed_canary(self, result: ProbeResult, now_s: float) -> None:
        """Take the answer to the one token that was asked for: it may end its time out."""
        pace = self.progress.feed_canary(result)
        self.canary_error = "" if pace is Pace.FINE else result.error
        if result.is_well and self.outlier.is_due(now_s):
            self.outlier.come_back(now_s)

    def feed_requests(self, counts: Counts, peers: Sequence[Peer], now_s: float) -> Standing:
        """Take what requests saw of it; return what that comes to."""
        self.outlier.feed(counts, now_s)
        return self.outlier.judge(peers, now_s)

    def excuse(self) -> None:
        """Forget the silence so far: it was somebody else's fault."""
        self.progress.excuse()
        self._unready_s = 0.0

    @property
    def stalled(self) -> str:
        """Why it counts as hung; empty when it does not.

        One whose probes fail for long is of no use to anybody, even if it answers canaries: with these switched off, a
        worker that had closed its port stayed unready until somebody came.
        """
        limit_s = self._config.unready_timeout_s
        if limit_s and self._unready_s >= limit_s:
            return f"not ready for {limit_s:.0f} s: health: {self.health_error}"
        if not self.progress.is_stalled:
            return ""
        if self.canary_error:
            return f"one token did not come: {self.canary_error}"
        return f"no token for {self._config.stall_timeout_s:.0f} s although requests are running"

    @property
    def objection(self) -> str:
        """Why it may not receive requests; empty when it may."""
        if not self.readiness.is_ready:
            return f"health: {self.health_error}"
        if self.outlier.standing is Standing.OUT:
            return self.outlier.explain()
        return self.stalled

    def concern(self, phase: Phase, model: ModelName) -> str:
        """Return what is wrong with a worker that serves nevertheless; empty when all is well."""
        if phase is not Phase.READY or self.outlier.standing is not Standing.KEPT:
            return ""
        return f"{self.outlier.explain()}; it is kept: too few workers of {model} would be left"

    def way_back(self, phase: Phase, now_s: float) -> str:
        """Return when a worker that is out for its failed requests may come back; empty for any other."""
        return self.outlier.way_back(now_s) if phase is Phase.UNREADY else ""

    def as_peer(self, phase: Phase, goal: Goal) -> Peer | None:
        """Return the worker as its equals are measured against it; None while it does not live or shall not serve."""
        if phase not in (Phase.READY, Phase.UNREADY) or goal is not Goal.SERVE:
            return None
        return Peer(is_routed=phase is Phase.READY, failed_share=self.outlier.failed_share)

    def follows(self, phase: Phase) -> Event | None:
        """Return what follows for a worker in this phase; None when all is as it should be."""
        if phase is Phase.READY and self.objection:
            return Event.FELL
        if phase is Phase.UNREADY and not self.objection:
            return Event.ROSE
        return None
