"""``scripts/faults``: run the faults, print a line each, and end with how many were survived."""

import argparse
import sys
from pathlib import Path

from faults import (
    changes,
    clients,
    daemons,
    deaths,
    ends,
    followers,
    gpus,
    hostile,
    output,
    starts,
    state,
    system,
    upgrades,
    workers,
)
from faults.suite import FAULTS, Result, now_s, recall, remember, run_all, summary, table

RESULTS = Path(__file__).resolve().parents[2] / ".cache" / "faults" / "results.json"
MODULES = (
    workers,
    daemons,
    starts,
    output,
    state,
    clients,
    followers,
    system,
    gpus,
    deaths,
    ends,
    changes,
    hostile,
    upgrades,
)
QUICK_SLACK = 3.0
SECOND_TRIES = 3


def main(argv: list[str] | None = None) -> int:
    """Return 0 when everything that was run was survived."""
    assert all(module.__doc__ for module in MODULES)
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="what fits into five minutes; what needs the container or the virtual machine is left out",
    )
    parser.add_argument("--only", metavar="N,N-N", help="these faults")
    parser.add_argument("--rounds", type=int, default=1, help="inject each so often in a row (default: 1)")
    parser.add_argument("--slack", type=float, help="multiply the bounds by this (default: 1, with --quick 3)")
    parser.add_argument("--keep", type=Path, help="keep the folders of faults that were not survived in this one")
    parser.add_argument("--table", action="store_true", help="print the documentation's page from the latest results")
    parser.add_argument("--list", action="store_true", help="print the faults and how each is injected")
    given = parser.parse_args(argv)
    if given.table:
        say(table(recall(RESULTS)).rstrip("\n"))
        return 0
    numbers = chosen(given.only)
    if given.list:
        for number in numbers:
            say(f"{number:3} {FAULTS[number].title}: {FAULTS[number].how}")
        return 0
    began_s = now_s()
    slack = given.slack or (QUICK_SLACK if given.quick else 1.0)
    results = run_all(
        [number for number in numbers for _ in range(given.rounds)],
        say,
        is_quick=given.quick,
        slack=slack,
        keep=given.keep,
    )
    if given.quick:
        results = again(results, slack=slack, keep=given.keep)
    remember(RESULTS, results)
    say(summary(results, now_s() - began_s))
    return int(any(result.verdict == "failed" for result in results))


def again(results: list[Result], *, slack: float, keep: Path | None) -> list[Result]:
    """Return the results, what was not survived tried once more and said so: bounds are times, machines are shared.

    More than a few at once are no matter of a busy machine, and stay as they are.
    """
    failed = [result.number for result in results if result.verdict == "failed"]
    if not 0 < len(failed) <= SECOND_TRIES:
        return results
    say(f"not survived at the first try: {', '.join(map(str, failed))}; tried once more:")
    second = {result.number: result for result in run_all(failed, say, is_quick=True, slack=slack, keep=keep)}
    return [second.get(result.number, result) for result in results]


def chosen(only: str | None) -> list[int]:
    """Return the numbers asked for, in order; all by default.

    Raises:
        SystemExit: One of them is no fault of the suite.
    """
    if only is None:
        return sorted(FAULTS)
    wanted: set[int] = set()
    for part in only.split(","):
        first, _, last = part.partition("-")
        wanted.update(number for number in range(int(first), int(last or first) + 1) if number in FAULTS or not last)
    unknown = sorted(wanted - FAULTS.keys())
    if unknown:
        raise SystemExit(f"no fault {', '.join(map(str, unknown))}; there are {', '.join(map(str, sorted(FAULTS)))}")
    return sorted(wanted)


def say(text: str) -> None:
    """Print at once: a run takes minutes, and its reader waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
