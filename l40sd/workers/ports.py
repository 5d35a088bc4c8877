"""Ports for workers, held from before the engine starts until it is gone.

A port that is only looked for can be taken by somebody else before the engine binds it: by a bind to port 0, or
as the local end of an outgoing connection. So it is bound here, with SO_REUSEADDR and SO_REUSEPORT, and never
listened on. Measured on Linux 6.18 (tests/workers/test_ports.py repeats it): an engine that sets either option
binds and listens beside us, on 127.0.0.1, 0.0.0.0 and [::]; binds to port 0 and outgoing connections stay away;
holding with only one of the two options shuts out engines that set only the other. A program that sets
neither needs ``HeldPort.let_go`` before it starts.

Two daemons of one user can both bind a port that way, so each port is also **claimed**: by a Unix socket with an
abstract name, which lives in the network namespace as ports do and goes with its owner however that dies. Of a
daemon that is away the worker itself is listening; only one that was killed before its engine listened leaves a
port that another daemon may take first. Another user cannot bind beside us at all.
"""

import contextlib
import os
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from l40sd.errors import L40sError

LISTEN = "0A"
"""TCP_LISTEN in /proc/net/tcp."""
NAMED_IN_ERRORS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranger:
    """Who has a port; pid None and command empty where this user may not know."""

    port: int
    pid: int | None = None
    command: str = ""

    def __str__(self) -> str:
        if self.pid is None:
            return f"port {self.port} is in use"
        return f"port {self.port} is in use by pid {self.pid} ({self.command})"


class HeldPort:
    """One port of the pool; ``is_held`` says whether we have it bound beside the engine."""

    def __init__(self, pool: "PortPool", port: int, held: socket.socket | None, claim: socket.socket | None) -> None:
        self.port = port
        self._pool = pool
        self._socket = held
        self._claim = claim

    @property
    def is_held(self) -> bool:
        """False for an adopted engine that set SO_REUSEADDR only, and after ``let_go``."""
        return self._socket is not None

    def let_go(self) -> None:
        """Unbind, for an engine that sets neither option; the pool still counts it as taken."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def release(self) -> None:
        """Unbind and give back to the pool; a second call does nothing."""
        self.let_go()
        if self._claim is not None:
            self._claim.close()
            self._claim = None
        self._pool._taken.pop(self.port, None)


class PortPool:
    """The ports from ``first`` to ``last`` on one address."""

    def __init__(self, host: str, first: int, last: int) -> None:
        """Look the address up.

        Raises:
            L40sError: It is no address of this host's families.
        """
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise L40sError(
                f"{host}: {error.strerror}", where="workers.host", hint="an IP address", code="bad_host"
            ) from error
        self._family: socket.AddressFamily = found[0]
        self._address: tuple[Any, ...] = found[4]
        self._ports = range(first, last + 1)
        self._taken: dict[int, HeldPort] = {}

    def take(self, *, avoid: Collection[int] = ()) -> HeldPort:
        """Return the lowest port that nobody has, bound. Takes below 1 ms.

        Args:
            avoid: Ports not to take although they are free.

        Raises:
            L40sError: None is left; names who has them, as far as we may know (``no_port``).
        """
        listening = set(listening_ports())
        skipped: list[int] = []
        for port in self._ports:
            if port in self._taken or port in avoid:
                continue
            claim = None if port in listening else claimed(port)
            held = self._bind(port) if claim is not None else None
            if claim is None or held is None:
                if claim is not None:
                    claim.close()
                skipped.append(port)
                continue
            self._taken[port] = HeldPort(self, port, held, claim)
            return self._taken[port]
        named = "".join(f"; {who_has(port)}" for port in skipped[:NAMED_IN_ERRORS])
        raise L40sError(
            f"no port is left of {self._ports.start} to {self._ports.stop - 1}:"
            f" {len(self._taken)} are workers', {len(skipped)} are others'{named}",
            where="workers.port_first",
            hint="widen port_first to port_last, or end who has them",
            code="no_port",
        )

    def adopt(self, port: int) -> HeldPort:
        """Return the port of a worker that runs already, bound if its engine lets us."""
        if port not in self._taken:
            self._taken[port] = HeldPort(self, port, self._bind(port), claimed(port))
        return self._taken[port]

    def strangers(self) -> list[Stranger]:
        """Return who listens on ports of this pool that no worker has. Reads all of /proc: some 10 ms."""
        ports = set(listening_ports()) & set(self._ports) - self._taken.keys()
        return [who_has(port) for port in sorted(ports)]

    def close(self) -> None:
        """Release everything."""
        for held in list(self._taken.values()):
            held.release()

    def _bind(self, port: int) -> socket.socket | None:
        held = socket.socket(self._family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind((self._address[0], port, *self._address[2:]))
        except OSError:
            held.close()
            return None
        return held


def claimed(port: int) -> socket.socket | None:
    """Return a claim to a port, for as long as it is open; None while another daemon of this user has one."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0l40sd-port-{os.geteuid()}-{port}")
    except OSError:
        claim.close()
        return None
    return claim


def listening_ports() -> Iterator[int]:
    """Yield the ports that anybody in this network namespace listens on, over IPv4 or IPv6.

    Our own bind does not tell: it succeeds beside one of our user's listeners that set SO_REUSEPORT.
    """
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # no IPv6
            for line in Path(f"/proc/net/{name}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN:
                    yield int(fields[1].rpartition(":")[2], 16)


def who_has(port: int) -> Stranger:
    """Return who has a port, listening or only bound, as far as this user may know."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid is not None:
                command = " ".join(psutil.Process(connection.pid).cmdline())[:200]
                return Stranger(port=port, pid=connection.pid, command=command)
    except (psutil.Error, OSError):
        pass
    return Stranger(port=port)
