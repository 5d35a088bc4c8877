"""An event as a person reads it: what happened to whom and why, then the rest."""

import json
from collections.abc import Mapping
from typing import Any

REASONS = ("reason", "why", "note")
LONG = ("last_lines", "exception")


def told(event: str, data: Mapping[str, Any]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the event with its worker, the reason, and the other keys with their values; each on one line.

    Args:
        data: Plain JSON, as the ring of events and the log have it.

    Returns:
        ``("worker.exited m-gpu0", "ended by signal 9", [("ran_s", "17.0")])``. Keys without a value are left out; what
        is long comes last. Nothing in it drives a terminal.
    """
    keys = {key: value for key, value in data.items() if value is not None}
    subject = f"{event} {flat(keys.pop('worker'))}" if "worker" in keys else event
    reason = "; ".join(filter(None, (flat(keys.pop(key)) for key in REASONS if key in keys)))
    ordered = sorted(keys, key=lambda key: key in LONG)
    return subject, reason, [(key, flat(keys[key])) for key in ordered]


def flat(value: Any) -> str:
    """Return a value on one line that drives no terminal: the lines of a text become clauses."""
    clauses = "; ".join(line.strip() for line in text_of(value).splitlines() if line.strip())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in clauses)


def text_of(value: Any) -> str:
    """Return plain JSON as text: lists of words and numbers with commas, lists of lines one below the other."""
    match value:
        case str():
            return value
        case list() if any(isinstance(item, str) and " " in item for item in value):
            return "\n".join(map(str, value))
        case list() if all(isinstance(item, (int, str)) for item in value):
            return ",".join(map(str, value))
        case _:
            return json.dumps(value)
