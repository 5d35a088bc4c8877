"""What one daemon tells the next about the proxy's open connections, when it replaces itself by exec.

Descriptors are open in both; everything else is what the next cannot find out from the sockets. Times are on the
monotonic clock, which an exec does not touch.
"""

from dataclasses import dataclass

from l40sd.model import Backend, ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedReply:
    """A reply of which the head and some of the body have been passed on.

    Attributes:
        lines: Its head as it was passed on, framing and all.
        left_bytes: Still to come of a body with a length; -1 for one in chunks (it stands between two of them) and for
            one that ends with its connection.
    """

    status: int
    lines: bytes
    left_bytes: int
    first_byte_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedExchange:
    """A request that a worker has.

    Attributes:
        upstream: Descriptor of the connection to the worker.
        head: The request's, in its plainest form.
        target: What the worker was asked for.
        body: The request's, so that it can be tried elsewhere; empty once a reply has begun.
        name: The model's, as the body has it.
        asked_at_s: When the worker was asked; of no use once a reply has begun.
        begun: What has come of the reply's head, while there is no ``reply``.
        died: Workers that ended with it and had not answered a byte of it.
    """

    upstream: int
    is_reused: bool
    backend: Backend
    head: bytes
    target: bytes
    body: bytes
    name: str
    model: ModelName
    request_id: bytes
    keep_alive: bool
    tries_left: int
    started_at_s: float
    asked_at_s: float
    begun: bytes
    reply: HandedReply | None
    died: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedConnection:
    """One client's connection.

    Attributes:
        client: Its descriptor.
        held: Bytes to take as if they came now: what has no worker yet, and what was sent ahead.
        is_parting: Refused; it is only left open for a moment, so that the client can read why.
    """

    client: int
    held: bytes = b""
    is_parting: bool = False
    exchange: HandedExchange | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """All of them.

    Attributes:
        paused_at_s: Since when nothing was read or accepted.
    """

    paused_at_s: float
    connections: tuple[HandedConnection, ...] = ()

    @property
    def in_flight(self) -> int:
        """How many of them have asked something and not had all of the answer."""
        return sum(bool(c.exchange or c.held) for c in self.connections)

    def descriptors(self) -> list[int]:
        """Return every descriptor that is kept open for the next daemon."""
        clients = [connection.client for connection in self.connections]
        return clients + [c.exchange.upstream for c in self.connections if c.exchange is not None]
