"""Prints a line a module: how many changes of it its own tests notice; then those that they do not. See ``mutants``."""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mutants.changes import Change, changes
from mutants.modules import MODULES, SAME
from mutants.trial import unchanged, unnoticed

ROOT = Path(__file__).parents[2]
ENOUGH = 0.95


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with TemporaryDirectory(prefix="l40sd-mutants-") as place:
        _go_to_copy(Path(place))
        return _try_modules(arguments)


def _go_to_copy(place: Path) -> None:
    """Whoever edits the tree meanwhile changes nothing here, and no change made here touches the tree."""
    for folder in ("l40sd", "tests"):
        shutil.copytree(ROOT / folder, place / folder)
    shutil.copy(ROOT / "pyproject.toml", place)
    os.chdir(place)
    sys.path.insert(0, str(place))


def _try_modules(arguments: argparse.Namespace) -> int:
    chosen = [m for m in MODULES if not arguments.modules or any(name in m for name in arguments.modules)]
    all_enough = bool(chosen)
    for module in chosen:
        all_enough &= _try_module(module, arguments.at_once)
    return 0 if all_enough else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/test --mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", help="only modules with this in their name")
    parser.add_argument("--at-once", type=int, default=2)
    return parser.parse_args()


def _try_module(path: str, at_once: int) -> bool:
    """Tell whether enough changes of one module are noticed, and print which are not."""
    source = Path(path).read_text(encoding="utf-8")
    tests = MODULES[path]
    module = path.removesuffix(".py").replace("/", ".")
    passes, limits = unchanged(module, source, tests)
    if not passes:
        print(f"{path}: its tests fail as it is: {' '.join(tests)}", flush=True)
        return False
    made = [change for change in changes(source) if not _is_same(path, change)]
    missed = []
    for change in unnoticed(module, made, tests, limits, at_once):
        missed.append(change)
        print(f"  unnoticed  {path}:{change.line}: {change.before}  ->  {change.after}", file=sys.stderr, flush=True)
    share = 1 - len(missed) / len(made) if made else 1.0
    print(f"{path}: {len(made) - len(missed)} of {len(made)} noticed ({share:.1%})", flush=True)
    for change in sorted(missed, key=lambda change: change.line):
        print(f"  {path}:{change.line}: {change.before}  ->  {change.after}", flush=True)
    return share >= ENOUGH


def _is_same(path: str, change: Change) -> bool:
    made = (path, change.before.split(), change.after.split())
    return any(made == (same.path, same.before.split(), same.after.split()) for same in SAME)


if __name__ == "__main__":
    sys.exit(main())
