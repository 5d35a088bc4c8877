"""What a daemon keeps when it replaces itself by exec: the same pid and children, its lock and its listeners."""

import os
import signal
import socket
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

VARIABLE = "L40SD_HANDOVER"
"""``LOCK:LISTENER,LISTENER``: numbers of the descriptors that are kept."""

HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Descriptors from the daemon that this process was before."""

    lock: int
    listeners: tuple[socket.socket, ...]


def take(environ: MutableMapping[str, str] = os.environ) -> Handover | None:
    """Return what was handed over, once; None for a process that has just been started."""
    text = environ.pop(VARIABLE, "")
    if not text:
        return None
    lock, _, listeners = text.partition(":")
    sockets = []
    for number in filter(None, listeners.split(",")):
        os.set_inheritable(int(number), False)
        listener = socket.socket(fileno=int(number))
        listener.setblocking(False)
        sockets.append(listener)
    return Handover(lock=int(lock), listeners=tuple(sockets))


def give(lock: int, listeners: Sequence[socket.socket], environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep these descriptors over the exec to come; copies, so that the originals may be closed in the usual way."""
    kept = [_copy(listener.fileno()) for listener in listeners]
    environ[VARIABLE] = f"{_copy(lock)}:{','.join(map(str, kept))}"


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
