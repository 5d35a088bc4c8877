"""A JSON object that broke off anywhere is ended so that every client decodes it."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from l40sd.proxy import half_json
from l40sd.proxy.half_json import rest_of_character, rest_of_object

MEMBERS = b'"error":{"message":"cut"}'

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(st.text(), values, max_size=4)


@example(
    {"id": "c1", "choices": [{"index": 0, "delta": {"content": "gr\u00fc\U0001f642\\\u2028"}}], "n": -1.5e-3}, 0, True
)
@given(objects, st.integers(0, 100_000), st.booleans())
def test_an_object_cut_anywhere_is_ended_and_says_the_error(value: dict[str, Any], cut: int, is_ascii: bool) -> None:
    whole = json.dumps(value, ensure_ascii=is_ascii).encode()
    for end in {1 + cut % (len(whole) - 1), *range(1, min(len(whole), 40))}:
        rest = rest_of_object(whole[:end], MEMBERS)
        assert rest is not None, whole[:end]
        ended = json.loads((whole[:end] + rest).decode())  # strict UTF-8 too
        assert (ended["error"] == {"message": "cut"}) == (end < len(whole))


def test_every_cut_of_a_chunk_of_a_chat() -> None:
    whole = (
        b'{"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": "a\\"\\u00e9\\ud83d\\ude42\\\\", "x": []'
        b'}, "logprobs": null, "finish_reason": null}], "b": [true, false, -0.5e+10, 12], "error": null}'
    )
    for end in range(1, len(whole)):
        rest = rest_of_object(whole[:end], MEMBERS)
        assert rest is not None
        assert json.loads(whole[:end] + rest)["error"] == {"message": "cut"}, whole[:end]
    assert rest_of_object(whole, MEMBERS) == b""
    assert rest_of_object(whole + b" ", MEMBERS) == b""


@pytest.mark.parametrize(
    "begun", [b"hello", b"[1, 2", b'"text', b"", b"{]", b'{"a" "b', b"{,", b"]", b"[" * 5000, b"{" * 5000]
)
def test_what_begins_no_object_is_left_alone(begun: bytes) -> None:
    assert rest_of_object(begun, MEMBERS) is None


def test_a_long_beginning_is_not_looked_at() -> None:
    assert rest_of_object(b'{"a":"' + b"x" * half_json.LIMIT_BYTES, MEMBERS) is None


@given(st.text(min_size=1, max_size=3))
@example("\u0800\U00010000\ud7ff\U0010ffff")
def test_a_character_cut_anywhere_is_ended(text: str) -> None:
    whole = text.encode()
    for end in range(len(whole) + 1):
        (whole[:end] + rest_of_character(whole[:end])).decode()
    assert rest_of_character(whole) == b""
