"""Open connections on their way from one daemon to the next, over an exec in the same process.

    settle --> export_connections --> (exec) --> import_connections

``settle`` waits while everything goes on, so that a client that does not read delays nobody else. The export takes one
connection after the other out of this daemon: from its description on, nothing here reads or writes it, and closing our
descriptor tells neither side anything, because the copy is open. The import is its mirror in the next daemon.
"""

import asyncio
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

from l40sd.proxy.client_connection import ClientConnection, ClientConnections
from l40sd.proxy.client_handover import come_to_rest, export_client, import_client, is_settled
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.exchange_handover import import_exchange
from l40sd.proxy.handed import Handed, HandedConnection

POLL_S = 0.002
ROUNDS = 3  # of the loop: a connection that was accepted in one is known to us in the next
BATCH = 64  # connections whose descriptors are open twice at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A connection that could not be handed over."""

    request: str
    worker: str
    why: str


async def settle(clients: ClientConnections, timeout_s: float) -> set[ClientConnection]:
    """Wait until each connection has once been where it can be handed over; return those that were not in time."""
    unsettled = set(clients.open)
    try:
        async with asyncio.timeout(timeout_s):
            while unsettled := {c for c in unsettled if c in clients.open and not is_settled(c)}:
                for client in unsettled:
                    come_to_rest(client)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        pass
    return unsettled


async def export_connections(
    loop: asyncio.AbstractEventLoop,
    clients: ClientConnections,
    stuck: Collection[ClientConnection],
    timeout_s: float,
) -> tuple[Handed, list[Lost]]:
    """Take every connection out of this daemon. Accepting has been paused.

    Args:
        loop: That runs the proxy.
        clients: Its connections.
        stuck: Connections that need not be waited for.
        timeout_s: For those that left the point where they were settled.
    """
    paused_at_s = loop.time()
    taken: list[HandedConnection] = []
    lost: list[Lost] = []
    rounds = 0
    while rounds < ROUNDS or (loop.time() < paused_at_s + timeout_s and any(c not in stuck for c in clients.open)):
        for client in sorted(clients.open, key=_place):
            if client not in clients.open or client.transport.is_closing():
                continue
            if is_settled(client):
                _take(client, taken, lost)
                if len(taken) % BATCH == 0:
                    await _turn()
            else:
                come_to_rest(client)
        await asyncio.sleep(POLL_S if rounds >= ROUNDS else 0)
        rounds += 1
    for client in list(clients.open):
        if client.transport.get_write_buffer_size():
            lost.append(_lost(client, "its client does not read"))
        elif not client.transport.is_closing():
            _take(client, taken, lost)
    return Handed(paused_at_s=paused_at_s, connections=tuple(taken)), lost


async def import_connections(context: ProxyContext, clients: ClientConnections, handed: Handed) -> None:
    """Go on with the connections of an earlier daemon."""
    loop = context.loop
    landed = await asyncio.gather(*(_land(loop, c.client) for c in handed.connections))
    upstreams = await asyncio.gather(
        *(_land(loop, c.exchange.upstream) for c in handed.connections if c.exchange is not None)
    )
    further = iter(upstreams)
    for connection, client in zip(handed.connections, landed, strict=True):
        upstream = next(further) if connection.exchange is not None else None
        if not client.is_lost:
            _go_on(context, clients, connection, client, upstream)
        elif upstream is not None and upstream.transport is not None:
            upstream.transport.abort()


class Landing(asyncio.Protocol):
    """The first protocol of a connection that is taken over: keeps what comes until the real one is in its place."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.is_lost = False
        self._data: list[bytes] = []
        self._has_ended = False
        self._error: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Keep it."""
        self._data.append(data)

    def eof_received(self) -> bool:
        """Keep that as well, and the transport open."""
        self._has_ended = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to take over."""
        self.is_lost = True
        self._error = exc

    def pass_on(self, protocol: asyncio.Protocol) -> None:
        """Let the real protocol have what came; from now on it is the transport's."""
        for data in self._data:
            protocol.data_received(data)
        if self.is_lost:
            protocol.connection_lost(self._error)
        elif self._has_ended and not protocol.eof_received() and self.transport is not None:
            self.transport.close()


async def _land(loop: asyncio.AbstractEventLoop, descriptor: int) -> Landing:
    landing = Landing()
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    try:
        await loop.connect_accepted_socket(lambda: landing, sock)
    except OSError:
        sock.close()
        landing.is_lost = True
    return landing


def _go_on(
    context: ProxyContext,
    clients: ClientConnections,
    handed: HandedConnection,
    landed: Landing,
    upstream_landed: Landing | None,
) -> None:
    client = ClientConnection(context, clients)
    assert landed.transport is not None
    import_client(client, landed.transport, handed)
    landed.transport.set_protocol(client)
    if handed.exchange is None or upstream_landed is None:
        landed.pass_on(client)
        return
    if upstream_landed.transport is None:
        client.reset()
        return
    exchange, upstream = import_exchange(context, client, handed.exchange, upstream_landed.transport)
    client.import_exchange(exchange)
    landed.pass_on(client)
    if client.exchange is not None:
        upstream_landed.pass_on(upstream)


def _take(client: ClientConnection, taken: list[HandedConnection], lost: list[Lost]) -> None:
    try:
        handed = export_client(client)
    except OSError as error:
        lost.append(_lost(client, str(error)))
        client.reset()
        return
    if handed is None:
        lost.append(_lost(client, "its reply stands in the middle of a chunk"))
        client.reset()
    else:
        taken.append(handed)


def _lost(client: ClientConnection, why: str) -> Lost:
    exchange = client.exchange
    if exchange is None:
        return Lost(request="", worker="", why=why)
    return Lost(request=exchange.request_id.decode(), worker=exchange.worker, why=why)


def _place(client: ClientConnection) -> tuple[bool, float]:
    """Who has no worker comes first: else it would get the place of one that has just been taken. Then the oldest."""
    exchange = client.exchange
    return (False, 0.0) if exchange is None else (exchange.stage.has_worker, exchange.started_at_s)


async def _turn() -> None:
    """Let the loop close what was aborted."""
    for _ in range(ROUNDS):
        await asyncio.sleep(0)
