"""Which requests may come in, decided from the head alone: what is passed on, what is shown, what is refused."""

import re
from collections.abc import Callable
from typing import NamedTuple

from l40sd.proxy.cors import Cors
from l40sd.proxy.http1.heads import RequestHead
from l40sd.proxy.refused import Refused

PASSED_ON = {
    path.encode(): path.encode()
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/rerank",
        "/v1/score",
        "/tokenize",
        "/detokenize",
    )
} | {b"/v1/tokenize": b"/tokenize", b"/v1/detokenize": b"/detokenize"}  # engines have them without the version
BODYLESS = (b"GET", b"HEAD", b"OPTIONS")
OPEN_PAGES = (b"/health", b"/ready", b"/metrics")

_passed_on_below = re.compile(rb"/v1/(?:audio|images)/[A-Za-z0-9_/-]++").fullmatch


class Admission(NamedTuple):
    """What becomes of a request that may come in; a page of ours when both are empty.

    Attributes:
        target: What to ask a worker for.
        allowed: The methods to name in answer to OPTIONS.
    """

    target: bytes = b""
    allowed: tuple[bytes, ...] = ()


def admit(head: RequestHead, is_key: Callable[[bytes], bool], cors: Cors | None, body_limit_bytes: int) -> Admission:
    """Decide in this order.

    0. A body where none is taken: 413.
    1. A browser's question for a web page, where some may use the endpoint: answered, whatever the path, so that the
       page can read what its request is refused for; 403 for any other page.
    2. A path that is not ours: 404.
    3. A method it does not have: 405, and OPTIONS is answered with those it has.
    4. A POST that browsers send for any page without asking: 403.
    5. No valid key, except for pages that monitoring reads: 401.
    6. A body that says it is larger than the limit: 413.

    Raises:
        Refused: One of these.
    """
    if head.method in BODYLESS and (head.is_chunked or head.content_length > 0):  # 0
        raise Refused(413, "request_too_large", f"a request with {head.method.decode()} has no body here")
    path = head.target.partition(b"?")[0]
    target = PASSED_ON.get(path) or (path if _passed_on_below(path) else b"")
    is_page = path in OPEN_PAGES or path == b"/v1/models" or path.startswith(b"/v1/models/")
    methods = (b"POST", b"OPTIONS") if target else (b"GET", b"HEAD", b"OPTIONS")
    if cors is not None and head.is_preflight:  # 1
        cors.check_preflight(head.origin)
        return Admission(allowed=methods if target or is_page else (b"GET", b"HEAD", b"POST", b"OPTIONS"))
    if not target and not is_page and path != b"*":  # 2
        raise Refused(404, "not_found", f"there is nothing at {path[:200].decode()}{_what_was_meant(path)}")
    if head.method not in methods:  # 3
        raise Refused(405, "method_not_allowed", "this method is not for this path", b", ".join(methods).decode())
    if head.method == b"OPTIONS":
        return Admission(allowed=methods)
    if cors is not None:
        cors.check_simple(head.origin, head.method, head.content_type)  # 4
    if path not in OPEN_PAGES and not is_key(head.credential):  # 5
        raise Refused(401, "invalid_api_key", "a valid API key is needed: Authorization: Bearer KEY")
    if head.content_length > body_limit_bytes:  # 6
        raise Refused(413, "request_too_large", f"the body is larger than {body_limit_bytes} bytes")
    return Admission(target=target + head.target[len(path) :] if target else b"")


_ENDS = {known.removeprefix(b"/v1"): known for known in (*PASSED_ON, b"/v1/models")}
_KNOWN_BY_END = sorted(_ENDS.items(), key=lambda end: len(end[0]), reverse=True)


def _what_was_meant(path: bytes) -> str:
    """Return a hint for a path that is not ours; most come from a base URL with /v1 too few or too many."""
    path = path.rstrip(b"/")
    if path in (b"", b"/v1"):
        return ": the API is below /v1, and /v1/models lists what is served"
    if path.startswith(b"/api/"):
        return ": Ollama's API is not spoken here; OpenAI's is, with a base URL that ends in /v1"
    meant = next((known for end, known in _KNOWN_BY_END if path.endswith(end)), None)
    if meant is None:
        return ""
    why = ""
    if path == b"/v1" + meant:
        why = " The base URL has one /v1 too many: Anthropic's libraries add theirs themselves"
    elif meant == b"/v1" + path:
        why = " The base URL for OpenAI's libraries ends in /v1"
    return f"; did you mean {meant.decode()}?{why}"
