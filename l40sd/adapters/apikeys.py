"""The file of keys that clients may use."""

from pathlib import Path

from l40sd.core.errors import L40sError

SIZE_LIMIT_BYTES = 1 << 20


def read_keys(path: str) -> frozenset[str]:
    """Return the keys of the file, one a line, ``#`` comments and empty lines left out; none for an empty path.

    Raises:
        L40sError: The file cannot be read, or has no key in it: nobody could ask anything.
    """
    if not path:
        return frozenset()
    try:
        text = Path(path).read_bytes()[:SIZE_LIMIT_BYTES].decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise L40sError(
            f"cannot be read: {reason}", where=path, hint="check [proxy] api_keys_file", code="bad_config"
        ) from error
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    keys = frozenset(line for line in lines if line)
    if not keys:
        raise L40sError(
            "has no key in it",
            where=path,
            hint='one key a line; api_keys_file = "" lets everybody ask',
            code="bad_config",
        )
    return keys
