"""One daemon a runtime directory, and how the shims know that it lives.

An open-file-description lock: it belongs to the open file and not to the process, so it survives exec, goes
with the last descriptor however the daemon dies, and can be asked for without being taken (the shims' lease).
"""

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Self

from l40sd.errors import L40sError

WRITE_LOCK = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
"""struct flock over the whole file, 64 bit."""
MODE = 0o600
"""Whoever can open the file can hold a read lock on it, which keeps our write lock out: nobody else shall."""


class DaemonLock:
    """The lock, held from ``acquire`` until ``release`` or the end of the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path) -> Self:
        """Take the lock and write our pid into the file; a file left from before is no obstacle.

        Raises:
            L40sError: Another daemon has it (``already_running``), or the file cannot be made.
        """
        while True:
            descriptor = open_own(path)
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, WRITE_LOCK)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # noqa: PTH116 - beside fstat
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
                    return cls(path, descriptor)
            except FileNotFoundError:
                pass  # removed between open and lock: ours is nobody's lock, take the new one
            except OSError as error:
                holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise already_running(path, holder) from error
                raise cannot_lock(path, str(error.strerror)) from error
            os.close(descriptor)

    @classmethod
    def resume(cls, path: Path, descriptor: int) -> Self:
        """Go on with the lock that this process held before it replaced itself by exec."""
        os.set_inheritable(descriptor, False)
        os.fchmod(descriptor, MODE)
        return cls(path, descriptor)

    def keep_over_exec(self) -> int:
        """Return the descriptor to ``resume`` with after an exec in place."""
        os.set_inheritable(self._descriptor, True)
        return self._descriptor

    def is_intact(self) -> bool:
        """Whether the file is still where the shims look for it; if not, they take us for dead."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))  # noqa: PTH116 - beside fstat
        except OSError:
            return False

    def restore(self) -> bool:
        """Take the lock anew if somebody deleted or replaced its file; return whether that was so.

        Raises:
            L40sError: Another daemon has taken the place meanwhile (``already_running``), or the file cannot be made.
        """
        if self.is_intact():
            return False
        fresh = type(self).acquire(self.path)
        os.close(self._descriptor)
        self._descriptor = fresh._descriptor
        return True

    def release(self) -> None:
        """Let go. The file stays: removing it would race with the next daemon. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_own(path: Path) -> int:
    """Return a descriptor of the lock file, which is made if need be, and is ours alone.

    Raises:
        L40sError: It is a link or somebody else's, or cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
    except OSError as error:
        raise cannot_lock(path, "it is a link" if error.errno == errno.ELOOP else str(error.strerror)) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        os.close(descriptor)
        raise cannot_lock(path, f"it is not a file of user {os.geteuid()} alone")
    os.fchmod(descriptor, MODE)  # an earlier version's could be opened by everybody
    return descriptor


def already_running(path: Path, holder: str) -> L40sError:
    """Return the error for a second daemon."""
    return L40sError(
        f"l40sd is already running (pid {holder or 'unknown'})",
        where=str(path),
        hint="`l40sctl status` talks to it; a second one needs a runtime_dir of its own",
        code="already_running",
    )


def cannot_lock(path: Path, why: str) -> L40sError:
    """Return the error for a lock file that cannot be made or locked."""
    return L40sError(f"cannot lock: {why}", where=str(path), hint="check daemon.runtime_dir", code="cannot_lock")
