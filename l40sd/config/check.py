"""What must hold between the values of a configuration, beyond each value's own type and bounds."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import SplitResult, urlsplit

from l40sd.config import overrides, placeholders
from l40sd.config.options import (
    BUILT_IN_ENGINES,
    BUILT_IN_PATTERNS,
    Config,
    EngineConfig,
    ModelConfig,
    is_external,
    slug,
)
from l40sd.config.origins import origin_problem
from l40sd.model import ModelName, Pattern

KeyPath = tuple[str | int, ...]
"""A key's place in the TOML tree: table names, then the key; numbers are places in an array."""

_SOCKET_PATH_BYTES = 107  # sun_path in unix(7), less its final NUL
_SLUG_LIMIT = 80  # a unit's name holds a slug, GPU numbers and a ulid, and ends at 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing to mend."""

    path: KeyPath
    what: str
    hint: str = ""


def check(config: Config) -> Iterator[Problem]:
    """Return everything about a configuration that cannot be, in the file's order."""
    yield from _check_daemon(config)
    yield from _check_proxy(config)
    yield from _check_workers(config)
    for name, engine in config.engines.items():
        yield from _check_engine(name, engine)
        yield from _check_command(name, engine, config)
    if not config.models:
        yield Problem(path=("models",), what="no model", hint="add a [models.NAME] with engine and source")
    for model in config.models.values():
        yield from _check_model(model, config)
    yield from _check_names(config)
    for pattern in config.patterns.values():
        yield from _check_pattern(pattern, config)


def base_engine(name: str, config: Config) -> str | None:
    """Return the built-in engine that ``name`` is or starts from; None for one wholly of the operator's own."""
    own = config.engines.get(name)
    if own is not None and own.base:
        return own.base
    return name if name in BUILT_IN_ENGINES else None


def listen_problem(address: str) -> str:
    """Return what is wrong with ``host:port``, ``[v6]:port`` or ``unix:/path``; empty when nothing is."""
    if address.startswith("unix:"):
        return _socket_problem(address.removeprefix("unix:"))
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})", address)
    if match is None:
        return f'"{address}" is neither host:port nor unix:/path'
    return "" if int(match[2]) <= 65535 else f"port {match[2]} is above 65535"


def _check_daemon(config: Config) -> Iterator[Problem]:
    daemon = config.daemon
    patterns = [*BUILT_IN_PATTERNS, *config.patterns]
    if daemon.pattern not in patterns:
        yield Problem(
            path=("daemon", "pattern"),
            what=f'no pattern "{daemon.pattern}"',
            hint=_nearest(daemon.pattern, patterns),
        )
    for name in ("state_dir", "runtime_dir", "log_dir", "cache_dir"):
        is_default = name == "cache_dir" and not daemon.cache_dir
        if not is_default and not PurePosixPath(getattr(daemon, name)).is_absolute():
            yield Problem(path=("daemon", name), what="must be an absolute path")
    in_default_place = f"{daemon.runtime_dir}/control.sock"
    if problem := _socket_problem(daemon.control_socket or in_default_place):
        yield Problem(path=("daemon", "control_socket" if daemon.control_socket else "runtime_dir"), what=problem)
    if not config.host.inventory:
        yield Problem(path=("host", "inventory"), what="must not be empty", hint='write "auto"')


def _check_proxy(config: Config) -> Iterator[Problem]:
    path = ("proxy", "listen")
    listen = config.proxy.listen
    if not listen:
        yield Problem(path=path, what="names no address", hint='e.g. ["127.0.0.1:8080"]')
    for address in listen:
        if problem := listen_problem(address):
            hint = f'e.g. "0.0.0.0{address}"' if re.fullmatch(r":[0-9]+", address) else ""
            yield Problem(path=path, what=problem, hint=hint)
    for address in _twice([each for each in listen if not each.endswith(":0")]):
        yield Problem(path=path, what=f'"{address}" is there twice')
    for origin in config.proxy.cors_origins:
        what, hint = origin_problem(origin)
        if what:
            yield Problem(path=("proxy", "cors_origins"), what=what, hint=hint)


def _check_workers(config: Config) -> Iterator[Problem]:
    workers = config.workers
    yield from _check_env(("workers", "env"), workers.env)
    if not re.fullmatch(r"[^\s/\[\]]+", workers.host):
        yield Problem(path=("workers", "host"), what=f'"{workers.host}" is no address', hint='e.g. "127.0.0.1"')
    for lower, upper in (
        ("port_first", "port_last"),
        ("backoff_first_s", "backoff_limit_s"),
        ("backoff_never_ready_first_s", "backoff_never_ready_limit_s"),
    ):
        low, high = getattr(workers, lower), getattr(workers, upper)
        if low > high:
            yield Problem(path=("workers", lower), what=f"{low:g} is above {upper} = {high:g}")


def _check_engine(name: str, engine: EngineConfig) -> Iterator[Problem]:
    at = ("engines", name)
    if engine.base and engine.base not in BUILT_IN_ENGINES:
        hint = _nearest(engine.base, BUILT_IN_ENGINES)
        yield Problem(path=(*at, "base"), what=f'no built-in engine "{engine.base}"', hint=hint)
    if not engine.base and name not in BUILT_IN_ENGINES and not engine.command:
        yield Problem(path=at, what="has neither a base nor a command", hint=_nearest(name, BUILT_IN_ENGINES))
    for key, texts in (("command", engine.command), ("env", engine.env.values())):
        for place in placeholders.names_in(texts):
            if place not in placeholders.NAMES:
                hint = _nearest(place, placeholders.NAMES)
                yield Problem(path=(*at, key), what=f"{{{place}}} stands for nothing", hint=hint)
    for key in ("health_path", "metrics_path"):
        value = getattr(engine, key)
        if value and not value.startswith("/"):
            yield Problem(path=(*at, key), what="must begin with /")
    yield from _check_env((*at, "env"), engine.env)


def _check_command(name: str, engine: EngineConfig, config: Config) -> Iterator[Problem]:
    """A command line of the operator's own may say all that l40sd says, but not fight it."""
    path = ("engines", name, "command")
    if engine.command and not overrides.has_port(engine.command, engine.env):
        hint = 'write {port} where the engine takes it, or PORT = "{port}" in env for a script of your own'
        yield Problem(path=path, what="does not say {port}: the worker would listen where nobody asks", hint=hint)
    program = overrides.pinning(engine.command)
    if program and config.host.numa_pinning:
        yield Problem(path=path, what=f"{program} would bind the worker elsewhere", hint=overrides.NUMA_HINT)


def _check_model(model: ModelConfig, config: Config) -> Iterator[Problem]:
    at = ("models", model.name)
    engines = [*BUILT_IN_ENGINES, *(name for name in config.engines if name not in BUILT_IN_ENGINES)]
    if model.engine not in engines:
        hint = _nearest(model.engine, engines)
        yield Problem(path=(*at, "engine"), what=f'no engine "{model.engine}"', hint=hint)
    if external := is_external(model, config.engines):
        yield from _check_endpoints(model)
    else:
        for key in ("endpoints", "endpoint_key"):
            if getattr(model, key):
                yield Problem(path=(*at, key), what='is only for engine = "external"')
    if not model.source and not external and base_engine(model.engine, config) != "simulated":
        yield Problem(path=(*at, "source"), what="is missing", hint="a path or a hub id, as the engine takes it")
    yield from _check_env((*at, "env"), model.env)
    for name, hint in overrides.arguments(base_engine(model.engine, config), model.args):
        yield Problem(path=(*at, "args"), what=f"{name} is not to be set here: l40sd sets it", hint=hint)


def _check_endpoints(model: ModelConfig) -> Iterator[Problem]:
    path = ("models", model.name, "endpoints")
    if not model.endpoints:
        yield Problem(path=path, what="is missing", hint='e.g. ["http://127.0.0.1:18000"]')
    for endpoint in model.endpoints:
        if not _is_endpoint(endpoint):
            yield Problem(path=path, what=f'"{endpoint}" is not http://host:port')
    for endpoint in _twice(model.endpoints):
        yield Problem(path=path, what=f'"{endpoint}" is there twice')


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # a port that is no port, a half-open [
        return False
    plain = SplitResult(scheme="http", netloc=parts.netloc, path="", query="", fragment="").geturl()
    return bool(port and parts.hostname) and "@" not in text and text == plain and " " not in text


def _check_names(config: Config) -> Iterator[Problem]:
    """Each name that a request or a worker may carry means one model."""
    owners: dict[str, ModelName] = {}  # slug -> the first model that has it
    for name in config.models:
        short = slug(name)
        if not re.fullmatch(r"[!-,.-~][!-~]{0,199}", name) or not short or len(short) > _SLUG_LIMIT:
            hint = (
                "printable ASCII without spaces, not beginning with -, with at least one letter or digit,"
                f" at most {_SLUG_LIMIT}"
            )
            yield Problem(path=("models", name), what="cannot be a model's name", hint=hint)
        elif short in owners:
            yield Problem(
                path=("models", name), what=f'its workers would be named "{short}-..." like those of {owners[short]}'
            )
        owners.setdefault(short, name)
    seen: dict[str, ModelName] = {}
    for name, model in config.models.items():
        for alias in model.aliases:
            path = ("models", name, "aliases")
            if not alias:
                yield Problem(path=path, what="an alias is empty")
            elif alias.startswith("-") or not alias.isprintable() or alias != alias.strip() or len(alias) > 200:
                hint = "engines are told it on their command line: printable, not beginning with -, at most 200"
                yield Problem(path=path, what=f"{alias[:40]!a} cannot be an alias", hint=hint)
            elif alias in config.models and alias != name:
                yield Problem(path=path, what=f'"{alias}" is another model\'s name')
            elif alias in seen:
                yield Problem(path=path, what=f'"{alias}" is already an alias of {seen[alias]}')
            seen.setdefault(alias, name)


def _check_pattern(pattern: Pattern, config: Config) -> Iterator[Problem]:
    at = ("patterns", pattern.name)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", pattern.name):
        yield Problem(path=at, what="cannot be a pattern's name", hint="letters, digits, . _ -; at most 64")
    if not pattern.replicas:
        yield Problem(path=at, what="has no replicas", hint=f"add a [[patterns.{pattern.name}.replicas]]")
    for position, replica in enumerate(pattern.replicas):
        path = (*at, "replicas", position, "model")
        if not replica.model:
            yield Problem(path=path, what="is missing", hint=_nearest("", list(config.models)))
        elif replica.model not in config.models:
            hint = _nearest(replica.model, list(config.models))
            yield Problem(path=path, what=f'no model "{replica.model}"', hint=hint)
        elif is_external(config.models[replica.model], config.engines):
            hint = "leave it out: external workers are part of every pattern"
            yield Problem(path=path, what=f'"{replica.model}" is external and takes no GPUs here', hint=hint)


def _check_env(path: KeyPath, env: Mapping[str, str]) -> Iterator[Problem]:
    for name in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield Problem(path=(*path, name), what="cannot be a variable's name")
    for name, hint in overrides.variables(env):
        yield Problem(path=(*path, name), what="is not to be set here: l40sd sets it", hint=hint)


def _socket_problem(path: str) -> str:
    if not PurePosixPath(path).is_absolute():
        return f'"{path}" is no absolute path'
    size = len(path.encode())
    limit = _SOCKET_PATH_BYTES
    return "" if size <= limit else f'"{path}" has {size} bytes, a socket\'s path at most {limit}'


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f'did you mean "{near[0]}"?'
    return f"known: {', '.join(known)}" if known else ""


def _twice(values: Sequence[str]) -> list[str]:
    return sorted({each for each in values if values.count(each) > 1})
