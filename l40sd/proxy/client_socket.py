"""One accepted connection among others: its place, its deadline, what it takes of the memory, how it closes."""

import asyncio
from math import inf
from typing import cast

from l40sd.proxy import sockets
from l40sd.proxy.bounds import address_of
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.refused import Refused

LINGER_S = 2.0  # for a refused client to read why before its connection is reset
PARTING_S = 0.25  # for a request that is on its way on an idle connection, when nothing new shall come


class ClientSocket(asyncio.Protocol):
    """What a client's connection is whatever is said on it.

    Attributes:
        is_closing: Nothing further is read or answered.
        is_paused: The client takes what is written too slowly.
        keep_alive: Another request may follow.
        deadline_s: Of what comes next, on the loop's clock.
    """

    __slots__ = (
        "_address",
        "_ahead_bytes",
        "_context",
        "_timeout_s",
        "deadline_s",
        "is_closing",
        "is_paused",
        "keep_alive",
        "transport",
    )

    def __init__(self, context: ProxyContext) -> None:
        self._context = context
        self.is_closing = False
        self.is_paused = False
        self.keep_alive = True
        self.deadline_s = inf
        self._timeout_s = inf
        self._address = ""  # that it is counted under
        self._ahead_bytes = 0  # of the memory for bodies, for what was sent ahead

    # Its place

    def take_place(self, transport: asyncio.BaseTransport, connections: int) -> Refused | None:
        """Be counted under the address that it comes from; return why it is not served, None when it is.

        Args:
            transport: The connection's.
            connections: There are without it.
        """
        self.transport = cast(asyncio.Transport, transport)  # uvloop has no common base class
        self._address = address_of(transport)
        return self._context.bounds.enter(self._address, connections)

    def leave_place(self) -> None:
        """Be counted no more."""
        self._context.bounds.leave(self._address)
        self._address = ""

    def take_memory_ahead(self, size_bytes: int) -> None:
        """Count what was sent ahead.

        Raises:
            Refused: There is no memory left for it.
        """
        self._ahead_bytes = size_bytes
        self._context.bounds.take_memory(size_bytes)

    def release_memory_ahead(self) -> None:
        """Count no more of what was sent ahead."""
        self._context.bounds.give_back_memory(self._ahead_bytes)
        self._ahead_bytes = 0

    # Its deadline

    def expect(self, timeout_s: float | None) -> None:
        """Set the deadline of what comes next; None: somebody else watches over it."""
        self._timeout_s = inf if timeout_s is None else timeout_s + self._context.tick_s
        self.deadline_s = self._context.now_s + self._timeout_s

    def moved(self) -> None:
        """Start the present deadline anew."""
        self.deadline_s = self._context.now_s + self._timeout_s

    def part(self) -> None:
        """Close an idle connection soon: a client that has just been told it may go on is not cut off in doing so."""
        self.deadline_s = min(self.deadline_s, self._context.now_s + PARTING_S)

    # Its end

    def will_keep_alive(self) -> bool:
        """Decide, for the head of a reply, whether another request may follow; it is a promise."""
        self.keep_alive = self.keep_alive and not self._context.is_stopping
        return self.keep_alive

    def close_after_reply(self) -> None:
        """Promise no further request: the end of this reply is the connection's."""
        self.keep_alive = False

    def close_written(self) -> None:
        """Close once everything is written."""
        self.is_closing = True
        self.expect(LINGER_S)  # a client that reads nothing is cut off then
        self.transport.close()

    def close_read(self) -> None:
        """Close once the client has read why, or a moment later."""
        self.is_closing = True
        self.expect(LINGER_S)
        if self.transport.can_write_eof():
            self.transport.write_eof()  # closing now, with bytes unread, would reset the answer away

    def close_reset(self) -> None:
        """Close so that the client sees an error, even where a reply's end is the connection's."""
        self.is_closing = True
        sockets.reset(self.transport)

    # From one daemon to the next

    def import_socket(self, transport: asyncio.Transport, *, is_parting: bool) -> None:
        """Be a connection that an earlier daemon accepted.

        Args:
            transport: The connection's.
            is_parting: It was refused, and is left open for a moment so that the client can read why.
        """
        self.take_place(transport, 0)
        self.is_closing = is_parting
        self.expect(LINGER_S if is_parting else self._context.config.client_idle_timeout_s)
