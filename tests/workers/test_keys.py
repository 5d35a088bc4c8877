"""The workers' keys on a real disk."""

import os
from pathlib import Path

import pytest

from l40sd.model import ModelName
from l40sd.workers.keys import WorkerKeys

MODEL = ModelName("org/Llama-8B")


def test_a_key_is_the_same_over_restarts_and_for_our_user_only(tmp_path: Path) -> None:
    """A new one at each start made vLLM compile at each start: 13 starts, 13 compilations."""
    place = tmp_path / "state" / "worker-keys"
    key = WorkerKeys(place).of(MODEL)
    assert WorkerKeys(place).of(MODEL) == key
    assert WorkerKeys(place).of(ModelName("other")) != key
    assert sorted(path.name for path in place.iterdir()) == ["org-llama-8b", "other"]
    assert (place / "org-llama-8b").stat().st_mode & 0o777 == 0o600
    assert place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["half", "empty", "readable", "link", "directory", "binary"])
def test_a_key_that_cannot_be_trusted_is_made_anew(tmp_path: Path, damage: str) -> None:
    key = WorkerKeys(tmp_path).of(MODEL)
    path = tmp_path / "org-llama-8b"
    match damage:
        case "half":
            path.write_text(key[:10])
        case "empty":
            path.write_text("")
        case "readable":
            path.chmod(0o644)
        case "link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        case "directory":
            path.unlink()
            path.mkdir()
        case _:
            path.write_bytes(os.urandom(32))
    fresh = WorkerKeys(tmp_path).of(MODEL)
    assert fresh != key
    assert len(fresh) == len(key)


def test_a_disk_that_takes_none_costs_only_the_next_daemons_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    keys = WorkerKeys(tmp_path / "file")
    assert keys.of(MODEL) == keys.of(MODEL)
