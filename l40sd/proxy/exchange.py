"""One request: from its model's name to the last byte of a worker's reply.

    start --> WAITING --turn--> CONNECTING --> ASKED --head--> REPLYING --> ended
       \\______________________/    |            |  \\--500--> HELD --/
                ^------ another worker ---------/-------------/   before the first byte of a reply only (invariant 7)

Each of these is an object that exists only there: proxy/tries.py has the first three, proxy/held_reply.py and
proxy/reply.py the others. What is tried again, and where, is proxy/retry_policy.py's to say. Once a reply has begun it
is never repeated: a stream that breaks ends in an error event, wherever it broke, and its connection is closed without
the last chunk, so that every client can tell (proxy/breaks.py); anything else is cut.

vLLM ends what it aborts as if it were whole, with ``finish_reason: "abort"`` and ``[DONE]``. Before l40sd tells a
worker to end it takes its requests from it (``given_up``), so none of that reaches a client. Where somebody else ended
it, a whole reply that says so is asked for elsewhere, and a stream that says so in its last two reads is cut.

llama.cpp goes on decoding an unstreamed request whose client left while it streams to another: closing the
connection is all that a proxy can do about it.
"""

import structlog

from l40sd.model import ModelName
from l40sd.proxy.context import ProxyContext
from l40sd.proxy.deaths import NONE_DIED, Deaths, deaths_known, with_one_more
from l40sd.proxy.handed import HandedExchange
from l40sd.proxy.http1.heads import RequestHead, format_request
from l40sd.proxy.http1.request_body import replace_model
from l40sd.proxy.interfaces import ENDED, NOWHERE, Client, Stage
from l40sd.proxy.metrics import CLIENT_GONE
from l40sd.proxy.pages import not_tried_any_more, refused_as_poison, unknown_model
from l40sd.proxy.refused import Refused
from l40sd.proxy.retry_policy import TABLE, Next, Seen, decide
from l40sd.proxy.tries import Asked, Connecting, Waiting
from l40sd.proxy.worker_connection import WorkerConnection
from l40sd.routing.routes import FailureKind, Lease

LOGGED_LIMIT = 200  # characters of what a client chose
JOIN_BELOW_BYTES = 16384  # a head and a smaller body are joined: one copy is cheaper than a second buffer

log = structlog.get_logger()

FAILURES = {
    Seen.CONNECT: FailureKind.CONNECT,
    Seen.CLOSED: FailureKind.CLOSED,
    Seen.VANISHED: FailureKind.CONNECT,
    Seen.GARBLED: FailureKind.CLOSED,
    Seen.UNAVAILABLE: FailureKind.STATUS,
    Seen.ENDING: FailureKind.STATUS,
    Seen.SILENT: FailureKind.FIRST_BYTE,
}
"""What a worker is blamed for, where it is."""


class Exchange:
    """One request under way. Ends exactly once, and then holds nothing.

    Attributes:
        target: What a worker is asked for.
        name: The model's, as the body has it.
        started_at_s: When it began: the order in which requests that wait are to wait on.
        tries_left: Further ones that it may have.
        deaths: Of workers that had it.
        stage: Where it is, and what it holds there.
    """

    __slots__ = (
        "_barred",
        "_body",
        "_body_at",
        "_lease",
        "_tried",
        "_tries",
        "client",
        "context",
        "deaths",
        "head",
        "model",
        "name",
        "request_id",
        "stage",
        "started_at_s",
        "target",
        "tries_left",
    )

    def __init__(
        self,
        context: ProxyContext,
        client: Client,
        head: RequestHead,
        target: bytes,
        body: bytes,
        body_at: int,
        name: str,
    ) -> None:
        self.context = context
        self.client = client
        self.head = head
        self.target = target
        self._body = body
        self._body_at = body_at  # what stands before it was read with it
        self.name = name
        self.request_id = head.request_id or context.make_request_id()
        self.started_at_s = context.loop.time()
        self._tries = 0  # workers asked, or connected to in vain
        self.tries_left = context.config.retries
        self._tried: tuple[int, ...] = ()  # serials of routes that failed
        self._barred: tuple[int, ...] = ()  # those of them that it cannot be tried on again
        self.deaths: Deaths = NONE_DIED
        self.model = ModelName("")
        self._lease: Lease | None = None
        self.stage: Stage = NOWHERE

    @property
    def worker(self) -> str:
        """The worker that it is on, or is being connected to; empty: none."""
        return self._lease.route.backend.worker if self._lease is not None else ""

    # The way to a worker

    def start(self) -> None:
        """Look for a worker; everything further happens through callbacks."""
        routes = self.context.routes
        model = routes.resolve(self.name)
        if model is None:
            self.refuse(unknown_model(routes, self.name))
            return
        self.model = model
        if self.context.poison.lengths and self._is_refused_as_poison():
            return
        lease = routes.take(model)
        if lease is not None:
            self.use(lease)
        else:
            self._look_further()

    def _is_refused_as_poison(self) -> bool:
        """Refuse a request that workers died of; one that may be innocent goes on, and is known to have been aboard."""
        now_s = self.context.now_s
        known = deaths_known(self.context.poison, self.target, memoryview(self._body)[self._body_at :], now_s)
        if known is None:
            return False
        self.deaths, entry = known
        if entry.is_poison(now_s):
            self.refuse(refused_as_poison(self.deaths.workers, entry.until_s - now_s))
            return True
        return False

    def _look_further(self) -> None:
        """Take a worker that has not had the request, else one that could be connected to, else wait for one."""
        routes = self.context.routes
        lease = routes.take(self.model, self._tried)
        if lease is None and len(self._tried) > len(self._barred):
            lease = routes.take(self.model, self._barred)
        if lease is not None:
            self.use(lease)
        else:
            Waiting(self).join(self._barred)

    def use(self, lease: Lease) -> None:
        """Try it on this worker."""
        self._lease = lease
        self._tries += 1
        context = self.context
        pool = context.pool(lease.route)
        # A further try takes a new connection: one that may be stale would cost it a try that it may not have.
        upstream = None if self._tried else pool.take_idle(context.now_s, context.config.upstream_idle_timeout_s)
        if upstream is not None:
            self.ask(lease, upstream)
        else:
            Connecting(self, lease, pool, was_stale=False).dial()

    def ask(self, lease: Lease, upstream: WorkerConnection) -> None:
        """Send it over this connection."""
        context = self.context
        asked = self.stage = Asked(self, lease, upstream, context.now_s)
        self.client.expect(context.config.first_byte_timeout_s)
        pool = upstream.pool
        body: bytes | memoryview
        if pool.served_name != self.name:
            try:
                body = replace_model(self._body, self.head.content_type, pool.served_name, self._body_at)
            except Refused as refused:
                self.refuse(refused)
                return
        elif len(self._body) < JOIN_BELOW_BYTES:
            body = self._body[self._body_at :]
        else:
            body = memoryview(self._body)[self._body_at :]
        if isinstance(body, bytes) and len(body) < JOIN_BELOW_BYTES:
            upstream.ask(asked, format_request(self.head, self.target, self.request_id, len(body), pool.fields, body))
        else:
            head = format_request(self.head, self.target, self.request_id, len(body), pool.fields)
            upstream.ask(asked, head, body)

    def leave(self, lease: Lease, seen: Seen, why: str) -> bool:
        """Go on after a failed try as the policy says; return False where the worker's own reply is to be passed on."""
        route, rule = lease.route, TABLE[seen]
        if rule.is_blamed:
            lease.failed(FAILURES[seen])
        if rule.is_death:
            self._note_death(lease)
        following = decide(seen, tries_left=self.tries_left, deaths=len(self.deaths.workers))
        match following:
            case Next.SAME:
                self._tries += 1
                self.tries_left = max(0, self.tries_left - 1)  # it may have been read: it counts where it can
                Connecting(self, lease, self.context.pool(route), was_stale=True).dial()
                return True
            case Next.REPLY:
                return False
            case Next.OTHER_OR_REPLY:
                return self._take_another(lease)
            case Next.OTHER_OR_WAIT | Next.OTHER_OR_SAME:
                self._tried = (*self._tried, route.serial)
                if following is Next.OTHER_OR_WAIT:
                    self._barred = (*self._barred, route.serial)
                self._let_go_for_another(lease)
                self._look_further()
            case Next.END:
                self._tried = (*self._tried, route.serial)
                self.refuse(
                    not_tried_any_more(
                        seen,
                        route.backend.worker,
                        why,
                        request=self.request_id.decode(),
                        tries=len(self._tried),
                        died=self.deaths.workers,
                    )
                )
        return True

    def _take_another(self, lease: Lease) -> bool:
        """Take the request to a worker that has not had it, if one is free now; return whether there was one."""
        tried = (*self._tried, lease.route.serial)
        another = self.context.routes.take(self.model, tried)
        if another is None:
            return False
        self._tried = tried
        self._let_go_for_another(lease)
        self.use(another)
        return True

    def _let_go_for_another(self, lease: Lease) -> None:
        self._let_go(NOWHERE)
        self.tries_left -= 1
        lease.retried()
        self.context.metrics.tried_again()

    def _note_death(self, lease: Lease) -> None:
        """Count an end of a worker that had not answered a byte: the request may be its cause."""
        body, context = memoryview(self._body)[self._body_at :], self.context
        self.deaths = with_one_more(
            self.deaths, lease, self.target, body, poison=context.poison, routes=context.routes, now_s=context.now_s
        )

    # From its stages

    def enter(self, stage: Stage) -> None:
        """Be in another stage, which has what the present one held."""
        self.stage = stage
        if stage.is_begun:
            self._body = b""  # nothing can be repeated from here on

    def answered(self, lease: Lease) -> None:
        """Count a worker's good answer."""
        lease.answered()
        if self.deaths.workers:
            self.context.poison.forget(self.deaths.fingerprint)

    def end_whole(self, lease: Lease, status: int, first_byte_at_s: float = 0.0) -> None:
        """End with a whole reply, and let go of the worker, whose connection is released already.

        Args:
            lease: The hold on the worker.
            status: Below 500.
            first_byte_at_s: When the reply began; 0.0: only now.
        """
        context = self.context
        now_s = context.loop.time()
        if first_byte_at_s:
            context.metrics.answered(self.model, status)
            context.metrics.timed(self.model, first_byte_at_s - self.started_at_s, now_s - self.started_at_s)
        else:
            context.metrics.answered_at_once(self.model, status, now_s - self.started_at_s)
        try:
            if context.config.access_log:
                log.info("proxy.request", **self._account(status, first_byte_at_s or now_s), problem="")
        finally:
            self.stage = ENDED
            lease.release()
            self._lease = None
        self.client.finished()

    # The end

    def broke(self, error: Exception) -> None:
        """End a request that our own code fails on: with an answer while none has begun, and holding nothing."""
        if self.stage is ENDED:
            self.client.reset_unanswered(self)
            return
        if isinstance(error, Refused):
            self.refuse(error)
            return
        self.context.failures.note_own(self.request_id.decode(), error, self.context.now_s)
        what = f"l40sd failed on this request: {type(error).__name__}"
        if self.stage.is_begun:
            self.end(what, is_failed=True)
            self.client.reset()
        else:
            self.refuse(Refused(500, "internal_error", f"{what}; its log has the rest"))

    def client_gone(self) -> None:
        """Stop at once; the worker sees its connection close."""
        if self.stage is not ENDED:
            self.context.metrics.client_gone()
            self.context.metrics.answered(self.model, self.stage.status or CLIENT_GONE)
            self.end("client gone")

    def refuse(self, refused: Refused) -> None:
        """End with an error of ours."""
        self.context.metrics.answered(self.model, refused.status)
        self.end(refused.message, refused.status, is_failed=refused.status >= 500)
        self.client.refuse(refused, self.head, request_id=self.request_id)

    def end(self, problem: str, status: int = 0, *, is_failed: bool = False) -> None:
        """End and let go of everything; the client is told by whoever calls."""
        context, first_byte_at_s = self.context, self.stage.first_byte_at_s
        status = self.stage.status or status
        try:
            if context.config.access_log:
                log.info("proxy.request", **self._account(status, first_byte_at_s), problem=problem)
            if is_failed:
                context.failures.note(problem, context.now_s, lambda: self._account(status, first_byte_at_s))
        finally:
            self.stop()

    def stop(self) -> None:
        """Hold nothing and say nothing: it has ended, or goes on elsewhere."""
        self._let_go(ENDED)

    def _let_go(self, stage: Stage) -> None:
        """Hold nothing any more: no place in line, no connection, no lease."""
        held, self.stage = self.stage, stage
        held.let_go()
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _account(self, status: int, first_byte_at_s: float) -> dict[str, object]:
        """Return what a log says of a request that ends."""
        return {
            "request": self.request_id.decode(),
            "model": self.model or self.name[:LOGGED_LIMIT],
            "path": self.target[:LOGGED_LIMIT].decode(),
            "worker": self.worker,
            "status": status,
            "tries": self._tries,
            "first_byte_s": round(first_byte_at_s - self.started_at_s, 4) if first_byte_at_s else None,
            "duration_s": round(self.context.loop.time() - self.started_at_s, 4),
        }

    # From one daemon to the next

    @property
    def body(self) -> bytes:
        """The request's body; empty once a reply has begun."""
        return self._body[self._body_at :] if self._body_at else self._body

    def import_facts(self, handed: HandedExchange) -> Lease:
        """Be the request that an earlier daemon sent to a worker; return the hold on that worker."""
        self.request_id = handed.request_id
        self.started_at_s = handed.started_at_s
        self._tries, self.tries_left = 1, handed.tries_left
        self.deaths = Deaths(workers=handed.died)
        self.model = handed.model
        lease = self._lease = self.context.routes.hold(handed.backend)
        return lease
