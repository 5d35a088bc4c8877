"""A shim's first moments: how it is spawned, and the errors when nothing comes of it."""

import os
import signal
import sys
from pathlib import Path

import l40sd
from l40sd.errors import L40sError
from l40sd.shim import INSTANCE_VARIABLE, RUNTIME_VARIABLE, proc
from l40sd.workers.process.records import Identity, InstanceSpec

SIGNALS_RESET = (signal.SIGPIPE, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGXFSZ)


def start_shim(directory: Path, instance: str, runtime_dir: Path) -> int:
    """Spawn a shim in a session of its own and return its pid. Takes about 1 ms.

    Not with asyncio's subprocess: from 3.12 on its teardown kills the child. No site packages: half the time
    to start.
    """
    env = {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": str(Path(l40sd.__file__).parent.parent),
        "TZ": os.environ.get("TZ", ""),
        INSTANCE_VARIABLE: instance,
        RUNTIME_VARIABLE: str(runtime_dir),
    }
    if not env["TZ"]:
        del env["TZ"]
    shim_log = str(directory / "shim.log")
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-P", "-S", "-m", "l40sd.shim", str(directory)],
        env,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, shim_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=SIGNALS_RESET,
    )


def identity_of(pid: int) -> Identity:
    """Return a child of ours, zombie or not, with its start time."""
    process = proc.read_process(pid)
    assert process is not None, "nobody but us reaps it"
    return Identity(pid=pid, start_ticks=process.start_ticks)


def has_ended(pid: int) -> bool:
    """Whether a child of ours is a zombie; it stays one."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def exec_failed(spec: InstanceSpec, detail: str) -> L40sError:
    """Return the error for a program that cannot be run: starting it again would not help."""
    return L40sError(
        detail, where=spec.worker, hint="check the engine's command and the paths in it", code="exec_failed"
    )


def spawn_failed(spec: InstanceSpec, why: str) -> L40sError:
    """Return the error for a shim that did not come up."""
    return L40sError(f"{spec.instance} could not be started: {why}", where=spec.worker, code="spawn_failed")
