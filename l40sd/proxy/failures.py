"""One warning for each request that failed: answered with 5xx, cut, timed out, or refused for want of a worker.

A storm of them fills no log: beyond so many a minute they are counted, and the next one that is told of says how many
were not.
"""

from collections.abc import Callable, Mapping

import structlog

from l40sd.proxy.rate_limit import RateLimit

log = structlog.get_logger()


class Failures:
    """Tells of failed requests, within a limit.

    Args:
        per_minute: Warnings a minute; 0: none.
        now_s: The loop's clock.
    """

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._limit = RateLimit(per_minute, now_s)
        self._own = RateLimit(per_minute, now_s)

    def configure(self, per_minute: int) -> None:
        """Change the limit."""
        self._limit.configure(per_minute)
        self._own.configure(per_minute)

    def note(self, why: str, now_s: float, facts: Callable[[], Mapping[str, object]]) -> None:
        """Tell of one failed request, or count it.

        Args:
            why: For the operator, in words.
            now_s: The loop's clock.
            facts: Returns what is known of the request; asked only where it is told.
        """
        suppressed = self._limit.admit(now_s)
        if suppressed is not None:
            more = {"suppressed": suppressed} if suppressed else {}
            log.warning("proxy.request_failed", **facts(), why=why, **more)

    def note_own(self, request: str, error: Exception, now_s: float) -> None:
        """Tell of a fault of ours that a request met, with its traceback: whoever finds one may repeat it for ever."""
        if self._own.admit(now_s) is not None:
            log.error("proxy.internal_error", request=request, exc_info=error)

    def sweep(self, now_s: float) -> None:
        """Tell how many were not told of, when no further one comes to do so."""
        if suppressed := self._limit.overdue(now_s):
            log.warning("proxy.request_failed", why="further requests failed before this", suppressed=suppressed)
