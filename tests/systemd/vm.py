"""A throw-away machine of its own: two sockets, a PCI tree and every cgroup controller, emulated by qemu.

    .venv/bin/python tests/systemd/vm.py [4+2|cascade]     a root shell in a fresh one; leaving it ends it

For what the container cannot have: a second NUMA node, PCIe switches, the pids and memory controllers whatever the
machine below binds them to, a clock and a loopback interface to spoil, and memory to run out of. All is emulated (a
stock kernel does not boot on every kind of KVM) and about ten times slower than the machine below. The disk stays as it
is: what is written goes to an overlay and is gone with the machine. It reaches nothing but its own loopback; its ssh is
a port on this machine's.
"""

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bootedhost import Host, as_user, until
from disk import Disk, build_disk, missing_vm_tools
from pcie import LAYOUTS, Layout, arguments

CPUS, MEMORY_MIB = 4, 2048
"""Half of each on either NUMA node."""
BOOT_TIMEOUT_S = 240.0
HALT_TIMEOUT_S = 20.0


class Machine(Host):
    """One booted virtual machine. Use as a context manager."""

    command_timeout_s = 180.0

    def __init__(self, disk: Disk, layout: Layout) -> None:
        self._disk = disk
        self._layout = layout
        self._folder = Path(tempfile.mkdtemp(prefix="l40sd-vm-"))
        self._console = self._folder / "console"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def argv(self, command: str, user: str) -> list[str]:
        """Return what to run on this machine so that a shell command runs inside."""
        return self.ssh(shlex.join(as_user(command, user)))

    def ssh(self, *words: str) -> list[str]:
        """Return ssh's command line; all commands share one connection, which saves them its handshake."""
        options = {
            "ConnectTimeout": "10",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "BatchMode": "yes",
            "ControlMaster": "auto",
            "ControlPath": str(self._folder / "ssh"),
            "ControlPersist": "600",
        }
        settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        key = ["-i", str(self._disk.key), "-p", str(self._port)]
        return ["ssh", "-q", "-F", "none", *key, *settings, "root@127.0.0.1", *words]

    @contextlib.contextmanager
    def background(self, command: str, *, user: str = "root") -> Iterator[subprocess.Popen[str]]:
        """Run a command inside, as a unit of its own, for as long as the context lasts."""
        unit = f"background-{secrets.token_hex(4)}"
        inside = ["systemd-run", "--quiet", "--pipe", "--collect", f"--unit={unit}", f"--uid={user}"]
        process = subprocess.Popen(
            self.ssh(shlex.join([*inside, *as_user(command, "root")])),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        with process:
            try:
                yield process
            finally:
                self.run(f"systemctl kill -s KILL {unit} 2>/dev/null", check=False)
                process.kill()

    def boot(self) -> None:
        overlay = self._folder / "overlay"
        subprocess.run(  # noqa: TID251 - the tests' thread has nothing else to do
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(self._disk.disk), str(overlay)],
            check=True, timeout=60,
        )  # fmt: skip
        self._port = _free_port()
        with (self._folder / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*self._hardware(overlay), *arguments(self._layout)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        until(self._is_up, f"the virtual machine is booted; its console: {self._console}", BOOT_TIMEOUT_S)

    def _hardware(self, overlay: Path) -> list[str]:
        half_cpus, half_mib = CPUS // 2, MEMORY_MIB // 2
        forward = f"hostfwd=tcp:127.0.0.1:{self._port}-:22"
        return [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35,usb=off,smbus=off", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-no-hpet"),
            *("-smp", f"{CPUS},sockets=2,cores={half_cpus},threads=1", "-m", str(MEMORY_MIB)),
            *("-object", f"memory-backend-ram,id=memory0,size={half_mib}M"),
            *("-object", f"memory-backend-ram,id=memory1,size={half_mib}M"),
            *("-numa", f"node,nodeid=0,cpus=0-{half_cpus - 1},memdev=memory0"),
            *("-numa", f"node,nodeid=1,cpus={half_cpus}-{CPUS - 1},memdev=memory1"),
            *("-numa", "dist,src=0,dst=1,val=21"),
            *("-kernel", str(self._disk.kernel), "-initrd", str(self._disk.initrd)),
            *("-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off panic=-1"),
            *("-drive", f"if=none,id=disk,file={overlay},format=qcow2,cache=unsafe,discard=unmap"),
            *("-device", "virtio-blk-pci,drive=disk,bus=pcie.0,addr=0x10"),
            *("-netdev", f"user,id=net,restrict=on,{forward}"),
            *("-device", "virtio-net-pci,netdev=net,bus=pcie.0,addr=0x11,romfile="),
            *("-device", "virtio-rng-pci,bus=pcie.0,addr=0x12"),
            *("-serial", f"file:{self._console}"),
        ]

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            said = (self._folder / "qemu.log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"qemu ended with {self._process.returncode}: {said}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            state = self.run("systemctl is-system-running", check=False, timeout_s=30).stdout.strip()
            return state in {"running", "degraded"}
        return False

    def end(self) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(  # noqa: TID251 - a clean end for the shared connection
                self.ssh("-O", "exit"), capture_output=True, timeout=10, check=False
            )
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(HALT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(HALT_TIMEOUT_S)
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main(argv: list[str]) -> None:
    """Boot one with l40sd installed, and give the caller a shell in it."""
    if reason := missing_vm_tools():
        raise SystemExit(reason)
    with Machine(build_disk(), LAYOUTS[argv[0] if argv else "4+2"]) as host:
        subprocess.call([*host.ssh("-t"), "bash", "-l"])


if __name__ == "__main__":
    main(sys.argv[1:])
