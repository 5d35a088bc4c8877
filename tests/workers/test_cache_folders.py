"""Folders of caches on a real disk."""

import os
from pathlib import Path

from l40sd.workers.cache_folders import prepare

HOUR_S = 3600.0
NOW_S = 2e9


def filled(root: Path, name: str, kib: int, used_s: float) -> Path:
    folder = root / name
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "kernel").write_bytes(b"x" * (kib << 10))
    os.utime(folder, (used_s, used_s))
    return folder


def test_a_folder_is_made_for_our_user_only(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "cache" / "m-tp1-pp1"
    assert prepare(folder, limit_bytes=1 << 30, in_use=(), now_s=NOW_S) == ""
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    folder.chmod(0o755)
    assert prepare(folder, limit_bytes=1 << 30, in_use=(), now_s=NOW_S) == ""
    assert folder.stat().st_mode & 0o777 == 0o700, "an engine runs what it finds in there"


def test_what_was_compiled_stays_within_the_limit(tmp_path: Path) -> None:
    """46 MB were left at each start, for ever."""
    old = filled(tmp_path, "old", 512, NOW_S - 9 * HOUR_S)
    used = filled(tmp_path, "used", 512, NOW_S - 8 * HOUR_S)
    newer = filled(tmp_path, "newer", 512, NOW_S - 2 * HOUR_S)
    mine = tmp_path / "mine"
    assert prepare(mine, limit_bytes=(1 << 20) + (64 << 10), in_use=("used",), now_s=NOW_S) == ""
    assert [path.exists() for path in (old, used, newer, mine)] == [False, True, True, True]
    assert prepare(mine, limit_bytes=0, in_use=("used",), now_s=NOW_S) == ""
    assert [path.exists() for path in (used, newer, mine)] == [True, False, True]


def test_where_there_can_be_none_it_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    why = prepare(tmp_path / "file" / "m", limit_bytes=1, in_use=(), now_s=NOW_S)
    assert "file" in why
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "not a directory of this user" in prepare(tmp_path / "link", limit_bytes=1, in_use=(), now_s=NOW_S)
