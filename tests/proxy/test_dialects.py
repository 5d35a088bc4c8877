"""Each path's errors have the shape that its clients' libraries look for."""

import json

import pytest

from l40sd.proxy.dialects import Dialect, dialect_of, error_body, error_members, event_name, last_data
from l40sd.proxy.refused import Refused

OURS = Refused(503, "no_worker", "none \u2028 is here", None)


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        (b"/v1/chat/completions", Dialect.OPENAI),
        (b"/v1/completions?x=/messages", Dialect.OPENAI),
        (b"/v1/models", Dialect.OPENAI),
        (b"/v1/models/messages-8b", Dialect.OPENAI),
        (b"/health", Dialect.OPENAI),
        (b"*", Dialect.OPENAI),
        (b"", Dialect.OPENAI),
        (b"/v1/messages", Dialect.MESSAGES),
        (b"/v1/messages?beta=true", Dialect.MESSAGES),
        (b"/v1/messages/count_tokens", Dialect.MESSAGES),
        (b"/v1/v1/messages", Dialect.MESSAGES),
        (b"/messages", Dialect.MESSAGES),
        (b"/v1/responses", Dialect.RESPONSES),
        (b"/responses", Dialect.RESPONSES),
    ],
)
def test_the_path_says_whose_shapes_are_expected(path: bytes, dialect: Dialect) -> None:
    assert dialect_of(path) is dialect


def test_openais_shape_is_for_everything_but_messages() -> None:
    for dialect in (Dialect.OPENAI, Dialect.RESPONSES):
        error = json.loads(error_body(dialect, OURS))["error"]
        assert error == {"message": OURS.message, "type": "server_error", "param": None, "code": "no_worker"}
    assert json.loads(error_body(Dialect.OPENAI, Refused(400, "x", "y", "model")))["error"] == {
        "message": "y", "type": "invalid_request_error", "param": "model", "code": "x"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_messages_has_its_own_shape_and_names(status: int, kind: str) -> None:
    """anthropic's library showed ``error.type=None`` and no reason for every error of ours."""
    body = json.loads(error_body(Dialect.MESSAGES, Refused(status, "code", "why")))
    assert body == {"type": "error", "error": {"type": kind, "message": "why"}}


def test_within_a_stream_each_api_has_an_event_of_its_own() -> None:
    def event(dialect: Dialect, seen: bytes = b"") -> dict[str, object]:
        members = error_members(dialect, OURS, seen)
        assert members.isascii(), "a raw line separator would be a line's end to some clients"
        return dict(json.loads(b"{%b}" % members))

    assert event(Dialect.OPENAI) == json.loads(error_body(Dialect.OPENAI, OURS))
    assert event(Dialect.MESSAGES) == json.loads(error_body(Dialect.MESSAGES, OURS))
    seen = b'data: {"sequence_number":6}\n\ndata: {"type":"x","sequence_number": 7,"del'
    own = {"type": "error", "code": "no_worker", "message": OURS.message, "param": None}
    assert event(Dialect.RESPONSES, seen) == {**own, "sequence_number": 8}
    assert event(Dialect.RESPONSES) == {**own, "sequence_number": 0}
    assert [event_name(dialect) for dialect in Dialect] == [b"", b"error", b"error"]


def test_the_last_event_is_known_where_the_api_says_it() -> None:
    assert last_data(b"/v1/chat/completions") == last_data(b"/v1/completions") == b"[DONE]"
    assert last_data(b"/v1/messages") == b"message_stop"
    assert last_data(b"/v1/responses") == last_data(b"/v1/audio/speech") == b""
