"""Two questions about a worker that has come up: may it receive requests, is it making tokens.

Whether it has come up is asked by workers/startup.py.

Each has a tracker that is fed what was seen, with the time, and answers with a verdict; workers/fitness.py makes one of
them. They ask different things on purpose. An engine that is slow to answer /health may be at the end of its strength
and still deliver every token: it loses requests (readiness), not its life (progress). One whose /health says 200 may
have hung an hour ago: /health of most engines is answered by a process that does none of the work.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import inf

from l40sd.config.options import HealthConfig

REFUSED = "refused"
TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What one question to a worker came to.

    Attributes:
        status: The HTTP status; None when there was no answer.
        error: Empty when ok; else ``refused``, ``timeout``, ``status 503`` or the failure in a few words.
    """

    ok: bool
    status: int | None = None
    error: str = ""

    @property
    def says_no(self) -> bool:
        """Whether the worker itself says that it cannot serve: a closed port, or an error of its own making."""
        return self.error == REFUSED or (self.status is not None and self.status >= 500)

    @property
    def is_well(self) -> bool:
        """Whether a question for a token was answered by a worker that is well: with it, or with a polite refusal."""
        return self.ok or (self.status is not None and (400 <= self.status < 500 or self.status == 501))


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """An engine's own account of its work; None for what it does not tell."""

    running: float | None = None
    waiting: float | None = None
    tokens: float | None = None


# --- may it receive requests? ------------------------------------------------------------------------------------


class ReadinessChange(StrEnum):
    """What a probe changed about a worker's readiness."""

    NONE = "none"
    FELL = "fell"
    ROSE = "rose"


class Readiness:
    """``fall`` failed probes in a row take a worker out, ``rise`` good ones bring it back. Starts ready."""

    __slots__ = ("_fall", "_rise", "_streak", "is_ready")

    def __init__(self, *, fall: int, rise: int) -> None:
        self._fall, self._rise, self._streak = fall, rise, 0
        self.is_ready = True

    def feed(self, result: ProbeResult) -> ReadinessChange:
        """Take the answer to a readiness probe."""
        if result.ok == self.is_ready:
            self._streak = 0
            return ReadinessChange.NONE
        self._streak += 1
        if self._streak < (self._fall if self.is_ready else self._rise):
            return ReadinessChange.NONE
        return self._turn()

    def trip(self) -> ReadinessChange:
        """Take it out at once: a request has just failed, and the worker itself says that it cannot serve."""
        self._streak = 0
        return self._turn() if self.is_ready else ReadinessChange.NONE

    def _turn(self) -> ReadinessChange:
        self._streak = 0
        self.is_ready = not self.is_ready
        return ReadinessChange.ROSE if self.is_ready else ReadinessChange.FELL


# --- is it making tokens? ----------------------------------------------------------------------------------------


class Pace(StrEnum):
    """What to make of a worker's progress."""

    FINE = "fine"
    CANARY_DUE = "canary_due"
    STALLED = "stalled"


CANARY_GAP = 0.75
"""Least time between two canaries, in probe intervals; below 1, for looks are not that regular."""


class Progress:
    """Whether a worker that has work makes tokens, and one that has none still can.

    The token counters that stand still are the only evidence against a busy worker; a probe that is late is none.

    1. The counters moved: all is well, whatever else is slow. While no scrape answers, replies that the proxy
       received stand in for them.
    2. Busy (requests running or waiting, as the engine says; as it last said while no scrape answers and it has
       requests of ours): hung after ``stall_timeout_s`` without a move.
    3. It never told its counters and has our requests: it cannot be judged; the proxy's deadlines end them.
    4. Idle by its own account, even if we hold leases (a client that reads slowly; a gauge that froze): after
       ``canary_interval_s`` without a move it is asked for one token.

    The canary is also asked for by ``suspect``, busy or not, when a request has just failed:

    5. A token, a polite refusal (an embedding engine), or counters that moved meanwhile: all is well.
    6. An error of its own making (5xx but 503): twice without a move in between is a hang, whatever else it claims.
    7. No answer, or 503, proves nothing against an engine that is busy or cannot be judged: it has real work to do.
       Against one that is idle, no answer in time is a hang; any other failure is one when it comes twice.

    At most one canary is under way, and each is answered once, so that no answer is taken for another's. ``is_stalled``
    is the verdict as it stands: it goes only when something has moved or a canary was answered.

    Only time in which somebody looked is counted: after a pause of the daemon the worker is not to blame.
    """

    __slots__ = (
        "_asked_at_s",
        "_canary_moved",
        "_canary_still_s",
        "_failures",
        "_fed_s",
        "_gap_s",
        "_interval_s",
        "_is_asked",
        "_is_busy",
        "_leases",
        "_replies",
        "_stall_s",
        "_still_s",
        "_tokens",
        "is_stalled",
    )

    def __init__(self, config: HealthConfig, *, now_s: float) -> None:
        self._stall_s = config.stall_timeout_s
        self._interval_s = config.canary_interval_s
        self._fed_s = now_s
        self._still_s = 0.0
        self._is_busy = False
        self._leases = 0
        self._tokens: float | None = None
        self._replies: float | None = None
        self._is_asked = False
        self._asked_at_s = -inf
        self._gap_s = CANARY_GAP * config.probe_interval_s
        self._canary_still_s = 0.0
        self._canary_moved = False
        self._failures = 0
        self.is_stalled = False

    @property
    def is_doubted(self) -> bool:
        """Whether the latest canary failed and nothing has moved since: it is worth another one now."""
        return self.is_stalled or self._failures > 0

    def feed(self, counters: Counters | None, *, leases: int, replies: float, now_s: float) -> Pace:
        """Take one scrape.

        Args:
            counters: None when the scrape failed or there is none.
            leases: Requests that the proxy has on this worker.
            replies: Requests or bytes that came back from it so far.

        Returns:
            ``CANARY_DUE`` exactly once a canary: send it now and give its result to ``feed_canary``.
        """
        looked_s = min(now_s - self._fed_s, self._stall_s / 4)
        self._fed_s, self._leases = now_s, leases
        if self._has_moved(counters, replies):
            self._moved()
        else:
            self._still_s += looked_s
        self._note_load(counters)
        if self._is_busy:  # 2
            self.is_stalled = self.is_stalled or self._still_s >= self._stall_s
            return Pace.STALLED if self._still_s >= self._stall_s else Pace.FINE
        if self._cannot_be_judged():  # 3
            self._still_s = 0.0
            return Pace.FINE
        is_due = self.is_doubted or (self._interval_s and self._still_s >= self._interval_s)  # 4
        return self.suspect(now_s) if is_due else Pace.FINE

    def suspect(self, now_s: float) -> Pace:
        """Have it asked for one token now, whatever its counters say.

        ``FINE`` while a canary is under way, or right after one: two that failed within a moment are one mishap, and
        are not to cost a restart.
        """
        if self._is_asked or now_s - self._asked_at_s < self._gap_s:
            return Pace.FINE
        self._is_asked, self._asked_at_s = True, now_s
        self._canary_still_s, self._canary_moved = self._still_s, False
        return Pace.CANARY_DUE

    def feed_canary(self, result: ProbeResult) -> Pace:
        """Take the answer to the one-token request that ``CANARY_DUE`` asked for."""
        assert self._is_asked, "nobody asked for this canary"
        self._is_asked = False
        if result.is_well or self._canary_moved:  # 5
            self._moved()
            return Pace.FINE
        is_error = result.status is not None and result.status >= 500 and result.status != 503
        if not is_error and (self._is_busy or self._cannot_be_judged()):  # 7
            return Pace.FINE
        self._failures += 1  # 6, 7
        self.is_stalled = self.is_stalled or result.error == TIMEOUT or self._failures >= 2
        return Pace.STALLED if self.is_stalled else Pace.FINE

    def excuse(self) -> None:
        """Forget the silence so far: it was somebody else's fault."""
        self._still_s = self._canary_still_s = 0.0
        self._failures = 0
        self.is_stalled = False

    def _cannot_be_judged(self) -> bool:
        return self._tokens is None and self._leases > 0

    def _has_moved(self, counters: Counters | None, replies: float) -> bool:
        tokens = counters.tokens if counters else None
        if tokens is None:
            moved = self._replies is not None and replies != self._replies
        else:
            moved = tokens != self._tokens
            self._tokens = tokens
        self._replies = replies
        return moved

    def _moved(self) -> None:
        self.excuse()
        self._canary_moved = True

    def _note_load(self, counters: Counters | None) -> None:
        if counters is None or (counters.running is None and counters.waiting is None):
            # What it said when it last said something holds while we see it have work. A worker whose metrics broke
            # while it was busy was restarted for the silence of the idle hours after it.
            self._is_busy = self._is_busy and self._leases > 0
            return
        asked = self._is_asked  # the canary is a running request, too, but not one to wait 120 s for
        is_busy = (counters.running or 0) + (counters.waiting or 0) > asked
        if is_busy and not self._is_busy:
            self._still_s = self._still_s - self._canary_still_s if asked else 0.0
            self._canary_still_s = 0.0  # taken off once, however often the gauge turns while the canary is out
        self._is_busy = is_busy
