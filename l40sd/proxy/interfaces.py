"""What the parts of one exchange may ask of each other: small protocols, so that imports run one way."""

import asyncio
from typing import Protocol

from l40sd.proxy.http1.heads import RequestHead
from l40sd.proxy.refused import Refused


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
