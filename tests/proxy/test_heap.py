"""What a process has touched stays in memory, where it may lock all of it."""

import resource
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import resource, sys
from l40sd.proxy.heap import keep_resident
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
print(keep_resident())
touched = bytearray(8 << 20)
untouched = __import__("mmap").mmap(-1, 64 << 20)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmLck")))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


def run(limit: int) -> tuple[bool, int, int]:
    done = subprocess.run(  # noqa: TID251 - a process of its own: a limit once lowered stays
        [sys.executable, "-c", PROGRAM, str(limit)], capture_output=True, text=True, check=True, timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    kept, locked, resident = done.stdout.split()
    return kept == "True", int(locked), int(resident)


def test_what_is_touched_is_kept_and_nothing_more_is_read_in() -> None:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] != resource.RLIM_INFINITY:
        hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        assert run(hard)[0] is False
        return
    kept, locked_kib, resident_kib = run(resource.RLIM_INFINITY)
    assert kept
    assert locked_kib > 64 << 10, "what is mapped later counts as locked"
    assert resident_kib < 60 << 10, "and is not there before it is touched"


def test_with_a_limit_nothing_is_locked() -> None:
    kept, locked_kib, _ = run(1 << 20)
    assert (kept, locked_kib) == (False, 0)
