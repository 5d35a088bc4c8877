"""Records <-> JSON: of the control API, of the state files, of what one daemon tells the next."""

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def encode(value: Any) -> bytes:
    """Return a record (or plain data) as one line of JSON."""
    return msgspec.json.encode(value)


def decode(kind: type[T], data: bytes) -> T:
    """Return the record that ``data`` holds.

    Raises:
        msgspec.ValidationError: The JSON does not have the record's shape.
    """
    return msgspec.json.decode(data, type=kind)


def plain(value: Any) -> Any:
    """Return a record as lists, dicts, strings and numbers, for ``-o json`` and for state files."""
    return msgspec.to_builtins(value, order="sorted")


def restore(kind: type[T], value: Any) -> T:
    """Return the record that ``plain`` made this of.

    Raises:
        msgspec.ValidationError: It does not have the record's shape.
    """
    return msgspec.convert(value, kind)
