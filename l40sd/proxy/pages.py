"""Answers that the proxy gives itself: errors (their shapes are in proxy/dialects.py), and what it shows of its state.

All of them carry ``x-l40s-source: l40sd``, so that a client can tell them from a worker's.
"""

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_plus

from l40sd.codec import encode
from l40sd.model import ListedModel, ModelName
from l40sd.proxy.refused import Refused
from l40sd.proxy.retry_policy import DEATHS_LIMIT, TABLE, Seen
from l40sd.routing.routes import Line, Routes

JSON = b"application/json"
PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"


def answer(
    status: int, body: bytes, *, content_type: bytes = JSON, fields: bytes = b"", close: bool, head_only: bool = False
) -> bytes:
    """Return a whole response of ours.

    Args:
        status: HTTP status.
        body: Its whole body.
        content_type: The body's.
        fields: Further ones, each as ``name: value CR LF``.
        close: The connection is closed after it.
        head_only: It answers a HEAD request.
    """
    head = b"HTTP/1.1 %d %b\r\nx-l40s-source: l40sd\r\n%b%b%b\r\n" % (
        status,
        HTTPStatus(status).phrase.encode(),
        fields,
        b"" if status == 204 else b"content-length: %d\r\ncontent-type: %b\r\n" % (len(body), content_type),
        b"connection: close\r\n" if close else b"",
    )
    return head if head_only else head + body


def error_fields(refused: Refused) -> bytes:
    """Return what an error asks for besides: whether and when to come again, what is allowed, how to authenticate.

    ``x-should-retry`` is what the libraries of OpenAI and Anthropic obey before any rule of their own.
    """
    return _fields_of(refused) + (b"" if refused.should_retry else b"x-should-retry: false\r\n")


def _fields_of(refused: Refused) -> bytes:
    match refused.status:
        case 503 | 429:
            return b"retry-after: %d\r\n" % refused.retry_after_s
        case 401:
            return b"www-authenticate: Bearer\r\n"
        case 405:
            return b"allow: %b\r\n" % (refused.param or "").encode()
        case _:
            return b""


def unknown_model(routes: Routes, name: str) -> Refused:
    """Return the refusal for a model that is not here; it names those that are."""
    known = ", ".join(line.model for line in routes.lines()) or "none at present"
    return Refused(404, "model_not_found", f"the model {name[:200]!r} is not served here; known: {known}", "model")


def no_worker(routes: Routes, model: ModelName, why: str) -> Refused:
    """Return the refusal for a request that no worker could take; it says what is on its way."""
    outlook = routes.outlook(model)
    note = f"; {outlook.note}" if outlook.note else ""
    return Refused(
        503,
        "no_worker",
        f"no worker of {model!r} could take the request: {why}{note}",
        retry_after_s=outlook.retry_after_s,
        should_retry=routes.may_wait(model),
    )


def refused_as_poison(workers: Sequence[str], for_s: float) -> Refused:
    """Return the refusal of a request that workers died of."""
    who = ", ".join(dict.fromkeys(workers))
    return Refused(
        502,
        "poison_request",
        f"workers ended with this very request and without a byte of an answer ({who}); it is refused for another"
        f" {max(1.0, for_s):.0f} s",
        should_retry=False,
    )


def not_tried_any_more(seen: Seen, worker: str, why: str, *, request: str, tries: int, died: Sequence[str]) -> Refused:
    """Return the refusal of a request that is not tried any more.

    Args:
        seen: What became of its last try.
        worker: That was tried last.
        why: In words.
        request: Its id.
        tries: Routes that failed it.
        died: Workers that ended with it and had not answered a byte of it.
    """
    if seen is Seen.OVERLOADED:
        return Refused(503, "overloaded", why)
    if seen is Seen.SILENT:
        return Refused(504, "worker_timeout", f"{worker} {why}; request {request}")
    if TABLE[seen].is_death and len(died) >= DEATHS_LIMIT:
        who = ", then ".join(died)
        what = f"{who} ended with this request and without a byte of an answer; it is not tried again"
        return Refused(502, "worker_failed", f"{what} ({worker}: {why})", should_retry=False)
    return Refused(502, "worker_failed", f"{tries} tries failed; {worker}: {why}")


class Page(NamedTuple):
    """A page of ours."""

    status: int
    body: bytes
    content_type: bytes = JSON


def show(target: bytes, routes: Routes, *, is_stopping: bool, metrics: Callable[[], str]) -> Page:
    """Return the page at one of our paths, which may have a query.

    Raises:
        Refused: 404; ``/v1/models/NAME`` or ``/ready?model=NAME`` names none.
    """
    path, _, query = target.partition(b"?")
    match path:
        case b"/health":
            return Page(*health(routes))
        case b"/ready":
            return Page(*ready(routes, _asked_model(query), is_stopping=is_stopping))
        case b"/metrics":
            return Page(200, metrics().encode(), PROMETHEUS)
        case b"/v1/models":
            return Page(200, models(routes))
        case _:
            return Page(200, model(routes, path.removeprefix(b"/v1/models/").decode()))


def models(routes: Routes) -> bytes:
    """Return the body of ``GET /v1/models``: every model, then its aliases.

    Of workers that differ, the shortest ``max_model_len`` counts: it is what every request can rely on.
    """
    return encode({"object": "list", "data": [entry for line in routes.lines() for entry in _entries(line)]})


def model(routes: Routes, quoted_name: str) -> bytes:
    """Return the body of ``GET /v1/models/NAME``.

    Raises:
        Refused: 404; there is none of this name or alias.
    """
    name = unquote(quoted_name)
    for line in routes.lines():
        for entry in _entries(line):
            if entry["id"] == name:
                return encode(entry)
    raise unknown_model(routes, name)


def _entries(line: Line) -> list[dict[str, Any]]:
    said = _said_of(line)
    entry = {
        "object": "model",
        "created": min((listed.created for listed in said if listed.created), default=0),
        "owned_by": next((listed.owned_by for listed in said if listed.owned_by), "l40sd"),
        "root": line.model,
        "ready": len(line.routes),
    }
    if lengths := [listed.max_model_len for listed in said if listed.max_model_len]:
        entry["max_model_len"] = min(lengths)
    return [{"id": name, **entry} for name in (line.model, *line.entry.aliases)]


def _said_of(line: Line) -> list[ListedModel]:
    """Return what a model's engines say of it: those that are ready, else the one that was last."""
    ready = [route.backend.listed for route in line.routes]
    return [listed for listed in (ready or [line.listed]) if listed is not None]


def health(routes: Routes) -> tuple[int, bytes]:
    """Return status and body of ``GET /health``: 200 when at least one model can be served."""
    lines = routes.lines()
    return _state(routes, is_good=any(line.routes for line in lines))


def ready(routes: Routes, name: str = "", *, is_stopping: bool) -> tuple[int, bytes]:
    """Return status and body of ``GET /ready``: 200 when what is wanted is served by a worker and we are not stopping.

    A model that is configured and not in the pattern does not matter. With a name, of a model or an alias: that one.

    Raises:
        Refused: 404; there is none of this name.
    """
    lines = [line for line in routes.lines() if line.entry.outlook.is_wanted]
    if name:
        model = routes.resolve(name)
        lines = [line for line in routes.lines() if line.model == model]
        if not lines:
            raise unknown_model(routes, name)
    return _state(routes, is_good=bool(lines) and not is_stopping and all(line.routes for line in lines))


def _asked_model(query: bytes) -> str:
    """Return the ``model`` of a query; empty when it names none."""
    for part in query.split(b"&"):
        if part.startswith(b"model="):
            return unquote_plus(part.removeprefix(b"model=").decode("utf-8", "replace"))
    return ""


def _state(routes: Routes, *, is_good: bool) -> tuple[int, bytes]:
    state = {
        "status": "ok" if is_good else "unavailable",
        "models": {
            line.model: {
                "ready": len(line.routes),
                "waiting": len(line.waiters),
                "wanted": line.entry.outlook.is_wanted,
                "note": line.entry.outlook.note,
            }
            for line in routes.lines()
        },
    }
    return (200 if is_good else 503), encode(state)
