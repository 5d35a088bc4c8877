"""What whoever changes this project is told and given: the same checks everywhere, and a license in what is built."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_a_commit_is_checked_by_what_the_tests_check_first() -> None:
    steps = re.findall(r'^    step "([a-z ]+)" "\$bin/(.+)$', text_of("scripts/test"), re.MULTILINE)
    expected = {name: ".venv/bin/" + command.replace('"', "") for name, command in steps}
    hooks = re.findall(r"^ +name: (.+)\n +entry: (.+)$", text_of(".pre-commit-config.yaml"), re.MULTILINE)
    assert set(expected) == {"format", "lint", "types", "import contracts"}
    assert dict(hooks) == expected


def test_a_forge_runs_what_every_other_machine_runs() -> None:
    assert re.findall(r"^ +- run: (.+)$", text_of(".github/workflows/ci.yml"), re.MULTILINE) == [".ci/run"]
    assert "exec scripts/test" in text_of(".ci/run")


def test_the_license_is_whole_and_is_what_the_package_says() -> None:
    text = text_of("LICENSE")
    assert "Version 2.0, January 2004" in text
    assert "Copyright 2026 The l40sd authors" in text
    assert "See the License for the specific language governing permissions and" in text
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert 'cp -r "$SOURCE/l40sd" "$SOURCE/pyproject.toml" "$SOURCE/LICENSE" ' in text_of("scripts/install")


def test_what_the_package_needs_is_imported_by_it() -> None:
    """prometheus-client was installed with every daemon; a test imported it, and nothing else."""
    needs = tomllib.loads(text_of("pyproject.toml"))["project"]["dependencies"]
    names = {re.split(r"[>=<]", need)[0] for need in needs} - {"nvidia-ml-py"}  # pynvml, imported by name
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "l40sd").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) ([a-z_0-9]+)", code, re.MULTILINE))
    assert names - imported == set()


def test_every_place_that_newcomers_are_sent_to_is_there() -> None:
    for page in ("CONTRIBUTING.md", "SECURITY.md"):
        places = re.findall(r"`((?:l40sd|tests|docs|etc|scripts|systemd)/[^` ]*)", text_of(page))
        assert places
        assert [place for place in places if not (ROOT / place).exists()] == [], page
