"""Processes by identity: read who runs, find all that came from one, kill them and nobody else.

A pid alone is not an identity: it is used again. A pid with its start time is, until the next boot. Signals
go only through a pidfd that was opened first and compared afterwards (invariant 8).
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

FREEZE_ROUNDS = 20
"""A tree that still grows after so many rounds of SIGSTOP is killed as it is; the caller comes again."""


class Process(NamedTuple):
    """One process at one moment, from /proc/PID/stat; ``start_ticks`` since boot, ``state`` one letter."""

    pid: int
    state: str
    parent: int
    session: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """Not a zombie and not on its way out."""
        return self.state not in "ZX"


def boot_id() -> str:
    """Return the kernel's id of this boot; start times of other boots mean nothing."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def read_process(pid: int) -> Process | None:
    """Return who has this pid now; None when nobody has."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name may hold spaces and brackets: fields count from the last ")".
    fields = text[text.rindex(b")") + 2 :].split()
    return Process(pid, fields[0].decode("ascii"), int(fields[1]), int(fields[3]), int(fields[19]))


def all_processes() -> Iterator[Process]:
    """Yield every process of the host, zombies too; what ends meanwhile is left out."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := read_process(int(name))) is not None:
            yield process


def descendants(pid: int, *, session: int = 0) -> list[Process]:
    """Return the living descendants of a process, without itself.

    Args:
        session: Members of this session and their descendants count too; 0: none.
    """
    children: dict[int, list[Process]] = {}
    found: list[Process] = []
    for process in all_processes():
        children.setdefault(process.parent, []).append(process)
        if session and process.session == session and process.pid != pid:
            found.append(process)
    found += children.get(pid, ())
    seen = {process.pid for process in found}
    for process in found:  # grows while we walk it
        fresh = [child for child in children.get(process.pid, ()) if child.pid not in seen]
        found += fresh
        seen.update(child.pid for child in fresh)
    return [process for process in {one.pid: one for one in found}.values() if process.is_alive]


def engine_of(leader: Process) -> list[Process]:
    """Return whom to tell when the engine that was started as ``leader`` shall end; see ``who_obeys``.

    Reads all of /proc once.
    """
    children: dict[int, list[Process]] = {}
    for process in all_processes():
        if process.is_alive:
            children.setdefault(process.parent, []).append(process)
    return who_obeys(leader, children, lambda process: catches(process, signal.SIGTERM)) or [leader]


def who_obeys(
    process: Process, children: Mapping[int, list[Process]], has_handler: Callable[[Process], bool]
) -> list[Process]:
    """Return who of a process and those below it is to get SIGTERM so that all of them end in good order.

    An engine of several processes has one that knows how to end the others: the first with a handler. Above it
    there may be a wrapper that runs it and waits (``bash -c '"$@"'``): it has no handler, SIGTERM would only kill
    it and cut the engine off. So names do not matter; the kernel says who has a handler. Where nobody has one
    there is nothing to be put in order, and the answer is empty.
    """
    if has_handler(process):
        return [process]
    return [one for child in children.get(process.pid, ()) for one in who_obeys(child, children, has_handler)]


def catches(process: Process, number: int) -> bool:
    """Whether a process has a handler for a signal; False also when it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{process.pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def send_signal(process: Process, number: int) -> bool:
    """Signal exactly this process; False when it is gone, another has its pid now, or it is not ours to signal."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except (ProcessLookupError, OSError):
        return False
    try:
        now = read_process(process.pid)
        if now is None or now.start_ticks != process.start_ticks:
            return False
        signal.pidfd_send_signal(pidfd, number)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(pidfd)
    return True


def kill_all(find: Callable[[], Iterable[Process]]) -> None:
    """Kill whoever ``find`` returns; stops them all first, so that nobody forks out of the net meanwhile.

    Returns before they are gone: call again until ``find`` returns nobody.
    """
    stopped: set[tuple[int, int]] = set()
    for _ in range(FREEZE_ROUNDS):
        fresh = [process for process in find() if (process.pid, process.start_ticks) not in stopped]
        if not fresh:
            break
        for process in fresh:
            send_signal(process, signal.SIGSTOP)
            stopped.add((process.pid, process.start_ticks))
    for process in find():
        send_signal(process, signal.SIGKILL)
