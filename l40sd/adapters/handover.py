"""What a daemon keeps when it replaces itself by exec: the same pid and children, its lock and its listeners."""

import os
import signal
import socket
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

VARIABLE = "L40SD_HANDOVER"
"""``LOCK:LISTENER,LISTENER``: numbers of the descriptors that are kept."""
OWN_VARIABLE = "L40SD_HANDOVER_OWN"
"""``LISTENER,LISTENER``: which of them the daemon bound itself. Not a part of the other, which older versions read."""

HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Descriptors from the daemon that this process was before.

    Attributes:
        own: Listeners that it had bound itself.
        lent: Those that systemd had given it, or, from an older version, all.
    """

    lock: int
    own: tuple[socket.socket, ...]
    lent: tuple[socket.socket, ...]


def take(environ: MutableMapping[str, str] = os.environ) -> Handover | None:
    """Return what was handed over, once; None for a process that has just been started."""
    text = environ.pop(VARIABLE, "")
    if not text:
        return None
    lock, _, listeners = text.partition(":")
    owned = environ.pop(OWN_VARIABLE, "").split(",")
    own: list[socket.socket] = []
    lent: list[socket.socket] = []
    for number in filter(None, listeners.split(",")):
        os.set_inheritable(int(number), False)
        listener = socket.socket(fileno=int(number))
        listener.setblocking(False)
        (own if number in owned else lent).append(listener)
    return Handover(lock=int(lock), own=tuple(own), lent=tuple(lent))


def give(
    lock: int,
    *,
    own: Sequence[socket.socket],
    lent: Sequence[socket.socket],
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Keep these descriptors over the exec to come; copies, so that the originals may be closed in the usual way."""
    owned = [str(_copy(listener.fileno())) for listener in own]
    kept = [str(_copy(listener.fileno())) for listener in lent]
    environ[VARIABLE] = f"{_copy(lock)}:{','.join([*kept, *owned])}"
    environ[OWN_VARIABLE] = ",".join(owned)


def exec_again() -> None:
    """Replace this process's program by the one now installed, with the same arguments. Does not return.

    The command is looked up by the name it was started under: /opt/l40sd/current/bin/l40sd is another release by now,
    while ``sys.executable`` is still the old one's.
    """
    if os.access(sys.argv[0], os.X_OK):
        os.execv(sys.argv[0], sys.argv)
    os.execv(sys.executable, [sys.executable, "-m", "l40sd", *sys.argv[1:]])


def hold_signals() -> None:
    """Let the signals that we answer wait, over an exec too, for ``release_signals``: their default is our death."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release_signals() -> None:
    """Receive them, those that came meanwhile first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def _copy(descriptor: int) -> int:
    copy = os.dup(descriptor)
    os.set_inheritable(copy, True)
    return copy
