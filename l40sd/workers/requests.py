"""What a worker has to do with requests: it is given some, has some, and they are taken from it."""

import asyncio

import structlog

from l40sd.clock import now_s
from l40sd.engines.launch import Launch
from l40sd.engines.table import ends_streams
from l40sd.model import ListedModel, Placement
from l40sd.routing.outliers import Counts
from l40sd.routing.routes import Backend, Routes


class Requests:
    """One worker's place in the routes."""

    def __init__(self, routes: Routes, placement: Placement, log: structlog.stdlib.BoundLogger) -> None:
        self._routes = routes
        self._placement = placement
        self._worker = placement.worker
        self._log = log
        self._was_kept = False

    @property
    def in_flight(self) -> int:
        """Requests on it now."""
        return self._routes.in_flight(self._worker)

    @property
    def served(self) -> int:
        """Requests that it answered since the daemon started."""
        return self._routes.served(self._worker)

    def counts(self) -> Counts:
        """Return what they saw of it."""
        return self._routes.counts(self._worker)

    def let_in(self, launch: Launch, listed: ListedModel | None) -> None:
        """Let it receive requests; ``listed``: what its engine says of the model."""
        self._routes.add(
            Backend(
                worker=self._worker,
                model=self._placement.model,
                host=launch.host,
                port=launch.port,
                weight=self._placement.weight,
                api_key=launch.api_key,
                served_name=launch.served_name,
                ends_streams=launch.ends_streams or (listed is not None and ends_streams(listed.owned_by)),
                listed=listed,
            )
        )

    def keep_out(self) -> None:
        """Let it receive no further request; those on it go on."""
        self._routes.remove(self._worker)

    def weigh(self, share: float, concern: str) -> None:
        """Give it this share of its weight; ``concern``: why it should be out, of one that is kept nevertheless."""
        is_kept = bool(concern)
        self._routes.weigh(self._worker, share=share, is_failing=is_kept)
        if is_kept == self._was_kept:
            return
        self._was_kept = is_kept
        if is_kept:
            self._log.warning("worker.failing", reason=concern, model=self._placement.model)
        else:
            self._log.info("worker.failing_no_more", model=self._placement.model)

    def note_ejected(self) -> None:
        """Count that it was taken out for the requests that failed on it."""
        self._routes.tally(self._worker).ejected += 1

    def take_away(self, why: str, *, is_hung: bool) -> None:
        """Before the signal: what an engine aborts then it may answer as if it were whole."""
        why = f"{self._worker} is being stopped" + (f": {why}" if why else "")
        self._routes.give_up(self._worker, why, is_hung=is_hung)

    async def drain(self, timeout_s: float) -> str:
        """Return once nothing is in flight, or at the deadline, saying how many were cut (invariant 3)."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._routes.drained(self._worker)
        except TimeoutError:
            cut = self.in_flight
            self._log.warning("worker.drain_deadline", in_flight=cut, after_s=timeout_s)
            return f"{cut} requests were still in flight at the drain's deadline"
        return ""

    def take_excuse(self, within_s: float) -> str:
        """Return the worker that was ended before by the request that ended this one; empty: none is known."""
        return self._routes.take_excuse(self._worker, now_s() - within_s)
