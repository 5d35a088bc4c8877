"""What systemd tells us and what we tell it; everything here does nothing where it is not there.

Source: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3), systemd.service(5) on notify-reload.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import MutableMapping
from pathlib import Path

FIRST_LISTEN_FD = 3
JOB_TIMEOUT_S = 2.0


class Notifier:
    """Messages to the service manager, through $NOTIFY_SOCKET."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        self._environ = environ
        self._path = environ.get("NOTIFY_SOCKET", "")

    @property
    def is_active(self) -> bool:
        """Whether anybody listens."""
        return bool(self._path)

    @property
    def watchdog_interval_s(self) -> float | None:
        """How often ``watchdog`` is to be called: half of what systemd allows; None: it does not watch."""
        allowed_us = self._environ.get("WATCHDOG_USEC", "")
        pid = self._environ.get("WATCHDOG_PID", "")
        if not allowed_us.isdigit() or (pid and pid != str(os.getpid())):
            return None
        return int(allowed_us) / 2e6

    def ready(self, status: str = "") -> bool:
        """Started, or reloaded."""
        return self.send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> bool:
        """Set one line for `systemctl status`."""
        return self.send(f"STATUS={text}")

    def reloading(self, status: str = "") -> bool:
        """Begin a reload; ``ready`` ends it. The time stamp is what Type=notify-reload asks for."""
        return self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", f"STATUS={status}")

    def stopping(self, status: str = "") -> bool:
        """Begin to stop."""
        return self.send("STOPPING=1", f"STATUS={status}")

    def watchdog(self) -> bool:
        """Say that the loop turns."""
        return self.send("WATCHDOG=1")

    def extend_timeout(self, more_s: float) -> bool:
        """Ask for so many seconds from now, for a start or a stop that makes progress."""
        return self.send(f"EXTEND_TIMEOUT_USEC={round(more_s * 1e6)}")

    def send(self, *lines: str) -> bool:
        """Send the lines as one message, without waiting; False when nobody took it."""
        if not self._path:
            return False
        address = f"\0{self._path[1:]}" if self._path.startswith("@") else self._path
        message = "\n".join(line.replace("\n", " ") for line in lines)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            try:
                sender.sendto(message.encode("utf-8", "replace"), address)
            except OSError:
                return False
        return True


def listen_sockets(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[socket.socket]]:
    """Return the sockets that systemd opened for us, by FileDescriptorName; none when there are none.

    Takes the three variables out of ``environ``: the descriptors are ours alone, and close on exec.
    """
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, list[socket.socket]] = {}
    named = names.split(":") if names else []
    for number in range(int(count)):
        descriptor = FIRST_LISTEN_FD + number
        os.set_inheritable(descriptor, False)
        listener = socket.socket(fileno=descriptor)
        listener.setblocking(False)
        found.setdefault(named[number] if number < len(named) else "unknown", []).append(listener)
    return found


def own_unit(cgroup_text: str | None = None) -> str | None:
    """Return the name of the service this process belongs to; None outside of one.

    Args:
        cgroup_text: As in /proc/self/cgroup; by default that.
    """
    text = Path("/proc/self/cgroup").read_text(encoding="utf-8") if cgroup_text is None else cgroup_text
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" or controllers == "name=systemd":
            for part in reversed(path.split("/")):
                if part.endswith(".service"):
                    return part
    return None


async def stop_reason(*, timeout_s: float = JOB_TIMEOUT_S) -> str | None:
    """Return what systemd is doing with our unit at a SIGTERM: ``"restart"``, ``"stop"`` or None: not its doing.

    The workers stay over a restart and end with a stop. None also when systemctl does not answer in time.
    """
    unit = own_unit()
    if unit is None or "INVOCATION_ID" not in os.environ:
        return None
    jobs = await _output("systemctl", "list-jobs", "--no-legend", "--plain", "--no-pager", timeout_s=timeout_s)
    return job_of(unit, jobs)


async def unit_facts(unit: str, *, timeout_s: float = JOB_TIMEOUT_S) -> dict[str, str]:
    """Return what systemd knows of a unit, e.g. ``ActiveState``, ``Result``; nothing where it does not answer."""
    wanted = "--property=LoadState,ActiveState,SubState,Result,ExecMainStatus,NRestarts"
    text = await _output("systemctl", "show", "--no-pager", wanted, unit, timeout_s=timeout_s)
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


async def last_error(unit: str, *, timeout_s: float = JOB_TIMEOUT_S) -> str:
    """Return the latest error in a unit's journal, with its date; empty where there is none to read."""
    lines = ("--priority=err", "--lines=1", "--output=short-iso", "--quiet", "--no-pager", "--no-hostname")
    return (await _output("journalctl", f"--unit={unit}", *lines, timeout_s=timeout_s)).strip()


async def _output(*command: str, timeout_s: float) -> str:
    """Return what a command prints; what it has printed when it does not end in time, nothing when it is not there."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return ""
    text = b""
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                text, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return text.decode("utf-8", "replace")


def job_of(unit: str, jobs: str) -> str | None:
    """Return restart, stop or None from the lines of `systemctl list-jobs`: number, unit, type, state."""
    for line in jobs.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[1] == unit and fields[2] in ("restart", "stop"):
            return fields[2]
    return None
