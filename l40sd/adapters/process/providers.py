"""Who holds a worker's processes together: a systemd unit, a cgroup of our own, or only the shim.

All else is the same path (see ARCHITECTURE.md, "Worker processes"). Each provider is tried for real before it is
chosen: what the host promises and what it lets this user do are two things.
"""

import asyncio
import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from l40sd.adapters.process.remains import remove_group, unit_of
from l40sd.core.errors import L40sError
from l40sd.shim import groups, tree

UNIT_RUNTIME_DIR = Path("/run/l40sd")
"""l40s-worker@.service looks for its instance here."""
SYSTEMD_RUNS = Path("/run/systemd/system")
"""There where systemd is the first process (sd_booted(3))."""
STARTER = Path("/run/l40s-start.sock")
"""Where systemd listens for l40s-start@.service, which starts an instance's unit and can do nothing else."""
ANSWER_MAX_BYTES = 4096
SYSTEMCTL_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """The one in force.

    Attributes:
        name: unit, cgroup or none.
        note: What it cannot do here; empty when nothing is missing.
        base: Directory of the instances' cgroups, for ``cgroup``.
    """

    name: str
    note: str = ""
    base: str = ""


class Unavailable(Exception):  # noqa: N818 - not an error: the next provider is tried
    """A provider does not work here; the text says why."""


class Late(Unavailable):
    """There was no answer in time: that says nothing of whether it works."""


async def choose(wanted: str, runtime_dir: Path) -> Provider:
    """Return the provider that ``wanted`` names, or for ``auto`` the first that works: unit, cgroup, none.

    Raises:
        L40sError: The one asked for does not work here.
    """
    tried: list[str] = []
    for name in ("unit", "cgroup", "none") if wanted == "auto" else (wanted,):
        try:
            match name:
                case "unit":
                    return await probe_unit(runtime_dir)
                case "cgroup":
                    return await asyncio.to_thread(probe_cgroup, runtime_dir)
                case _:
                    return without(tried)
        except Unavailable as reason:
            tried.append(f"{name}: {reason}")
    raise L40sError(
        f"processes cannot be held by {tried[0]}",
        where="daemon.provider",
        hint='set it to "auto": the first that works is taken',
        code="provider_unavailable",
    )


def without(tried: list[str]) -> Provider:
    """Return the last resort and what it lacks."""
    note = "no cgroups: no limit of processes, no naming of OOM kills; a process that hides may outlive a killed shim"
    return Provider(name="none", note=f"{note} ({'; '.join(tried)})" if tried else note)


# cgroup


def probe_cgroup(runtime_dir: Path) -> Provider:
    """Make, fill, kill and remove a cgroup. Blocks for some milliseconds.

    Raises:
        Unavailable: One of these did not work.
    """
    own = groups.own()
    if own is None:
        raise Unavailable("no cgroup2 is mounted here")
    name = f"l40sd-{hashlib.sha256(os.fsencode(runtime_dir)).hexdigest()[:12]}"
    reasons: list[str] = []
    # As root at the top, outside of what systemd manages: our own unit's cgroup must not hold workers, or
    # systemd cannot start it again (219/CGROUP). Otherwise below our own group, if that was delegated to us.
    top = mount_of(own)
    for place in dict.fromkeys([top, own] if os.geteuid() == 0 else [own]):
        base = f"{place}/{name}"
        try:
            with contextlib.suppress(FileExistsError):
                Path(base).mkdir()
            for level in (place, base) if place == top else (base,):
                for controller in ("+pids", "+memory"):
                    with contextlib.suppress(OSError):
                        tree.write_text(f"{level}/cgroup.subtree_control", controller)
            kill_a_child_in(f"{base}/probe-{os.getpid()}")
            controllers = Path(base, "cgroup.controllers").read_text(encoding="ascii").split()
        except OSError as error:
            reasons.append(f"{error.filename or base}: {error.strerror}")
            continue
        missing = [controller for controller in ("pids", "memory") if controller not in controllers]
        note = f"no {' and '.join(missing)} controller here: " if missing else ""
        lacks = {"pids": "the limit of processes is not applied", "memory": "OOM kills are not named"}
        note += ", ".join(lacks[controller] for controller in missing)
        return Provider(name="cgroup", note=note, base=base)
    raise Unavailable("; ".join(reasons))


def mount_of(group: str) -> str:
    """Return the mount point that a cgroup2 directory is below."""
    path = Path(group)
    while not os.path.ismount(path) and path != path.parent:
        path = path.parent
    return str(path)


def kill_a_child_in(group: str) -> None:
    """Prove that a process can be moved into a new cgroup and killed there.

    Raises:
        OSError: It cannot.
    """
    remove_group(group)
    Path(group).mkdir()
    child = 0
    try:
        child = os.posix_spawnp("sleep", ["sleep", "5"], os.environ)
        tree.write_text(f"{group}/cgroup.procs", str(child))
        tree.write_text(f"{group}/cgroup.kill", "1")
        os.waitpid(child, 0)
        child = 0
    finally:
        if child:
            os.kill(child, 9)
            os.waitpid(child, 0)
        remove_group(group)


# unit


async def probe_unit(runtime_dir: Path) -> Provider:
    """Start the template unit once, for an instance that does not exist: its shim ends at once.

    A host that is slow, as at its start, is one that has them: without units no worker could be pinned until the
    daemon's next start, and each start of a worker asks again anyway.

    Raises:
        Unavailable: No systemd, no such unit, no permission, or another runtime directory.
    """
    if not SYSTEMD_RUNS.is_dir():
        raise Unavailable("systemd does not run this host")
    if runtime_dir != UNIT_RUNTIME_DIR:
        raise Unavailable(f"l40s-worker@.service works in {UNIT_RUNTIME_DIR} only, not in {runtime_dir}")
    try:
        await start_unit("probe", timeout_s=PROBE_TIMEOUT_S, starter=STARTER)
    except Late as late:
        return Provider(name="unit", note=f"{late} at the daemon's start")
    return Provider(name="unit")


async def start_unit(instance: str, *, timeout_s: float = SYSTEMCTL_TIMEOUT_S, starter: Path = STARTER) -> None:
    """Have an instance's unit started; whether it came up shows in its run.json.

    Raises:
        Unavailable: It was refused, in systemd's own words.
        Late: It took longer than ``timeout_s``.
    """
    try:
        async with asyncio.timeout(timeout_s):
            answer = await answer_of(starter, f"{instance}\n")
    except (FileNotFoundError, ConnectionRefusedError):
        await start_by_systemctl(instance, timeout_s, starter)
        return
    except TimeoutError as error:
        raise Late(f"{starter} took longer than {timeout_s:g} s") from error
    except OSError as error:
        raise Unavailable(f"{starter}: {error.strerror}") from error
    status, _, said = answer.partition(" ")
    if status != "0":
        raise Unavailable(said.strip() or f"{starter} gave no answer: journalctl -t l40s-start")


async def start_by_systemctl(instance: str, timeout_s: float, starter: Path) -> None:
    """Start a unit where nobody listens for it: under the units of an older release, whose polkit rule allows this.

    Raises:
        Unavailable: It was refused, as under the units of this one, or took longer than ``timeout_s``.
    """
    try:
        await systemctl("start", unit_of(instance), timeout_s=timeout_s)
    except Unavailable as reason:  # late, too: without a starter units are the exception
        raise Unavailable(f"nobody listens at {starter} (systemctl start l40s-start.socket); {reason}") from reason


async def answer_of(path: Path, asked: str) -> str:
    """Return what a Unix socket answers to all that it is asked, at most ``ANSWER_MAX_BYTES`` of it.

    Raises:
        OSError: Nobody listens there, or the connection broke.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(asked.encode("ascii"))
        writer.write_eof()
        answer = await reader.readexactly(ANSWER_MAX_BYTES)
    except asyncio.IncompleteReadError as ended:
        answer = ended.partial
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return answer.decode("utf-8", "replace")


async def reset_unit(instance: str) -> None:
    """Let systemd forget that an instance's unit failed; a unit that did not fail is no matter."""
    with contextlib.suppress(Unavailable):
        await systemctl("reset-failed", unit_of(instance))


async def kill_unit(instance: str) -> None:
    """Have systemd kill all of an instance's unit; one that never started is no matter."""
    with contextlib.suppress(Unavailable):
        await systemctl("kill", "--signal=SIGKILL", unit_of(instance))


async def systemctl(verb: str, *arguments: str, timeout_s: float = SYSTEMCTL_TIMEOUT_S) -> None:
    """Run one systemctl verb without waiting for its job.

    Raises:
        Unavailable: It failed.
        Late: It took longer than ``timeout_s``; it is killed.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            "systemctl", "--no-block", "--no-ask-password", verb, *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise Unavailable(f"systemctl: {error.strerror}") from error
    try:
        async with asyncio.timeout(timeout_s):
            _, said = await process.communicate()
    except TimeoutError as error:
        raise Late(f"systemctl {verb} took longer than {timeout_s:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise Unavailable(said.decode("utf-8", "replace").strip() or f"systemctl {verb}: {process.returncode}")
