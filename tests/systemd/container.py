"""A throw-away host: the image booted by systemd-nspawn with systemd as PID 1, in about a second.

    .venv/bin/python tests/systemd/container.py          a root shell in a fresh one; leaving it ends it

The image stays as it is: what is written goes to memory and is gone with the container. It has no network but its
own loopback. What it cannot have is what the machine below does not lend: a second NUMA node, GPUs, and the memory
and pids controllers where that machine binds them to cgroup v1.
"""

import contextlib
import os
import pwd
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from bootedhost import PATH, Host, as_user, until
from image import REPOSITORY, Image, build, hierarchies, missing_tools

BOOT_TIMEOUT_S = 60.0
HALT_TIMEOUT_S = 20.0
_SIGRTMIN_PLUS_3 = signal.SIGRTMIN + 3  # systemd's "halt"


class Container(Host):
    """One booted container. Use as a context manager.

    Args:
        image: What to boot.
        binds: Paths inside -> folders of this machine shown there read-only.
    """

    def __init__(self, image: Image, binds: Mapping[str, Path] | None = None) -> None:
        self.name = f"l40sd-test-{secrets.token_hex(4)}"
        self._image = image
        self._binds = dict(binds or {})
        self._log = Path(tempfile.mkstemp(prefix=f"{self.name}-", suffix=".log")[1])
        self._cgroups = tuple(mount / self.name for _, mount in hierarchies())
        self._process: subprocess.Popen[bytes] | None = None
        self.leader = 0

    @contextlib.contextmanager
    def background(self, command: str, *, user: str = "root") -> Iterator[subprocess.Popen[str]]:
        """Run a command inside for as long as the context lasts; its standard input ends with it."""
        process = subprocess.Popen(
            self.argv(command, user), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        with process:
            try:
                yield process
            finally:
                # nsenter waits for a child of its own, which is in the other pid namespace: end that one.
                for child in _children(process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                process.kill()

    def argv(self, command: str, user: str) -> list[str]:
        """Return what to run on this machine so that a shell command runs inside."""
        return ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-C", *as_user(command, user)]

    def boot(self) -> None:
        binds = [f"--bind-ro={outside}:{inside}" for inside, outside in self._binds.items()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["systemd-nspawn", "--quiet", f"--directory={self._image.root}", "--volatile=overlay", "--boot",
                 "--register=no", "--keep-unit", "--private-network", f"--machine={self.name}", "--console=pipe",
                 f"--kill-signal={_SIGRTMIN_PLUS_3}", *binds],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={"PATH": os.environ["PATH"], "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                preexec_fn=self._enter_cgroups,
            )  # fmt: skip
        until(self._find_leader, f"{self.name} has a PID 1, see {self._log}", BOOT_TIMEOUT_S)
        until(self._is_up, f"{self.name} is booted, see {self._log}", BOOT_TIMEOUT_S)

    def _enter_cgroups(self) -> None:
        # nspawn builds the container's cgroups below the one it is in, and moves itself about in there. In a cgroup of
        # our own that disturbs nobody; in the root, or in a service's, it would rearrange the machine. A machine with
        # both kinds of cgroup has systemd's processes in two trees at once, and nspawn works in both.
        for cgroup in self._cgroups:
            cgroup.mkdir(exist_ok=True)
            (cgroup / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def _find_leader(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"systemd-nspawn ended: {self._log.read_text(encoding='utf-8', errors='replace')}")
        nspawn = self._process.pid
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in _children(nspawn):
                status = Path(f"/proc/{child}/status").read_text(encoding="utf-8")
                inner = next((line.split() for line in status.splitlines() if line.startswith("NSpid:")), [])
                if inner[-1:] == ["1"] and status.startswith("Name:\tsystemd\n"):
                    self.leader = child
                    return True
        return False

    def _is_up(self) -> bool:
        state = self.run("systemctl is-system-running", check=False).stdout.strip()
        return state in {"running", "degraded"}

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(HALT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(HALT_TIMEOUT_S)
        for cgroup in self._cgroups:
            _remove_cgroup(cgroup)
        with contextlib.suppress(OSError):
            Path(f"/run/systemd/nspawn/propagate/{self.name}").rmdir()
        self._log.unlink(missing_ok=True)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _remove_cgroup(top: Path) -> None:
    if not top.is_dir():
        return
    with contextlib.suppress(OSError):
        (top / "cgroup.kill").write_text("1", encoding="ascii")

    def is_gone() -> bool:
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        return not top.exists()

    with contextlib.suppress(TimeoutError):
        until(is_gone, f"{top} is removed", HALT_TIMEOUT_S)


def main() -> None:
    """Boot one with the checkout at /src and the wheels at /wheels, and give the caller a shell in it."""
    if reason := missing_tools():
        raise SystemExit(reason)
    image = build()
    with Container(image, {"/src": REPOSITORY, "/wheels": image.wheels}) as host:
        shell = ["nsenter", "-t", str(host.leader), "-m", "-u", "-i", "-n", "-p", "-C", "bash", "-l"]
        subprocess.call(
            shell, env={"PATH": PATH, "HOME": pwd.getpwuid(0).pw_dir, "TERM": os.environ.get("TERM", "dumb")}
        )


if __name__ == "__main__":
    sys.exit(main())
