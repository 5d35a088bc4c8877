"""What all connections of one proxy have in common."""

import asyncio
import hashlib
import math
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass, field

from l40sd.config.options import ProxyConfig
from l40sd.proxy.bounds import Bounds
from l40sd.proxy.cors import Cors
from l40sd.proxy.failures import Failures
from l40sd.proxy.metrics import Metrics
from l40sd.proxy.poison_table import Poison
from l40sd.proxy.worker_connection import ConnectionPool
from l40sd.routing.routes import Route, Routes

TICK_LIMITS_S = (0.02, 0.5)


@dataclass(slots=True)
class ProxyContext:
    """The proxy's own state; changed through its methods only.

    Attributes:
        now_s: The loop's clock as of the last sweep: good enough for deadlines, and free.
        tick_s: Longest time between two sweeps.
        bounds: What all connections together may take.
        key_digests: Of the API keys, made with a secret of this process: looking one up takes the same time whatever
            is asked for, as far as an attacker can choose it. Empty: everybody may ask.
        cors: Which web pages may use the endpoint; None: nothing is said of it to browsers, and nothing refused.
        rules: Another object whenever other requests may come in than before.
        pools: By route, made when first used.
        is_stopping: Nothing new is accepted; what is open ends.
        is_closing: No worker will come any more: nobody needs to wait for one.
        tasks: The requests' (a connection to a worker being made, a question about one); no others hold any.
        poison: Requests that workers died of.
        failures: Tells of requests that failed.
    """

    config: ProxyConfig
    routes: Routes
    loop: asyncio.AbstractEventLoop
    metrics: Metrics = field(default_factory=Metrics)
    bounds: Bounds = field(default_factory=Bounds)
    key_digests: frozenset[bytes] = frozenset()
    cors: Cors | None = None
    rules: object = field(default_factory=object)
    now_s: float = 0.0
    tick_s: float = 0.5
    is_stopping: bool = False
    is_closing: bool = False
    pools: dict[Route, ConnectionPool] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    failures: Failures = field(default_factory=lambda: Failures(0, 0.0))
    poison: Poison = field(default_factory=lambda: Poison(limit=0, kept_s=0.0))

    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    _id_prefix: bytes = field(default_factory=lambda: secrets.token_hex(6).encode())
    _id_count: int = 0

    def configure(self, config: ProxyConfig, *, descriptor_limit: int) -> None:
        """Use other limits and deadlines from the next event on."""
        self.config = config
        self.tick_s = _tick_s(config)
        self.failures.configure(config.failures_logged_per_minute)
        self.poison.configure(limit=config.poison_limit, kept_s=config.poison_refused_s)
        self.bounds.configure(config, descriptor_limit)
        self.cors = Cors(config.cors_origins) if config.cors_origins else None
        self.rules = object()

    def look_at_clock(self) -> float:
        """Take the time anew and return it."""
        self.now_s = self.loop.time()
        return self.now_s

    def stop(self) -> None:
        """Keep no connection open for a further request from now on."""
        self.is_stopping = True

    def resume(self) -> None:
        """Keep connections open again."""
        self.is_stopping = False

    def give_up_waiting(self) -> None:
        """Have nobody wait for a worker any more: none will come."""
        self.is_closing = True
        self.routes.expire(math.inf)

    def set_keys(self, keys: frozenset[bytes]) -> None:
        """Replace the API keys that clients may use."""
        self.key_digests = frozenset(self._digest(key) for key in keys)
        self.rules = object()

    def has_key(self, credential: bytes) -> bool:
        """Return whether a client with this key may ask."""
        return not self.key_digests or self._digest(credential) in self.key_digests

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret).digest()

    def make_request_id(self) -> bytes:
        """Return a new id: random for the process, counted within it."""
        self._id_count += 1
        return b"%b-%x" % (self._id_prefix, self._id_count)

    def make_room_for_upstream(self) -> bool:
        """Return whether one more connection to a worker may be made; for it an idle one may have to go."""
        limit = self.bounds.shares.upstreams
        if sum(pool.open for pool in self.pools.values()) + len(self.tasks) < limit:
            return True
        idle = [pool for pool in self.pools.values() if pool.idle]
        if not idle:
            return False
        min(idle, key=lambda pool: pool.idle[0].idle_since_s).close_oldest()
        return True

    def start_task(self, task: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run a task of a request's; it is waited for when the proxy closes."""
        started = self.loop.create_task(task)
        self.tasks.add(started)
        started.add_done_callback(self.tasks.discard)
        return started

    def sweep(self, now_s: float) -> None:
        """Let go of what is too old: poison, connections to workers, and the pools of routes that are gone."""
        self.poison.sweep(now_s)
        self.failures.sweep(now_s)
        self.routes.expire(now_s)
        for route, pool in list(self.pools.items()):
            pool.sweep(now_s, self.config.upstream_idle_timeout_s)
            if not route.is_open and not route.in_flight and not pool.idle:
                del self.pools[route]

    def pool(self, route: Route) -> ConnectionPool:
        """Return the connections of a route."""
        pool = self.pools.get(route)
        if pool is None:
            pool = self.pools[route] = ConnectionPool(route)
        return pool


def _tick_s(config: ProxyConfig) -> float:
    """Return how often to look: a quarter of the shortest deadline, within bounds."""
    shortest = min(
        config.queue_timeout_s,
        config.connect_timeout_s,
        config.first_byte_timeout_s,
        config.idle_timeout_s,
        config.client_header_timeout_s,
        config.client_body_timeout_s,
        config.client_idle_timeout_s,
        config.upstream_idle_timeout_s,
    )
    return min(max(shortest / 4, TICK_LIMITS_S[0]), TICK_LIMITS_S[1])
