"""A Config -> TOML to read, and two Configs -> what differs between them, in words. Secrets stay hidden."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from l40sd.config.check import KeyPath
from l40sd.config.load import SECTIONS, key_text
from l40sd.config.options import Config, options_of
from l40sd.model import Pattern, ReplicaSpec

_SECRET_KEY = re.compile(r"(?i)(token|secret|password|credentials?|key)$")
_HIDDEN = "***"
_COMMENT_COLUMN = 48


def to_toml(config: Config, origins: Mapping[KeyPath, str] | None = None, *, secrets: bool = False) -> str:
    """Return the effective configuration as TOML, every option spelled out.

    Args:
        origins: From ``load.load``; each line then says which file it came from, or that it is a default.
        secrets: Write keys and tokens too; else ``***`` stands for them. What is written with them parses back
            to an equal Config.
    """
    lines: list[str] = []
    for path, record in _tables(config):
        if lines:
            lines.append("")
        lines.append(f"[{key_text(path)}]")
        if isinstance(record, Pattern):
            lines += _pattern_lines(path, record, origins)
            continue
        for option in options_of(type(record)):
            value = _shown(option.name, getattr(record, option.name), secrets)
            lines.append(_commented(f"{option.name} = {toml_value(value)}", (*path, option.name), origins))
    return "\n".join(lines) + "\n"


def diff(old: Config, new: Config) -> tuple[str, ...]:
    """Return what differs, one sentence each: ``proxy.queue_limit: 1000 -> 500``; empty for none.

    What is not seen at once says when it is.
    """
    before, after = dict(_tables(old)), dict(_tables(new))
    sentences: list[str] = []
    for path in dict.fromkeys((*before, *after)):
        name = key_text(path)
        if path not in after:
            sentences.append(f"{name}: removed")
        elif path not in before:
            sentences.append(f"{name}: added ({_summary(after[path])})")
        elif isinstance(after[path], Pattern):
            if before[path].replicas != after[path].replicas:
                sentences.append(f"{name}: {_summary(before[path])} -> {_summary(after[path])}")
            if before[path].description != after[path].description:
                sentences.append(f"{name}.description: changed")
        else:
            sentences += _option_changes(name, before[path], after[path])
    return tuple(sentences)


def toml_value(value: Any) -> str:
    """Return a value as TOML on one line."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return _escaped(json.dumps(value, ensure_ascii=False))
        case Mapping():
            inside = ", ".join(f"{_escaped(key_text((key,)))} = {toml_value(item)}" for key, item in value.items())
            return f"{{ {inside} }}" if inside else "{}"
        case _:
            return f"[{', '.join(toml_value(item) for item in value)}]"


def _escaped(json_text: str) -> str:
    """Return a JSON string as TOML: the escapes are the same, but TOML wants DEL escaped too."""
    return json_text.replace("\x7f", "\\u007f")


def _tables(config: Config) -> Iterator[tuple[KeyPath, Any]]:
    """Return every table's path and record, in the order in which they are shown."""
    for section in SECTIONS:
        yield (section,), getattr(config, section)
    for kind in ("engines", "models", "patterns"):
        for name, record in getattr(config, kind).items():
            yield (kind, name), record


def _pattern_lines(path: KeyPath, pattern: Pattern, origins: Mapping[KeyPath, str] | None) -> Iterator[str]:
    yield _commented(f"description = {toml_value(pattern.description)}", (*path, "description"), origins)
    for replica in pattern.replicas:
        yield _commented(f"[[{key_text(path)}.replicas]]", (*path, "replicas"), origins)
        yield f"model = {toml_value(replica.model)}"
        yield f"count = {toml_value('fill' if replica.count is None else replica.count)}"
        yield f"tp = {replica.tp}"
        yield f"pp = {replica.pp}"


def _commented(line: str, path: KeyPath, origins: Mapping[KeyPath, str] | None) -> str:
    if origins is None:
        return line
    return f"{line:<{_COMMENT_COLUMN}} # {origins.get(path, 'default')}"


def _option_changes(name: str, before: Any, after: Any) -> Iterator[str]:
    for option in options_of(type(after)):
        was, now = getattr(before, option.name), getattr(after, option.name)
        if was == now:
            continue
        words = option.later or getattr(type(after), "LATER", "")
        later = f" ({words})" if words else ""
        old, new = _shown(option.name, was, secrets=False), _shown(option.name, now, secrets=False)
        change = "changed" if old == new else f"{toml_value(old)} -> {toml_value(new)}"
        yield f"{name}.{option.name}: {change}{later}"


def _summary(record: Any) -> str:
    if isinstance(record, Pattern):
        return " + ".join(_replica_text(each) for each in record.replicas)
    engine = getattr(record, "engine", "")
    return f"engine {engine}" if engine else "engine"


def _replica_text(replica: ReplicaSpec) -> str:
    count = "fill" if replica.count is None else str(replica.count)
    shape = f"TP{replica.tp}" + (f" PP{replica.pp}" if replica.pp > 1 else "")
    return f"{count} x {replica.model} {shape}"


def _shown(name: str, value: Any, secrets: bool) -> Any:  # noqa: FBT001 - passed through from a keyword
    if secrets or not value:
        return value
    if isinstance(value, Mapping):
        return {key: _shown(key, item, secrets) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_shown_argument(before, each) for before, each in zip(("", *value), value, strict=False))
    return _HIDDEN if isinstance(value, str) and _SECRET_KEY.search(name) else value


def _shown_argument(before: str, argument: str) -> str:
    """Return one argument of a command line; hidden after ``--api-key`` or in ``--api-key=...``."""
    name, sign, _ = argument.partition("=")
    if before.startswith("-") and "=" not in before and _SECRET_KEY.search(before):
        return argument if argument.startswith("{") else _HIDDEN
    return f"{name}={_HIDDEN}" if sign and name.startswith("-") and _SECRET_KEY.search(name) else argument
