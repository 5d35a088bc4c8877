"""Another user of the host, for tests that run as root."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

UID = 65534
"""The user and the group that a stranger has; nothing under test belongs to it."""

BECOME = f"import os; os.setgroups([]); os.setgid({UID}); os.setuid({UID})\n"
"""A line of a Python program that goes on as the stranger; what it imports afterwards may be closed to it."""


@contextlib.contextmanager
def passable(path: Path) -> Iterator[None]:
    """Let everybody pass the folders above ``path``, and put their modes back.

    Pytest's own folder is among them: a mode that is left open there decides what later tests see.
    """
    modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in path.parents}
    closed = {folder: mode for folder, mode in modes.items() if not mode & 0o001}
    for folder, mode in closed.items():
        folder.chmod(mode | 0o011)
    try:
        yield
    finally:
        for folder, mode in closed.items():
            folder.chmod(mode)


@contextlib.contextmanager
def as_stranger() -> Iterator[None]:
    """Run the block with the stranger's user and groups: a group that stays is a way in."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(UID)
    os.seteuid(UID)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
