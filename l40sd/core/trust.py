"""Whether what lies on disk can be ours alone: anybody who may write there could have put it there."""

import stat

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
