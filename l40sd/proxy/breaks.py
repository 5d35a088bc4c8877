"""Replies that do not come to their end: what a client is told, and whether an end without framing was one."""

from l40sd.proxy.dialects import dialect_of, error_members, event_name, last_data
from l40sd.proxy.http1.chunked import go_on, place_of
from l40sd.proxy.http1.heads import ResponseHead
from l40sd.proxy.refused import Refused
from l40sd.proxy.sse import ending, is_whole
from l40sd.proxy.worker_connection import WorkerConnection


def end_of_stream(
    reply: ResponseHead, target: bytes, seen: bytes, refused: Refused, upstream: WorkerConnection, *, takes_chunks: bool
) -> bytes | None:
    """Return what ends a stream that broke off so that its client is told why; None where nothing can be added.

    Args:
        reply: Its head.
        target: What the worker was asked for; says whose API it is.
        seen: The latest bytes that were passed on.
        refused: Why.
        upstream: Where they came from; it parses nothing any more afterwards.
        takes_chunks: The client gets the reply in chunks where it comes in chunks.
    """
    if not reply.is_event_stream or (reply.is_framed and not reply.is_chunked):
        return None
    place = None
    if reply.is_chunked:
        place = place_of(seen, upstream.left_in_chunk(seen))
        if place is None:
            return None
        seen = place.payload
    dialect = dialect_of(target)
    more = ending(seen, error_members(dialect, refused, seen), event_name(dialect))
    return go_on(place, more) if place is not None and takes_chunks else more


def ended_whole(reply: ResponseHead, target: bytes, seen: bytes, upstream: WorkerConnection) -> bool:
    """Return whether a reply whose end was to be its connection's was whole when the worker closed.

    Of a stream that can be told: it ends after an event, and with its API's last one where this worker sends that. A
    worker whose engine is not known is expected to do again what it did once.

    Args:
        reply: Its head.
        target: What the worker was asked for.
        seen: The latest bytes that were passed on.
        upstream: Where they came from.
    """
    if not reply.is_event_stream:
        return True
    last, pool = last_data(target.partition(b"?")[0]), upstream.pool
    whole = is_whole(seen, last if pool.ends_streams else b"")
    if whole and last and last in seen:
        pool.learn_end()
    return whole
