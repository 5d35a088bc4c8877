# pathlib would cost every shim 5 ms and 1 MB.
# ruff: noqa: PTH105, PTH108, PTH120
"""Small files, written whole or not at all."""

import contextlib
import os


def write_text(path: str, text: str) -> None:
    """Write a kernel file in one write; an OSError is the kernel's answer."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)


def write_file(path: str, data: bytes, *, mode: int = 0o640) -> None:
    """Replace a file so that a crash at any moment leaves the old or the new one, whole.

    Temporary file, fsync, rename, fsync of the directory. Raises OSError; then the old file is untouched.
    """
    temporary = f"{path}.tmp-{os.getpid()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
