"""The configuration's files: which, and their text."""

from collections.abc import Mapping
from pathlib import Path

from l40sd.errors import L40sError

DEFAULT_PATH = Path("/etc/l40sd/l40sd.toml")
SIZE_LIMIT_BYTES = 1 << 20


def find(asked: str | None, environ: Mapping[str, str]) -> Path:
    """Return the main file's path: 1. as asked on the command line, 2. $L40SD_CONFIG, 3. the usual place."""
    return Path(asked or environ.get("L40SD_CONFIG") or DEFAULT_PATH)


def read(path: Path) -> list[tuple[str, str]]:
    """Return (path, text) of the main file and of each ``conf.d/*.toml`` beside it, by name.

    Raises:
        L40sError: A file is missing, unreadable, not UTF-8 or larger than a configuration can be.
    """
    overlays = path.parent / "conf.d"
    try:
        names = sorted(each for each in overlays.iterdir() if each.suffix == ".toml")
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise L40sError(f"cannot be read: {error.strerror}", where=str(overlays), code="config_unreadable") from error
    return [(str(each), _text(each)) for each in (path, *names)]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT_BYTES + 1)
        if len(data) > SIZE_LIMIT_BYTES:
            raise L40sError("larger than 1 MiB", where=str(path), code="config_unreadable")
        return data.decode("utf-8-sig")  # an editor's byte order mark is not a part of it
    except FileNotFoundError as error:
        raise L40sError(
            "no such file",
            where=str(path),
            hint="name one with --config or $L40SD_CONFIG; etc/l40sd.toml is a commented one to start from",
            code="config_missing",
        ) from error
    except UnicodeDecodeError as error:
        raise L40sError(f"not UTF-8 at byte {error.start}", where=str(path), code="config_unreadable") from error
    except OSError as error:
        raise L40sError(f"cannot be read: {error.strerror}", where=str(path), code="config_unreadable") from error
