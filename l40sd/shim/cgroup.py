"""A worker's cgroup: ``shim`` and ``engine`` below it, killed and counted as one.

The only way to find everybody: of five ways for a process to hide (its own session, double fork, scrubbed
environment, ...) a kill by process group misses three and a walk over the tree two, ``cgroup.kill`` none.
"""

# pathlib would cost every shim 5 ms and 1 MB.
# ruff: noqa: PTH102

import contextlib
import os
from typing import Any

from l40sd.shim import OWN_GROUP
from l40sd.shim.files import write_text
from l40sd.shim.output import RotatingLog


def join(spec: dict[str, Any], log: RotatingLog) -> str:
    """Move this process into ``shim`` below the instance's cgroup and make ``engine``; "" where that fails.

    ``spec["group"]`` is the directory the daemon made, ``"own"`` for the one we were started in (a unit with
    Delegate=yes), or empty. Controllers are used as far as they are there.
    """
    group = own() or "" if spec["group"] == OWN_GROUP else spec["group"]
    if not group:
        return ""
    try:
        for name in ("shim", "engine"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{group}/{name}")
        write_text(f"{group}/shim/cgroup.procs", "0")
    except OSError as error:
        log.note(f"no cgroup: {group}: {error.strerror}")
        return ""
    limits = {"pids.max": spec["pids_limit"], "memory.max": spec["memory_limit_bytes"], "memory.oom.group": 1}
    for controller in ("+pids", "+memory"):
        with contextlib.suppress(OSError):
            write_text(f"{group}/cgroup.subtree_control", controller)
    for name, limit in limits.items():
        with contextlib.suppress(OSError):
            if limit:
                write_text(f"{group}/engine/{name}", str(limit))
    return str(group)


def was_oom_killed(group: str) -> bool:
    """Whether the kernel killed for memory in this cgroup; False also where that cannot be known."""
    if not group:
        return False
    try:
        with open(f"{group}/engine/memory.events", encoding="ascii") as file:
            counts = dict(line.split() for line in file)
    except OSError:
        return False
    return int(counts.get("oom_kill", 0)) > 0


def kill(group: str) -> bool:
    """Kill every process of a cgroup and of those below it; False when it is gone or not ours to kill."""
    try:
        write_text(f"{group}/cgroup.kill", "1")
    except OSError:
        return False
    return True


def is_populated(group: str) -> bool:
    """Whether a living process is in this cgroup or below it; a cgroup that is gone has none."""
    try:
        with open(f"{group}/cgroup.events", encoding="ascii") as file:
            return "populated 1" in file.read()
    except OSError:
        return False


def own() -> str | None:
    """Return the directory of this process's own cgroup2 group; None where there is no cgroup2 here.

    The mount is found in /proc/self/mountinfo: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid hosts.
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [line.split() for line in file if " - cgroup2 " in line]
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        own = [line.rstrip("\n")[3:] for line in file if line.startswith("0::")]
    if not mounts or not own:
        return None
    root, mount = mounts[0][3], mounts[0][4]
    inside = own[0].removeprefix(root.rstrip("/")) if own[0].startswith(root) else own[0]
    return f"{mount}{inside}".rstrip("/")
