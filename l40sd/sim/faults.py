"""What can be wrong with the simulated engine, and the processes, output and memory that it takes.

A fault is a name and a number. It is set by ``--fault NAME[=NUMBER]``, by ``L40SD_SIM_FAULTS=NAME[=NUMBER],...``, or
while the engine runs by ``POST /sim/fault {"NAME": number}``; null takes it away.
"""

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import inf
from shutil import which

FAULTS: dict[str, tuple[float, str]] = {
    # name: (the number when none is given, what it does)
    "never-bind": (1, "never opens the port"),
    "unavailable": (1, "answers every health probe with 503"),
    "exit-at-once": (1, "exits with this code before it opens the port"),
    "die-after": (1, "exits with code 1, this many seconds after it became ready"),
    "crash-after": (0, "exits with code 1 at the first request after this many"),
    "poison": (1, "exits with this code at a request with the word poison in its body"),
    "dead-core": (
        0.3,
        "answers requests with 500 and /health with 503, and exits with 1 after this many seconds (vLLM)",
    ),
    "hang-after": (0, "makes no more tokens once this many requests have come; /health stays 200"),
    "slow-health": (60, "answers health probes this many seconds late"),
    "slow-metrics": (60, "answers scrapes this many seconds late"),
    "error": (inf, "answers this many requests with 500"),
    "error-but-one": (inf, "answers this many requests with 500, but not those for one token"),
    "half-response": (inf, "ends this many replies in the middle"),
    "half-event": (inf, "ends this many streams within an event"),
    "bad-chunk": (inf, "breaks the chunks of this many replies"),
    "reset": (inf, "resets the connection of this many replies after their first bytes"),
    "ignore-term": (1, "takes no notice of SIGTERM"),
    "clean-up": (1, "puts things in order for this many seconds after SIGTERM, and says so"),
    "leave": (3, "leaves this many segments of shared memory and temporary files behind"),
    "rank-death-unnoticed": (1, "hangs, instead of exiting with code 1, when one of its ranks dies"),
    "leak-children": (1, "leaves its ranks behind when it exits"),
    "daemon-child": (1, "starts this many twice-forked children in sessions of their own, with an empty environment"),
    "fork-bomb": (1000, "starts this many children at once, in sessions of their own"),
    "memory": (256, "takes this many MiB"),
    "flood-log": (inf, "writes this many MiB of output as fast as it can"),
    "long-line": (100, "writes one line of this many MiB"),
    "bad-output": (10, "writes this many lines of NULs and invalid UTF-8"),
}


class Faults:
    """The faults in force."""

    def __init__(self, specs: Iterable[str]) -> None:
        self._values: dict[str, float] = {}
        for spec in specs:
            name, _, number = spec.strip().partition("=")
            self.set(name, float(number) if number else FAULTS.get(name, (0.0, ""))[0])

    def set(self, name: str, number: float | None) -> None:
        """Put a fault in force with this number, or take it away.

        Raises:
            ValueError: There is no such fault.
        """
        if name not in FAULTS:
            raise ValueError(f"no fault {name!r}; there are {', '.join(FAULTS)}")
        if number is None:
            self._values.pop(name, None)
        else:
            self._values[name] = number

    def get(self, name: str) -> float | None:
        """Return a fault's number; None when it is not in force."""
        return self._values.get(name)

    def strikes(self, name: str) -> bool:
        """Whether a fault counted in requests strikes this one."""
        left = self._values.get(name, 0)
        if left <= 0:
            return False
        self._values[name] = left - 1
        return True


def take(name: str, number: float) -> object:
    """Do at once what a fault about processes, output or memory does; return what must be kept alive."""
    match name:
        case "daemon-child":
            for _ in range(int(number)):
                idle = f"{_sleep()} 86400 </dev/null >/dev/null 2>&1 &"
                shell = os.posix_spawn("/bin/sh", ["sh", "-c", idle], {}, setsid=True)
                os.waitpid(shell, 0)
        case "fork-bomb":
            born = [pid for pid in (spawn_idle(own_session=True) for _ in range(int(number))) if pid]
            say(f"fork bomb: {len(born)} of {int(number)} born")
        case "leave":
            starts = ("/dev/shm/psm_l40sd_sim", f"{os.environ.get('TMPDIR', '/tmp')}/l40sd_sim")
            names = [f"{start}_{os.getpid()}_{piece}" for start in starts for piece in range(int(number))]
            return [os.open(name, os.O_CREAT | os.O_RDWR, 0o600) for name in names]  # open while it lives
        case "memory":
            return b"\x01" * (int(number) << 20)
        case "flood-log":
            _write_aside(_repeated(b"flood " + b"x" * 121 + b"\n", number * (1 << 20)))
        case "long-line":
            _write_aside([*_repeated(b"x" * 65536, number * (1 << 20)), b"\n"])
        case "bad-output":
            _write_aside([b"\xff\xfe\x00\x00 \xc3( bad\n"] * int(number))
        case _:
            pass
    return None


def spawn_idle(*, own_session: bool = False) -> int | None:
    """Start a child that does nothing; return its pid, or None where no further process is allowed."""
    with suppress(BlockingIOError, OSError):
        return os.posix_spawn(_sleep(), ["sleep", "86400"], os.environ, setsid=own_session)
    return None


def say(text: str) -> None:
    """Write one line of output."""
    sys.stdout.write(f"simulated: {text}\n")
    sys.stdout.flush()


def _sleep() -> str:
    return which("sleep") or "/bin/sleep"


def _repeated(piece: bytes, limit_bytes: float) -> Iterator[bytes]:
    written = 0
    while written < limit_bytes:
        yield piece
        written += len(piece)


def _write_aside(pieces: Iterable[bytes]) -> None:
    """Write output from a thread, so that a full pipe holds up nothing else."""

    def write() -> None:
        with suppress(BrokenPipeError):
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(1, rest) :]

    threading.Thread(target=write, daemon=True).start()
