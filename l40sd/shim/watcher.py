# pathlib would cost every shim 5 ms and 1 MB.
# ruff: noqa: PTH100, PTH120
"""The shim's one loop: start the engine, pass its output on, and leave nobody behind.

    start ----exec fails----------------------------------------> exit.json (exec-failed)
      | run.json
    running --leader ends------------> kill stragglers ---------> exit.json (exited)
      |  SIGTERM: SIGTERM + SIGCONT to the engine
      |  or lease lost
      v
    stopping --leader ends, others live: SIGTERM + SIGCONT to them------+
      |                                                                 |
      |  term_timeout_s after the first signal: kill everything until   |  nobody is left
      v                                                                 v
      +-----------------------------------------------------------> exit.json (stopped, orphaned)
      |  SIGQUIT, from anywhere: the same at once ---------------> exit.json (killed)

One thread, one poll; nothing here waits for the daemon or for the disk's free space. An engine that cannot be
killed (state D: a lost GPU) keeps the shim alive and trying, so that "the shim is gone" means "all is gone".
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

from l40sd.shim import INSTANCE_VARIABLE, PROTOCOL, RUNTIME_VARIABLE, TERM_GROUP, cgroup, engine, files, leftovers, proc
from l40sd.shim.output import RotatingLog

READ_BYTES = 256 << 10
TICK_S = 1.0
"""Between two looks at the lease and two tries at a full disk."""
FIRST_RETRY_S, LAST_RETRY_S = 0.01, 1.0
"""Between two rounds of killing, doubling."""
SHIM_OOM_SCORE = -900


def main(argv: list[str]) -> int:
    """Run the instance described in ``argv[1]``/spec.json; 0 when its end is on record."""
    directory = os.path.abspath(argv[1])
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    for number in engine.IGNORED:
        signal.signal(number, signal.SIG_IGN)
    try:
        with open(f"{directory}/spec.json", "rb") as file:
            spec = json.load(file)
            began_s = os.fstat(file.fileno()).st_ctime
    except FileNotFoundError:
        return 0  # the daemon that wrote it has withdrawn it: see Processes.adopt
    with contextlib.suppress(OSError):
        files.write_text("/proc/self/comm", "l40sd-shim")
    with contextlib.suppress(OSError):  # lowering it needs CAP_SYS_RESOURCE
        files.write_text("/proc/self/oom_score_adj", str(SHIM_OOM_SCORE))
    return Watcher(directory, spec, began_s).run()


class Watcher:
    """One instance from its engine's fork to its exit record."""

    def __init__(self, directory: str, spec: dict[str, Any], began_s: float) -> None:
        """``began_s``: when this was asked for, as files have their times."""
        self.directory = directory
        self.spec = spec
        engine.prctl(engine.PR_SET_CHILD_SUBREAPER, 1)
        self.log = RotatingLog(spec["log"], spec["log_file_bytes"], spec["log_files"])
        self.group = cgroup.join(spec, self.log)
        self.started_s = time.monotonic()
        self.folder = ""  # the run's temporary one
        self.began_s = began_s
        self.signals: set[int] = set()
        self.poller = select.poll()
        self.readers: dict[int, Callable[[], None]] = {}
        self.status: int | None = None  # the leader's, as from wait(2)
        self.has_children = True
        self.cause = ""
        self.detail = ""
        self.is_killing = False
        self.rest_is_told = False
        self.term_deadline_s: float | None = None
        self.retry_s = FIRST_RETRY_S
        self.retry_at_s = 0.0
        self.tick_at_s = self.started_s
        self.tick_s = min(TICK_S, spec["orphan_grace_s"] / 4)
        self.free_since_s: float | None = None

    def run(self) -> int:
        """Start, watch, end; 0 when exit.json is written."""
        wake_read, wake_write = os.pipe()
        for descriptor in (wake_read, wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in engine.OBEYED:
            signal.signal(number, lambda number, _: self.signals.add(number))
        self.on_readable(wake_read, lambda: discard(wake_read))
        runtime_dir = os.path.dirname(os.path.dirname(self.directory))
        marks = {INSTANCE_VARIABLE: self.spec["instance"], RUNTIME_VARIABLE: runtime_dir}
        folder = self.spec.get("tmp", "")
        if folder and leftovers.make_folder(folder, self.began_s):
            self.folder = marks["TMPDIR"] = folder
        self.engine, self.output_fd, self.exec_fd = engine.fork(self.spec, marks, self.group)
        self.on_readable(self.output_fd, lambda: void(self.read_output()))
        self.on_readable(self.exec_fd, self.exec_answered)
        self.log.note(f"{self.spec['instance']} starts, pid {self.engine}, {wall_time_iso()}")
        while not self.is_over():
            for descriptor, _ in self.poller.poll(self.wait_s() * 1000):
                self.readers[descriptor]()
            self.reap()
            self.obey_signals()
            self.obey_clock()
        if self.exec_fd in self.readers:  # it ended within one round of the loop
            self.exec_answered()
        while self.output_fd in self.readers and self.read_output():
            pass  # all writers are dead: this ends with what is in the pipe
        leftovers.remove(self.folder, self.began_s)
        return self.write_exit()

    def on_readable(self, descriptor: int, do: Callable[[], None]) -> None:
        """Have the loop call ``do`` whenever there is something to read, or the other end is closed."""
        self.readers[descriptor] = do
        self.poller.register(descriptor, select.POLLIN)

    def wait_s(self) -> float:
        """Return how long nothing can be due."""
        due = [self.tick_at_s]
        if self.is_killing:
            due.append(self.retry_at_s)
        elif self.term_deadline_s is not None:
            due.append(self.term_deadline_s)
        return max(0.0, min(due) - time.monotonic())

    def exec_answered(self) -> None:
        """Exec closed the pipe: on record now. Or it said why not."""
        text = os.read(self.exec_fd, 4096).decode("utf-8", "replace")
        self.poller.unregister(self.exec_fd)
        del self.readers[self.exec_fd]
        if text:
            self.end("exec-failed", text)
            return
        record = {
            "protocol": PROTOCOL,
            "instance": self.spec["instance"],
            "shim": identity(os.getpid()),
            "engine": identity(self.engine),
            "boot_id": proc.boot_id(),
            "group": self.group,
            "started_at": wall_time_iso(),
        }
        try:
            self.write_record("run.json", record)
        except OSError as error:  # nobody could ever adopt it
            self.end("exec-failed", f"cannot write run.json: {error.strerror}")

    # Watching

    def read_output(self) -> bool:
        """Move what the engine said into its log; False when there is nothing more at the moment."""
        try:
            data = os.read(self.output_fd, READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self.log.write(data)
            return True
        self.poller.unregister(self.output_fd)
        del self.readers[self.output_fd]
        return False

    def reap(self) -> None:
        """Collect the leader's status, and orphans of its tree: as subreaper we are their parent now."""
        while self.has_children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.has_children = False
                return
            if pid == 0:
                return
            if pid == self.engine:
                self.status = status

    def obey_signals(self) -> None:
        """Do what the signals asked for that came since the last round."""
        signals, self.signals = self.signals, set()
        if signal.SIGTERM in signals:
            self.stop("stopped")
        if signal.SIGQUIT in signals and self.status is None:
            self.cause = "killed"
            self.is_killing = True

    def obey_clock(self) -> None:
        """Do what is due: look at the lease, climb the ladder."""
        now_s = time.monotonic()
        if now_s >= self.tick_at_s:
            self.tick_at_s = now_s + self.tick_s
            self.log.tick()
            self.check_lease(now_s)
        if self.term_deadline_s is not None and now_s >= self.term_deadline_s and not self.is_killing:
            self.detail = f"did not end within {self.spec['term_timeout_s']:g} s of SIGTERM, killed"
            self.is_killing = True

    def check_lease(self, now_s: float) -> None:
        """Stop the engine when no daemon has held the lock for ``orphan_grace_s`` on end."""
        if not lock_is_free(self.spec["lock"]):
            self.free_since_s = None
        elif self.free_since_s is None:
            self.free_since_s = now_s
        elif now_s - self.free_since_s >= self.spec["orphan_grace_s"]:
            self.stop("orphaned", f"no daemon for {self.spec['orphan_grace_s']:g} s")

    # Ending

    def stop(self, cause: str, detail: str = "") -> None:
        """First rung of the ladder; a second call changes nothing."""
        if self.cause or self.status is not None:
            return
        self.cause, self.detail = cause, detail
        self.term_deadline_s = time.monotonic() + self.spec["term_timeout_s"]
        self.log.note(f"stopping: {detail or 'asked to'}")
        # The leader is our child and not reaped yet, so its pid, which is its process group's id, is its own.
        leader = proc.read_process(self.engine)
        assert leader is not None
        if self.term_to() == TERM_GROUP:
            try:
                os.killpg(self.engine, signal.SIGTERM)
            except ProcessLookupError:  # it has not come to its setsid yet
                os.kill(self.engine, signal.SIGTERM)
            tell_all([leader], signal.SIGCONT)
        else:
            tell_all(proc.engine_of(leader), signal.SIGTERM, signal.SIGCONT)
        with contextlib.suppress(ProcessLookupError):  # a stopped process would not see it, nor end with the others
            os.killpg(self.engine, signal.SIGCONT)

    def term_to(self) -> object:
        """Return who is to be told: as the daemon said for this stop, else as the spec says."""
        with (
            contextlib.suppress(OSError, ValueError, AttributeError),
            open(f"{self.directory}/stop.json", "rb") as file,
        ):
            return json.load(file).get("term_to")
        return self.spec.get("term_to")

    def tell_the_rest(self) -> None:
        """Second rung, once: the leader is gone, and those that it left may put things in order as well."""
        if not self.rest_is_told:
            self.rest_is_told = True
            tell_all(proc.descendants(os.getpid()), signal.SIGTERM, signal.SIGCONT)

    def end(self, cause: str, detail: str) -> None:
        """Skip the ladder: it never got to run properly."""
        self.cause, self.detail = cause, detail
        self.is_killing = True

    def is_over(self) -> bool:
        """Whether nobody is left; once somebody should not be any more, tell or kill them."""
        if self.status is None and not self.is_killing:
            return False
        if not self.has_children and not (self.group and cgroup.is_populated(f"{self.group}/engine")):
            return True
        if self.term_deadline_s is not None and not self.is_killing:
            self.tell_the_rest()
            return False
        self.is_killing = True
        self.kill_all()
        return False

    def kill_all(self) -> None:
        """Last rung, again and again until nobody is left."""
        now_s = time.monotonic()
        if now_s < self.retry_at_s:
            return
        self.retry_at_s = now_s + self.retry_s
        self.retry_s = min(LAST_RETRY_S, 2 * self.retry_s)
        if self.group:
            cgroup.kill(f"{self.group}/engine")
        if self.has_children:
            proc.kill_all(lambda: proc.descendants(os.getpid()))

    def write_exit(self) -> int:
        """Say how it ended; the disk gets a few tries, a directory that is gone needs no record."""
        assert self.status is not None
        code = os.WEXITSTATUS(self.status) if os.WIFEXITED(self.status) else None
        number = os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else None
        oom = cgroup.was_oom_killed(self.group)
        how = f"exit code {code}" if number is None else f"killed by {signal.Signals(number).name}"
        record = {
            "protocol": PROTOCOL,
            "instance": self.spec["instance"],
            "code": code,
            "signal": number,
            "oom": oom,
            "cause": self.cause or "exited",
            "detail": self.detail or ("out of memory: " if oom else "") + how,
            "ended_at": wall_time_iso(),
            "ran_s": round(time.monotonic() - self.started_s, 3),
        }
        self.log.tick()
        self.log.note(f"{self.spec['instance']} ended: {record['cause']}, {record['detail']}, {record['ended_at']}")
        for _ in range(10):
            try:
                self.write_record("exit.json", record)
            except FileNotFoundError:
                return 1
            except OSError:
                time.sleep(TICK_S)
            else:
                return 0
        return 1

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Write run.json or exit.json, whole or not at all. Raises OSError."""
        files.write_file(f"{self.directory}/{name}", json.dumps(record).encode("ascii"))


def lock_is_free(path: str) -> bool:
    """Whether no process holds the open-file-description lock on this file; a missing file is held by nobody."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    finally:
        os.close(descriptor)
    return bool(struct.unpack_from("h", answer)[0] == fcntl.F_UNLCK)


def tell_all(processes: list[proc.Process], *numbers: int) -> None:
    """Send each of these signals to each of these processes."""
    for number in numbers:
        for process in processes:
            proc.send_signal(process, number)


def identity(pid: int) -> dict[str, int]:
    """Return a pid with its start time; 0 for one that is gone already."""
    process = proc.read_process(pid)
    return {"pid": pid, "start_ticks": process.start_ticks if process else 0}


def discard(descriptor: int) -> None:
    """Empty the signal pipe."""
    with contextlib.suppress(BlockingIOError):
        while os.read(descriptor, 4096):
            pass


def void(_: object) -> None:
    """Drop a result."""


def wall_time_iso() -> str:
    """Return the date and time with the local offset; no datetime, which costs 0.5 MB and 2 ms here."""
    text = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return f"{text[:-2]}:{text[-2:]}"
