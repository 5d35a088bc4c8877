"""Clocks. Durations are monotonic; the wall clock is for people and may jump."""

import time
from datetime import datetime
from functools import cache

from l40sd.shim import proc


def now_s() -> float:
    """Return monotonic seconds, for durations and deadlines; stands still while the host is suspended."""
    return time.monotonic()


def wall_time_s() -> float:
    """Return seconds since 1970; never subtract two of these."""
    return datetime.now().astimezone().timestamp()


def wall_time_iso() -> str:
    """Return the date and time with the local offset, e.g. ``2026-03-01T12:00:00.123+01:00``."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


@cache
def boot_id() -> str:
    """Return the kernel's id of this boot; read once, for it stays, and a file descriptor may not be there later."""
    return proc.boot_id()
