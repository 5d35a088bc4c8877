"""Configuration texts -> Config: overlays are merged, keys and values checked, all problems told at once.

What goes beyond one value (a pattern's model exists, aliases are unique) is in check.py; how a Config
is shown and compared, in show.py.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import tomli

from l40sd.config.check import KeyPath, Problem, check
from l40sd.config.options import (
    Config,
    DaemonConfig,
    EngineConfig,
    HealthConfig,
    HostConfig,
    ModelConfig,
    Option,
    ProxyConfig,
    WorkersConfig,
    option,
    options_of,
)
from l40sd.config.values import BadValue, shown, value_of
from l40sd.errors import ConfigError, L40sError
from l40sd.model import ModelName, Pattern, ReplicaSpec

SECTIONS: Mapping[str, type] = {
    "daemon": DaemonConfig,
    "host": HostConfig,
    "proxy": ProxyConfig,
    "workers": WorkersConfig,
    "health": HealthConfig,
}
_TABLES = (*SECTIONS, "engines", "models", "patterns")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checked configuration and where it came from.

    Attributes:
        files: In the order in which they were laid over each other.
        origins: For every key that a file sets: its path, and the last file that set it.
    """

    config: Config
    files: tuple[str, ...]
    origins: Mapping[KeyPath, str]


def parse(texts: Sequence[tuple[str, str]]) -> Config:
    """Return the configuration that these files make together; see ``load``."""
    return load(texts).config


def load(texts: Sequence[tuple[str, str]]) -> Loaded:
    """Return the configuration that these files make together, and which file each value came from.

    Args:
        texts: (path, TOML text) of the main file, then of each overlay: tables are merged key by key,
            everything else (arrays too) is replaced.

    Raises:
        ConfigError: Every problem of all the files: ``file: table.key: what``.
    """
    tree: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    broken: list[L40sError] = []
    for path, text in texts:
        try:
            _lay_over(tree, tomli.loads(text), origins, path)
        except (ValueError, RecursionError) as error:  # a TOMLDecodeError, an endless number, "[" x 400
            broken.append(L40sError(f"not TOML: {error}", where=path, code="bad_config"))
    if broken:
        raise ConfigError(broken)

    reader = _Reader()
    config = reader.config(tree)
    told = {problem.path for problem in reader.problems}
    problems = reader.problems + [each for each in check(config) if not _is_below(each.path, told)]
    if problems:
        main = texts[0][0] if texts else "configuration"
        raise ConfigError([_as_error(each, origins, main) for each in problems])
    return Loaded(config=config, files=tuple(path for path, _ in texts), origins=MappingProxyType(dict(origins)))


def key_text(path: KeyPath) -> str:
    """Return a key's path as TOML writes it: ``models."qwen2.5".tp``, ``patterns.day.replicas[0].tp``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        text += ("." if text else "") + (part if _BARE_KEY.fullmatch(part) else json.dumps(part, ensure_ascii=False))
    return text


def origin_of(path: KeyPath, origins: Mapping[KeyPath, str]) -> str | None:
    """Return the file that set this key or, failing that, the nearest table around it; None for neither."""
    for end in range(len(path), 0, -1):
        if path[:end] in origins:
            return origins[path[:end]]
    return None


def _lay_over(
    below: dict[str, Any], above: Mapping[str, Any], origins: dict[KeyPath, str], file: str, at: KeyPath = ()
) -> None:
    for key, value in above.items():
        path = (*at, key)
        origins[path] = file
        if isinstance(value, dict):
            if not isinstance(below.get(key), dict):
                below[key] = {}
            _lay_over(below[key], value, origins, file, path)
        else:
            below[key] = value


def _as_error(problem: Problem, origins: Mapping[KeyPath, str], main: str) -> L40sError:
    file = origin_of(problem.path, origins) or main
    key = key_text(problem.path)
    return L40sError(problem.what, where=f"{file}: {key}" if key else file, hint=problem.hint, code="bad_config")


def _is_below(path: KeyPath, told: Iterable[KeyPath]) -> bool:
    """Return whether a value on this path was refused already: what follows from that is only noise."""
    return any(path[: len(each)] == each or each[: len(path)] == path for each in told)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReplicaEntry:
    """One ``[[patterns.NAME.replicas]]`` as written; ``count`` is read by itself: it may be "fill"."""

    model: str = option("", "a model of this configuration")
    tp: int = option(1, "tensor parallel width", least=1, most=1024)
    pp: int = option(1, "pipeline parallel depth", least=1, most=1024)


_COUNT = Option(
    name="count", kind=int, default=None, doc="", least=1, most=1024, choices=(), restart=False
)  # fmt: skip


class _Reader:
    """Makes records of tables; what it cannot use it notes in ``problems`` and reads as the default."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def config(self, tree: Mapping[str, Any]) -> Config:
        """Return the whole configuration."""
        self._refuse_unknown(tree, (), _TABLES)
        sections = {
            name: record(**self._options(record, self._table(tree, (), name), (name,)))
            for name, record in SECTIONS.items()
        }
        engines = {
            name: EngineConfig(**self._options(EngineConfig, self._table(tables, ("engines",), name), path))
            for name, path, tables in self._entries(tree, "engines")
        }
        models = {
            ModelName(name): ModelConfig(
                name=ModelName(name),
                **self._options(ModelConfig, self._table(tables, ("models",), name), path),
            )
            for name, path, tables in self._entries(tree, "models")
        }
        patterns = {
            name: self._pattern(name, self._table(tables, ("patterns",), name), path)
            for name, path, tables in self._entries(tree, "patterns")
        }
        return Config(**sections, engines=engines, models=models, patterns=patterns)

    def _entries(self, tree: Mapping[str, Any], kind: str) -> Iterable[tuple[str, KeyPath, Mapping[str, Any]]]:
        """Return name, path and surrounding table of each ``[kind.NAME]``."""
        tables = self._table(tree, (), kind)
        return [(name, (kind, name), tables) for name in tables]

    def _table(self, around: Mapping[str, Any], at: KeyPath, name: str) -> Mapping[str, Any]:
        value = around.get(name, {})
        if isinstance(value, dict):
            return value
        path = (*at, name)
        self._note(path, f"must be a table, not {shown(value)}", f"write [{key_text(path)}]")
        return {}

    def _options(self, record: type, table: Mapping[str, Any], at: KeyPath) -> dict[str, Any]:
        known = {each.name: each for each in options_of(record)}
        self._refuse_unknown(table, at, tuple(known))
        return {name: self._value(known[name], table[name], (*at, name)) for name in known if name in table}

    def _pattern(self, name: str, table: Mapping[str, Any], at: KeyPath) -> Pattern:
        self._refuse_unknown(table, at, ("description", "replicas"))
        text = Option(
            name="description", kind=str, default="", doc="", least=None, most=None, choices=(), restart=False
        )
        description = self._value(text, table.get("description", ""), (*at, "description"))
        entries = table.get("replicas", [])
        path = (*at, "replicas")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            self._note(path, f"must be tables, not {shown(entries)}", f"write [[{key_text(path)}]]")
            entries = []
        replicas = [self._replica(entry, (*path, position)) for position, entry in enumerate(entries)]
        return Pattern(name=name, replicas=tuple(replicas), description=description)

    def _replica(self, table: Mapping[str, Any], at: KeyPath) -> ReplicaSpec:
        self._refuse_unknown(table, at, ("model", "count", "tp", "pp"))
        known = {name: value for name, value in table.items() if name in ("model", "tp", "pp")}
        entry = _ReplicaEntry(**self._options(_ReplicaEntry, known, at))
        count = table.get("count", "fill")
        if isinstance(count, str) and count != "fill":
            self._note((*at, "count"), f'must be a number or "fill", not {shown(count)}')
        number = None if isinstance(count, str) else self._value(_COUNT, count, (*at, "count"))
        return ReplicaSpec(model=ModelName(entry.model), count=number, tp=entry.tp, pp=entry.pp)

    def _value(self, known: Option, raw: Any, path: KeyPath) -> Any:
        try:
            return value_of(known, raw)
        except BadValue as bad:
            self._note(path, bad.what, bad.hint)
            return known.default

    def _refuse_unknown(self, table: Mapping[str, Any], at: KeyPath, known: Sequence[str]) -> None:
        for name in table:
            if name not in known:
                self._note((*at, name), "unknown key", _suggestion(name, at, known))

    def _note(self, path: KeyPath, what: str, hint: str = "") -> None:
        self.problems.append(Problem(path=path, what=what, hint=hint))


def _suggestion(name: str, at: KeyPath, known: Sequence[str]) -> str:
    """Return what may have been meant: 1. the nearest key here, 2. the same key elsewhere, 3. all keys."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:  # 1
        return f"did you mean {key_text((near[0],))}?"
    elsewhere = [
        f"[{table}]"
        for table, record in {**SECTIONS, "models.NAME": ModelConfig, "engines.NAME": EngineConfig}.items()
        if any(each.name == name for each in options_of(record))
    ]
    if elsewhere:  # 2
        return f"{name} belongs to {' or '.join(elsewhere)}"
    return f"known {'here' if at else 'tables'}: {', '.join(known)}"  # 3
