"""The README is part of the program: what it names must exist, and what exists must be named."""

import re
import subprocess
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


def test_the_demo_tells_what_it_is_without_installing_anything(tmp_path: Path) -> None:
    """`scripts/demo --help` fetched 221 MB first."""
    copy = tmp_path / "scripts"
    copy.mkdir()
    (copy / "demo").write_bytes((ROOT / "scripts/demo").read_bytes())
    (copy / "setup").write_text("touch was-set-up\n")
    for name in ("demo", "setup"):
        (copy / name).chmod(0o755)
    for argument, code in (("--help", 0), ("-h", 0), ("--stop", 0), ("--nonsense", 2)):
        done = subprocess.run([copy / "demo", argument], capture_output=True, timeout=20)  # noqa: TID251  no loop here
        assert done.returncode == code
        assert done.stdout or done.stderr
    assert not (tmp_path / "was-set-up").exists()
