"""One request on its way from one daemon to the next, with its connection to the worker that has it."""

import asyncio

from l40sd.proxy.context import ProxyContext
from l40sd.proxy.exchange import Exchange
from l40sd.proxy.handed import HandedExchange, HandedReply
from l40sd.proxy.http1.heads import ResponseHead, parse_request, plain_request
from l40sd.proxy.interfaces import Client
from l40sd.proxy.reply import Reply
from l40sd.proxy.sockets import duplicate
from l40sd.proxy.tries import Asked
from l40sd.proxy.worker_connection import WorkerConnection


def export_exchange(exchange: Exchange, *, keep_alive: bool) -> HandedExchange | bytes | None:
    """End a request here, for another daemon to go on.

    Args:
        exchange: The request; it has not ended.
        keep_alive: Another request may follow on its client's connection.

    Returns:
        The request's bytes while no worker has them all; None where the next daemon could not tell where in the
        reply it stands: then nothing has ended.
    """
    handed: HandedExchange | bytes
    match exchange.stage:
        case Reply() as reply:
            left_bytes = reply.left_bytes_at_rest()
            if left_bytes is None:
                return None
            handed = _record(exchange, reply, left_bytes, keep_alive=keep_alive)
        case Asked() as asked if asked.is_settled():
            handed = _record(exchange, asked, 0, keep_alive=keep_alive)
        case _:
            body = exchange.body
            handed = plain_request(exchange.head, len(body)) + body
    exchange.stop()
    return handed


def _record(exchange: Exchange, stage: Asked | Reply, left_bytes: int, *, keep_alive: bool) -> HandedExchange:
    body, upstream, reply = exchange.body, stage.upstream, None
    if isinstance(stage, Reply):
        reply = HandedReply(
            status=stage.status, lines=stage.head.lines, left_bytes=left_bytes, first_byte_at_s=stage.first_byte_at_s
        )
    return HandedExchange(
        upstream=duplicate(upstream.transport),
        is_reused=upstream.reused,
        backend=stage.lease.route.backend,
        head=plain_request(exchange.head, len(body)),
        target=exchange.target,
        body=body,
        name=exchange.name,
        model=exchange.model,
        request_id=exchange.request_id,
        keep_alive=keep_alive,
        tries_left=exchange.tries_left,
        died=exchange.deaths.workers,
        started_at_s=exchange.started_at_s,
        asked_at_s=stage.first_byte_at_s if isinstance(stage, Reply) else stage.asked_at_s,
        begun=b"" if reply else upstream.begun,
        reply=reply,
    )


def import_exchange(
    context: ProxyContext, client: Client, handed: HandedExchange, transport: asyncio.Transport
) -> tuple[Exchange, WorkerConnection]:
    """Go on with a request that an earlier daemon sent to a worker, over this connection to it."""
    exchange = Exchange(context, client, parse_request(handed.head), handed.target, handed.body, 0, handed.name)
    lease = exchange.import_facts(handed)
    upstream = WorkerConnection(context.pool(lease.route))
    upstream.connection_made(transport)
    asked = Asked(exchange, lease, upstream, handed.asked_at_s)
    exchange.enter(asked)
    upstream.import_request(asked, begun=handed.begun, is_reused=handed.is_reused)
    client.expect(context.config.first_byte_timeout_s)
    if handed.reply is not None:
        _import_reply(exchange, asked, handed.reply)
    transport.set_protocol(upstream)
    return exchange, upstream


def _import_reply(exchange: Exchange, asked: Asked, handed: HandedReply) -> None:
    head = ResponseHead(handed.status, handed.lines)
    latest = b"" if head.is_chunked else b"\n"  # what stood before is not known, but that it was a whole part
    reply = Reply(exchange, asked.lease, asked.upstream, head, latest=latest, first_byte_at_s=handed.first_byte_at_s)
    exchange.enter(reply)
    exchange.client.expect(exchange.context.config.idle_timeout_s)
    asked.upstream.import_reply(reply, reply.import_body(handed.left_bytes))
