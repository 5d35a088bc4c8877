"""Who may receive requests, who holds one now, and who is waiting for a turn.

Exactly the READY workers are here (invariant 2): the worker's own task calls ``add`` and ``remove``. A request
holds a ``Lease`` from its choice of a backend to the last byte; counts return to zero because a lease can be
released any number of times and counts once (invariant 7).

    request --take--> Lease --release--> (wakes the line)
        \\--wait--> Waiter --its turn--> on_turn(Lease), or on_turn(None) when time is up or the model is gone

A worker that is removed and added again with another port or key is another ``Route``: leases of the old one go
on counting for ``in_flight`` and ``drained``, never for the new one's load.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from l40sd.model import Backend as Backend
from l40sd.model import ListedModel, ModelName, Outlook, WorkerId
from l40sd.routing.balancer import AWAY, choose, load_with_one_more
from l40sd.routing.outliers import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model that this host means to serve, ready or not.

    Attributes:
        outlook: What is on its way, for a request that finds no worker: ``"2 workers are loading"``.
    """

    aliases: tuple[str, ...] = ()
    outlook: Outlook = field(default_factory=Outlook)


class FailureKind(StrEnum):
    """What a request saw go wrong on a worker; the worker's owner decides what it means."""

    CONNECT = "connect"  # refused, or no connection within connect_timeout_s
    CLOSED = "closed"  # connection lost before the first byte of a reply
    CUT = "cut"  # connection lost, or framing broken, within a reply
    STATUS = "status"  # a reply with a 5xx status
    FIRST_BYTE = "first_byte"  # silence for first_byte_timeout_s
    IDLE = "idle"  # silence for idle_timeout_s within a reply


WITHIN_REPLY = (FailureKind.CUT, FailureKind.IDLE)


@dataclass(slots=True)
class Tally:
    """What a worker did since the daemon started, over all its instances."""

    served: int = 0
    failed: int = 0
    retried: int = 0
    broken: int = 0  # of those served, replies that broke off
    ejected: int = 0


class Route:
    """One backend that may receive requests, and the requests on it. Changed by ``Routes`` and ``Lease`` only."""

    __slots__ = (
        "backend",
        "failing",
        "in_flight",
        "is_failing",
        "is_open",
        "line",
        "place",
        "serial",
        "tally",
        "weight",
    )

    def __init__(self, backend: Backend, serial: int, line: "Line", tally: Tally) -> None:
        self.backend = backend
        self.serial = serial
        self.line = line
        self.tally = tally
        self.in_flight = 0
        self.place = 0  # in the line's routes and loads, while open
        self.is_open = True
        self.failing = 0  # failures in a row
        self.weight: float = backend.weight  # what of the backend's weight it is given at present
        self.is_failing = False  # kept although requests fail on it


class Lease:
    """One request's hold on one backend."""

    __slots__ = ("_is_held", "_routes", "route")

    def __init__(self, routes: "Routes", route: Route) -> None:
        self._routes = routes
        self._is_held = True
        self.route = route

    def answered(self) -> None:
        """Count a request that the backend began to answer well."""
        self.route.failing = 0
        self.route.tally.served += 1

    def failed(self, kind: FailureKind) -> None:
        """Count a failure that is the backend's, and tell its owner."""
        self.route.failing += 1
        self.route.tally.failed += 1
        self.route.tally.broken += kind in WITHIN_REPLY
        if self.route.is_open and self._routes.on_failure is not None:  # a drained or stopped worker may fail
            self._routes.on_failure(self.route.backend.worker, kind)

    def retried(self) -> None:
        """Count a request that is taken elsewhere, or asked again."""
        self.route.tally.retried += 1

    def release(self) -> None:
        """Give the backend back; again is nothing."""
        if self._is_held:
            self._is_held = False
            route = self.route
            route.in_flight -= 1
            assert route.in_flight >= 0, "a lease was counted twice"
            line = route.line
            if route.is_open and not line.is_even:
                line.loads[route.place] = load_with_one_more(route.in_flight, route.weight)
            if line.waiters or not route.is_open or self._routes.is_draining:
                self._routes.released(route)


class Excuse(NamedTuple):
    """A request that ended a worker had ended one before: this one, if it has left the routes since."""

    earlier: Route
    serial: int
    at_s: float


TurnCallback = Callable[[Lease | None], None]


class Waiter:
    """One request's place in a model's waiting line."""

    __slots__ = ("_line", "deadline_s", "on_turn", "tried")

    def __init__(self, line: "Line", on_turn: TurnCallback, deadline_s: float, tried: Collection[int]) -> None:
        self._line = line
        self.on_turn = on_turn
        self.deadline_s = deadline_s
        self.tried = tried

    def cancel(self) -> None:
        """Leave the line without a turn; again is nothing."""
        if self in self._line.waiters:
            self._line.waiters.remove(self)


class Line:
    """One model: its routes, and those who wait for one. First in, first out among those who can be served.

    Attributes:
        loads: Of each route, with one request more. Where ``is_even``, the requests that it was given instead: a worker
            that fails at once has the least in flight and would get nearly all of them.
        turn: Where to look first among equals.
        listed: What the engine said of the model that was added last.
    """

    __slots__ = ("entry", "is_even", "is_in_catalog", "listed", "loads", "model", "routes", "turn", "waiters")

    def __init__(self, model: ModelName) -> None:
        self.model = model
        self.entry = CatalogEntry()
        self.is_in_catalog = False
        self.listed: ListedModel | None = None
        self.routes: list[Route] = []
        self.loads: list[float] = []
        self.is_even = False
        self.turn = 0
        self.waiters: deque[Waiter] = deque()

    @property
    def may_wait(self) -> bool:
        """Whether a worker is here or on its way."""
        return bool(self.routes) or self.entry.outlook.is_coming

    def seat(self) -> None:
        """Number the routes after one came, went or is weighed anew."""
        for place, route in enumerate(self.routes):
            route.place = place
        self.is_even = any(route.is_failing for route in self.routes)
        self.loads = [load_with_one_more(0 if self.is_even else route.in_flight, route.weight) for route in self.routes]


class Routes:
    """The routes of all models.

    Args:
        queue_limit: Requests that may wait, per model.
        in_flight_limit: Requests at once on one worker; 0: no limit.

    Attributes:
        on_failure: Called with the worker and what a request saw go wrong on it; never for a worker already removed.
        on_doubt: Says of a worker that just answered 500 whether it is ending; None: nobody can tell.
        on_given_up: Takes a worker's requests from it: called with the worker, why, and whether it hangs.
    """

    def __init__(self, *, queue_limit: int = 1000, in_flight_limit: int = 0) -> None:
        self.on_failure: Callable[[WorkerId, FailureKind], None] | None = None
        self.on_doubt: Callable[[WorkerId], Awaitable[bool]] | None = None
        self.on_given_up: Callable[[WorkerId, str, bool], None] | None = None
        self._queue_limit = queue_limit
        self._in_flight_limit = in_flight_limit
        self._lines: dict[ModelName, Line] = {}
        self._names: dict[str, Line] = {}
        self._routes: dict[WorkerId, list[Route]] = {}  # the open one, and closed ones with leases
        self._tallies: dict[WorkerId, Tally] = {}
        self._excuses: dict[WorkerId, Excuse] = {}
        self._drains: dict[WorkerId, list[asyncio.Future[None]]] = {}
        self._serial = 0

    # What the worker's and the pattern's owners say

    def configure(self, *, queue_limit: int, in_flight_limit: int) -> None:
        """Change the limits; who already waits stays in line."""
        self._queue_limit = queue_limit
        self._in_flight_limit = in_flight_limit
        for line in self._lines.values():
            self._serve(line)

    def set_catalog(self, catalog: Mapping[ModelName, CatalogEntry]) -> None:
        """Replace the models that are known without a backend, with their aliases and notes.

        Requests waiting for a model that is neither here nor has a backend, or for which nothing can come any more,
        get their turn with None.
        """
        for model in catalog:
            self._line(model)
        for line in self._lines.values():
            line.is_in_catalog = line.model in catalog
            line.entry = catalog.get(line.model, CatalogEntry())
            if line.waiters and not line.may_wait:
                self._send_away(line, list(line.waiters))
        self._forget_unknown()

    def add(self, backend: Backend) -> None:
        """Let a worker receive requests.

        The same backend again while requests are still on it (a drain taken back) is the same load; anything
        else replaces what the worker had.
        """
        self._close(backend.worker)
        self._serial += 1
        line = self._line(backend.model)
        routes = self._routes.setdefault(backend.worker, [])
        route = next((r for r in routes if r.backend == backend and r.line is line), None)
        if route is None:
            tally = self._tallies.setdefault(backend.worker, Tally())
            route = Route(backend, self._serial, line, tally)
            routes.append(route)
        route.is_open = True
        route.serial = self._serial  # new, so that requests which tried it before may try it again
        route.failing, route.is_failing, route.weight = 0, False, backend.weight
        route.backend = backend  # what its engine says now
        line.listed = backend.listed or line.listed
        line.routes.append(route)
        line.seat()
        self._name_lines()
        self._serve(line)

    def hold(self, backend: Backend) -> Lease:
        """Return a lease on a backend that need not be routed to: a request that an earlier daemon sent to it.

        A worker that is added as the same backend afterwards has these requests as its load.
        """
        line = self._line(backend.model)
        routes = self._routes.setdefault(backend.worker, [])
        route = next((r for r in routes if r.backend == backend and r.line is line), None)
        if route is None:
            self._serial += 1
            route = Route(backend, self._serial, line, self._tallies.setdefault(backend.worker, Tally()))
            route.is_open = False
            routes.append(route)
        route.in_flight += 1
        if route.is_open:
            line.seat()
        return Lease(self, route)

    def weigh(self, worker: WorkerId, *, share: float, is_failing: bool) -> None:
        """Give a worker this part of its weight, above 0 to 1, or say that requests fail on it although it is kept.

        While one of a model's is kept so, all of them get the same share of the requests. Unknown workers are ignored.
        """
        route = self.open_route(worker)
        if route is None:
            return
        weight = route.backend.weight * share
        if (route.weight, route.is_failing) != (weight, is_failing):
            route.weight, route.is_failing = weight, is_failing
            route.line.seat()

    def remove(self, worker: WorkerId) -> None:
        """Let a worker receive no further request; those on it go on. Unknown workers are ignored."""
        self._close(worker)
        self._forget_unknown()

    def give_up(self, worker: WorkerId, why: str, *, is_hung: bool = False) -> None:
        """Let a worker receive no further request, and take from it those that it has.

        Call it before its process is told to end: an engine may answer what it aborts as if it were whole.
        """
        self.remove(worker)
        if self.on_given_up is not None and self.in_flight(worker):
            self.on_given_up(worker, why, is_hung)

    def excuse(self, worker: WorkerId, earlier: Route, serial: int, now_s: float) -> None:
        """Note that this worker ended, or is about to, with a request that had been the end of another one.

        Args:
            earlier: The other one's route,
            serial: and its serial then.
        """
        self._excuses[worker] = Excuse(earlier, serial, now_s)

    def take_excuse(self, worker: WorkerId, since_s: float) -> str:
        """Return which worker's end counts for this one's; empty: its own does. Asked once for each end.

        Args:
            since_s: What was noted before is about something else.
        """
        excuse = self._excuses.pop(worker, None)
        if excuse is None or excuse.at_s < since_s:
            return ""
        has_left = not excuse.earlier.is_open or excuse.earlier.serial != excuse.serial
        return excuse.earlier.backend.worker if has_left else ""

    # What they may ask

    def open_route(self, worker: WorkerId) -> Route | None:
        """Return the route over which this worker may receive requests now."""
        return next((route for route in self._routes.get(worker, ()) if route.is_open), None)

    def in_flight(self, worker: WorkerId) -> int:
        """Return the requests on a worker now, those on earlier instances of it included."""
        return sum(route.in_flight for route in self._routes.get(worker, ()))

    @property
    def is_draining(self) -> bool:
        """Whether anybody waits in ``drained``."""
        return bool(self._drains)

    def served(self, worker: WorkerId) -> int:
        """Return the requests that a worker answered since the daemon started."""
        return self.tally(worker).served

    def failures_in_row(self, worker: WorkerId) -> int:
        """Return the requests that failed on a worker since one was answered well; 0 for one not routed to."""
        route = self.open_route(worker)
        return route.failing if route else 0

    def counts(self, worker: WorkerId) -> Counts:
        """Return what requests saw of a worker."""
        tally = self.tally(worker)
        return Counts(good=tally.served - tally.broken, failed=tally.failed, in_row=self.failures_in_row(worker))

    def tally(self, worker: WorkerId) -> Tally:
        """Return what a worker did since the daemon started."""
        return self._tallies.get(worker, Tally())

    def waiting(self, model: ModelName) -> int:
        """Return the requests in a model's waiting line."""
        line = self._lines.get(model)
        return len(line.waiters) if line else 0

    def outlook(self, model: ModelName) -> Outlook:
        """Return what is on its way for a model."""
        line = self._lines.get(model)
        return line.entry.outlook if line else Outlook()

    def may_wait(self, model: ModelName) -> bool:
        """Return whether a worker of this model is here or on its way."""
        line = self._lines.get(model)
        return line is not None and line.may_wait

    def workers(self) -> Iterator[tuple[WorkerId, Tally]]:
        """Yield every worker that was ever routed to, with what it did."""
        yield from self._tallies.items()

    def lines(self) -> list[Line]:
        """Return the known models by name."""
        known = [line for line in self._lines.values() if line.is_in_catalog or line.routes]
        return sorted(known, key=lambda line: line.model)

    async def drained(self, worker: WorkerId) -> None:
        """Return when no request is on this worker. The deadline is the caller's; cancelling is safe."""
        while self.in_flight(worker):
            idle = asyncio.get_running_loop().create_future()
            waiting = self._drains.setdefault(worker, [])
            waiting.append(idle)
            try:
                await idle
            finally:
                waiting.remove(idle)
                if not waiting and self._drains.get(worker) is waiting:
                    del self._drains[worker]

    # What a request does

    def resolve(self, name: str) -> ModelName | None:
        """Return the model that goes by this name or alias; None when there is none."""
        line = self._names.get(name)
        return line.model if line else None

    def take(self, model: ModelName, tried: Collection[int] = ()) -> Lease | None:
        """Return a lease on the least busy backend of a known model; None when all are busy, tried or away.

        Overtakes nobody: whoever still waits cannot be served by what is free, or would have been.
        """
        line = self._lines[model]
        loads = self._loads_but(line, tried) if tried or self._in_flight_limit else line.loads
        place = choose(loads, line.turn)
        if place < 0:
            return None
        line.turn = place + 1
        route = line.routes[place]
        route.in_flight += 1
        if line.is_even:
            line.loads[place] += 1 / route.weight
        else:
            line.loads[place] = load_with_one_more(route.in_flight, route.weight)
        return Lease(self, route)

    def wait(
        self, model: ModelName, on_turn: TurnCallback, *, deadline_s: float, tried: Collection[int] = ()
    ) -> Waiter | None:
        """Stand in a known model's line; None when it is full.

        Args:
            model: As ``resolve`` returned it.
            on_turn: Called once, with a lease, or with None when ``expire`` finds the deadline passed or the
                model is no longer known. Not called after ``Waiter.cancel``.
            deadline_s: On the clock that ``expire`` is called with.
            tried: Serials of routes not to be given.
        """
        line = self._lines[model]
        if len(line.waiters) >= self._queue_limit:
            return None
        waiter = Waiter(line, on_turn, deadline_s, tried)
        line.waiters.append(waiter)
        return waiter

    def expire(self, now_s: float) -> None:
        """Send away whoever waits past the deadline."""
        for line in list(self._lines.values()):
            if line.waiters:
                self._send_away(line, [w for w in line.waiters if w.deadline_s <= now_s])

    def released(self, route: Route) -> None:
        """Tell whoever cares that a lease was given back."""
        if route.line.waiters:
            self._serve(route.line)
        if not route.in_flight and not route.is_open:
            self._forget(route)
        worker = route.backend.worker
        if worker in self._drains and not self.in_flight(worker):
            for idle in self._drains[worker]:
                if not idle.done():
                    idle.set_result(None)

    # Helpers

    def _loads_but(self, line: Line, tried: Collection[int]) -> list[float]:
        """Return a line's loads, ``AWAY`` for those that were tried or hold as many requests as they may."""
        limit = self._in_flight_limit
        return [
            AWAY if route.serial in tried or (limit and route.in_flight >= limit) else load
            for route, load in zip(line.routes, line.loads, strict=True)
        ]

    def _serve(self, line: Line) -> None:
        """Give turns from the front of the line until nobody in it can be served."""
        served: Waiter | None
        while line.waiters and line.routes:
            served = None
            for waiter in line.waiters:
                lease = self.take(line.model, waiter.tried)
                if lease is not None:
                    served = waiter
                    line.waiters.remove(waiter)
                    waiter.on_turn(lease)  # may call back into us: start over
                    break
                if not waiter.tried:
                    break  # nothing is free for anybody
            if served is None:
                return

    def _close(self, worker: WorkerId) -> None:
        route = self.open_route(worker)
        if route is not None:
            route.is_open = False
            route.line.routes.remove(route)
            route.line.seat()
            if not route.in_flight:
                self._forget(route)

    def _send_away(self, line: Line, waiters: list[Waiter]) -> None:
        for waiter in waiters:
            if waiter in line.waiters:
                line.waiters.remove(waiter)
                waiter.on_turn(None)

    def _forget(self, route: Route) -> None:
        worker = route.backend.worker
        self._routes[worker].remove(route)
        if not self._routes[worker]:
            del self._routes[worker]

    def _forget_unknown(self) -> None:
        self._name_lines()
        for line in list(self._lines.values()):
            if not line.is_in_catalog and not line.routes:
                self._send_away(line, list(line.waiters))

    def _line(self, model: ModelName) -> Line:
        return self._lines.setdefault(model, Line(model))

    def _name_lines(self) -> None:
        """A model's own name wins over an alias; of two equal aliases the first model's by name."""
        known = self.lines()
        self._names = {}
        for line in known:
            for alias in line.entry.aliases:
                self._names.setdefault(alias, line)
        self._names.update({line.model: line for line in known})
