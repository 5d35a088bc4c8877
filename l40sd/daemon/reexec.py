"""What a daemon keeps when it replaces itself by exec: the same pid and children, its lock, listeners and connections.

What is known of the connections goes along in a file without a name, which nobody else can open: API keys are in it.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import msgspec

from l40sd.proxy.handed import Handed

VARIABLE = "L40SD_HANDOVER"
"""``LOCK:LISTENER,LISTENER``: numbers of the descriptors that are kept."""
OWN_VARIABLE = "L40SD_HANDOVER_OWN"
"""``LISTENER,LISTENER``: which of them the daemon bound itself. Not a part of the other, which older versions read."""
CONNECTIONS_VARIABLE = "L40SD_HANDOVER_CONNECTIONS"
"""The number of the file's descriptor; a variable of its own, for releases that know the other one only."""
CONNECTIONS_VERSION = 1
"""Of ``Handed``; another one's connections are closed."""
ANSWER_LIMIT = 2000

HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """What the daemon that this process was before has left.

    Attributes:
        lock: Its descriptor.
        own: Listeners that it had bound itself.
        lent: Those that systemd had given it, or, from an older version, all.
        connections: None when it handed none over.
        problem: Why connections that were handed over had to be closed; empty as a rule.
    """

    lock: int
    own: tuple[socket.socket, ...]
    lent: tuple[socket.socket, ...]
    connections: Handed | None = None
    problem: str = ""


class _Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """The part that every version can read: enough to close what cannot be understood."""

    version: int
    descriptors: list[int]
    connections: msgspec.Raw


def take(environ: MutableMapping[str, str] = os.environ) -> Handover | None:
    """Return what was handed over, once; None for a process that has just been started."""
    connections, problem = _take_connections(environ.pop(CONNECTIONS_VARIABLE, ""))
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
    return Handover(lock=int(lock), own=tuple(own), lent=tuple(lent), connections=connections, problem=problem)


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


def give_connections(handed: Handed, environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep these connections' descriptors over the exec to come, and what the next daemon has to know of them."""
    descriptors = handed.descriptors()
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    connections = msgspec.Raw(msgspec.msgpack.encode(handed))
    envelope = _Envelope(version=CONNECTIONS_VERSION, descriptors=descriptors, connections=connections)
    file = os.memfd_create("l40sd-connections", 0)
    with open(file, "wb", closefd=False) as writer:
        writer.write(msgspec.msgpack.encode(envelope))
    environ[CONNECTIONS_VARIABLE] = str(file)


def command() -> list[str]:
    """Return the command of the release now installed, with this process's arguments.

    It is looked up by the name we were started under: /opt/l40sd/current/bin/l40sd is another release by now, while
    ``sys.executable`` is still the old one's.
    """
    if os.access(sys.argv[0], os.X_OK):
        return sys.argv
    return [sys.executable, "-m", "l40sd", *sys.argv[1:]]


async def check(timeout_s: float) -> str:
    """Let the release now installed check the configuration that it would start with; return what it objects to."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command(), "--check-config",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        return f"{command()[0]}: {error.strerror}"
    try:
        async with asyncio.timeout(timeout_s):
            _, said = await process.communicate()
    except TimeoutError:
        return f"{command()[0]} --check-config did not answer within {timeout_s:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        return said.decode("utf-8", "replace").strip()[-ANSWER_LIMIT:] or f"exit status {process.returncode}"
    return ""


def exec_again() -> None:
    """Replace this process's program by the one now installed, with the same arguments. Does not return."""
    arguments = command()
    os.execv(arguments[0], arguments)


def tell_next(number: signal.Signals) -> None:
    """Let the daemon that this process becomes receive a signal that came for it."""
    hold_signals()
    signal.raise_signal(number)


def hold_signals() -> None:
    """Let the signals that we answer wait, over an exec too, for ``release_signals``: their default is our death."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release_signals() -> None:
    """Receive them, those that came meanwhile first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def _take_connections(text: str) -> tuple[Handed | None, str]:
    """Return the connections that were handed over, or why there are none though there were."""
    if not text:
        return None, ""
    with open(int(text), "rb") as reader:
        reader.seek(0)
        data = reader.read()
    try:
        envelope = msgspec.msgpack.decode(data, type=_Envelope)
    except msgspec.MsgspecError as error:
        return None, f"their description cannot be read: {error}"
    problem = f"version {envelope.version} of their description is not known here"
    if envelope.version == CONNECTIONS_VERSION:
        try:
            handed = msgspec.msgpack.decode(envelope.connections, type=Handed)
        except msgspec.MsgspecError as error:
            problem = f"their description cannot be read: {error}"
        else:
            for descriptor in envelope.descriptors:
                os.set_inheritable(descriptor, False)
            return handed, ""
    for descriptor in envelope.descriptors:
        os.close(descriptor)
    return None, problem


def _copy(descriptor: int) -> int:
    copy = os.dup(descriptor)
    os.set_inheritable(copy, True)
    return copy
