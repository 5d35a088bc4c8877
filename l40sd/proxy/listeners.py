"""The listeners that were there before the proxy: which of them the configuration means, and what becomes of the rest.

Two kinds are inherited. Those that systemd **lent** stay open whatever we do, because systemd has them as well: one
that nobody accepts on would let clients wait for ever. So they are served even where the configuration does not name
them, and that is said. Those that are our **own**, bound by the process that this one was before an upgrade, are
closed when the configuration does not name them any more: it was changed, and the old address is expected to be gone.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

import structlog

log = structlog.get_logger()

HINT = (
    "l40sd.socket names it and [proxy] listen does not: `systemctl edit l40sd.socket`, then `systemctl stop l40sd` and"
    " `systemctl start l40sd`; a restart keeps it"
)


def take_over(
    listen: Sequence[str], *, lent: Sequence[socket.socket], own: Sequence[socket.socket]
) -> tuple[list[socket.socket], list[socket.socket], list[str]]:
    """Return the lent and the own listeners to serve on, and the addresses that are left to bind.

    An own one that is not meant is closed here, before anything is bound: it may be in the way.
    """
    meant: dict[str, socket.socket] = {}
    for address in sorted(listen, key=lambda each: each.endswith(":0")):  # any port: whatever is left on this host
        found = (sock for sock in (*lent, *own) if sock not in meant.values() and is_at(sock, address))
        if (sock := next(found, None)) is not None:
            meant[address] = sock
    for sock in lent:
        if sock not in meant.values():
            log.warning("proxy.listener_not_configured", address=address_of(sock), hint=HINT)
    for sock in own:
        if sock not in meant.values():
            log.warning("proxy.listener_closed", address=address_of(sock), reason="not in [proxy] listen any more")
            close([sock], unix_paths([sock]))
    kept = [sock for sock in own if sock in meant.values()]
    return list(lent), kept, [address for address in listen if address not in meant]


def is_at(sock: socket.socket, address: str) -> bool:
    """Whether this listener is what ``host:port``, ``[v6]:port`` or ``unix:/path`` asks for; port 0 asks for any."""
    if address.startswith("unix:") or sock.family == socket.AF_UNIX:
        return address == address_of(sock)
    host, port = host_and_port(address)
    at, at_port = sock.getsockname()[:2]
    try:
        found = socket.getaddrinfo(host, None, family=sock.family, type=socket.SOCK_STREAM)
    except OSError:  # a name without an address of this family
        return False
    return port in (0, at_port) and at in {sockaddr[0] for *_, sockaddr in found}


def host_and_port(address: str) -> tuple[str, int]:
    """Return the parts of ``host:port`` or ``[v6]:port``."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def address_of(sock: socket.socket) -> str:
    """Return where a listener is, as the configuration would name it."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(name)}"
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unix_paths(sockets: Iterable[socket.socket]) -> list[Path]:
    """Return the files of those that are Unix sockets."""
    return [Path(os.fsdecode(sock.getsockname())) for sock in sockets if sock.family == socket.AF_UNIX]


def close(sockets: Iterable[socket.socket], paths: Iterable[Path]) -> None:
    """Close the listeners and remove these files."""
    for sock in sockets:
        sock.close()
    for path in paths:
        path.unlink(missing_ok=True)
