"""What the tests do with a throw-away host that has systemd as PID 1, whatever that host is made of."""

import shlex
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLEAN = ("env", "-i", f"PATH={PATH}", "LANG=C.UTF-8", "TERM=dumb", "SYSTEMD_PAGER=", "HOME=/root")
"""The environment of every command inside: nothing of this machine's."""
_POLL_S = 0.02


def until(claim: Callable[[], object], what: str, timeout_s: float = 20.0) -> object:
    """Wait until ``claim`` is true and return what it returned.

    Raises:
        TimeoutError: It was not within ``timeout_s`` seconds; names ``what``.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := claim()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_s:g} s still not: {what}")
        time.sleep(_POLL_S)
    return found


def as_user(command: str, user: str) -> list[str]:
    """Return the command line that runs a shell command inside as this user."""
    become = [] if user == "root" else ["runuser", "-u", user, "--"]
    return [*CLEAN, *become, "sh", "-c", command]


class Host(ABC):
    """One that is booted while the context lasts; its kinds say how, and how a command is run inside."""

    command_timeout_s = 60.0

    @abstractmethod
    def boot(self) -> None:
        """Return once it is up."""

    @abstractmethod
    def end(self) -> None:
        """Leave nothing of it behind, also of one that did not come up."""

    def __enter__(self) -> Self:
        try:
            self.boot()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @abstractmethod
    def argv(self, command: str, user: str) -> list[str]:
        """Return what to run on this machine so that a shell command runs inside."""

    def run(
        self, command: str, *, user: str = "root", check: bool = True, timeout_s: float = 0.0, given: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command inside and return its exit status and output.

        Args:
            timeout_s: 0: what is usual for this kind of host.

        Raises:
            AssertionError: ``check`` is set and it did not exit with 0; shows the output and the journal's end.
        """
        done = subprocess.run(  # noqa: TID251 - the tests' thread has nothing else to do
            self.argv(command, user), input=given, capture_output=True, text=True,
            timeout=timeout_s or self.command_timeout_s, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(
                f"{command!r} exited with {done.returncode}\n{done.stdout}{done.stderr}\n{self.journal(30)}"
            )
        return done

    def output(self, command: str, *, user: str = "root", timeout_s: float = 0.0) -> str:
        """Return what a command prints, without the white space around it; it must succeed."""
        return self.run(command, user=user, timeout_s=timeout_s).stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Write a file inside, and the folders above it."""
        self.run(f"mkdir -p $(dirname {path}) && cat > {path}", given=text)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return a unit's properties as systemd has them."""
        text = self.output(f"systemctl show {shlex.quote(unit)} -p {','.join(properties)}")
        return dict(line.partition("=")[::2] for line in text.splitlines())

    def journal(self, lines: int, unit: str = "") -> str:
        """Return the end of the journal, whole or of one unit."""
        chosen = f"-u {shlex.quote(unit)}" if unit else ""
        return self.run(f"journalctl --no-pager -o short-monotonic -n {lines} {chosen}", check=False).stdout
