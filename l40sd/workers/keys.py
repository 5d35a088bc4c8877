"""The keys between proxy and workers: one a model, the same over restarts, readable to our user only.

Engines read theirs from the environment, and vLLM up to at least 0.26 counts its environment among what a compiled
model depends on: with a new key at each start it compiled anew at each start, 13 times in 13, and kept every one.
"""

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path

from l40sd.config.options import slug
from l40sd.model import ModelName
from l40sd.shim.files import write_file

_KEY = re.compile(r"[A-Za-z0-9_-]{32}")
_KEY_BYTES = 24


class WorkerKeys:
    """The keys, in files of a directory; where it takes none, in memory for as long as this daemon lives."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._keys: dict[str, str] = {}

    def of(self, model: ModelName) -> str:
        """Return the key for the workers of a model: the one known, the one on disk, or a new one."""
        name = slug(model)
        if name not in self._keys:
            path = self._directory / name
            self._keys[name] = _read(path) or _make(path)
        return self._keys[name]


def _read(path: Path) -> str:
    """Return the key in a file; nothing when it is not there, not whole, or others may have read or written it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return ""
        text = os.read(descriptor, 100).decode("ascii", "replace").strip()
    finally:
        os.close(descriptor)
    return text if _KEY.fullmatch(text) else ""


def _make(path: Path) -> str:
    key = secrets.token_urlsafe(_KEY_BYTES)
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(str(path), f"{key}\n".encode(), mode=0o600)
    return key
