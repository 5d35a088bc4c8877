"""The file of keys that clients may use."""

import os
import stat

from l40sd.errors import L40sError
from l40sd.proxy.key_file import parse_keys

SIZE_LIMIT_BYTES = 1 << 20


def read_keys(path: str) -> frozenset[str]:
    """Return the keys of the file, see proxy/key_file.py; none for an empty path.

    Raises:
        L40sError: The file cannot be read, is too large or nobody's to trust, or a line of it cannot be a key.
    """
    return parse_keys(_text(path), path=path) if path else frozenset()


def _text(path: str) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would be waited for
        try:
            _check_mode(path, os.fstat(descriptor).st_mode)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(SIZE_LIMIT_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}", "check [proxy] api_keys_file") from error
    if len(data) > SIZE_LIMIT_BYTES:
        raise _refused(path, "is larger than 1 MiB", "one key a line")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refused(f"{path}:{line}", "is not UTF-8", "keys are printable ASCII") from error


def _check_mode(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise _refused(path, "is no file", "one key a line")
    if mode & stat.S_IWOTH:
        raise _refused(path, "can be written by everybody: whoever likes has a key", f"chmod o-rwx {path}")


def _refused(where: str, what: str, hint: str) -> L40sError:
    return L40sError(what, where=where, hint=hint, code="bad_config")
