"""Which configuration files are read, in which order, and what is said of those that cannot be."""

from pathlib import Path

import pytest

from l40sd.config import files as config_files
from l40sd.errors import L40sError


def test_the_file_is_chosen_by_option_then_environment_then_default() -> None:
    environ = {"L40SD_CONFIG": "/b"}
    assert config_files.find("/a", environ) == Path("/a")
    assert config_files.find(None, environ) == Path("/b")
    assert config_files.find(None, {}) == Path("/etc/l40sd/l40sd.toml")


def test_overlays_come_after_the_main_file_by_name(tmp_path: Path) -> None:
    main = tmp_path / "l40sd.toml"
    main.write_text("main")
    overlays = tmp_path / "conf.d"
    overlays.mkdir()
    for name in ("20.toml", "10.toml", "30.toml.bak"):
        (overlays / name).write_text(name)
    assert config_files.read(main) == [
        (str(main), "main"),
        (str(overlays / "10.toml"), "10.toml"),
        (str(overlays / "20.toml"), "20.toml"),
    ]


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no such file"), (b"\xff", "not UTF-8 at byte 0"), (b"#" * (1 << 20) + b"#", "larger")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "l40sd.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(L40sError, match=said) as failure:
        config_files.read(file)
    assert failure.value.where == str(file)


def test_a_directory_in_the_files_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(L40sError, match="cannot be read: Is a directory"):
        config_files.read(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    """An editor on Windows writes one: "not TOML: Invalid statement (at line 1, column 1)"."""
    file = tmp_path / "l40sd.toml"
    file.write_bytes(b"\xef\xbb\xbf[proxy]\r\nretries = 1\r\n")
    assert config_files.read(file) == [(str(file), "[proxy]\r\nretries = 1\r\n")]
