"""What the connections of one proxy may take together: places, a part of them from one address, memory for bodies."""

import asyncio
import ipaddress
from collections import Counter

from l40sd.config.options import ProxyConfig
from l40sd.proxy.descriptors import Shares, share
from l40sd.proxy.refused import Refused

FREE_BODY_BYTES = 16384
"""A request's body up to this size is not counted: ``connection_limit`` bounds those, and counting costs."""

IPV6_SITE_BITS = 64  # what one customer has is one address


class Bounds:
    """Counts what is taken. Changed by the connections, each for its own part.

    Attributes:
        shares: Of the file descriptors.
        body_bytes: Bodies held now: being read, or kept until a worker has begun to answer.
    """

    def __init__(self) -> None:
        self.shares = Shares(clients=1, refused=1, upstreams=1, backlog=1)
        self.body_bytes = 0
        self._body_memory_bytes = 0
        self._address_limit = 1
        self._addresses: Counter[str] = Counter()

    def configure(self, config: ProxyConfig, descriptors: int) -> None:
        """Set the limits; what is taken already stays taken."""
        self.shares = share(descriptors, config.connection_limit)
        self._address_limit = config.address_connection_limit or self.shares.clients - self.shares.clients // 4
        self._body_memory_bytes = max(config.body_memory_bytes, config.body_limit_bytes)

    def enter(self, address: str, clients: int) -> Refused | None:
        """Count a connection from an address; return why it is not served, None when it is.

        Args:
            address: As ``address_of`` gave it; ``leave`` it in the end.
            clients: There are without it.
        """
        if address:
            self._addresses[address] += 1
        if clients >= self.shares.clients:
            return Refused(503, "overloaded", "too many connections")
        if self._addresses[address] > self._address_limit:
            return Refused(429, "too_many_connections", f"more than {self._address_limit} connections from one address")
        return None

    def leave(self, address: str) -> None:
        """Count a connection no more."""
        if address:
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    def hold_memory(self, size_bytes: int) -> None:
        """Count more of a body that is there already, within the limit or not."""
        self.body_bytes += size_bytes

    def give_back_memory(self, size_bytes: int) -> None:
        """Count so much of a body no more."""
        self.body_bytes -= size_bytes

    def take_memory(self, size_bytes: int) -> None:
        """Count more of a body; the caller gives it back, also when this raises.

        Raises:
            Refused: 503; all bodies together are too large.
        """
        self.body_bytes += size_bytes
        if self.body_bytes > self._body_memory_bytes:
            raise Refused(503, "overloaded", "the bodies of the requests under way take all the memory that they may")


def address_of(transport: asyncio.BaseTransport) -> str:
    """Return whom a connection comes from, as far as one is to be told from another; empty for a Unix socket."""
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple):
        return ""
    try:
        address = ipaddress.ip_address(str(name[0]).partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, IPV6_SITE_BITS), strict=False).network_address)
