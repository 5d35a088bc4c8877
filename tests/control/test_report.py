"""What the running parts look like from outside."""

from pathlib import Path

import pytest

from l40sd.control.report import summary_line
from l40sd.daemon.daemon import own_python


@pytest.mark.parametrize(
    ("ready", "adopted", "degraded", "line"),
    [
        (8, 0, (), "pattern A: 8 of 8 workers ready"),
        (2, 6, (), "pattern A: 2 of 8 workers ready, 6 adopted and not yet looked at"),
        (0, 0, ("no NVIDIA GPU\n  here",), "pattern A: 0 of 8 workers ready; no NVIDIA GPU here"),
        (7, 0, ("a", "b", "c"), "pattern A: 7 of 8 workers ready; a (and 2 more: l40sctl status)"),
        (7, 0, ("x" * 500,), f"pattern A: 7 of 8 workers ready; {'x' * 160}..."),
    ],
)
def test_systemctl_status_says_who_serves_and_what_is_wrong(
    ready: int, adopted: int, degraded: tuple[str, ...], line: str
) -> None:
    """After a restart it said "0 of 8 workers ready" of eight that served; without a GPU it said nothing of that."""
    assert summary_line("A", total=8, ready=ready, adopted=adopted, degraded=degraded) == line


def test_a_daemon_that_was_started_by_a_relative_path_names_its_python_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started as .venv/bin/l40sd, every simulated worker failed: cannot run .venv/bin/python."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bin/l40sd"])
    assert own_python() == str(tmp_path / "bin/python")
