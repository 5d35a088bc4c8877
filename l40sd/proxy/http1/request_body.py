"""Where a request's body names its model, and how to put another name there.

The two usual places, first key or followed by small values only, are found in 1 us however large the body is;
anything else is decoded (0.1 ms for 128 KiB). A body that names its model twice is routed by one of the names and
passed on as it is: the engine reads it itself and refuses a name it does not have. Where another name has to be put in,
what the engine will read must be what was routed: such a body is refused.

Everything here is linear in the body, with bounds on what costs more than looking at a byte: see the limits.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from l40sd.proxy.refused import Refused

TAIL_BYTES = 4096
KEPT_BYTES = 4096  # of a body, to know the next one's model by
NAME_LIMIT_BYTES = 1024
STRINGS_LIMIT = 100_000  # in a body whose model is in an unusual place and has to be replaced: 10 ms
KEYS_LIMIT = 1000  # called "model", anywhere in such a body
PARTS_LIMIT = 256
PART_HEAD_LIMIT_BYTES = 4096
BOUNDARY_LIMIT = 70  # bytes; RFC 2046, 5.1.1

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
_model_key = re.compile(
    rb'(?<!\\)"(?:m|\\u006[dD])(?:o|\\u006[fF])(?:d|\\u0064)(?:e|\\u0065)(?:l|\\u006[cC])"' + _space + rb":"
).finditer
_any_string = re.compile(_space + rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL).match
_form_type = re.compile(rb"(?i:multipart/form-data)[ \t]*+").match
_form_data = re.compile(rb"[ \t]*+(?i:form-data)[ \t]*+").match
_parameter = re.compile(
    rb';[ \t]*+([^=;"\s]++)[ \t]*+=[ \t]*+(?:"((?:[^"\\]++|\\.)*+)"|([^;"\s]*+))[ \t]*+', re.DOTALL
).match


class _Body(msgspec.Struct):
    model: str | None = None


_decode = msgspec.json.Decoder(_Body).decode


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
        Refused: 400; it names none, or is neither. 404: no model has so long a name.
    """
    if _is_form(content_type):
        return _find_in_form(body, content_type, start)
    match = _usual(body, start)
    if match is not None:
        return _field(body, match.start(1), match.end(1))
    try:
        name = _decode(memoryview(body)[start:]).model
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refused(400, "invalid_json", f"the body is not a JSON object with a model: {error}") from error
    except RecursionError:
        raise Refused(400, "invalid_json", "the body is nested too deeply") from None
    if name is None:
        raise _no_model()
    _check_length(name)
    return ModelField(name, -1, -1)


class CachedModelName:
    """``find_model`` for one client's connection: its bodies begin alike, or end alike, up to and with the model."""

    __slots__ = ("_begins", "_content_type", "_ends", "_name")

    def __init__(self) -> None:
        self._begins = b""
        self._ends = b""
        self._content_type = b""
        self._name = ""

    def name(self, body: bytes, content_type: bytes, start: int = 0) -> str:
        """Return the name that ``find_model`` finds.

        Raises:
            Refused: As there.
        """
        if content_type == self._content_type:
            if self._begins:
                if body.startswith(self._begins, start):
                    return self._name
            elif self._ends and body.endswith(self._ends) and not _first(body, start):
                return self._name
        field = find_model(body, content_type, start)
        self._begins = self._ends = b""
        if field.start >= 0 and not _is_form(content_type):
            self._content_type = content_type
            self._name = field.name
            if _first(body, start) is not None:
                self._begins = _short(body[start : field.end + 1])
            else:
                self._ends = body[_search_from(body, start) - 1 :]  # with what stands before: never a backslash
        return field.name


def replace_model(body: bytes, content_type: bytes, name: str, start: int = 0) -> bytes:
    """Return the body proper with another model's name where ``find_model`` found one; nothing else changes.

    Raises:
        Refused: 400; it names a model twice, or in a place that cannot be found within the limits.
    """
    if _is_form(content_type):
        field, new = _find_in_form(body, content_type, start), name.encode()
    else:
        field, new = _find_only(body, start), msgspec.json.encode(name)[1:-1]
    return body[start : field.start] + new + body[field.end :]


def _usual(body: bytes, start: int) -> re.Match[bytes] | None:
    return _first(body, start) or _last(body, _search_from(body, start))


def _search_from(body: bytes, start: int) -> int:
    """Return where the last ``"model"`` near the end stands; the end itself when there is none."""
    found = body.rfind(b'"model"', max(start, len(body) - TAIL_BYTES))
    is_within_string = found > start and body[found - 1 : found] == b"\\"  # "x\"model": another key's end
    return found if found >= 0 and not is_within_string else len(body)


# -- the one place in a JSON object


def _find_only(body: bytes, start: int) -> ModelField:
    """Return the one model that an object names at its top; the key may be written with escapes."""
    is_plain = body.count(b'"model"', start) == 1 and body.find(b"\\u006", start) < 0
    match = _usual(body, start) if is_plain else None
    if match is None:
        _check_utf8(body, start)
        keys = _keys_at_top(body, start)
        if len(keys) != 1:
            raise Refused(400, "bad_request", f"the body names its model {len(keys)} times", "model")
        match = _any_string(body, keys[0])
    if match is None:
        raise _no_model()
    return ModelField("", match.start(1), match.end(1))


def _check_utf8(body: bytes, start: int) -> None:
    try:
        str(memoryview(body)[start:], "utf-8")
    except UnicodeDecodeError as error:
        raise Refused(400, "invalid_json", f"the body is not UTF-8: {error.reason}") from error


def _keys_at_top(body: bytes, start: int) -> list[int]:
    """Return where the values of the keys "model" of an object itself begin, not those of objects within it."""
    if body.count(b'"', start) > 2 * STRINGS_LIMIT:
        raise _put_it_first()
    found = []
    depth = 0
    at = start
    for count, key in enumerate(_model_key(body, start)):
        if count == KEYS_LIMIT:
            raise _put_it_first()
        depth += _opened_in(body[at : key.start()])
        at = key.end()
        if depth == 1:
            found.append(at)
    return found


def _opened_in(text: bytes) -> int:
    """Return how many more brackets are opened than closed in a piece of JSON that begins and ends between tokens."""
    outside = b"".join(text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    return outside.count(b"{") + outside.count(b"[") - outside.count(b"}") - outside.count(b"]")


# -- forms


def _is_form(content_type: bytes) -> bool:
    return content_type[:10].lower() == b"multipart/"


def _find_in_form(body: bytes, content_type: bytes, start: int) -> ModelField:
    boundary = [value for name, value in _parameters(_form_type, content_type) if name == b"boundary"]
    if len(boundary) != 1 or not 1 <= len(boundary[0]) <= BOUNDARY_LIMIT or b"\\" in boundary[0]:
        raise Refused(400, "bad_request", "the multipart body's type names no boundary")
    line = b"\r\n--" + boundary[0]
    places = list(_delimiters(body, line, start))
    found = []
    for at, end in itertools.pairwise(places):
        begin = at + len(line)
        head_end = body.find(b"\r\n\r\n", begin, min(end, begin + PART_HEAD_LIMIT_BYTES))
        if head_end < 0:
            raise _broken_form(f"a part has no head, or one longer than {PART_HEAD_LIMIT_BYTES} bytes")
        if _is_model_part(body[begin:head_end]):
            found.append((head_end + 4, end))
    if not found:
        raise _no_model()
    if len(found) > 1:
        raise _broken_form(f"it names its model {len(found)} times")
    return _field(body, *found[0])


def _delimiters(body: bytes, line: bytes, start: int) -> Iterator[int]:
    """Yield where each line between two parts begins, with the CR LF before it; the last one's is the form's end."""
    at = start - 2 if body.startswith(line[2:], start) else body.find(line, start)
    for _ in range(PARTS_LIMIT):
        if at < start - 2:
            raise _broken_form("the form does not end")
        after = at + len(line)
        ending = body[after : after + 2]
        if ending in (b"\r\n", b"--"):  # a longer line only begins like it
            yield at
        if ending == b"--":
            return
        at = body.find(line, after)
        if at < 0:
            raise _broken_form("the form does not end")
    raise _broken_form(f"the form has more than {PARTS_LIMIT} parts")


def _is_model_part(head: bytes) -> bool:
    """Return whether a part's head gives it the name "model"."""
    named = []
    for field in head.split(b"\r\n"):
        key, _, value = field.partition(b":")
        if key.strip().lower() == b"content-disposition":
            named += [pair for pair in _parameters(_form_data, value) if pair[0] in (b"name", b"name*")]
    if len(named) > 1 or any(name != b"name" or b"\\" in value for name, value in named):
        raise _broken_form("a part has two names, or one that is written with escapes")
    return named == [(b"name", b"model")]


def _parameters(begins: Callable[[bytes], re.Match[bytes] | None], value: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the parameters of a field's value, names in lower case."""
    match = begins(value)
    while match is not None and match.end() < len(value):
        match = _parameter(value, match.end())
        if match is not None:
            yield match[1].lower(), match[2] or match[3] or b""
    if match is None:
        raise _broken_form(f"{value[:200].decode('latin-1')!r} cannot be read")


# -- refusals


def _field(body: bytes, start: int, end: int) -> ModelField:
    if end - start > NAME_LIMIT_BYTES:
        _check_length(body[start : start + NAME_LIMIT_BYTES + 1].decode("utf-8", "replace"))
    try:
        return ModelField(body[start:end].decode(), start, end)
    except UnicodeDecodeError as error:
        raise Refused(400, "bad_request", "the model's name is not UTF-8") from error


def _check_length(name: str) -> None:
    if len(name) > NAME_LIMIT_BYTES:
        raise Refused(404, "model_not_found", f"the model {name[:200]!r}... is not served here", "model")


def _short(data: bytes) -> bytes:
    return data if len(data) <= KEPT_BYTES else b""


def _no_model() -> Refused:
    return Refused(400, "missing_required_parameter", "the body names no model", "model")


def _put_it_first() -> Refused:
    why = 'the body is too large to look for the model in the middle of it: put "model" first'
    return Refused(400, "bad_request", why, "model")


def _broken_form(why: str) -> Refused:
    return Refused(400, "bad_request", f"the multipart body is broken: {why}")
