"""The file of keys on disk: what it may be, and who may write it."""

import os
from pathlib import Path

import pytest

from l40sd.errors import L40sError
from l40sd.proxy.api_keys import SIZE_LIMIT_BYTES, read_keys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbfsk-hash#tail\r\nsk-other\r\n")
    path.chmod(0o640)
    return path


def test_keys_are_read_whole(file: Path) -> None:
    assert read_keys(str(file)) == {"sk-hash#tail", "sk-other"}
    assert read_keys("") == frozenset()


def refusal(path: Path) -> L40sError:
    with pytest.raises(L40sError) as caught:
        read_keys(str(path))
    assert caught.value.code == "bad_config"
    return caught.value


def test_a_file_that_is_too_large_is_refused_and_not_cut(file: Path) -> None:
    """Seen: cut at 1 MiB without a word, so that the beginning of a key was valid and what came behind it was not."""
    file.write_bytes(b"k" * 60 + b"\n" + b"x" * SIZE_LIMIT_BYTES)
    assert "larger than 1 MiB" in refusal(file).what


def test_bytes_that_are_no_text_are_refused_with_their_line(file: Path) -> None:
    file.write_bytes(b"one\ntwo\nth\xffree\n")
    assert refusal(file).where == f"{file}:3"


def test_a_file_that_everybody_may_write_is_refused(file: Path) -> None:
    file.chmod(0o646)
    assert "written by everybody" in refusal(file).what


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert refusal(fifo).what == "is no file"
    assert "cannot be read" in refusal(tmp_path / "none").what
    assert refusal(tmp_path).what == "is no file"
