"""The endpoint: least busy worker, streamed reply, one port for everything.

    ClientConnection              --> Exchange                  --> WorkerConnection
    (bytes in, one request at a time) (lease, tries, deadlines)     (bytes back)

Proxy owns the listening sockets and one timer. The timer looks at every connection twice a second: a deadline is an
attribute that a request sets on its way, so ten thousand of them cost no timer handles.
"""

import asyncio
import resource
import socket
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from l40sd.config.options import ProxyConfig
from l40sd.errors import L40sError
from l40sd.model import WorkerId
from l40sd.proxy import heap, listeners
from l40sd.proxy.client_connection import ClientConnection, ClientConnections
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.descriptors import BACKLOG
from l40sd.proxy.handed import Handed
from l40sd.proxy.handover import export_connections, import_connections, settle
from l40sd.routing.routes import Routes

DRAIN_POLL_S = 0.01
ROUNDS_TO_CLOSE = 3
UNIX_SOCKET_MODE = 0o660

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyStats:
    """Now, and since the proxy was made.

    Attributes:
        served: Requests answered below 500, by workers or here.
        failed: Answered with 500 or above, or cut.
        retried: Further workers tried.
    """

    connections: int
    in_flight: int
    waiting: int
    served: int
    failed: int
    retried: int


class Proxy:
    """Listens, balances and streams. Use ``start`` once, ``stop`` once.

    Attributes:
        sockets: The listeners; they stay open and keep queueing while accepting is paused.
        lent: Those of them that are not ours alone.
        clients: Their connections.
        addresses: Where clients reach it: ``host:port``, ``[host]:port`` or ``unix:/path``, real port numbers.
    """

    def __init__(self, config: ProxyConfig, routes: Routes, *, api_keys: Collection[str] = ()) -> None:
        self._config = config
        self._routes = routes
        self._api_keys = api_keys
        self._context: ProxyContext | None = None
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None
        self._paths: list[Path] = []
        self.sockets: list[socket.socket] = []
        self.clients = ClientConnections()
        self.lent: list[socket.socket] = []
        self.addresses: tuple[str, ...] = ()

    async def start(
        self,
        lent: Sequence[socket.socket] = (),
        own: Sequence[socket.socket] = (),
        handed: Handed | None = None,
    ) -> None:
        """Listen and serve.

        Args:
            lent: Already listening, from systemd, which holds them too; see listeners.py.
            own: Already listening, from a previous self. An address in the config that one of these or of those has is
                not bound again; what the config does not name any more is closed.
            handed: Connections of a previous self, to go on with before anything new is accepted.

        Raises:
            L40sError: An address cannot be listened on.
        """
        heap.keep_freed_memory()
        loop = asyncio.get_running_loop()
        self._context = ProxyContext(config=self._config, routes=self._routes, loop=loop, now_s=loop.time())
        self._routes.on_given_up = self._take_from
        self.set_api_keys(self._api_keys)
        self.configure(self._config)
        self.lent, kept, missing = listeners.take_over(self._config.listen, lent=lent, own=own)
        self.sockets, self._paths = [*self.lent, *kept], listeners.unix_paths(kept)
        try:
            for address in missing:
                self.sockets.append(self._bind(address))
        except L40sError:
            self._close_sockets()
            raise
        for sock in self.sockets:
            sock.setblocking(False)
        self.addresses = tuple(listeners.address_of(sock) for sock in self.sockets)
        if handed is not None:
            await import_connections(self._context, self.clients, handed)
        await self.resume_accepting()
        self._tick()
        log.info("proxy.ready", addresses=self.addresses)
        if handed is not None:
            paused_s = round(loop.time() - handed.paused_at_s, 4)
            stats = self.stats
            log.info("proxy.taken_over", connections=stats.connections, in_flight=stats.in_flight, paused_s=paused_s)

    @property
    def stats(self) -> ProxyStats:
        """Counts for ``status``."""
        context = self._running
        lines = self._routes.lines()
        return ProxyStats(
            connections=len(self.clients.open),
            in_flight=sum(client.exchange is not None for client in self.clients.open),
            waiting=sum(len(line.waiters) for line in lines),
            served=context.metrics.served,
            failed=context.metrics.failed,
            retried=context.metrics.retried,
        )

    def metrics_text(self) -> str:
        """Return what ``GET /metrics`` shows."""
        return self._running.metrics.text(self._routes, len(self.clients.open))

    @property
    def api_keys(self) -> Collection[str]:
        """The keys that clients may use; none: everybody may ask."""
        return self._api_keys

    def set_api_keys(self, keys: Collection[str]) -> None:
        """Replace the keys that clients may use; none: everybody may ask. Open requests go on."""
        self._api_keys = keys
        if self._context is not None:
            self._context.set_keys(frozenset(key.encode() for key in keys))

    def configure(self, config: ProxyConfig) -> None:
        """Use other limits and deadlines from the next event on; ``listen`` is read by ``start`` only."""
        self._config = config
        self._routes.configure(queue_limit=config.queue_limit, in_flight_limit=config.in_flight_limit)
        if self._context is None:
            return
        self._context.configure(config, descriptor_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    async def pause_accepting(self) -> None:
        """Accept nothing more; the listeners stay open and the kernel queues connections for whoever accepts next."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()

    async def resume_accepting(self) -> None:
        """Accept on every listener, at the start or after ``pause_accepting``."""
        context, clients = self._running, self.clients
        context.resume()
        for sock in self.sockets:
            own = sock.dup()  # a server closes its socket when it stops; the listener must outlive it
            own.setblocking(False)
            backlog = context.bounds.shares.backlog
            server = context.loop.create_server(lambda: ClientConnection(context, clients), sock=own, backlog=backlog)
            self._servers.append(await server)

    def send_away_waiting(self) -> None:
        """Answer 503 to whoever waits for a worker, now and from now on: none will come any more."""
        self._running.give_up_waiting()

    async def drain(self, grace_s: float) -> int:
        """Accept nothing more and let open requests end; return how many had not after ``grace_s``.

        A connection that was told it may be used again is closed a moment later, not at once: a client that goes
        straight on with its next request would find it closed. That request is answered, as the connection's last.

        The listeners stay open: whoever has them next, a restarted self or a new one, refuses nobody.
        """
        context = self._running
        context.stop()
        await self.pause_accepting()
        try:
            async with asyncio.timeout(grace_s):
                while self.clients.open:  # also those that are closing: a reply's last bytes may still be on their way
                    self._part()
                    await asyncio.sleep(DRAIN_POLL_S)
        except TimeoutError:
            log.warning("proxy.drain_deadline", in_flight=self.stats.in_flight, after_s=grace_s)
        return self.stats.in_flight

    async def export_connections(self) -> tuple[Handed, int]:
        """Leave the open connections to another daemon; what cannot be handed over in time is cut, named and counted.

        The listeners are the other's as well: those of ours are closed, their Unix paths stay.
        """
        context = self._running
        timeout_s = context.config.handover_timeout_s
        stuck = await settle(self.clients, timeout_s)
        await self.pause_accepting()
        if self._timer is not None:
            self._timer.cancel()
        handed, lost = await export_connections(context.loop, self.clients, stuck, timeout_s)
        for each in lost:
            log.warning("proxy.connection_lost", request=each.request, worker=each.worker, why=each.why)
        self._paths = []
        await self._close()
        return handed, len(lost)

    async def stop(self, grace_s: float) -> None:
        """Drain, cut what is left, and close everything; a second time is nothing."""
        if self._context is None:
            return
        self._close_sockets()
        await self.drain(grace_s)
        await self._close()
        log.info("proxy.stopped")

    async def _close(self) -> None:
        context = self._running
        self._close_sockets()
        for client in list(self.clients.open):
            client.reset()
        for pool in context.pools.values():
            pool.close_idle()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*context.tasks, return_exceptions=True)
        for _ in range(ROUNDS_TO_CLOSE):  # transports call connection_lost in one of the loop's next rounds
            await asyncio.sleep(0)
        self._context = None

    @property
    def _running(self) -> ProxyContext:
        assert self._context is not None, "start comes first"
        return self._context

    def _take_from(self, worker: WorkerId, why: str, is_hung: bool) -> None:  # noqa: FBT001 - a callback's
        """Take from a worker, whose process is about to be told to end, what it has; the oldest request first."""
        exchanges = [client.exchange for client in self.clients.open if client.exchange is not None]
        for exchange in sorted((e for e in exchanges if e.worker == worker), key=lambda e: e.started_at_s):
            try:
                exchange.stage.given_up(why, is_hung=is_hung)
            except Exception as error:  # noqa: BLE001 - the worker's task calls this, and the others wait for it
                exchange.broke(error)

    # The sweep

    def _tick(self) -> None:
        """Look at every deadline, then come again."""
        context = self._running
        now_s = context.look_at_clock()
        for client in [client for client in self.clients.open if client.is_late(now_s)]:
            try:
                client.expired()
            except Exception as error:  # noqa: BLE001 - the deadlines of all others hang on this timer
                client.broke(error)
        for client in list(self.clients.unread):
            client.look_for_hangup()
        context.sweep(now_s)
        if context.is_stopping:
            self._part()
        self._timer = context.loop.call_later(context.tick_s, self._tick)

    def _part(self) -> None:
        """Close what is idle, a moment after it was first seen so."""
        self._running.look_at_clock()
        for client in list(self.clients.open):
            client.part_if_idle()

    # Listeners

    def _bind(self, address: str) -> socket.socket:
        try:
            if address.startswith("unix:"):
                return self._bind_unix(Path(address.removeprefix("unix:")))
            host, port = listeners.host_and_port(address)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((host, port))
                sock.listen(BACKLOG)
            except OSError:
                sock.close()
                raise
        except (OSError, ValueError, OverflowError) as error:
            raise L40sError(
                f"cannot listen on {address}: {error}",
                where="[proxy] listen",
                hint="stop whoever has it (ss -ltnp tells), or choose another: host:port, [::1]:port or unix:/path",
                code="cannot_listen",
            ) from error
        return sock

    def _bind_unix(self, path: Path) -> socket.socket:
        """Listen on a path; one left behind by a process that is gone is replaced."""
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(path))
            path.chmod(UNIX_SOCKET_MODE)
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        self._paths.append(path)
        return sock

    def _close_sockets(self) -> None:
        listeners.close(self.sockets, self._paths)
        self.sockets, self.lent, self._paths = [], [], []
