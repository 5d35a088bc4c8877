"""What scripts/demo passes on of the programs that it runs."""

import runpy
from pathlib import Path
from typing import Any

import pytest

DEMO: dict[str, Any] = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "demo.py"))
CHANGE = """\
! a note
pattern B: 0 of 2 ready: draining chat-gpu1
pattern B: 0 of 2 ready: starting chat-gpu0-1
pattern B: 1 of 2 ready: draining chat-gpu3
pattern B: 1 of 2 ready: starting chat-gpu2-3
pattern B: 2 of 2 ready
pattern B: 2 of 2 workers ready after 9 s, never below 50 % of the ready capacity
"""
TOLD = """\
! a note
pattern B: 0 of 2 ready: draining chat-gpu1
pattern B: 1 of 2 ready: draining chat-gpu3
pattern B: 2 of 2 ready
pattern B: 2 of 2 workers ready after 9 s, never below 50 % of the ready capacity
"""


def test_in_a_pipe_the_demo_tells_a_change_in_a_line_for_each_worker(capsys: pytest.CaptureFixture[str]) -> None:
    """`scripts/demo | cat` was 64 lines, a dozen of them what was drained and started, and more on a slower machine."""
    told: set[str] = set()
    for line in CHANGE.splitlines():
        DEMO["tell_once"](line, told)
    assert capsys.readouterr().out == TOLD


def test_in_a_pipe_the_demo_leaves_long_lines_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Three sentences were broken at 80 columns, one within the command that is there to be copied."""
    line = "curl " + "word " * 40
    DEMO["console"].print(line)
    assert capsys.readouterr().out == line + "\n"
