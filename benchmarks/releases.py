"""This release beside an earlier one: requests, events, a start, an upgrade, `l40sctl status`.

python -m benchmarks.releases REVISION [--rounds 5] [--seconds 2]

REVISION is one of this repository's; its files are taken from the history. Both releases do the same in turn, on the
same machine, in the same minutes: other programs only ever add to a figure, so the best round of each counts, and the
ratio is what is to be read.
"""

import argparse
import http.client
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.proxy.__main__ import START_TIMEOUT_S, WORKERS, free_ports, running

HERE = Path(__file__).resolve().parents[1]
WORK = {"a request, us of CPU": ("requests", 64, 0), "an event, us of CPU": ("events", 200, 50)}
"""What the load does, on how many connections, and how many events a second come on each."""
COMMANDS = 5
CONFIG = """
[daemon]
pattern = "all"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
log_dir = "{folder}/log"
[proxy]
listen = ["127.0.0.1:0"]
[host]
inventory = "l40s-12-4+2"
[health]
startup_interval_s = 0.05
[models.toy]
engine = "simulated"
attention_heads = 64
[[patterns.all.replicas]]
model = "toy"
count = 12
"""


class Control(http.client.HTTPConnection):
    """The control socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("l40sd", timeout=10)
        self._path = path

    def connect(self) -> None:
        """Connect to the Unix socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))

    def ask(self, method: str, path: str) -> Any:
        """Return the answer; None while there is none."""
        try:
            self.request(method, path, headers={"content-length": "0"})
            return json.loads(self.getresponse().read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            self.close()


def files_of(revision: str, folder: Path) -> Path:
    """Return a folder with the package and the benchmarks of a revision."""
    archive = subprocess.check_output(["git", "-C", str(HERE), "archive", revision, "l40sd", "benchmarks"])
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def environ_of(tree: Path) -> dict[str, str]:
    """Return an environment in which Python finds this release."""
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": ""}


def cpu_us(tree: Path, work: str, seconds: float, cpus: tuple[int, int]) -> float:
    """Return the proxy's CPU microseconds an item; proxy and load each have a CPU of their own."""
    kind, connections, rate = WORK[work]
    port, *workers = free_ports(1 + WORKERS)
    addresses = [f"127.0.0.1:{worker}" for worker in workers]
    module = ["-m", "benchmarks.proxy.serve", "--listen", f"127.0.0.1:{port}", "--model", "m", "--workers", *addresses]
    proxy = ["env", "-C", str(tree), f"PYTHONPATH={tree}", sys.executable, *module]
    stub = [sys.executable, "-m", "benchmarks.proxy.stub", *map(str, workers)]
    with running(stub, workers[-1], cpus[1]), running(proxy, port, cpus[0]) as process:
        arguments = [kind, port, connections, rate, 1.0, seconds, process.pid]
        load = ["taskset", "-c", str(cpus[1]), sys.executable, "-m", "benchmarks.proxy.load", *map(str, arguments)]
        result = json.loads(subprocess.check_output(load, timeout=seconds + 60))
    return float(result["cpu_s"]) / float(result["items"]) * 1e6


def until(what: Callable[[], Any], timeout_s: float = START_TIMEOUT_S * 3) -> Any:
    """Return the first answer that is true.

    Raises:
        TimeoutError: There was none in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not (answer := what()):
        if time.monotonic() > deadline_s:
            raise TimeoutError("not in time")
        time.sleep(0.01)
    return answer


def a_daemon(tree: Path) -> dict[str, float]:
    """Return what a daemon with twelve simulated workers takes to start, to be upgraded and to be asked."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "l40sd.toml").write_text(CONFIG.format(folder=folder))
        log = folder / "daemon.log"
        program = [sys.executable, "-m", "l40sd", "--config", str(folder / "l40sd.toml")]
        began_s = time.monotonic()
        with log.open("wb") as out:
            daemon = subprocess.Popen(program, cwd=folder, env=environ_of(tree), stdout=out, stderr=out)
        try:
            control = Control(folder / "run" / "control.sock")
            until(lambda: are_ready(control.ask("GET", "/v1/status")))
            ready_s = time.monotonic() - began_s
            status_s = min(a_command(tree, folder) for _ in range(COMMANDS))
            control.ask("POST", "/v1/upgrade")
            until(lambda: log.read_text().count("event=daemon.ready") == 2)
            gap = re.findall(r"event=proxy\.taken_over.* paused_s=([\d.]+)", log.read_text())
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(60)
        return {
            "start to READY, s": ready_s,
            "an upgrade's gap, s": float(gap[-1]),
            "l40sctl status, s of CPU": status_s,
        }


def are_ready(status: Any) -> bool:
    """Whether every worker of a status is ready."""
    workers = (status or {}).get("workers", [])
    return len(workers) == WORKERS and all(worker["phase"] == "ready" for worker in workers)


def a_command(tree: Path, folder: Path) -> float:
    """Return the CPU seconds of one `l40sctl status`."""
    module = "l40sd.cli" if (tree / "l40sd" / "cli").is_dir() else "l40sd.l40sctl"
    argv = [sys.executable, "-m", module, "--socket", str(folder / "run" / "control.sock"), "status"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.check_output(argv, cwd=folder, env=environ_of(tree))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure in rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        trees = {options.revision: files_of(options.revision, Path(name)), "now": HERE}
        for _ in range(options.rounds):
            for which, tree in trees.items():
                found = {work: cpu_us(tree, work, options.seconds, (cpus[0], cpus[-1])) for work in WORK}
                for what, value in {**found, **a_daemon(tree)}.items():
                    figures.setdefault(what, {}).setdefault(which, []).append(value)
    write = sys.stdout.write
    write(f"{'best of ' + str(options.rounds):28} {options.revision[:12]:>12} {'now':>12} {'ratio':>7}\n")
    for what, by_release in figures.items():
        before, now = (min(values) for values in by_release.values())
        write(f"{what:28} {before:12.3f} {now:12.3f} {now / before:7.2f}\n")


if __name__ == "__main__":
    main()
