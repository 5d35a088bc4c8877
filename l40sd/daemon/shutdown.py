"""How a daemon can end."""

from enum import StrEnum

PROXY_GRACE_S = 5.0
"""For open requests, once there are no workers to answer them."""


class ShutdownReason(StrEnum):
    """Why the daemon ends, which decides what becomes of the workers."""

    STOP = "stop"  # nothing shall serve any more: drain and stop all of them
    RESTART = "restart"  # another daemon follows: leave them
    UPGRADE = "upgrade"  # this process becomes the next daemon: leave them, keep the listener
