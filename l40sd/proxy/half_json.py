"""The beginning of a JSON object -> what makes it a whole one.

A stream of events can break off within one. What was sent cannot be taken back, and every client decodes what it gets:
so the object is ended where it stands, with further members that say what happened. A member that stands twice counts
as its last (RFC 8259 leaves it open; Python, JavaScript and Go do so).
"""

import json
import re

LIMIT_BYTES = 1 << 18

_token = re.compile(rb'[ \t\r\n]++|"(?:[^"\\]|\\.)*+"|[{}\[\],:]|[^ \t\r\n"{}\[\],:]++', re.DOTALL).match
_half_escape = re.compile(rb'"(?:[^"\\]|\\[^u]|\\u[0-9a-fA-F]{4})*+\\(u[0-9a-fA-F]{0,3})?', re.DOTALL).fullmatch
_number = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?").fullmatch


def rest_of_object(begun: bytes, members: bytes) -> bytes | None:
    """Return what ends a JSON object that broke off.

    Args:
        begun: Its beginning; the first bytes are there.
        members: What it is to say besides, as ``"name":value,...``: the last of its own level.

    Returns:
        Empty where it is whole already; None where it is no beginning of an object, or one too long to look at.
    """
    if len(begun) > LIMIT_BYTES:
        return None
    try:
        rest = _rest(begun, members)
        json.loads(begun + rest)
    except (ValueError, RecursionError, IndexError):
        return None
    return rest


def rest_of_character(begun: bytes) -> bytes:
    """Return continuation bytes for a text that ends within a UTF-8 character; which one that makes, nobody knows."""
    for back in range(1, min(3, len(begun)) + 1):
        first = begun[-back]
        if first & 0xC0 == 0x80:
            continue
        length = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC2 else 1
        if back == 1 and first in (0xE0, 0xF0):  # not below U+0800 and U+10000: that would be an overlong form
            return (b"\xa0" if first == 0xE0 else b"\x90") + b"\x80" * (length - 2)
        return b"\x80" * max(0, length - back)
    return b""


def _rest(begun: bytes, members: bytes) -> bytes:
    """Walk over the tokens; what is not JSON is found out by whoever decodes the whole."""
    open_: list[bytes] = []
    wanted = b""  # in the innermost container: b"," after a value, else what comes next: a key, b":" or a value
    last = b""
    at = 0
    while at < len(begun):
        token = _token(begun, at)
        if token is None:  # a text that is not ended
            rest = _rest_of_text(begun[at:])
            wanted, last = (b":" if wanted == b"key" else b","), b'"'
            return rest + _close(open_, wanted, last, members)
        at = token.end()
        match token[0]:
            case b"{" | b"[" as bracket:
                open_.append(bracket)
                wanted = b"key" if bracket == b"{" else b"value"
            case b"}" | b"]":
                open_.pop()
                if not open_:
                    return b""
                wanted = b","
            case b",":
                wanted = b"key" if open_[-1] == b"{" else b"value"
            case b":":
                wanted = b"value"
            case text if text.isspace():
                continue
            case text if text[:1] == b'"' and wanted == b"key":
                wanted = b":"
            case text:
                wanted = b","
                if at == len(begun) and text[:1] != b'"':
                    return _rest_of_word(text) + _close(open_, wanted, text, members)
        last = token[0]
    return _close(open_, wanted, last, members)


def _close(open_: list[bytes], wanted: bytes, last: bytes, members: bytes) -> bytes:
    """Return what ends the value at hand and every container, ``members`` in the outermost."""
    rest = b""
    if len(open_) == 1 and wanted == b"key":
        return members + b"}"
    match wanted:
        case b":":
            rest = b":null"
        case b"key" if last == b",":
            rest = b'"":null'
        case b"value" if last != b"[":
            rest = b"null"
    rest += b"".join(b"}" if bracket == b"{" else b"]" for bracket in reversed(open_[1:]))
    return rest + b"," + members + (b"}" if open_[0] == b"{" else b"]")


def _rest_of_text(begun: bytes) -> bytes:
    half = _half_escape(begun)
    if half is None:
        return rest_of_character(begun) + b'"'
    return (b"\\" if half[1] is None else b"0" * (5 - len(half[1]))) + b'"'


def _rest_of_word(begun: bytes) -> bytes:
    for word in (b"true", b"false", b"null"):
        if word.startswith(begun):
            return word[len(begun) :]
    return b"" if _number(begun) else b"0"
