"""A stream of events as clients' libraries read it."""

import json
import re
from typing import Any, NamedTuple


class SseEvent(NamedTuple):
    """One event.

    Attributes:
        name: Of its last ``event`` field; empty: it had none.
        data: Its ``data`` fields, joined.
    """

    name: str
    data: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


def decode(stream: bytes) -> list[SseEvent]:
    """Return the events of a stream; what no blank line follows is none.

    As openai 3.57's SSEDecoder does it: strict UTF-8, and an event with a name and no data is one, which it then tries
    to decode. The HTML standard and anthropic's library drop that.
    """
    events = []
    name = ""
    data: list[str] = []
    for line in re.split(rb"\r\n|\n|\r", stream)[:-1]:
        field, _, value = line.decode().partition(":")
        value = value.removeprefix(" ")
        if not line:
            if name or data:
                events.append(SseEvent(name, "\n".join(data)))
            name, data = "", []
        elif field == "event":
            name = value
        elif field == "data":
            data.append(value)
    return events
