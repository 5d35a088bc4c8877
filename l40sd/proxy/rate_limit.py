"""How often something is said: so many times a minute, and how often it was not said."""

MINUTE_S = 60.0


class RateLimit:
    """A token bucket: a burst of ``per_minute`` at once, refilled evenly; what finds it empty is counted.

    Args:
        per_minute: 0: nothing is ever admitted.
        now_s: Monotonic, as all others.
    """

    __slots__ = ("_filled_s", "_per_minute", "_said_s", "_suppressed", "_tokens")

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._tokens = float(per_minute)
        self._filled_s = self._said_s = now_s
        self._suppressed = 0

    def configure(self, per_minute: int) -> None:
        """Change the limit; a burst that is under way goes on with what it has left."""
        self._tokens = min(self._tokens, per_minute) if self._per_minute else float(per_minute)
        self._per_minute = per_minute

    def admit(self, now_s: float) -> int | None:
        """Return how many were suppressed since the last one that was admitted; None: this one is suppressed, too."""
        refilled = (now_s - self._filled_s) * self._per_minute / MINUTE_S
        self._tokens = min(self._per_minute, self._tokens + refilled)
        self._filled_s = now_s
        if self._tokens < 1:
            self._suppressed += 1
            return None
        self._tokens -= 1
        return self._told(now_s)

    def overdue(self, now_s: float) -> int:
        """Return how many were suppressed that nothing has told of for a minute, and count anew; mostly 0."""
        if not self._suppressed or now_s - self._said_s < MINUTE_S or not self._per_minute:
            return 0
        return self._told(now_s)

    def _told(self, now_s: float) -> int:
        suppressed, self._suppressed = self._suppressed, 0
        self._said_s = now_s
        return suppressed
