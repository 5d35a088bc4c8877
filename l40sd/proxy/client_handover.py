"""One client's connection on its way from one daemon to the next, with the request that is under way on it."""

import asyncio
import os

from l40sd.proxy.client_connection import ClientConnection
from l40sd.proxy.exchange_handover import export_exchange
from l40sd.proxy.handed import HandedConnection, HandedExchange
from l40sd.proxy.sockets import duplicate


def is_settled(client: ClientConnection) -> bool:
    """Whether it is at a point where another daemon could go on with it: nothing unsent, between two chunks."""
    if client.transport.get_write_buffer_size():
        return False
    return client.exchange is None or client.exchange.stage.is_settled()


def come_to_rest(client: ClientConnection) -> None:
    """Send no more of a reply than to the next such point."""
    if client.exchange is not None:
        client.exchange.stage.come_to_rest()


def export_client(client: ClientConnection) -> HandedConnection | None:
    """End a connection here, for another daemon to go on; None, and nothing has ended, where that cannot be.

    Raises:
        OSError: There is no descriptor for it.
    """
    descriptor = duplicate(client.transport)
    try:
        found = _describe(client)
    except BaseException:
        os.close(descriptor)
        raise
    if found is None:
        os.close(descriptor)
        return None
    exchange, held = found
    handed = HandedConnection(client=descriptor, held=held, is_parting=client.is_closing, exchange=exchange)
    client.leave()
    return handed


def _describe(client: ClientConnection) -> tuple[HandedExchange | None, bytes] | None:
    """Return what a worker has, and what is to be read again; None where nobody could go on."""
    if client.is_closing:
        return None, b""
    if client.exchange is None:
        return None, client.reader.unread()
    match export_exchange(client.exchange, keep_alive=client.keep_alive):
        case None:
            return None
        case bytes(again):
            return None, again + client.reader.held
        case handed:
            return handed, client.reader.held


def import_client(client: ClientConnection, transport: asyncio.Transport, handed: HandedConnection) -> None:
    """Go on with a connection that an earlier daemon accepted; its exchange is set by whoever has both ends."""
    client.import_connection(transport, is_parting=handed.is_parting)
    if handed.is_parting:
        return
    if handed.exchange is not None:
        body_bytes = len(handed.exchange.body)
        client.import_request(keep_alive=handed.exchange.keep_alive, body_bytes=body_bytes, held=handed.held)
    elif handed.held:
        client.data_received(handed.held)
