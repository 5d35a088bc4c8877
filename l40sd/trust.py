"""Whether what lies on disk can be ours alone: anybody who may write there could have put it there."""

import stat

from l40sd.errors import L40sError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def distrust(*, owner: int, mode: int, own: int) -> str:
    """Return why a file or folder cannot be trusted, in one clause; empty when it is ours alone to write.

    Args:
        owner: Its user id, from stat(2).
        mode: Its mode, likewise.
        own: Our user id.
    """
    if owner != own:
        return f"belongs to user {owner}, and this is user {own}"
    if mode & OTHERS_WRITE:
        return f"can be written by others (mode {stat.S_IMODE(mode):04o})"
    return ""


def unusable(key: str, directory: str, why: str | None, *, own: int) -> L40sError:
    """Return the error for one of the daemon's directories.

    Args:
        key: Of ``[daemon]``, e.g. ``runtime_dir``.
        own: The user id that it is to belong to.
    """
    return L40sError(
        f"cannot be used: {why}",
        where=f"daemon.{key} = {directory!r}",
        hint=f"make it user {own}'s alone (chown, chmod go-w), or name another in the configuration",
        code="bad_config",
    )
