"""The daemon's own directories: ours alone, or the start is refused with their name."""

import os
import stat
from pathlib import Path

import pytest

from l40sd.config.load import Loaded
from l40sd.config.options import Config, DaemonConfig
from l40sd.control.preflight import refuse_unusable
from l40sd.daemon.main import prepare_directories
from l40sd.errors import ConfigError, L40sError

KEYS = ("state_dir", "runtime_dir", "log_dir")


def config(root: Path) -> Config:
    return Config(daemon=DaemonConfig(**{key: str(root / key) for key in KEYS}))


def test_they_are_made_closed_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        prepare_directories(config(tmp_path))
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / key).stat().st_mode) for key in KEYS] == [0o755] * 3
    prepare_directories(config(tmp_path))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_one_that_others_may_write_is_refused(tmp_path: Path, key: str, mode: int) -> None:
    """Seen: the daemon started in a directory of another user, open to all, and acted on what was put there."""
    (tmp_path / key).mkdir()
    (tmp_path / key).chmod(mode)
    with pytest.raises(L40sError) as caught:
        prepare_directories(config(tmp_path))
    assert caught.value.code == "bad_config"
    assert key in caught.value.where
    assert "can be written by others" in caught.value.what
    with pytest.raises(ConfigError) as told:
        refuse_unusable(Loaded(config=config(tmp_path), files=("c.toml",), origins={}))
    assert [str(each) for each in told.value.problems] == [str(caught.value)], (
        "the check before an upgrade says the same"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a directory away")
@pytest.mark.parametrize("key", KEYS)
def test_one_of_another_user_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / key).mkdir(mode=0o755)
    os.chown(tmp_path / key, 65534, 65534)
    with pytest.raises(L40sError, match="belongs to user 65534, and this is user 0"):
        prepare_directories(config(tmp_path))
