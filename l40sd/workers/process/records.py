"""What is known of an instance, as records and as the three files of its directory."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from l40sd.shim import PROTOCOL, files, proc
from l40sd.trust import distrust

T = TypeVar("T")

SIZE_LIMIT_BYTES = 16 << 20
"""Of a record; the largest part of one is the environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """What to run once, and how to end it.

    Attributes:
        argv: Program and arguments; a program without a slash is looked up in ``env``'s PATH.
        env: The whole environment, but for the two marks that are added here.
        tmp: The run's temporary folder, made and removed with it; empty: the usual one.
        term_to: Who gets SIGTERM: ``engine``, which ends its own, or the whole process ``group``.
        term_timeout_s: From SIGTERM to the kill.
        orphan_grace_s: The engine is stopped when no daemon has held the lock for this long.
        log_file_bytes: Size of one file of its output; ``log_files`` are kept.
        pids_limit: Processes and threads at once, where the pids controller is there; 0: no limit.
        memory_limit_bytes: Where the memory controller is there; 0: no limit.
        meta: JSON, not looked at; comes back on adoption.
    """

    instance: str
    worker: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str = "/"
    tmp: str = ""
    term_to: str = "engine"
    term_timeout_s: float = 20.0
    orphan_grace_s: float = 600.0
    log_file_bytes: int = 16 << 20
    log_files: int = 4
    pids_limit: int = 4096
    memory_limit_bytes: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """How an instance ended.

    Attributes:
        code: The leader's exit code; None when a signal ended it, or when nobody saw it.
        signal: The signal's number; None likewise.
        oom: The kernel killed for memory in its cgroup.
        cause: exited (by itself), stopped, killed (both as asked), orphaned, exec-failed or shim-lost.
        detail: One phrase for the operator.
        ended_at: Wall clock, ISO 8601 with offset.
        ran_s: From the shim's start to the last process's end; 0 when nobody saw it.
    """

    instance: str
    code: int | None = None
    signal: int | None = None
    oom: bool = False
    cause: str
    detail: str = ""
    ended_at: str
    ran_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """The daemon's part of spec.json beside the spec; ``group`` as ``groups.join`` takes it."""

    boot_id: str
    group: str
    lock: str
    log: str
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A pid that is sure until the next boot."""

    pid: int
    start_ticks: int

    def matches(self, process: proc.Process | None) -> bool:
        """Whether this process is the one meant."""
        return process is not None and process.start_ticks == self.start_ticks


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """run.json: who runs."""

    instance: str
    shim: Identity
    engine: Identity
    boot_id: str
    group: str = ""
    started_at: str = ""
    protocol: int = PROTOCOL


class CorruptError(Exception):
    """A record that is there and cannot be read."""


def write_spec(directory: Path, spec: InstanceSpec, birth: Birth) -> None:
    """Write the write-ahead record, readable to us only: the environment may hold keys. Raises OSError."""
    record = {**asdict(spec), **asdict(birth)}
    files.write_file(str(directory / "spec.json"), msgspec.json.encode(record), mode=0o600)


def write_exit(directory: Path, record: ExitRecord) -> None:
    """Write exit.json in a dead shim's place. Raises OSError."""
    files.write_file(str(directory / "exit.json"), msgspec.json.encode(record))


def read_record(directory: Path, name: str, kind: type[T]) -> T | None:
    """Return what a record says; None when it is not there.

    Raises:
        CorruptError: It is there and does not say what it should, or is not our user's alone.
    """
    try:
        return msgspec.json.decode(_read_own(directory / name), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{directory / name}: {error}") from error


def _read_own(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if why := distrust(owner=found.st_uid, mode=found.st_mode, own=os.geteuid()):
            raise PermissionError(13, why)
        return file.read(SIZE_LIMIT_BYTES)


def distrust_of(folder: Path, *, follow: bool = False) -> str:
    """Return why a folder is not our user's alone; empty when it is. A link is not, unless followed. Raises OSError."""
    found = folder.stat() if follow else folder.lstat()
    return distrust(owner=found.st_uid, mode=found.st_mode, own=os.geteuid())


def now_iso() -> str:
    """Return the date and time with the local offset."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def is_ours(pid: int) -> bool:
    """Whether the process with this pid now runs as our user."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid == os.geteuid()
    except OSError:
        return False
