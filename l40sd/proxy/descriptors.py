"""How a process's file descriptors are shared out: clients, connections to workers, and what must always find one."""

from dataclasses import dataclass

RESERVED = 192
"""For the control socket, probes, state, logs, pidfds and pipes of workers: they find one whatever clients do."""

BACKLOG = 4096
"""Connections that the kernel queues for a listener, where descriptors are many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What each may have at once.

    Attributes:
        clients: Connections that are served.
        refused: Further ones that are being told so; beyond them a connection is closed without a word.
        upstreams: Connections to workers: each client may need one.
        backlog: Connections that may be accepted in one turn of the loop, before anybody looks at them.
    """

    clients: int
    refused: int
    upstreams: int
    backlog: int


def needed(connection_limit: int) -> int:
    """Return how many file descriptors a process needs for so many clients."""
    return 2 * RESERVED + connection_limit * 16 // 7 + 16


def share(descriptors: int, connection_limit: int) -> Shares:
    """Return the shares, which together with the reserve are never more than the process may have open.

    Args:
        descriptors: That the process may have open (``ulimit -n``). Below 32 there is nothing to share.
        connection_limit: Clients that are wanted at most.
    """
    rest = descriptors - min(RESERVED, descriptors // 2)
    passing = min(2 * BACKLOG, max(4, rest // 8))  # not served: being told so, or not looked at yet
    clients = max(1, min(connection_limit, (rest - passing) // 2))
    return Shares(clients=clients, refused=passing // 2, upstreams=clients, backlog=passing - passing // 2)
