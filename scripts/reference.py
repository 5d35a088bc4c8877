"""Writes the parts of docs/ that are told by the code: what stands between ``from the code`` and ``end`` there.

    .venv/bin/python scripts/reference.py            (after a change of an option or of a record of the control API)

tests/test_reference.py fails while a page says something else than this would write.
"""

import re
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from l40sd import model
from l40sd.config.load import SECTIONS
from l40sd.config.options import EngineConfig, ModelConfig, Option, options_of
from l40sd.config.show import toml_value
from l40sd.control import messages
from l40sd.workers import lifecycle

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(r"(<!-- from the code: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
AT_ONCE = "in force at a reload"


def main() -> None:
    """Write the pages anew."""
    for path in (ROOT / "docs").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        if (page := written(text)) != text:
            path.write_text(page, encoding="utf-8")


def written(page: str) -> str:
    """Return a page with what the code tells in its place."""
    return PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]()}\n{part[3]}", page)


def options_text() -> str:
    """Return a table for each section of the configuration."""
    sections = {f"[{name}]": record for name, record in SECTIONS.items()}
    sections |= {"[models.NAME]": ModelConfig, "[engines.NAME]": EngineConfig}
    return "\n".join(line for title, record in sections.items() for line in _section(title, record))


def _section(title: str, record: type) -> Iterator[str]:
    summary = (record.__doc__ or "").split("\n")[0].partition(": ")[2]
    yield from (f"### {title}", "", f"{summary[:1].upper()}{summary[1:]}", "")
    yield from ("| key | default | may be | meaning | a change |", "|---|---|---|---|---|")
    later = getattr(record, "LATER", "")
    for option in options_of(record):
        cells = (
            f"`{option.name}`",
            f"`{toml_value(option.default)}`",
            _may_be(option),
            _escaped(option.doc),
            _escaped(option.later or later or AT_ONCE),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def _may_be(option: Option) -> str:
    if option.choices:
        return " ".join(f"`{toml_value(choice)}`" for choice in option.choices)
    if option.least is not None and option.most is not None:
        return f"{option.least:,.15g} to {option.most:,.15g}"
    return _type_text(option.kind)


def records_text() -> str:
    """Return the fields of each record of the control API, as JSON has them."""
    records = [each for each in vars(messages).values() if is_dataclass(each) and isinstance(each, type)]
    return "\n".join(line for record in records for line in _record(record))


def _record(record: type) -> Iterator[str]:
    doc = (record.__doc__ or "").strip()
    yield from (f"### {record.__name__}", "", _escaped(_unquoted(doc.split("\n\n")[0])), "")
    is_asked = record.__name__.endswith("Request")
    yield from (
        ("| field | JSON | left out | meaning |", "|---|---|---|---|")
        if is_asked
        else ("| field | JSON | meaning |", "|---|---|---|")
    )
    meanings = _attributes(doc)
    hints = typing.get_type_hints(record)
    for each in fields(record):
        left_out = (_default(each),) if is_asked else ()
        cells = (f"`{each.name}`", _type_text(hints[each.name]), *left_out, _escaped(meanings.get(each.name, "")))
        yield f"| {' | '.join(cells).rstrip()} |"
    yield ""


def _attributes(doc: str) -> dict[str, str]:
    """Return what the ``Attributes:`` of a docstring say of each."""
    _, _, block = doc.partition("Attributes:\n")
    told = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", block, re.MULTILINE)
    return {name: _unquoted(" ".join(text.split())) for name, text in told}


def _default(each: Any) -> str:
    if each.default_factory is not MISSING:
        return f"`{toml_value(each.default_factory())}`"
    if each.default is MISSING:
        return "never"
    return "`null`" if each.default is None else f"`{toml_value(each.default)}`"


def _type_text(kind: Any) -> str:
    """Return a Python type in JSON's words; that of an option in TOML's, where these are the same."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
    inside = typing.get_args(kind)
    if kind in words:
        return words[kind]
    if typing.get_origin(kind) in (UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _type_text(part) for part in inside)
    if typing.get_origin(kind) is tuple:
        if inside[-1] is Ellipsis:
            return f"list of: {_type_text(inside[0])}"
        return f"[{', '.join(_type_text(part) for part in inside)}]"
    if inside:
        return f"table of: {_type_text(inside[1])}"
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def _unquoted(text: str) -> str:
    """Return a piece of a docstring on one line, in the page's language; closed sets are spelled out."""
    text = re.sub(r"A ``\w+\.\w+`` value: ", "", text)
    text = re.sub(r"A ``(\w+)\.(\w+)`` value\.", lambda found: _members(found[1], found[2]), text)
    return re.sub(r"\bNone\b", "null", " ".join(text.split()).replace("``", "`"))


def _members(module: str, name: str) -> str:
    return " ".join(f"`{member}`" for member in getattr(ENUMS_IN[module], name))


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


ENUMS_IN = {"model": model, "lifecycle": lifecycle}
PARTS = {"options": options_text, "records": records_text}

if __name__ == "__main__":
    main()
