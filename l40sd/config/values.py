"""One TOML value -> one option's Python value, or what is wrong with it."""

import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any

from l40sd.config.options import Option


class BadValue(Exception):  # noqa: N818 - it is a verdict, told together with all the others
    """A value that cannot be used, and what to do about it."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def value_of(known: Option, raw: Any) -> Any:
    """Return one TOML value as this option's type.

    Raises:
        BadValue: Wrong type, out of bounds, or none of the choices.
    """
    if known.kind is bool:
        return _expect(raw, bool, "true or false")
    if known.kind is str:
        return _chosen(known, _text(raw))
    if known.kind in (int, float):
        return _number(known, raw)
    origin = typing.get_origin(known.kind)
    if origin is tuple:
        _expect(raw, list, 'an array of strings, e.g. ["a", "b"]')
        return tuple(_text(item, "an array of strings only") for item in raw)
    assert origin is Mapping, f"no reader for {known.kind}"
    _expect(raw, dict, 'a table of strings, e.g. { NAME = "value" }')
    return {name: _text(value, f"a table of strings only ({name})") for name, value in raw.items()}


def _expect(raw: Any, kind: type, wanted: str) -> Any:
    if type(raw) is not kind:
        raise BadValue(f"must be {wanted}, not {shown(raw)}")
    return raw


def _text(raw: Any, wanted: str = "a string") -> str:
    if type(raw) is not str:
        hint = f'put it in quotes: "{raw}"' if type(raw) in (int, float) else ""
        raise BadValue(f"must be {wanted}, not {shown(raw)}", hint)
    if "\0" in raw:
        raise BadValue("must not contain a NUL character")  # no argument, variable or path can carry one
    return raw


def _chosen(known: Option, value: str) -> str:
    if not known.choices or value in known.choices:
        return value
    near = difflib.get_close_matches(value.lower(), [each.lower() for each in known.choices], n=1)
    meant = [each for each in known.choices if [each.lower()] == near]
    hint = f'did you mean "{meant[0]}"?' if meant else ""
    raise BadValue(f"must be one of {', '.join(known.choices)}, not {shown(value)}", hint)


def _number(known: Option, raw: Any) -> int | float:
    wanted = "a whole number" if known.kind is int else "a number"
    if type(raw) is str and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", raw):
        raise BadValue(f"must be {wanted}, not {shown(raw)}", f"write {raw} without quotes")
    if type(raw) is not int and not (known.kind is float and type(raw) is float):
        raise BadValue(f"must be {wanted}, not {shown(raw)}")
    least = float("-inf") if known.least is None else known.least
    most = float("inf") if known.most is None else known.most
    if not least <= raw <= most:  # nan is never between two numbers
        raise BadValue(f"must be from {_plain(least)} to {_plain(most)}, not {shown(raw)}")
    return int(raw) if known.kind is int else float(raw)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def shown(raw: Any) -> str:
    """Return a wrong value for a message: short, and named by what TOML calls it."""
    match raw:
        case bool():
            return str(raw).lower()
        case dict():
            return "a table"
        case list():
            return "an array"
        case str():
            return f'"{raw}"' if len(raw) <= 60 else f'"{raw[:57]}..."'
        case int() if raw.bit_length() > 128:
            return "an enormous number"
        case _:
            return str(raw)
