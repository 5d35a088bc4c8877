"""What an engine leaves outside its processes: its temporary folder, and segments of shared memory.

vLLM leaves about ten sockets in the temporary folder at each of its ends, and after a crash its segments in /dev/shm,
which is memory. So each run gets a temporary folder of its own, and what of shared memory nobody uses any more is
removed with it.
"""

# pathlib would cost every shim 5 ms and 1 MB.
# ruff: noqa: PTH102, PTH106, PTH108, PTH116, PTH119, PTH120

import contextlib
import fcntl
import os
import stat

SHARED_MEMORY = "/dev/shm"
SEGMENTS = ("psm_", "sem.", "vllm_dist_", "nccl-", "torch_")
"""How the names begin that Python, vLLM, NCCL and torch give: others' are let be."""
FOLDER = "l40sd-"
"""How a temporary folder's name begins; what is not called so is never removed."""

RUN_DIGITS = 10
FORGOTTEN_AFTER_S = 60.0
"""A folder that nobody holds is let be for so long: its daemon may be about to clear up after a killed shim."""


def make_folder(path: str, now_s: float) -> bool:
    """Make a run's temporary folder; False where that cannot be, and the usual one has to do.

    It stays locked while this process lives: systemd-tmpfiles lets be what is locked, however old. Folders that were
    left beside it go first: the daemon of a shim that was killed may have another /tmp (PrivateTmp=).
    """
    sweep(os.path.dirname(path), now_s - FORGOTTEN_AFTER_S)
    try:
        os.mkdir(path, 0o700)
        fcntl.flock(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH)
    except OSError:
        return False
    return True


def remove(folder: str, since_s: float) -> None:
    """Remove what a run has left, once no process of it is; nothing is done a second time.

    Args:
        folder: Its temporary folder, or nothing.
        since_s: When it began, as files have their times.
    """
    remove_folder(folder)
    remove_segments(SHARED_MEMORY, since_s)


def remove_folder(path: str) -> None:
    """Remove a run's folder with all that is in it; a link, somebody else's, or one not named so is let be."""
    if not os.path.basename(path).startswith(FOLDER):
        return
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return
        for _, folders, files, descriptor in os.fwalk(path, topdown=False):
            for name in (*files, *folders):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=descriptor)  # a link to a folder is listed as one
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=descriptor)
        os.rmdir(path)


def sweep(place: str, before_s: float) -> list[str]:
    """Remove runs' folders of which nobody knows any more: older than that, and no shim holds them; return their names.

    Whoever was to remove them was killed, or has another /tmp.
    """
    removed = []
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        names = [entry.name for entry in entries if is_run_folder(entry.name)]
        for name in names:
            path = f"{place}/{name}"
            if is_forgotten(path, before_s):
                remove_folder(path)
                removed.append(name)
    return sorted(removed)


def is_run_folder(name: str) -> bool:
    """Whether a name is ``FOLDER`` and ten hexadecimal digits, as the daemon gives them."""
    run = name.removeprefix(FOLDER)
    return name.startswith(FOLDER) and len(run) == RUN_DIGITS and set(run) <= set("0123456789abcdef")


def is_forgotten(path: str, before_s: float) -> bool:
    """Whether a folder is ours, older than that, and locked by nobody."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return found.st_uid == os.geteuid() and found.st_mtime < before_s


def remove_segments(place: str, since_s: float) -> list[str]:
    """Remove the segments that an engine made since then and nobody uses; return their names.

    Made by an engine: by its name, our user's, and not older than the run. Used: mapped or open in a process of our
    user; nobody else may open them. Other workers and strangers have theirs mapped for as long as they live.
    """
    made = {}
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith(SEGMENTS):
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_ctime >= since_s:
                        made[found.st_dev, found.st_ino] = entry
    used = in_use() if made else set()
    removed = []
    for identity, entry in made.items():
        if identity not in used:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
                removed.append(entry.name)
    return sorted(removed)


def in_use() -> set[tuple[int, int]]:
    """Return device and inode of all files that processes of our user have mapped or open.

    Into one that may do more than we do (a container's first process) we cannot look; no engine's process is one.
    """
    found: set[tuple[int, int]] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.stat(f"/proc/{pid}").st_uid == os.geteuid():
                found |= mapped(pid)
                found |= opened(pid)
    return found


def mapped(pid: str) -> set[tuple[int, int]]:
    """Return device and inode of the files that a process has mapped. Raises OSError."""
    with open(f"/proc/{pid}/maps", encoding="ascii", errors="replace") as file:
        fields = [line.split(maxsplit=5) for line in file]
    devices = [(line[3].split(":"), int(line[4])) for line in fields if line[4] != "0"]
    return {(os.makedev(int(major, 16), int(minor, 16)), inode) for (major, minor), inode in devices}


def opened(pid: str) -> set[tuple[int, int]]:
    """Return device and inode of the files that a process has open. Raises OSError."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            one = os.stat(f"/proc/{pid}/fd/{name}")
            found.add((one.st_dev, one.st_ino))
    return found
