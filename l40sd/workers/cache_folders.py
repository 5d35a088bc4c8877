"""The folders of engines' caches: private, and together within a limit."""

import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from l40sd.engines.caches import Cache, to_remove


def prepare(folder: Path, *, limit_bytes: int, in_use: Collection[str], now_s: float) -> str:
    """Make the folder that an engine is about to use, and room in those beside it; return why not, empty when done.

    An engine runs what it finds in there, so it is for our user only. Blocks on the disk.

    Args:
        in_use: Names of folders that running engines use.
        now_s: Seconds since 1970, as files have their times.
    """
    try:
        for place in (folder.parent, folder):
            _make_private(place)
        os.utime(folder, (now_s, now_s))
        found = [_cache(each) for each in folder.parent.iterdir() if each.is_dir() and not each.is_symlink()]
        for name in to_remove(found, mine=folder.name, in_use=in_use, now_s=now_s, limit_bytes=limit_bytes):
            shutil.rmtree(folder.parent / name, ignore_errors=True)
        _make_private(folder)
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return ""


def _make_private(place: Path) -> None:
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700, parents=True)
    found = place.lstat()
    if found.st_uid != os.geteuid() or not place.is_dir() or place.is_symlink():
        raise OSError(0, "is not a directory of this user", str(place))
    if found.st_mode & 0o077:
        place.chmod(0o700)


def _cache(folder: Path) -> Cache:
    size_bytes = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # an engine is at work in there
                size_bytes += os.lstat(os.path.join(place, name)).st_blocks * 512
    return Cache(name=folder.name, size_bytes=size_bytes, used_s=folder.stat().st_mtime)
