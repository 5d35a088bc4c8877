"""Recorded hosts: those that come with l40sd, and files."""

from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from l40sd.errors import L40sError
from l40sd.hardware.host_file import parse_host_file
from l40sd.model import Inventory

SIZE_LIMIT_BYTES = 4 << 20


def bundled_hosts() -> list[str]:
    """Return the names of the hosts that come with l40sd."""
    files = resources.files("l40sd.sim").joinpath("hosts").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def read_host(name: str, *, where: str = "host.inventory") -> Inventory:
    """Return a bundled host, or the one in a file. A name that a bundled host has is that one first.

    Args:
        where: Who named it, for the error.

    Raises:
        L40sError: No such file or name (hint: the nearest bundled one), or it describes no host.
    """
    if name in bundled_hosts():
        file = resources.files("l40sd.sim").joinpath("hosts", f"{name}.toml")
        return parse_host_file(file.read_text(encoding="utf-8"), source=f"{name} (bundled)")
    path = Path(name).expanduser()
    try:
        if path.stat().st_size > SIZE_LIMIT_BYTES:
            raise L40sError("too large for a host file", where=name, hint="at most 4 MiB", code="bad_host_file")
        text = path.read_text(encoding="utf-8-sig")  # an editor's byte order mark is not a part of it
    except (OSError, UnicodeDecodeError) as error:
        near = get_close_matches(name, bundled_hosts(), n=1)
        known = f"bundled hosts: {', '.join(bundled_hosts())}"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise L40sError(
            f"cannot read host file {name!r}: {reason}",
            where=where,
            hint=f"did you mean {near[0]}? {known}" if near else f"{known}; or auto",
            code="no_host_file",
        ) from error
    return parse_host_file(text, source=name)
