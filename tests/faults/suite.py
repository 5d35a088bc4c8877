"""What a fault is, how one is run, and how the run is told.

A fault is a function that injects it into a real daemon with real workers, sees that what was promised happens, and
returns how long it took and what was lost. It fails by raising. The runner then looks for what must not be there:
processes, cgroups, a socket's file, descriptors of a daemon that still runs.
"""

import asyncio
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from faults.rig import Broken, Rig
from l40sd.errors import L40sError

QUICK_LIMIT_S = 120.0
FULL_LIMIT_S = 1200.0
LEFTOVERS_LIMIT_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A fault survived.

    Attributes:
        took_s: From the injection until what was promised had happened, as measured from outside.
        lost: Requests without their whole answer.
        note: What else was measured, or what could not be shown here; short.
    """

    took_s: float
    lost: int = 0
    note: str = ""


class NotHereError(Exception):
    """The fault cannot be injected on this machine; the text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        title: What happens, e.g. ``kill -9 of the daemon, workers ready``.
        how: How it is injected.
        expected: What l40sd does then, for the table in the documentation.
        promise: By when, in words and with the default configuration.
        within_s: The same with the suite's short timeouts; None: the fault's function asserts what there is to assert.
    """

    number: int
    title: str
    how: str
    expected: str
    promise: str
    within_s: float | None
    run: Callable[[Rig], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one fault: ``survived``, ``failed`` or ``not run``."""

    number: int
    title: str
    verdict: str
    took_s: float = 0.0
    lost: int = 0
    note: str = ""

    def line(self) -> str:
        """Return the one line about it."""
        match self.verdict:
            case "survived":
                lost = f"{self.lost} request{'s' if self.lost != 1 else ''} lost"
                note = f" ({self.note})" if self.note else ""
                return f"fault {self.number} survived in {self.took_s:.1f} s, {lost}: {self.title}{note}"
            case "failed":
                return f"fault {self.number} NOT SURVIVED: {self.title}: {self.note}"
            case _:
                return f"fault {self.number} not run: {self.title}: {self.note}"


FAULTS: dict[int, Fault] = {}


def fault(
    number: int, title: str, *, how: str, expected: str, promise: str = "-", within_s: float | None = None
) -> Callable[[Callable[[Rig], Awaitable[Outcome]]], Callable[[Rig], Awaitable[Outcome]]]:
    """Register a function as the fault of this number."""

    def register(run: Callable[[Rig], Awaitable[Outcome]]) -> Callable[[Rig], Awaitable[Outcome]]:
        assert number not in FAULTS, f"fault {number} is registered twice"
        FAULTS[number] = Fault(
            number=number, title=title, how=how, expected=expected, promise=promise, within_s=within_s, run=run
        )
        return run

    return register


async def run_one(one: Fault, *, is_quick: bool, slack: float, keep: Path | None = None) -> Result:
    """Inject one fault and say what became of it. Nothing is left behind, whatever happens.

    Args:
        slack: Bounds are multiplied by it: a machine that does other work as well is slower, not wrong.
        keep: Where to put the folder of a fault that failed.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"l40sd-fault{one.number}-"))
    rig = Rig(number=one.number, folder=folder, is_quick=is_quick)
    problem = ""
    outcome: Outcome | None = None
    try:
        async with asyncio.timeout(QUICK_LIMIT_S if is_quick else FULL_LIMIT_S):
            outcome = await one.run(rig)
    except NotHereError as error:
        return Result(number=one.number, title=one.title, verdict="not run", note=str(error))
    except (Broken, L40sError, TimeoutError) as error:
        problem = str(error) or type(error).__name__
    except Exception:  # noqa: BLE001 - whatever it is, the faults after this one are still to be run
        problem = traceback.format_exc()
    finally:
        try:
            async with asyncio.timeout(LEFTOVERS_LIMIT_S):
                left = await rig.end()
        except (L40sError, TimeoutError, OSError) as error:
            left = [f"the end: {str(error) or type(error).__name__}"]
            rig.clear()
    problem = problem or "; ".join(left)
    if not problem and outcome is not None and one.within_s and outcome.took_s > one.within_s * slack:
        problem = f"took {outcome.took_s:.1f} s, more than {one.within_s * slack:g} s ({outcome.note})"
    if problem and keep is not None:
        shutil.rmtree(keep / folder.name, ignore_errors=True)
        shutil.copytree(folder, keep / folder.name, symlinks=True, ignore=_sockets)
        problem += f" [{keep / folder.name}]"
    shutil.rmtree(folder, ignore_errors=True)
    if problem or outcome is None:
        return Result(number=one.number, title=one.title, verdict="failed", note=problem)
    return Result(
        number=one.number,
        title=one.title,
        verdict="survived",
        took_s=outcome.took_s,
        lost=outcome.lost,
        note=outcome.note,
    )


def _sockets(folder: str, names: list[str]) -> list[str]:
    """Return what of a folder cannot be copied."""
    return [name for name in names if (Path(folder) / name).is_socket()]


def run_all(
    numbers: Sequence[int], say: Callable[[str], None], *, is_quick: bool, slack: float, keep: Path | None
) -> list[Result]:
    """Run these faults one after the other, each in a loop of its own."""
    results = []
    for number in numbers:
        result = asyncio.run(run_one(FAULTS[number], is_quick=is_quick, slack=slack, keep=keep))
        say(result.line())
        results.append(result)
    return results


def summary(results: Sequence[Result], took_s: float) -> str:
    """Return the last lines: what was not run, and how many of those run were survived."""
    run = [result for result in results if result.verdict != "not run"]
    skipped = [str(result.number) for result in results if result.verdict == "not run"]
    survived = sum(result.verdict == "survived" for result in run)
    lines = [f"not run here: {', '.join(skipped)}"] if skipped else []
    failed = [str(result.number) for result in run if result.verdict == "failed"]
    lines += [f"not survived: {', '.join(failed)}"] if failed else []
    return "\n".join([*lines, f"{survived} of {len(run)} survived in {took_s:.0f} s"])


def remember(path: Path, results: Sequence[Result]) -> None:
    """Keep the results beside those of earlier runs, for the table."""
    known = recall(path)
    known |= {result.number: result for result in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [asdict(known[number]) for number in sorted(known)]
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def recall(path: Path) -> dict[int, Result]:
    """Return the latest result of each fault; none where there is no file."""
    if not path.exists():
        return {}
    return {plain["number"]: Result(**plain) for plain in json.loads(path.read_text(encoding="utf-8"))}


HEAD = """# What happens when

Every line was injected into a running l40sd with real processes, signals and sockets, and measured from outside;
`scripts/faults` does it again on your machine, and this page is its output (`scripts/faults --table`). *Promised*
holds with the default configuration; *measured* is the suite's, with its short timeouts, on the simulated engine, on
two busy CPU cores. *Lost* counts requests without their whole answer. Each line is that fault's latest result:
lines may come from different runs, some of them with doubled bounds because the machine was shared.

"""


def table(results: Mapping[int, Result]) -> str:
    """Return the page for the documentation."""
    rows = ["| # | what happens | what l40sd does | promised | measured | lost |", "|--|--|--|--|--|--|"]
    for number, one in sorted(FAULTS.items()):
        result = results.get(number)
        if result is None or result.verdict == "not run":
            measured, lost = f"not run: {result.note if result else 'no result yet'}", "-"
        elif result.verdict == "failed":
            measured, lost = "**not survived**", "-"
        else:
            measured = f"{result.took_s:.1f} s" + (f"; {result.note}" if result.note else "")
            lost = str(result.lost)
        rows.append(f"| {number} | {one.title} | {one.expected} | {one.promise} | {measured} | {lost} |")
    run = [result for result in results.values() if result.verdict != "not run"]
    survived = sum(result.verdict == "survived" for result in run)
    missing = sorted(number for number in FAULTS if number not in {result.number for result in run})
    not_run = f", not run: {', '.join(map(str, missing))}" if missing else ""
    return HEAD + "\n".join(rows) + f"\n\n{survived} of {len(run)} survived{not_run}.\n"


def now_s() -> float:
    """Return monotonic seconds."""
    return time.monotonic()
