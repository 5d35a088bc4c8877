"""What all connections of one proxy have in common."""

import asyncio
import hashlib
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from l40sd.config.options import ProxyConfig
from l40sd.proxy.bounds import Bounds
from l40sd.proxy.cors import Cors
from l40sd.proxy.failures import Failures
from l40sd.proxy.metrics import Metrics
from l40sd.proxy.poison_table import Poison
from l40sd.proxy.worker_connection import ConnectionPool
from l40sd.routing.routes import Route, Routes

if TYPE_CHECKING:
    from l40sd.proxy.client_connection import ClientConnection


@dataclass(slots=True)
class ProxyContext:
    """The proxy's own state; changed by ``Proxy`` and, for their own part, by its connections.

    Attributes:
        now_s: The loop's clock as of the last sweep: good enough for deadlines, and free.
        tick_s: Longest time between two sweeps.
        bounds: What all connections together may take.
        key_digests: Of the API keys, made with a secret of this process: looking one up takes the same time whatever
            is asked for, as far as an attacker can choose it. Empty: everybody may ask.
        cors: Which web pages may use the endpoint; None: nothing is said of it to browsers, and nothing refused.
        rules: Another object whenever other requests may come in than before.
        unread: Clients that sent too far ahead to be read for now.
        pools: By route, made when first used.
        is_stopping: Nothing new is accepted; what is open ends.
        is_closing: No worker will come any more: nobody needs to wait for one.
        dials: The requests' tasks (a connection to a worker being made, a question about one); no others hold any.
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
    clients: "set[ClientConnection]" = field(default_factory=set)
    unread: "set[ClientConnection]" = field(default_factory=set)
    pools: dict[Route, ConnectionPool] = field(default_factory=dict)
    dials: set[asyncio.Task[None]] = field(default_factory=set)
    failures: Failures = field(default_factory=lambda: Failures(0, 0.0))
    poison: Poison = field(default_factory=lambda: Poison(limit=0, kept_s=0.0))

    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    _id_prefix: bytes = field(default_factory=lambda: secrets.token_hex(6).encode())
    _id_count: int = 0

    def set_keys(self, keys: frozenset[bytes]) -> None:
        """Replace the API keys that clients may use."""
        self.key_digests = frozenset(self._digest(key) for key in keys)
        self.rules = object()

    def set_origins(self, origins: tuple[str, ...]) -> None:
        """Replace the origins of web pages that may use the endpoint."""
        self.cors = Cors(origins) if origins else None
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
        if sum(pool.open for pool in self.pools.values()) + len(self.dials) < limit:
            return True
        idle = [pool.idle[0] for pool in self.pools.values() if pool.idle]
        if not idle:
            return False
        oldest = min(idle, key=lambda upstream: upstream.idle_since_s)
        oldest.pool.idle.remove(oldest)
        oldest.abort()
        return True

    def pool(self, route: Route) -> ConnectionPool:
        """Return the connections of a route."""
        pool = self.pools.get(route)
        if pool is None:
            pool = self.pools[route] = ConnectionPool(route)
        return pool
