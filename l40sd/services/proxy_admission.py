"""Which requests may come in, decided from the head alone: what is passed on, what is shown, what is refused."""

import re
from collections.abc import Callable
from typing import NamedTuple

from l40sd.adapters.http import RequestHead
from l40sd.core.refused import Refused

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


def admit(head: RequestHead, is_key: Callable[[bytes], bool], body_limit_bytes: int) -> Admission:
    """Decide in this order.

    1. A path that is not ours: 404.
    2. A method it does not have: 405.
    3. No valid key, except for OPTIONS and pages that monitoring reads: 401.
    4. A body where none is taken, or one that says it is larger than the limit: 413.
    5. OPTIONS is answered.

    Raises:
        Refused: One of these.
    """
    path = head.target.partition(b"?")[0]
    target = PASSED_ON.get(path) or (path if _passed_on_below(path) else b"")
    is_page = path in OPEN_PAGES or path == b"/v1/models" or path.startswith(b"/v1/models/")
    if not target and not is_page and path != b"*":  # 1
        raise Refused(404, "not_found", f"there is nothing at {path[:200].decode()}")
    methods = (b"POST", b"OPTIONS") if target else (b"GET", b"HEAD", b"OPTIONS")
    if head.method not in methods:  # 2
        raise Refused(405, "method_not_allowed", "this method is not for this path", b", ".join(methods).decode())
    if path not in OPEN_PAGES and head.method != b"OPTIONS" and not is_key(head.credential):  # 3
        raise Refused(401, "invalid_api_key", "a valid API key is needed: Authorization: Bearer KEY")
    if head.method != b"POST" and (head.is_chunked or head.content_length > 0):  # 4
        raise Refused(413, "request_too_large", "a request that is no POST has no body here")
    if head.content_length > body_limit_bytes:
        raise Refused(413, "request_too_large", f"the body is larger than {body_limit_bytes} bytes")
    if head.method == b"OPTIONS":  # 5
        return Admission(allowed=methods)
    return Admission(target=target + head.target[len(path) :] if target else b"")
