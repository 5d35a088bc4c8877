"""ARCHITECTURE.md and the contracts in pyproject.toml are true of the folders, and the code keeps to their words."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"^( +)([a-z0-9_]+(?:/|\.py))(?= |$)")
ELSEWHERE = (
    "docs/gguf.md",  # ggml's
    "l40sd/core/errors.py",  # an earlier release's, told by it
)
"""Files that a text names though they are not here."""

GIVEN_UP = {
    r"\badapters/|\bservices/|\bcore/|\bcore\.(?:plan|model|config)\b": "the package: supervisor/, workers/, ...",
    r"\btakes? over workers\b|\bRecalled\w": "adopt",
    r"(?i)\bplanner\b": "reconciler (supervisor/reconcile.py); a plan of sizes or costs will be another thing",
    r"\bKnownReply\b|\bHeadTemplate\b|\bModelMemory\b": "Cached...: they are caches",
    r"\bTools\b|\bclass Shared\b": "a context, or what is needed as an argument",
    r"\bclass (?:Ask|Turn|Past|Upstream)\b": "NextPhase, ReadinessChange, SavedWorker, WorkerConnection",
}
"""What the code must not say (patterns), and the word of ARCHITECTURE.md that it says instead."""


def contract(name: str) -> dict[str, Any]:
    """Return the contract of pyproject.toml whose name begins so."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return next(each for each in contracts if each["name"].startswith(name))


def drawn() -> list[str]:
    """Return the packages (with a slash) and modules in the tree of ARCHITECTURE.md, as paths below l40sd, in order."""
    tree = ARCHITECTURE.split("```\nl40sd/\n")[1].split("```")[0]
    found: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        if not line.startswith("  "):  # the folders beside l40sd/
            break
        if match := ENTRY.match(line):
            del folders[len(match[1]) // 2 - 1 :]
            found.append("".join(folders) + match[2])
            if match[2].endswith("/"):
                folders.append(match[2])
    return found


def there() -> set[str]:
    """Return the same of the folders; a package's ``__init__.py`` is the package."""
    modules = {path.relative_to(ROOT / "l40sd") for path in (ROOT / "l40sd").rglob("*.py")}
    return {f"{path.parent}/" if path.name == "__init__.py" else str(path) for path in modules} - {"./"}


def says(path: str) -> str:
    """Return a line of the tree for a module: its place, and what its docstring begins with."""
    file = ROOT / "l40sd" / path / ("__init__.py" if path.endswith("/") else "")
    first = re.search(r'"""(.*?)(?:"""|\n|$)', file.read_text(encoding="utf-8"))
    indent = "  " * (path.rstrip("/").count("/") + 1)
    name = f"{indent}{path.rstrip('/').rpartition('/')[2]}{'/' if path.endswith('/') else ''}"
    above = path.rstrip("/").rpartition("/")[0]
    return f"below l40sd/{above}:\n{name:25} {first[1] if first else 'what it is'}"


def test_the_tree_in_architecture_md_is_the_folders() -> None:
    tree = drawn()
    new = [f"add to the tree in ARCHITECTURE.md, {says(path)}" for path in sorted(there() - set(tree))]
    gone = [f"take out of the tree in ARCHITECTURE.md: l40sd/{path}" for path in tree if path not in there()]
    twice = [f"it stands twice in ARCHITECTURE.md: l40sd/{path}" for path in set(tree) if tree.count(path) > 1]
    assert not new + gone + twice, "\n" + "\n".join(new + gone + twice)


def test_the_tree_is_in_the_order_of_the_layers() -> None:
    layers = contract("Every room")["layers"]
    expected = [name.strip() for layer in layers for name in layer.split("|")]
    shown = [path.removesuffix("/").removesuffix(".py") for path in drawn() if "/" not in path.rstrip("/")]
    assert shown == expected, f"ARCHITECTURE.md has to draw them in the order of the layers: {expected}"


def test_every_module_that_can_neither_wait_nor_read_nor_print_is_in_the_list() -> None:
    """Pure by what it imports, however indirectly; the contract itself fails for one that is not any more."""
    listed = contract("What decides")
    graph = grimp.build_graph("l40sd", include_external_packages=True)
    for ignored in listed["ignore_imports"]:
        importer, imported = ignored.split(" -> ")
        graph.remove_import(importer=importer, imported=imported)
    impure: set[str] = set()
    for module in set(listed["forbidden_modules"]) & graph.modules:
        impure |= graph.find_downstream_modules(module)
    ours = {"l40sd"} | graph.find_descendants("l40sd")
    pure = {module for module in ours - impure if not graph.find_children(module)}
    list_name = 'source_modules of "What decides can neither wait, read nor print" in pyproject.toml'
    missing = "".join(f'    "{module}",\n' for module in sorted(pure - set(listed["source_modules"])))
    assert not missing, f"add to {list_name}, in order:\n{missing}"
    extra = sorted(set(listed["source_modules"]) - pure)
    assert not extra, f"they can wait, read or print, or are gone: take them out of {list_name}: {extra}"
    assert listed["source_modules"] == sorted(pure), f"sort {list_name}"


def texts(*patterns: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of these files, but for this one and the changelog, which say what was."""
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        if path != Path(__file__).resolve() and path.name != "CHANGELOG.md":
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_the_words_that_have_been_given_up_are_not_used() -> None:
    found = [
        f"{name}:{number}: {line.strip()[:90]}\n    say instead: {better}"
        for name, text in texts("*.md", "docs/*.md", "systemd/*.md", "l40sd/**/*.py")
        for number, line in enumerate(text.splitlines(), start=1)
        for word, better in GIVEN_UP.items()
        if re.search(word, line)
    ]
    assert not found, "\n" + "\n".join(found)


def test_every_file_that_a_text_names_is_there() -> None:
    """``workers/health.py``: below l40sd, tests or the root, or beside what names it; ``health.py``: anywhere."""
    with_folder = re.compile(r"(?<![\w/.*-])((?:[a-z0-9_]+/)+[a-z0-9_]+\.(?:py|md))(?![\w/])")
    alone = re.compile(r"(?<![\w/.*-])([a-z0-9_]+\.py)(?!\w)")
    names = {
        path.name for folder in ("l40sd", "tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    }
    lost = set()
    for name, text in texts("*.md", "*/*.md", "*/*.toml", "l40sd/**/*.py", "tests/**/*.py", "benchmarks/*.py"):
        places = (ROOT, ROOT / "l40sd", ROOT / "tests", (ROOT / name).parent)
        named = {path for path in with_folder.findall(text) if not any((place / path).exists() for place in places)}
        if not name.startswith("tests/"):  # where engines' output is quoted, with the names of their modules
            named |= set(alone.findall(text)) - names
        lost |= {f"{name} names {path}, which is not there" for path in named - set(ELSEWHERE)}
    assert not lost, "\n" + "\n".join(sorted(lost))


def test_a_number_of_a_fault_says_where_the_faults_are() -> None:
    """``fault 19`` told nobody anything who did not know of the page."""
    faults = re.compile(r"(?i)\bfaults? (\d+)(?: and (\d+))?( of docs/what-happens-when\.md)?")
    known = set(re.findall(r"^\| (\d+) \|", (ROOT / "docs/what-happens-when.md").read_text(encoding="utf-8"), re.M))
    for name, text in texts("l40sd/**/*.py", "tests/**/*.py", "benchmarks/*.py", "scripts/*.py"):
        for one, other, pointer in [] if name.startswith("tests/faults/") else faults.findall(text):
            assert pointer, f"{name}: say 'fault {one} of docs/what-happens-when.md', or what happens instead"
            assert {one, other or one} <= known, f"{name}: there is no fault {one} {other} in docs/what-happens-when.md"
