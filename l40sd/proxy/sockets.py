"""What is asked of a connection's socket, beside its transport."""

import asyncio
import os
import select
import socket
import struct


def duplicate(transport: asyncio.Transport) -> int:
    """Return another descriptor of a connection, which stays open when the transport closes its own."""
    return os.dup(transport.get_extra_info("socket").fileno())


def has_hung_up(transport: asyncio.Transport) -> bool:
    """Return whether the other side has gone: where the socket is not being read, no event tells of it."""
    raw = transport.get_extra_info("socket")
    if raw is None or raw.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(raw.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


def reset(transport: asyncio.Transport) -> None:
    """Close a connection so that the other side sees an error, even where the end of what is sent is its end."""
    raw = transport.get_extra_info("socket")
    if raw is not None and raw.family != socket.AF_UNIX:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
