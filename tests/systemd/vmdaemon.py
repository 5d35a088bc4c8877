"""l40sd in the virtual machine: installed by scripts/install, run by systemd as user l40sd, on the PCI tree there.

Only NVML is not real: the stand-in of tests/kit/fake_nvml.py has a GPU at the address of each `edu` device. So the
inventory is a live one, its links, NUMA nodes and CPUs are what /sys says there, and workers are pinned for real.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bootedhost import until
from pcie import STAND_IN
from vm import Machine

FAKE_NVML = Path(__file__).resolve().parents[1] / "kit" / "fake_nvml.py"
NO_POLKIT_RULES = Path(__file__).resolve().parents[2] / "systemd/l40sd.service.d/no-polkit-rules.conf"
GPU_BYTES = 48 << 30
PIDS_LIMIT, BACKOFF_FIRST_S, SPAWN_TIMEOUT_S = 150, 5.0, 60.0
SILENCE_LIMIT_S = 25.0
"""Longer than any of the timeouts below takes to find a silent worker hung."""
CONFIG = f"""\
[daemon]
pattern = "few"
orphan_grace_s = 300
stop_timeout_s = 60

[host]
nvml_timeout_s = 30

[workers]
spawn_timeout_s = {SPAWN_TIMEOUT_S}
drain_timeout_s = 5
term_timeout_s = 10
kill_timeout_s = 30
backoff_first_s = {BACKOFF_FIRST_S}
quarantine_per_hour = 100
pids_limit = {PIDS_LIMIT}

[health]
probe_interval_s = 1
probe_timeout_s = 5
stall_timeout_s = 10
canary_interval_s = 2
canary_timeout_s = {{canary_timeout_s}}

[models.toy]
engine = "simulated"
attention_heads = 64

[[patterns.few.replicas]]
model = "toy"
"""
"""``count`` and ``tp`` of its pattern are still to come."""
DROP_IN = """\
[Service]
Environment=L40SD_NVML_LIBRARY=/opt/test/fake_nvml.py FAKE_NVML=/opt/test/nvml.json
"""
READY_TIMEOUT_S = 180.0
Worker = Mapping[str, Any]


class Daemon:
    """The daemon of one machine, asked through its control socket: there curl starts a hundred times faster than
    l40sctl.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.count = 0  # of workers; 0: not configured yet

    def configure(
        self, *, gpus: Iterable[int] = range(12), count: int = 2, tp: int = 4, canary_timeout_s: float = 8
    ) -> None:
        """Give it these of the GPUs and a pattern of ``count`` workers; by default one on each socket.

        What is wanted is kept on disk, so the state of an earlier configuration goes.
        """
        machine = self.machine
        machine.run("systemctl stop l40sd && rm -rf /var/lib/l40sd/*")
        devices = self.devices()
        known = [{"uuid": f"GPU-{n:08d}", "busId": f"0000{devices[n]}", "total": GPU_BYTES} for n in gpus]
        machine.write("/opt/test/fake_nvml.py", FAKE_NVML.read_text(encoding="utf-8"))
        machine.write("/opt/test/nvml.json", json.dumps({"gpus": known}))
        machine.write("/opt/test/no-polkit-rules.conf", NO_POLKIT_RULES.read_text(encoding="utf-8"))
        machine.write(
            "/etc/l40sd/l40sd.toml", f"{CONFIG.format(canary_timeout_s=canary_timeout_s)}count = {count}\ntp = {tp}\n"
        )
        machine.write("/run/systemd/system/l40sd.service.d/fake-nvml.conf", DROP_IN)
        machine.run("systemctl daemon-reload")
        self.count = count

    def serve(self) -> dict[str, Worker]:
        """Have it run with all workers ready, and return these; what runs already is left alone.

        Failures of what was injected before are forgotten: they would count in what is injected next.
        """
        if self.count == 0:
            self.configure()
        self.machine.run("systemctl start l40sd")
        for worker in self.until_ready():
            self.post(f"/v1/workers/{worker}/reset")
        return self.workers()

    def until_ready(self) -> dict[str, Worker]:
        """Wait until all workers are ready and return them."""
        try:
            until(self._is_ready, "all workers are ready", READY_TIMEOUT_S)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.machine.journal(60)}") from error
        return self.workers()

    def _is_ready(self) -> bool:
        asked = self.machine.run(self._curl("/v1/status"), check=False)
        if asked.returncode != 0:
            return False
        workers = json.loads(asked.stdout)["workers"]
        return len(workers) == self.count and all(worker["phase"] == "ready" for worker in workers)

    def devices(self) -> list[str]:
        """Return the PCI addresses of the stand-ins, in order."""
        vendor, device = STAND_IN
        here = "/sys/bus/pci/devices"
        return self.machine.output(
            f"cd {here}; for d in *; do grep -q {vendor} $d/vendor && grep -q {device} $d/device && echo $d; done; true"
        ).split()

    def get(self, path: str) -> Any:
        return json.loads(self.machine.output(self._curl(path)))

    def post(self, path: str) -> None:
        self.machine.run(f"{self._curl(path)} -X POST")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/v1/status")
        return found

    def workers(self) -> dict[str, Worker]:
        return {worker["id"]: worker for worker in self.status()["workers"]}

    def pids(self) -> dict[str, int]:
        return {name: worker["pid"] for name, worker in self.workers().items()}

    def pid(self) -> int:
        return int(self.machine.show("l40sd.service", "MainPID")["MainPID"])

    def shims(self) -> list[int]:
        return [int(pid) for pid in self.machine.output("pgrep -u l40sd -f 'l40sd[.]shim' || true").split()]

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        """Return what has happened after this one."""
        lines = self.machine.output(self._curl(f"/v1/events?since={since}")).splitlines()
        return [event for event in map(json.loads, lines) if event["seq"] > since]

    def mark(self) -> int:
        """Return this moment: the number of the last event."""
        return max((event["seq"] for event in self.events()), default=0)

    def told(self, mark: int, name: str, worker: str, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """Wait for the first event of this name and worker after a moment, and return its keys."""

        def look() -> list[dict[str, Any]]:
            events = self.events(mark)
            return [e["data"] for e in events if e["event"] == name and e["data"].get("worker") == worker]

        try:
            found = until(look, f"event {name} {worker}", timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}; there were {self.events(mark)}\n{self.machine.journal(30)}") from error
        assert isinstance(found, list)
        keys: dict[str, Any] = found[0]
        return keys

    def answers(self) -> bool:
        """Whether a request through the proxy gets its whole answer."""
        body = json.dumps({"model": "toy", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]})
        asked = self.machine.run(
            "curl -sS -m 60 http://127.0.0.1:8080/v1/chat/completions -H content-type:application/json -d @-",
            given=body, check=False,
        )  # fmt: skip
        return asked.returncode == 0 and '"finish_reason"' in asked.stdout

    def inject(self, worker: Worker, name: str, number: float) -> None:
        """Put a fault of the simulated engine in force; an engine that dies of it does not answer."""
        self.machine.run(
            f"curl -sS -m 120 http://{worker['address']}/sim/fault -d @-", given=json.dumps({name: number}), check=False
        )

    def group(self, worker: Worker) -> str:
        """Return the cgroup of a worker's engine."""
        line = self.machine.output(f"cat /proc/{worker['pid']}/cgroup")
        return f"/sys/fs/cgroup{line.removeprefix('0::')}"

    def _curl(self, path: str) -> str:
        return f"curl -sSf -m 60 --unix-socket /run/l40sd/control.sock 'http://l40sd{path}'"
