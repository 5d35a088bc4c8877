"""What can be found out about a configuration and this machine without a daemon, before it starts or while it runs.

For `doctor`, with a daemon and without; for `config check`; and what makes a start refuse the configuration. The
command line imports this (cli/doctor.py, cli/config.py) and Host, and nothing else behind the socket.
"""

import os
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from l40sd.codec import decode, restore
from l40sd.config import files as config_files
from l40sd.config.load import Loaded, key_text, load, origin_of
from l40sd.config.options import Config
from l40sd.control.exposure import connects_to, is_loopback
from l40sd.control.messages import Check
from l40sd.engines.launch import build, program_of
from l40sd.errors import ConfigError, L40sError
from l40sd.hardware.host import AUTO
from l40sd.hardware.host_files import read_host
from l40sd.hardware.topology import NvmlGpu
from l40sd.model import Inventory, Layout, ModelFacts, ModelName
from l40sd.placement.patterns import patterns_of
from l40sd.placement.place import place
from l40sd.proxy.api_keys import read_keys
from l40sd.trust import distrust, unusable

OK, WARNING, FAILED = "ok", "warning", "failed"
DISK_FREE_AT_LEAST = 0.05
CONNECT_TIMEOUT_S = 0.5
STATE_NAME = "state.json"  # in state_dir
GIB = 1 << 30

Facts = Mapping[ModelName, ModelFacts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """Something that a start would refuse or fail at; ``key`` is the path of the configuration's key."""

    key: tuple[str | int, ...]
    what: str
    hint: str = ""


def refuse_unusable(loaded: Loaded) -> None:
    """Refuse a configuration whose key file, recorded host or directories a start would refuse.

    Whose the directories are is not asked: the one who checks need not be the one who starts.

    Raises:
        ConfigError: With every such problem.
    """
    problems: list[L40sError] = []
    for read in (lambda: read_keys(loaded.config.proxy.api_keys_file), lambda: _recorded(loaded.config)):
        try:
            read()
        except L40sError as error:
            problems.append(error)
    problems += _open_directories(loaded.config)
    if problems:
        raise ConfigError(problems)


def _open_directories(config: Config) -> Iterator[L40sError]:
    for key in ("state_dir", "runtime_dir", "log_dir"):
        directory = Path(getattr(config.daemon, key))
        with suppress(OSError):  # it is not there yet, or not to be seen from here
            found = directory.stat()
            if why := distrust(owner=found.st_uid, mode=found.st_mode, own=found.st_uid):
                yield unusable(key, str(directory), why, own=found.st_uid)


def refuse_failing(loaded: Loaded, facts: Facts, inventory: Inventory | None) -> None:
    """Refuse a configuration that a start, or its workers, would fail with: checkpoints, patterns that do not fit.

    Args:
        inventory: The host to place the patterns on; None: there is none to try.

    Raises:
        ConfigError: With every such problem, and the file that has it.
    """
    doubts = [*_sources(loaded.config, facts), *(_patterns(loaded.config, inventory, facts) if inventory else [])]
    problems = []
    for doubt in doubts:
        file = origin_of(doubt.key, loaded.origins) or loaded.files[0]
        where = f"{file}: {key_text(doubt.key)}"
        problems.append(L40sError(doubt.what, where=where, hint=doubt.hint, code="bad_config"))
    if problems:
        raise ConfigError(problems)


def _recorded(config: Config) -> Inventory | None:
    return None if config.host.inventory == AUTO else read_host(config.host.inventory)


def _sources(config: Config, facts: Facts) -> Iterator[Doubt]:
    for name, model in config.models.items():
        if facts.get(name, ModelFacts()).missing:
            yield Doubt(key=("models", name, "source"), what=f"there is nothing at {model.source}")


def _patterns(config: Config, inventory: Inventory, facts: Facts) -> Iterator[Doubt]:
    """Name the patterns of the configuration's own, and the one that is applied first, that do not fit."""
    patterns = patterns_of(config, inventory)
    for name in dict.fromkeys([config.daemon.pattern, *config.patterns]):
        key = ("patterns", name) if name in config.patterns else ("daemon", "pattern")
        try:
            place(patterns[name], config, inventory, facts=facts)
        except L40sError as error:
            yield Doubt(key=key, what=f"pattern {name} does not fit {inventory.source}: {error.what}", hint=error.hint)


# -- checks ------------------------------------------------------------------------------------------------------------


def config_on_disk(path: Path) -> tuple[Loaded | None, list[Check]]:
    """Return the configuration that the next start would read, if it can be, and what is wrong with its files."""
    try:
        loaded = load(config_files.read(path))
        refuse_unusable(loaded)
    except ConfigError as error:
        what = [Check(name="config", state=FAILED, found=each.what if not each.where else f"{each.where}: {each.what}",
                      hint=each.hint) for each in error.problems]  # fmt: skip
        return None, what
    except L40sError as error:
        return None, [Check(name="config", state=FAILED, found=f"{error.where}: {error.what}", hint=error.hint)]
    return loaded, [Check(name="config", state=OK, found=f"{path}: good")]


def key_file(config: Config) -> list[Check]:
    """Look at the file of API keys; nothing where none is named. One that cannot be read is ``config_on_disk``'s."""
    path = config.proxy.api_keys_file
    if not path:
        return []
    try:
        mode, count = stat.S_IMODE(Path(path).stat().st_mode), len(read_keys(path))
    except (OSError, L40sError) as error:
        return [Check(name="keys", state=FAILED, found=f"{path}: {error}", hint="check [proxy] api_keys_file")]
    if mode & 0o007:
        found = f"{path} can be read by every user of this machine (mode {mode:04o})"
        return [Check(name="keys", state=WARNING, found=found, hint=f"chgrp l40sd {path}; chmod 640 {path}")]
    return [Check(name="keys", state=OK, found=f"{path}: {count} keys")]


def exposure(config: Config) -> Check:
    """Say who may ask: a port that others reach wants keys."""
    open_to = [each for each in config.proxy.listen if not is_loopback(each)]
    if not open_to or config.proxy.api_keys_file:
        keys = "with a key" if config.proxy.api_keys_file else "without a key"
        return Check(name="access", state=OK, found=f"{', '.join(config.proxy.listen)}: {keys}")
    return Check(
        name="access",
        state=WARNING,
        found=f"whoever reaches {', '.join(open_to)} may ask: there are no API keys",
        hint="[proxy] api_keys_file, or listen on 127.0.0.1 behind something that asks for one",
    )


def known_gpus(config: Config) -> list[NvmlGpu]:
    """Return the GPUs that a daemon has had here, from its state; none where that cannot be read. Changes nothing."""
    try:
        state = decode(dict[str, Any], (Path(config.daemon.state_dir) / STATE_NAME).read_bytes())
        return restore(list[NvmlGpu], state.get("gpus") or [])
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError):  # of root's, or of no daemon: nothing is missed then
        return []


def programs(layout: Layout, config: Config, inventory: Inventory, facts: Facts) -> list[Check]:
    """Look for each model of a layout: is its engine's program there, is its checkpoint?"""
    checks: dict[str, Check] = {}
    for placement in layout.placements:
        if placement.endpoint or placement.model in checks:
            continue
        name = f"model {placement.model}"
        try:
            program = program_of(build(placement, config, inventory, port=0, api_key=""))
        except L40sError as error:
            checks[placement.model] = Check(name=name, state=FAILED, found=error.what, hint=error.hint)
            continue
        path, known = shutil.which(program), facts.get(placement.model)
        if path is None:
            hint = f"install it, or set command = [...] in [engines.{config.models[placement.model].engine}]"
            checks[placement.model] = Check(name=name, state=FAILED, found=f"no program {program!r}", hint=hint)
        elif known is not None and known.missing:
            found = f"nothing at {config.models[placement.model].source}"
            hint = f"correct source in [models.{placement.model}]"
            checks[placement.model] = Check(name=name, state=FAILED, found=found, hint=hint)
        else:
            size = f", checkpoint {known.size_bytes / GIB:.1f} GiB" if known and known.size_bytes else ""
            checks[placement.model] = Check(name=name, state=OK, found=f"{path}{size}")
    return list(checks.values())


def numactl(inventory: Inventory, config: Config) -> Check:
    """Look for what pins workers."""
    if not inventory.is_live:
        return Check(name="pinning", state=OK, found="shown, not applied: the host is read from a file")
    if not config.host.numa_pinning:
        return Check(name="pinning", state=WARNING, found="switched off", hint="[host] numa_pinning = true")
    path = shutil.which("numactl")
    if path is None:
        return Check(name="pinning", state=FAILED, found="no numactl", hint="apt-get install numactl")
    return Check(name="pinning", state=OK, found=path)


def placement(pattern: str, warnings: Sequence[str]) -> Check:
    """Say what a layout warns of."""
    if warnings:
        return Check(name="placement", state=WARNING, found="; ".join(warnings), hint="l40sctl topology")
    return Check(name="placement", state=OK, found=f"pattern {pattern} without reservations")


def directories(config: Config, keys: Sequence[str] = ("state_dir", "log_dir")) -> list[Check]:
    """Look at the daemon's directories: there, writable, with room. Blocks on the disk."""
    return [_directory(key, Path(getattr(config.daemon, key))) for key in keys]


def _directory(key: str, directory: Path) -> Check:
    try:
        usage = shutil.disk_usage(directory)
    except FileNotFoundError:
        return Check(name=key, state=OK, found=f"{directory} is not there yet: a start makes it")
    except OSError as error:
        return Check(name=key, state=FAILED, found=f"{directory}: {error.strerror}", hint="check its owner")
    found = f"{directory}: {usage.free / GIB:.1f} GiB free"
    if not os.access(directory, os.W_OK):
        hint = f"check its owner; this was asked by uid {os.geteuid()}"
        return Check(name=key, state=FAILED, found=f"{directory} is not writable", hint=hint)
    if usage.free < DISK_FREE_AT_LEAST * usage.total:
        return Check(name=key, state=WARNING, found=found, hint="free some space")
    return Check(name=key, state=OK, found=found)


def endpoint_without_daemon(config: Config) -> list[Check]:
    """Say who holds the endpoint's addresses while no daemon does. Waits for each ``CONNECT_TIMEOUT_S`` at most."""
    checks = []
    for address in config.proxy.listen:
        if _answers(address):
            found = f"something listens on {address}: systemd's l40sd.socket, or another program"
            checks.append(Check(name="endpoint", state=WARNING, found=found, hint="ss -ltnp shows who"))
        else:
            checks.append(Check(name="endpoint", state=OK, found=f"{address} is free for the daemon"))
    return checks


def _answers(address: str) -> bool:
    target = connects_to(address)
    if target is None:
        return False
    family = socket.AF_UNIX if isinstance(target, str) else socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(target)
        except OSError:
            return False
    return True
