"""Server-sent events: where a stream stands, told from its latest bytes, and how to end it there with an error event.

Nothing here is asked while a stream goes well. A worker's stream can break off anywhere; what was passed on of an
event cannot be taken back, and a blank line makes an event of it, which the client's library decodes. So:

| the stream stands                  | it goes on with                                                             |
|------------------------------------|-----------------------------------------------------------------------------|
| between two events                 | the error event                                                             |
| after a line, or in one, of no data| the line's end; the lines so far become part of the error event             |
| after whole lines of data          | the blank line that was missing: that event is whole; the error event       |
| within a line of JSON data         | the rest of a JSON object that says the error as well, so that the library  |
|                                    | decodes it and raises what it should; the error event                       |
| in the middle of something unknown | line ends, whatever it was; the error event                                 |

Source: "Interpreting an event stream" in the HTML standard. Lines end in CR LF, LF or CR; of two ``event`` fields in
one event the last counts; an event without ``data`` is none, but openai's library takes a named one for one.
"""

import re

from l40sd.proxy.half_json import rest_of_character, rest_of_object

DONE = b"[DONE]"

_line_end = re.compile(rb"\r\n|\n|\r")
_blank = re.compile(rb"(?>\r\n|\n|\r){2,}")
_begins_event = re.compile(rb"(?:data|event|id|retry):").match
_last_data = re.compile(rb"(?:\A|[\r\n])data: ?([^\r\n]*)[\r\n]*\Z").search


def error_event(members: bytes, name: bytes = b"") -> bytes:
    """Return a whole event.

    Args:
        members: Of its data, a JSON object, without the braces.
        name: Its name; empty: none.
    """
    return b"%bdata: {%b}\n\n" % (b"event: %b\n" % name if name else b"", members)


def ending(seen: bytes, members: bytes, name: bytes = b"") -> bytes:
    """Return what ends a stream that broke off, its error event last.

    Args:
        seen: The latest bytes of the stream, without any framing; they may begin anywhere.
        members: As for ``error_event``.
        name: As for ``error_event``.
    """
    if seen.endswith(b"\r"):  # the LF may have been on its way; where it was not, it is harmless
        return b"\n" + ending(seen + b"\n", members, name)
    event = error_event(members, name)
    pending = _pending(seen)
    if pending is None:
        return _any_end(seen) + event
    *lines, last = _line_end.split(pending)
    data = [value for line in lines if (value := _data_of(line)) is not None]
    begun = _data_of(last)
    if begun is None and not data:
        return _end_of_line(last) + event
    rest = _rest_of_data(b"\n".join(data if begun is None else [*data, begun]), members)
    if rest is None:
        return _any_end(seen) + event
    field = _end_of_line(last) + (b"data: " if rest else b"") if begun is None else b""
    own_name = b"event: %b\n" % name if name and rest.endswith(b"}") else b""
    return field + rest + b"\n" + own_name + b"\n" + event


def is_whole(seen: bytes, last_data: bytes) -> bool:
    """Return whether a stream that ended with its connection was whole, in doubt yes.

    Args:
        seen: Its latest bytes; empty: nothing ever came.
        last_data: What its last event has in it, ``[DONE]`` say; empty: nobody knows.
    """
    tail = _last_data(seen)
    if tail is not None and tail[1].strip() == DONE:
        return True
    is_line_end_only = bool(seen) and not seen.strip(b"\r\n")  # what stood before came earlier
    if seen and not is_line_end_only and not _stands_after_blank(seen):
        return False
    if not last_data or is_line_end_only or _begins_event(seen.lstrip(b"\r\n")) is None:
        return bool(seen) or not last_data
    return last_data in seen


def _pending(seen: bytes) -> bytes | None:
    """Return what has come of an event that is not ended, empty between two; None where its beginning is not seen."""
    start = 0
    for blank in _blank.finditer(seen):
        start = blank.end()
    if start or _begins_event(seen):
        return seen[start:].lstrip(b"\r\n")
    return None


def _stands_after_blank(seen: bytes) -> bool:
    return any(blank.end() == len(seen) for blank in _blank.finditer(seen))


def _data_of(line: bytes) -> bytes | None:
    """Return the value of a line that is a data field; None for any other."""
    name, colon, value = line.partition(b":")
    return value.removeprefix(b" ") if name == b"data" and colon else None


def _rest_of_data(begun: bytes, members: bytes) -> bytes | None:
    """Return what makes an event's data whole, with the error in it; None where nobody knows."""
    if not begun.strip():
        return b"{%b}" % members
    if DONE.startswith(begun):
        return DONE[len(begun) :]
    return rest_of_object(begun, members)


def _end_of_line(begun: bytes) -> bytes:
    """Return what ends a line of no data; half a field's name is made one that nobody knows."""
    if not begun:
        return b""
    return rest_of_character(begun) + (b"\n" if b":" in begun else b"-\n")


def _any_end(seen: bytes) -> bytes:
    """Return what ends any line and any event.

    It begins with the line end of a chunk's size or of a chunk, as far as that has not come: it may be taken for one.
    Neither ends in half a character or in ``data``.
    """
    rest = b"-" if seen.endswith(b"data") else rest_of_character(seen)
    return rest + b"\r\n\r\n\r\n"
