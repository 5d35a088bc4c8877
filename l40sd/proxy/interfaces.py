"""What the parts of one exchange may ask of each other: small protocols, so that imports run one way."""

import asyncio
from typing import Protocol

from l40sd.model import ModelName
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.http1.heads import RequestHead
from l40sd.proxy.refused import Refused
from l40sd.proxy.retry_policy import Seen
from l40sd.proxy.worker_connection import WorkerConnection
from l40sd.routing.routes import Lease


class Client(Protocol):
    """What a client's connection can be told by the exchange that it waits for.

    Attributes:
        transport: Where a reply goes; what is written to it is the present request's answer.
        is_paused: The client takes what is written too slowly.
    """

    transport: asyncio.Transport
    is_paused: bool

    def expect(self, timeout_s: float | None) -> None:
        """Set the deadline of what comes next; None: somebody else watches over it."""

    def will_keep_alive(self) -> bool:
        """Decide, for the head of a reply, whether another request may follow; it is a promise."""

    def close_after_reply(self) -> None:
        """Promise no further request: the end of this reply is the connection's."""

    def release_memory(self) -> None:
        """Count the request's body no more."""

    def finished(self) -> None:
        """Go on to the next request: the answer to this one is written."""

    def refuse(self, refused: Refused, head: RequestHead | None, *, request_id: bytes = b"") -> None:
        """Answer the present request with an error and go on to the next."""

    def close(self) -> None:
        """Close once everything is written."""

    def reset(self) -> None:
        """Close so that the client sees an error, even where a reply's end is the connection's."""

    def reset_unanswered(self, exchange: object) -> None:
        """Reset if it still waits for the answer of this exchange, which has ended and gives none."""


class Stage:
    """Where a request is, and what it holds there; this one: nowhere, and nothing.

    Attributes:
        status: Of the reply that has begun; 0: none has.
        first_byte_at_s: When it had; 0.0: it has not.
        has_worker: A worker has the request, or some of it.
        is_begun: A reply has begun: nothing can be repeated.
    """

    __slots__ = ()

    status: int = 0
    first_byte_at_s: float = 0.0
    has_worker: bool = False
    is_begun: bool = False

    def let_go(self) -> None:
        """Hold nothing any more but the lease, which is the request's."""

    def expired(self) -> None:
        """The deadline of this stage has passed."""

    def given_up(self, why: str, *, is_hung: bool) -> None:
        """Leave the worker, whose process is about to be told to end; what has begun is cut."""

    def pause(self, *, is_paused: bool) -> None:
        """Stop or go on reading the reply: the client takes it too slowly, or keeps up again."""

    def has_moved(self) -> bool:
        """Return whether more of a reply has come since this was asked last."""
        return False

    def is_settled(self) -> bool:
        """Whether it is at a point where another daemon could go on with it, as far as our side is concerned."""
        return True

    def come_to_rest(self) -> None:
        """Read no more of a reply than to the next point where it could be handed over."""


NOWHERE = Stage()
"""Not begun, or between two tries."""
ENDED = Stage()


class Request(Protocol):
    """What a stage may know of its request, and tell it.

    Attributes:
        target: What a worker is asked for.
        name: The model's, as the body has it.
    """

    context: ProxyContext
    client: Client
    head: RequestHead
    target: bytes
    request_id: bytes
    name: str
    model: ModelName
    started_at_s: float

    @property
    def worker(self) -> str:
        """The worker that it is on, or is being connected to; empty: none."""

    def use(self, lease: Lease) -> None:
        """Try it on this worker."""

    def ask(self, lease: Lease, upstream: WorkerConnection) -> None:
        """Send it over this connection."""

    def enter(self, stage: Stage) -> None:
        """Be in another stage, which has what the present one held."""

    def leave(self, lease: Lease, seen: Seen, why: str) -> bool:
        """Go on after a failed try; return False where the worker's own reply is to be passed on."""

    def answered(self, lease: Lease) -> None:
        """Count a worker's good answer."""

    def end(self, problem: str, status: int = 0, *, is_failed: bool = False) -> None:
        """End it and let go of everything; the client is told by whoever calls."""

    def end_whole(self, lease: Lease, status: int, first_byte_at_s: float = 0.0) -> None:
        """End it with a whole reply, and let go of the worker, whose connection is released already.

        Args:
            lease: The hold on the worker.
            status: Below 500.
            first_byte_at_s: When the reply began; 0.0: only now.
        """

    def refuse(self, refused: Refused) -> None:
        """End it with an error of ours."""

    def broke(self, error: Exception) -> None:
        """End it: our own code failed on it."""
