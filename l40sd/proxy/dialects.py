"""Each API's own shape of an error: what its clients' libraries look for, in a reply and in a stream.

| path             | a reply                                       | within a stream                               |
|------------------|-----------------------------------------------|-----------------------------------------------|
| /v1/messages     | ``{"type": "error", "error": {type, message}}`` | ``event: error`` and the same                 |
| /v1/responses    | ``{"error": {message, type, param, code}}``   | ``event: error``, code and message at the top |
| everything else  | ``{"error": {message, type, param, code}}``   | ``data:`` and the same                        |

Sources: platform.claude.com/docs/en/api/errors; the OpenAI API reference, "error" of the Responses API's streaming
events. Python's openai 3.57 and anthropic 2.14 were tried against all of them.
"""

import json
import re
from enum import StrEnum
from typing import Any

from l40sd.proxy.refused import Refused

_sequence_number = re.compile(rb'"sequence_number":[ ]?(\d{1,15})\b').findall

_MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Dialect(StrEnum):
    """Whose shapes a client expects."""

    OPENAI = "openai"
    RESPONSES = "responses"
    MESSAGES = "messages"


def dialect_of(path: bytes) -> Dialect:
    """Return the dialect that is spoken at a path, a wrong one too: ``/messages`` is meant for ``/v1/messages``."""
    names = path.partition(b"?")[0].split(b"/")
    if b"messages" in names:
        return Dialect.MESSAGES
    return Dialect.RESPONSES if b"responses" in names else Dialect.OPENAI


def error_body(dialect: Dialect, refused: Refused) -> bytes:
    """Return an error as the body of a reply; ASCII only, without a line end."""
    return _encode(_messages_error(refused) if dialect is Dialect.MESSAGES else _openai_error(refused))


def error_members(dialect: Dialect, refused: Refused, seen: bytes = b"") -> bytes:
    """Return an error as the members of a stream's event, ``"name":value,...``.

    Args:
        dialect: The API's.
        refused: Why.
        seen: The latest bytes of the stream; the Responses API numbers its events.
    """
    match dialect:
        case Dialect.MESSAGES:
            return _encode(_messages_error(refused))[1:-1]
        case Dialect.OPENAI:
            return _encode(_openai_error(refused))[1:-1]
        case Dialect.RESPONSES:
            error = {"type": "error", "code": refused.code, "message": refused.message, "param": refused.param}
            return _encode({**error, "sequence_number": _next_number(seen)})[1:-1]


def event_name(dialect: Dialect) -> bytes:
    """Return what the error event is called; empty where events have no names."""
    return b"" if dialect is Dialect.OPENAI else b"error"


def last_data(path: bytes) -> bytes:
    """Return what the last event of a whole stream has in it where the API says so; empty where it does not."""
    if path in (b"/v1/chat/completions", b"/v1/completions"):
        return b"[DONE]"
    return b"message_stop" if path == b"/v1/messages" else b""


def _openai_error(refused: Refused) -> dict[str, Any]:
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    error = {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}
    return {"error": error}


def _messages_error(refused: Refused) -> dict[str, Any]:
    usual = "api_error" if refused.status >= 500 else "invalid_request_error"
    return {"type": "error", "error": {"type": _MESSAGES_TYPES.get(refused.status, usual), "message": refused.message}}


def _next_number(seen: bytes) -> int:
    numbers = _sequence_number(seen)
    return int(numbers[-1]) + 1 if numbers else 0


def _encode(error: dict[str, Any]) -> bytes:
    return json.dumps(error, separators=(",", ":")).encode()
