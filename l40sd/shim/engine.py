"""From a fork to the engine's first instruction."""

# pathlib would cost every shim 5 ms and 1 MB.
# ruff: noqa: PTH110

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
from typing import Any, NamedTuple, NoReturn

from l40sd.shim.files import write_text

PIPE_BYTES = 1 << 20
"""The engine's output waits here while the disk is slow: the most an unprivileged process may ask for."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE)
"""The shim ignores these: a terminal's end, and a reader's."""
OBEYED = (signal.SIGTERM, signal.SIGQUIT, signal.SIGCHLD)
"""The shim acts on these."""

libc = ctypes.CDLL(None)


class Engine(NamedTuple):
    """A child, not yet known to run: ``answer`` closes when its exec succeeds, and else says why it did not."""

    pid: int
    output: int
    answer: int


def fork(spec: dict[str, Any], marks: dict[str, str], group: str) -> Engine:
    """Fork the engine. Both descriptors are the reading ends of pipes, ``output``'s does not block.

    Args:
        marks: Added to the spec's environment.
        group: The instance's cgroup, or nothing.
    """
    output, output_write = os.pipe()
    os.set_blocking(output, False)
    with contextlib.suppress(OSError):  # over /proc/sys/fs/pipe-user-pages-soft: the small one will do
        fcntl.fcntl(output_write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    answer, answer_write = os.pipe()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid == 0:
        become(spec, marks, group, parent, output_write, answer_write)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.close(output_write)
    os.close(answer_write)
    return Engine(pid, output, answer)


def become(spec: dict[str, Any], marks: dict[str, str], group: str, parent: int, output: int, answer: int) -> NoReturn:
    """In the child: cgroup, session, signals, directory, exec. A failure goes down the pipe as JSON."""
    doing = "start a session"
    try:
        os.setsid()
        doing = f"join the cgroup {group}/engine"
        if group:
            write_text(f"{group}/engine/cgroup.procs", "0")
        with contextlib.suppress(OSError):
            write_text("/proc/self/oom_score_adj", "0")
        # A shim that dies alone takes its leader along; the daemon, or the next one, kills the rest.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(127)
        doing = f"enter the directory {spec['cwd']}"
        os.chdir(spec["cwd"])
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        for number in (*IGNORED, *OBEYED, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        argv = spec["argv"]
        doing = f"run {argv[0]}"
        os.execvpe(argv[0], argv, spec["env"] | marks)
    except (OSError, ValueError) as error:
        code = getattr(error, "errno", None)
        why = os.strerror(code) if code else str(error)
        if code == errno.ENOENT and doing.startswith("run /") and os.path.exists(doing[4:]):
            why = "its interpreter is missing"
        os.write(answer, f"cannot {doing}: {why}".encode("utf-8", "surrogateescape"))
    finally:
        os._exit(127)


def prctl(option: int, value: int) -> None:
    """Call prctl(2), which Python does not have; the two options used here cannot fail."""
    libc.prctl(option, *(ctypes.c_ulong(argument) for argument in (value, 0, 0, 0)))
