"""What a process tree has done so far, read from /proc through psutil: CPU time, bytes read, output."""

from pathlib import Path

import psutil

from l40sd.workers.startup import Activity


def activity_of(pid: int | None, log_path: Path) -> Activity:
    """Return what the tree below ``pid`` has done; zeros for a process that is gone. Blocks for a millisecond or so."""
    cpu_s, read_bytes = 0.0, 0
    for process in _tree(pid):
        try:
            times = process.cpu_times()
            cpu_s += times.user + times.system
            read_bytes += process.io_counters().read_chars
        except psutil.Error:  # it ended while we looked, or is not ours to read
            continue
    return Activity(log_bytes=_size(log_path), cpu_s=cpu_s, read_bytes=read_bytes)


def _tree(pid: int | None) -> list[psutil.Process]:
    if pid is None:
        return []
    try:
        leader = psutil.Process(pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.Error:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
