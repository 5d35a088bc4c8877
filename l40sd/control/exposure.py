"""Whom an address of ``[proxy] listen`` is open to."""

import ipaddress


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches ``host:port``, ``[v6]:port`` or ``unix:/path``.

    A name other than localhost may be anything, and counts as open.
    """
    if address.startswith("unix:"):
        return True
    host = _host(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connects_to(address: str) -> str | tuple[str, int] | None:
    """Return where to connect to reach whoever listens there; None for any free port.

    Whoever listens everywhere listens on the loopback address, too.
    """
    if address.startswith("unix:"):
        return address.removeprefix("unix:")
    host, port = _host(address), int(address.rpartition(":")[2])
    if not port:
        return None
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
