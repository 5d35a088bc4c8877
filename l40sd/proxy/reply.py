"""One reply in progress: its head is passed on, its bytes as they come, and at last it is whole or cut."""

from collections.abc import Callable

from l40sd.proxy.breaks import end_of_stream, ended_whole
from l40sd.proxy.http1.chunked import ends_between_chunks
from l40sd.proxy.http1.heads import ResponseHead
from l40sd.proxy.interfaces import Request, Stage
from l40sd.proxy.refused import Refused
from l40sd.proxy.reply_body import Countdown, Tail, Unchunk
from l40sd.proxy.worker_connection import ABORTED, WorkerConnection, says_aborted
from l40sd.routing.routes import FailureKind, Lease


class Reply(Stage):
    """A reply that has begun. It is never repeated: what breaks is cut so that the client can tell.

    Attributes:
        head: Its head as it was passed on, framing and all.
        latest: The part that came last.
        write: Where the next goes.
    """

    __slots__ = (
        "_client",
        "_countdown",
        "_request",
        "_swept",
        "_tail",
        "first_byte_at_s",
        "head",
        "latest",
        "lease",
        "status",
        "upstream",
        "write",
    )

    has_worker = True
    is_begun = True

    def __init__(
        self,
        request: Request,
        lease: Lease,
        upstream: WorkerConnection,
        head: ResponseHead,
        latest: bytes,
        first_byte_at_s: float,
    ) -> None:
        self._request = request
        self._client = request.client
        self.lease = lease
        self.upstream = upstream
        self._countdown: Countdown | None = None  # of a reply with a length, while it comes
        self._tail: Tail | None = None
        self._swept: bytes | None = b""  # the part that the sweep has seen
        self.head = head
        self.status = head.status
        self.first_byte_at_s = first_byte_at_s
        self.latest = latest
        self.write: Callable[[bytes], object] = request.client.transport.write

    # The bytes

    def pass_on_head(self, rest: bytes) -> None:
        """Pass on the head and its first bytes."""
        request, head, client = self._request, self.head, self._client
        write = self.write
        unchunk = request.head.is_http10 and head.is_chunked
        lines = head.without_framing() if unchunk else head.lines
        if not head.is_framed:
            client.close_after_reply()
        line_end = lines.find(b"\r\n")
        cors = request.context.cors
        head_bytes = b"%b\r\nx-request-id: %b%b%b%b%b\r\n\r\n" % (
            lines[:line_end] if line_end >= 0 else lines,
            request.request_id,
            self.upstream.pool.reply_field,
            b"" if client.will_keep_alive() else b"\r\nconnection: close",
            b"" if cors is None else cors.reply_fields(request.head.origin),
            lines[line_end:] if line_end >= 0 else b"",
        )
        if unchunk:
            write(head_bytes)
            self.write = Unchunk(write)
            self.write(rest)
        else:
            write(head_bytes + rest)  # in one: the client wakes once
            length = head.content_length
            if length >= 0 and not self.upstream.is_done:
                self.write = self._countdown = Countdown(write, length - len(rest))
        if client.is_paused:
            self.upstream.pause(is_paused=True)

    def import_body(self, left_bytes: int) -> bytes:
        """Go on with a body of which an earlier daemon passed on a part; return the fields that frame what is left.

        Args:
            left_bytes: As ``left_bytes`` returned it there.
        """
        if self.head.is_chunked:
            if self._request.head.is_http10:
                self.write = Unchunk(self.write)
            return b"transfer-encoding: chunked\r\n"
        if left_bytes < 0:
            return b""
        self.write = self._countdown = Countdown(self.write, left_bytes)
        return b"content-length: %d\r\n" % left_bytes

    def pause(self, *, is_paused: bool) -> None:
        """Stop or go on reading the reply: the client takes it too slowly, or keeps up again."""
        self._swept = None  # for the sweep, something has moved
        self.upstream.pause(is_paused=is_paused)

    def has_moved(self) -> bool:
        """Return whether more of it has come since this was asked last."""
        has_moved = self.latest is not self._swept
        self._swept = self.latest
        return has_moved

    # Its end

    def on_complete(self) -> None:
        """The whole reply is written."""
        self.upstream.release(self._request.context.now_s)
        self._whole()

    def on_lost(self, why: str, *, is_clean: bool) -> None:
        """The worker's connection is gone."""
        if not is_clean or self.head.is_framed:
            self._cut(FailureKind.CUT, why)
        elif says_aborted(self.latest):
            self._cut(FailureKind.CUT, ABORTED)
        elif ended_whole(self.head, self._request.target, self.latest, self.upstream):
            self._whole()  # its end was to be the connection's
        else:
            self._cut(FailureKind.CUT, "the stream ended early")

    def broke(self, error: Exception) -> None:
        """Our own code failed on it."""
        self._request.broke(error)

    def given_up(self, why: str, *, is_hung: bool) -> None:
        """Leave the worker, whose process is about to be told to end."""
        self.upstream.abort()
        self._cut(FailureKind.CUT, why)

    def expired(self) -> None:
        """Nothing has moved for too long."""
        if self._client.is_paused:  # the client does not read: nobody's failure
            self._request.end("client does not read")
            self._client.reset()
        else:
            self.upstream.abort()
            self._cut(FailureKind.IDLE, f"silent for {self._request.context.config.idle_timeout_s:g} s")

    def let_go(self) -> None:
        """Hold no connection any more, unless the reply is whole and it is the next request's."""
        self.upstream.abort_for(self)

    def _whole(self) -> None:
        request = self._request
        if self.status < 500:
            request.end_whole(self.lease, self.status, self.first_byte_at_s)
            return
        metrics, taken_s = request.context.metrics, request.context.loop.time() - request.started_at_s
        metrics.answered(request.model, self.status)
        metrics.timed(request.model, self.first_byte_at_s - request.started_at_s, taken_s)
        request.end(f"{request.worker} answered so", is_failed=True)
        self._client.finished()

    def _cut(self, kind: FailureKind, why: str) -> None:
        """End a reply that will not be whole, so that the client can tell."""
        request = self._request
        self.lease.failed(kind)
        request.context.metrics.reply_cut()
        refused = Refused(502, "worker_failed", f"l40sd: the reply of {request.worker} broke off: {why}")
        seen = self._tail.data if self._tail else self.latest
        takes_chunks = not request.head.is_http10
        words = end_of_stream(self.head, request.target, seen, refused, self.upstream, takes_chunks=takes_chunks)
        if words is not None:
            self._client.transport.write(words)
        request.end(f"cut: {why}", is_failed=True)
        if words is not None:
            self._client.close()  # without the last chunk
        else:
            self._client.reset()

    # Where it stands, for another daemon

    def is_settled(self) -> bool:
        """Whether it is at a point where another daemon could go on with it."""
        return self._is_between_chunks() if self.head.is_chunked else self.left_bytes() is not None

    def come_to_rest(self) -> None:
        """Read no further than to the next such point."""
        if self.is_settled():
            self.upstream.pause(is_paused=True)
        elif self._tail is not None:
            self._tail.stop_between_chunks()

    def left_bytes(self) -> int | None:
        """Return what is still to come of a body with a length, -1 for one without, None where nobody counts."""
        if self._countdown is not None:
            return self._countdown.left_bytes
        return -1 if self.head.is_chunked or not self.head.is_framed else None

    def left_bytes_at_rest(self) -> int | None:
        """Return ``left_bytes`` where another daemon can go on at this very point; else None. Ends the parsing."""
        left_bytes = self.left_bytes()
        if left_bytes is None or (self.head.is_chunked and not self.upstream.is_between_chunks()):
            return None
        return left_bytes

    def _is_between_chunks(self) -> bool:
        if ends_between_chunks(self._tail.data if self._tail else self.latest):
            return True
        if self._tail is None:
            self.write = self._tail = Tail(self.upstream, self.write, self.latest)
        return False


def pass_on(request: Request, lease: Lease, upstream: WorkerConnection, head: ResponseHead, rest: bytes) -> Reply:
    """Begin the reply to a request with its head and its first bytes, and return it; nothing can be repeated now."""
    context = request.context
    reply = Reply(request, lease, upstream, head, rest, context.loop.time())
    request.enter(reply)
    upstream.pass_to(reply)
    request.client.release_memory()
    request.client.expect(context.config.idle_timeout_s)
    reply.pass_on_head(rest)
    return reply
