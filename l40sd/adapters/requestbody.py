"""Where a request's body names its model, and how to put another name there.

The two usual places, first key or followed by small values only, are found in 1 us however large the body is;
anything else is decoded (0.1 ms for 128 KiB). A body that names its model twice may be taken by either name: the
engine reads the body itself and refuses a name it does not have.
"""

import re
from typing import Any, NamedTuple

import msgspec

from l40sd.core.refused import Refused

TAIL_BYTES = 4096
PARTS_LIMIT = 256

_string = rb'"[^"\\]*+"'
_plain = rb'(?:[^"\\\[\]{}]|' + _string + rb")*+"  # neither brackets nor escapes
_value = rb"(?:" + _string + rb"|[-+.\w]++|\{" + _plain + rb"\}|\[" + _plain + rb"\])"
_space = rb"[ \t\r\n]*+"
_name = rb'"model"' + _space + rb":" + _space + rb'"([^"\\]*+)"'
_first = re.compile(_space + rb"\{" + _space + _name).match
_last = re.compile(
    _name
    + rb"(?:"
    + _space
    + rb","
    + _space
    + _string
    + _space
    + rb":"
    + _space
    + _value
    + rb")*+"
    + _space
    + rb"\}"
    + _space
).fullmatch
_boundary = re.compile(rb'(?i:multipart/form-data\b.*;[ \t]*boundary)=(?:"([^"]{1,70})"|([^;," \t]{1,70}))').match
_is_model_part = re.compile(rb'(?i:content-disposition:[^\r\n]*;[ \t]*name)="?model"?[ \t]*(?:;|\r\n|$)').search


class _Body(msgspec.Struct):
    model: str | None = None


_decode = msgspec.json.Decoder(_Body).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class ModelField(NamedTuple):
    """The model that a body names.

    Attributes:
        start: Where the name's bytes begin in the body; -1 when only decoding finds it.
        end: Where they end.
    """

    name: str
    start: int
    end: int


def find_model(body: bytes, content_type: bytes, start: int = 0) -> ModelField:
    """Return the model that a JSON object or a multipart form names at its top.

    Args:
        body: May have something else before the body proper, which begins at ``start``.
        content_type: The body's.
        start: So that a large body need not be copied out of what was read.

    Raises:
        Refused: 400; it names none, or is neither.
    """
    match = _first(body, start) or _last(body, _search_from(body, start))
    if match is not None:
        return _field(body, match.start(1), match.end(1))
    if content_type[:10].lower() == b"multipart/":
        return _find_in_form(body, content_type, start)
    try:
        name = _decode(memoryview(body)[start:]).model
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refused(400, "invalid_json", f"the body is not a JSON object with a model: {error}") from error
    if name is None:
        raise _no_model()
    return ModelField(name, -1, -1)


class ModelMemory:
    """``find_model`` for one client's connection: its bodies begin alike, or end alike, up to and with the model."""

    __slots__ = ("_begins", "_ends", "_name")

    def __init__(self) -> None:
        self._begins = b""
        self._ends = b""
        self._name = ""

    def name(self, body: bytes, content_type: bytes, start: int = 0) -> str:
        """Return the name that ``find_model`` finds.

        Raises:
            Refused: As there.
        """
        if self._begins:
            if body.startswith(self._begins, start):
                return self._name
        elif self._ends and body.endswith(self._ends) and not _first(body, start):
            return self._name
        field = find_model(body, content_type, start)
        self._name = field.name
        is_first = field.start >= 0 and _first(body, start) is not None
        is_last = field.start >= 0 and not is_first and content_type[:10].lower() != b"multipart/"
        self._begins = body[start : field.end + 1] if is_first else b""
        self._ends = body[_search_from(body, start) :] if is_last else b""
        return field.name


def replace_model(body: bytes, field: ModelField, name: str, start: int = 0) -> bytes:
    """Return the body proper with another model's name where ``find_model`` found one; nothing else changes."""
    if field.start >= 0:
        new = name.encode()
        is_json = body[field.start - 1 : field.start] == b'"'
        return body[start : field.start] + (msgspec.json.encode(name)[1:-1] if is_json else new) + body[field.end :]
    fields: dict[str, Any] = {**_decode_fields(memoryview(body)[start:]), "model": name}
    return msgspec.json.encode(fields)


def _search_from(body: bytes, start: int) -> int:
    """Return where the last ``"model"`` near the end stands; the end itself when there is none."""
    found = body.rfind(b'"model"', max(start, len(body) - TAIL_BYTES))
    return found if found >= 0 else len(body)


def _find_in_form(body: bytes, content_type: bytes, start: int) -> ModelField:
    match = _boundary(content_type)
    if match is None:
        raise Refused(400, "bad_request", "the multipart body's type names no boundary")
    delimiter = b"--" + (match[1] or match[2])
    at = start if body.startswith(delimiter, start) else body.find(b"\r\n" + delimiter, start) + 2
    for _ in range(PARTS_LIMIT):
        head_end = body.find(b"\r\n\r\n", at)
        end = body.find(b"\r\n" + delimiter, max(at, head_end))
        if at < 0 or head_end < 0 or end < 0:
            break
        if _is_model_part(body, at, head_end):
            return _field(body, head_end + 4, end)
        at = end + 2
    raise _no_model()


def _field(body: bytes, start: int, end: int) -> ModelField:
    try:
        return ModelField(body[start:end].decode(), start, end)
    except UnicodeDecodeError as error:
        raise Refused(400, "bad_request", "the model's name is not UTF-8") from error


def _no_model() -> Refused:
    return Refused(400, "missing_required_parameter", "the body names no model", "model")
