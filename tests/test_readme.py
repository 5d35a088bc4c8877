"""The README is part of the program: what it names must exist, and what exists must be named."""

import re
from pathlib import Path

from l40sd.cli import cli
from l40sd.core.lifecycle import Phase

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVENT = re.compile(r"""\.(?:debug|info|warning|error|method)\(\s*f?"([a-z_]+\.[a-z_.{}]+)"|method\("([a-z_.]+)\"""")
STATES = ("replaced", "rolled_back", "incomplete")


def events_in_code() -> set[str]:
    """Every event that the daemon can log; the two that are put together are spelled out."""
    found: set[str] = set()
    for path in (ROOT / "l40sd").rglob("*.py"):
        for match in EVENT.finditer(path.read_text(encoding="utf-8")):
            found.add(match[1] or match[2])
    found.discard("worker.{self.phase}")
    found.discard("pattern.apply.{state}")
    return found | {f"worker.{phase}" for phase in Phase} | {f"pattern.apply.{state}" for state in STATES}


def test_every_log_event_is_in_the_table_and_nothing_else() -> None:
    table = README.split("## Log events")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in first_cells for name in re.findall(r"`([a-z_]+\.[a-z_.]+)`", cell)}
    assert named == events_in_code()


def test_every_command_is_in_the_readme() -> None:
    block = README.split("## Commands")[1].split("```")[1]
    assert "switch-pattern" in cli.commands
    assert [command for command in cli.commands if not re.search(rf"\b{command}\b", block)] == []


def test_every_file_that_the_readme_points_to_is_there() -> None:
    targets = [*re.findall(r"\]\(((?!https?:)[^)#]+)\)", README), *re.findall(r"`?(scripts/[a-z_.-]+)", README)]
    assert "docs/status.svg" in targets
    assert [target for target in targets if not (ROOT / target.rstrip(".")).exists()] == []
