"""docs/ is the reference: every option, event, metric and path of the control API stands in it, and nothing else does.

What fails here says what to write where. The pages that are told by the code are written by scripts/reference.py.
"""

import ast
import re
import runpy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from l40sd.control.client import UNREACHABLE
from l40sd.control.server import STATUS_OF
from l40sd.model import ModelName, WorkerId
from l40sd.proxy.metrics import Metrics
from l40sd.routing.routes import Backend, Routes
from l40sd.workers.lifecycle import Phase
from l40sd.workers.phase_log import line_of

ROOT = Path(__file__).resolve().parents[1]
LOG_METHODS = ("debug", "info", "warning", "error", "method")
SPELLED_OUT = {
    "pattern.apply.{state}": ["pattern.apply.replaced", "pattern.apply.rolled_back", "pattern.apply.incomplete"],
}
"""The events whose names are put together where they are logged."""
DECIDED = {
    event: level
    for before, phase, is_wish, is_ejected in product(Phase, Phase, (False, True), (False, True))
    for level, event in [line_of(before, phase, is_wish=is_wish, is_ejected=is_ejected)]
}
"""The events that workers/phase_log.py decides on, each with a level of it; workers/worker.py logs them."""
ALWAYS = {"worker", "gpus", "model", "was", "reason", "instance", "exit_code", "exit_signal", "oom", "ran_s"}
"""The keys that docs/events.md names once for all events."""


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of all tables in a page, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("| `") or re.match(r"\| (?:GET|POST) ", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def code() -> Iterator[tuple[Path, ast.AST]]:
    """Yield every node of the package with its file."""
    for path in sorted((ROOT / "l40sd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path.relative_to(ROOT), node


def literal(node: ast.expr) -> str:
    """Return a text that is written in the code; what is put into it stands in braces."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return ast.unparse(node)[2:-1]
        case _:
            return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """One place where an event is logged.

    Attributes:
        level: Empty where it is put together.
        keys: As far as they are written there.
        is_whole: There are no others.
    """

    place: str
    level: str
    keys: frozenset[str]
    is_whole: bool


def logged() -> Iterator[tuple[str, Logged]]:
    """Yield every event that is logged, with where and how."""
    for path, node in code():
        if not isinstance(node, ast.Call) or not node.args:
            continue
        target = node.func
        method = target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else ""
        name = literal(node.args[0])
        place = f"{path}:{node.lineno}"
        is_log = isinstance(target, ast.Attribute) and ast.unparse(target.value).endswith("log")
        is_decided = str(path) == "l40sd/workers/worker.py" and bool(DECIDED)
        assert name or not (is_log and method in LOG_METHODS), f"{place}: write an event's name where it is logged"
        assert is_decided or not re.match(r"getattr\(.*log,", ast.unparse(target)), (
            f"{place}: add to DECIDED what it logs"
        )
        if method in LOG_METHODS and re.fullmatch(r"[a-z_]+\.[a-z_.{}]+", name):
            assert "{" not in name or name in SPELLED_OUT, f"{place}: add what {name!r} may be to SPELLED_OUT"
            keys = {"exception" if each.arg == "exc_info" else each.arg for each in node.keywords}
            for event in SPELLED_OUT.get(name, [name]):
                is_literal = event == name and method != "method"
                yield (
                    event,
                    Logged(
                        place=place,
                        level=method if is_literal else "",
                        keys=frozenset(key for key in keys if key),
                        is_whole=None not in keys,
                    ),
                )


def events() -> dict[str, list[Logged]]:
    """Return the places of each event."""
    found: dict[str, list[Logged]] = {}
    for event, how in logged():
        found.setdefault(event, []).append(how)
    for event, level in DECIDED.items():
        how = Logged(place="l40sd/workers/phase_log.py", level=level, keys=frozenset(), is_whole=False)
        found.setdefault(event, []).append(how)
    return found


def told(differing: Sequence[str]) -> str:
    return "\n" + "\n".join(differing)


def test_every_event_is_in_the_table_and_nothing_else() -> None:
    in_code = events()
    in_table = [event for cells in rows(page("events.md")) for event in quoted(cells[0])]
    new = [
        f"docs/events.md: add a row for {event} ({in_code[event][0].place})"
        for event in in_code
        if event not in in_table
    ]
    gone = [f"docs/events.md: nothing logs {event}" for event in in_table if event not in in_code]
    assert not new + gone, told(new + gone)
    assert len(in_table) == len(set(in_table))


def test_every_key_and_level_of_an_event_is_in_its_row() -> None:
    """Of a call whose event is put together, or some of whose keys are, as much as is written there."""
    in_code = events()
    wrong = []
    for cells in rows(page("events.md")):
        keys, places = (
            set(quoted(cells[2])),
            [(event, how) for event in quoted(cells[0]) for how in in_code.get(event, [])],
        )
        written = {key for _, how in places for key in how.keys}
        for event, how in places:
            missing = how.keys - keys - ALWAYS - {"exception"}
            wrong += [f"{event}: add the key {key} ({how.place})" for key in sorted(missing)]
            wrong += [] if how.level in cells[1] else [f"{event}: it is also logged as {how.level} ({how.place})"]
        if all(how.is_whole for _, how in places):
            wrong += [f"{cells[0]}: nothing logs its key {key}" for key in sorted(keys - written - ALWAYS)]
    assert not wrong, told([f"docs/events.md, {each}" for each in wrong])


def shown_metrics() -> set[tuple[str, str, tuple[str, ...]]]:
    """Return name, type and labels of all metrics of a proxy that has served something."""
    routes, metrics = Routes(), Metrics()
    backend = Backend(worker=WorkerId("m-gpu0"), model=ModelName("m"), host="127.0.0.1", port=1, weight=1)
    routes.add(backend)
    metrics.answered("m", 200)
    metrics.timed("m", 0.1, 0.2)
    text = metrics.text(routes, 1)
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    labels: dict[str, set[str]] = {name: set() for name in kinds}
    for name, inside in re.findall(r"^([a-z0-9_]+)(?:\{(.*)\})? ", text, re.MULTILINE):
        family = name if name in kinds else re.sub(r"_(?:bucket|sum|count)$", "", name)
        labels[family] |= set(re.findall(r"([a-z]+)=", inside))
    return {(name, kind, tuple(sorted(labels[name]))) for name, kind in kinds.items()}


def test_every_metric_is_in_the_table_and_nothing_else() -> None:
    in_table = {(quoted(cells[0])[0], cells[1], tuple(sorted(quoted(cells[2])))) for cells in rows(page("metrics.md"))}
    shown = shown_metrics()
    new = [
        f"docs/metrics.md: add a row for {name}, a {kind} with the labels {labels}"
        for name, kind, labels in shown - in_table
    ]
    gone = [
        f"docs/metrics.md: there is no {name}, a {kind} with the labels {labels}"
        for name, kind, labels in in_table - shown
    ]
    assert not new + gone, told(new + gone)


def control_paths() -> set[tuple[str, str]]:
    """Return method and path of everything that the control API answers."""
    routes = re.compile(r'web\.(get|post|put|delete|patch|route|view)\(\s*"([^"]+)"')
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "l40sd/control").glob("*.py")]
    return {(method.upper(), path) for text in texts for method, path in routes.findall(text)}


def test_every_path_of_the_control_api_is_in_the_table_and_nothing_else() -> None:
    table = page("control-api.md").split("## Paths")[1].split("\n## ")[0]
    in_table = {(cells[0], quoted(cells[1])[0]) for cells in rows(table)}
    in_code = control_paths()
    new = [f"docs/control-api.md, Paths: add {method} {path}" for method, path in sorted(in_code - in_table)]
    gone = [f"docs/control-api.md, Paths: there is no {method} {path}" for method, path in sorted(in_table - in_code)]
    assert in_code
    assert not new + gone, told(new + gone)


def error_codes() -> dict[str, str]:
    """Return the codes of our errors, each with a place that has it."""
    found = dict.fromkeys((*STATUS_OF, UNREACHABLE, "error"), "l40sd")
    for path, node in code():
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                    found.setdefault(str(keyword.value.value), f"{path}:{node.lineno}")
    return found


def test_every_error_code_is_in_the_tables_with_its_status_and_nothing_else() -> None:
    table = page("control-api.md").split("## Errors")[1].split("\n## ")[0]
    in_table = {quoted(cells[0])[0]: cells[1] for cells in rows(table)}
    in_code = error_codes()
    new = [
        f"docs/control-api.md, Errors: add {name} ({place})" for name, place in in_code.items() if name not in in_table
    ]
    gone = [f"docs/control-api.md, Errors: there is no {name}" for name in in_table if name not in in_code]
    assert not new + gone, told(new + gone)
    statuses = {name: int(status) for name, status in in_table.items() if status.isdigit()}
    assert {name: STATUS_OF.get(name, 409) for name in statuses} == statuses


def test_what_the_code_tells_in_the_pages_is_what_it_tells_now() -> None:
    """Options with their defaults, bounds and meanings; records of the control API with their fields."""
    written = runpy.run_path(str(ROOT / "scripts/reference.py"))["written"]
    stale = [path.name for path in (ROOT / "docs").glob("*.md") if written(page(path.name)) != page(path.name)]
    assert not stale, f"run .venv/bin/python scripts/reference.py, which writes docs/{', docs/'.join(stale)}"


def test_every_option_of_the_shipped_file_is_in_the_table() -> None:
    """tests/config/test_load.py compares that file with the code; here both ways with the page."""
    shipped = (ROOT / "etc/l40sd.toml").read_text(encoding="utf-8")
    named = {"patterns": {"description", "replicas", "model", "count", "tp", "pp"}}
    for line in shipped.splitlines():
        if section := re.match(r"#?\[+([a-z]+)", line):
            current = named.setdefault(section[1], set())
        elif option := re.match(r"#?([a-z_0-9]+) = ", line):
            current.add(option[1])
    in_page: dict[str, set[str]] = {}
    for section in page("configuration.md").split("\n### ")[1:]:
        name = section.strip("[").partition("]")[0].partition(".")[0]
        in_page.setdefault(name, set()).update(quoted(cells[0])[0] for cells in rows(section))
    assert in_page == named


def test_every_link_between_the_pages_leads_somewhere() -> None:
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "systemd").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        heads = {
            re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.M)
        }
        for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", text):
            file, _, anchor = target.partition("#")
            assert not file or (path.parent / file).exists(), f"{path.name} points to {target}"
            assert file or anchor in heads, f"{path.name} points to #{anchor}"
