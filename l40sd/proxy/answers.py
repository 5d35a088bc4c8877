"""What the proxy answers itself: which answer to which request, and how it is counted. Written by the connection."""

from typing import NamedTuple

from l40sd.proxy import pages
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.cors import Cors, preflight_fields
from l40sd.proxy.dialects import dialect_of, error_body
from l40sd.proxy.http1.heads import RequestHead
from l40sd.proxy.refused import Refused

OUR_REASONS = (500, 503)  # 501 and 505 are for what a client asks


class Answer(NamedTuple):
    """A whole answer but for what depends on its connection.

    Attributes:
        fields: Further ones, each as ``name: value CR LF``.
    """

    status: int
    body: bytes
    content_type: bytes = pages.JSON
    fields: bytes = b""


def error_answer(refused: Refused, target: bytes, *, request_id: bytes = b"") -> Answer:
    """Return an error in the shape of the path that was asked for.

    Args:
        refused: What is wrong.
        target: What was asked for, as far as it can be read.
        request_id: Under which a log may have it; empty: none.
    """
    fields = pages.error_fields(refused)
    if request_id:
        fields += b"x-request-id: %b\r\n" % request_id
    return Answer(refused.status, error_body(dialect_of(target), refused), fields=fields)


def options_answer(cors: Cors | None, head: RequestHead, allowed: tuple[bytes, ...]) -> Answer:
    """Return the answer to OPTIONS: what may be asked, and a browser's question for a web page."""
    fields = b"allow: %b\r\n" % b", ".join(allowed)
    if cors is not None and head.is_preflight:
        fields += preflight_fields(allowed, head.asked_fields)
    return Answer(204, b"", fields=fields)


def page_answer(context: ProxyContext, head: RequestHead, connections: int) -> Answer:
    """Return one of our pages.

    Raises:
        Refused: It names what is not there.
    """
    page = pages.show(
        head.target,
        context.routes,
        is_stopping=context.is_stopping,
        metrics=lambda: context.metrics.text(context.routes, connections),
    )
    return Answer(page.status, page.body, page.content_type)


def own_answer(context: ProxyContext, head: RequestHead, allowed: tuple[bytes, ...], connections: int) -> Answer:
    """Return the answer to a request that no worker is asked for: to OPTIONS, or a page.

    Args:
        context: The proxy's.
        head: The request's.
        allowed: What to answer to OPTIONS; empty: it asks for a page.
        connections: Of clients, now.

    Raises:
        Refused: It names what is not there.
    """
    return options_answer(context.cors, head, allowed) if allowed else page_answer(context, head, connections)


def format_answer(
    answer: Answer, head: RequestHead | None, cors: Cors | None, *, close: bool, head_only: bool = False
) -> bytes:
    """Return an answer's bytes, with what every reply says of the web pages that may read it.

    Args:
        answer: What is answered.
        head: To what; None: that could not be read.
        cors: Which web pages may use the endpoint.
        close: The connection is closed after it.
        head_only: It answers a HEAD request.
    """
    cors_fields = b"" if cors is None or head is None else cors.reply_fields(head.origin)
    return pages.answer(
        answer.status,
        answer.body,
        content_type=answer.content_type,
        fields=answer.fields + (cors_fields[2:] + b"\r\n" if cors_fields else b""),
        close=close,
        head_only=head_only,
    )


def count_refused(context: ProxyContext, refused: Refused, head: RequestHead | None) -> None:
    """Count a request that is refused before a worker was looked for; for our reasons, it is told of as well."""
    context.metrics.answered("", refused.status)
    if refused.status in OUR_REASONS:
        request = head.request_id.decode() if head is not None else ""
        facts = {"request": request, "status": refused.status}
        context.failures.note(refused.message, context.now_s, lambda: facts)
