"""Runs test files against a changed module, in forks of this process, so many at once."""

import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from time import monotonic
from types import ModuleType

# What tests import and the code under test is not part of: loaded once, inherited by every fork.
import _pytest.config
import aiohttp
import hypothesis.strategies
import msgspec
import psutil
import pytest
import pytest_asyncio.plugin
import structlog

from mutants.changes import Change

LOADED = (_pytest.config, aiohttp, hypothesis.strategies, msgspec, psutil, pytest_asyncio.plugin, structlog)
OPTIONS = (
    "-x",
    "-p",
    "no:cacheprovider",
    "--hypothesis-profile=mutants",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
)
PASSED = 0


class _Changed(MetaPathFinder, InspectLoader):
    """Gives one module's changed text in place of its file."""

    def __init__(self, module: str, source: str) -> None:
        self._module = module
        self._source = source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname == self._module else None

    def get_source(self, fullname: str) -> str:
        return self._source


class _QuickFirst:
    """Has pytest run the property tests last: what an ordinary test notices as well need not wait for them."""

    @staticmethod
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: hasattr(getattr(item, "obj", None), "hypothesis"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a trial may take: a change may well make a loop endless."""

    cpu_s: int
    wall_s: float


def unchanged(module: str, source: str, tests: Sequence[str]) -> tuple[bool, Limits]:
    """Return whether the tests pass as things are, and what a trial may take, by what they took."""
    began_s = monotonic()
    pid = _start(module, source, tests, Limits(cpu_s=600, wall_s=0))
    _, status, used = os.wait4(pid, 0)
    took_s = monotonic() - began_s
    return status == PASSED, Limits(cpu_s=int(10 + 5 * (used.ru_utime + used.ru_stime)), wall_s=120 + 10 * took_s)


def unnoticed(
    module: str, changes: Iterable[Change], tests: Sequence[str], limits: Limits, at_once: int
) -> Iterator[Change]:
    """Yield the changes with which all the tests pass, as they are found."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    running: dict[int, tuple[Change, float]] = {}
    try:
        for change in changes:
            if len(running) >= at_once:
                yield from _next_ended(running)
            running[_start(module, change.source, tests, limits)] = (change, monotonic() + limits.wall_s)
        while running:
            yield from _next_ended(running)
    finally:
        for pid in running:
            _end(pid)


def _next_ended(running: dict[int, tuple[Change, float]]) -> Iterator[Change]:
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            change, _ = running.pop(pid)
            _end(pid)
            if status == PASSED:
                yield change
            return
        signal.sigtimedwait({signal.SIGCHLD}, max(0.0, min(until_s for _, until_s in running.values()) - monotonic()))
        for late in [pid for pid, (_, until_s) in running.items() if until_s <= monotonic()]:
            _end(late)


def _end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _start(module: str, source: str, tests: Sequence[str], limits: Limits) -> int:
    """Return the process in which the tests run: it ends with 0 when all of them pass."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with suppress(PermissionError):  # it has done so itself
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nowhere, descriptor)
        sys.meta_path.insert(0, _Changed(module, source))
        status = int(pytest.main([*OPTIONS, *tests], plugins=[_QuickFirst()]))
    finally:
        os._exit(status)
