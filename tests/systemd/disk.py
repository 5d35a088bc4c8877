"""Builds what the virtual machine boots: Debian with a kernel, and a disk of it with l40sd installed.

    python tests/systemd/disk.py             build it, say where it is

Kept in ``.cache/systemd`` as the container's image is, which see.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from image import (
    BUILD_TIMEOUT_S,
    CACHE,
    CUSTOMIZE,
    INSTALLED,
    PACKAGES,
    REPOSITORY,
    copy_source,
    debootstrap,
    logged,
    once,
    os_release,
    suite_and_sources,
    wheels_for,
)

VM_PACKAGES = f"{PACKAGES},udev,kmod,initramfs-tools,iproute2,openssh-server,linux-image-cloud-amd64"
VM_DISK_BYTES = 3 << 30  # sparse

# What only a machine of its own needs. A list of modules keeps the initrd small: emulated, every megabyte is a second.
# The network is what qemu gives, at qemu's address, without asking for it; the name server there answers nobody.
_VM_MODULES = "virtio_pci virtio_blk virtio_net virtio_rng ext4 crc32c_generic"
_VM_EARLY = """mkdir -p "$1/etc/initramfs-tools/conf.d"; echo MODULES=list > "$1/etc/initramfs-tools/conf.d/test" """
_VM_CUSTOMIZE = f"""{CUSTOMIZE}
printf '%s\\n' {_VM_MODULES} >> "$1/etc/initramfs-tools/modules"
printf '/dev/vda / ext4 rw,noatime 0 1\\n' > "$1/etc/fstab"
printf 'nameserver 10.0.2.3\\n' > "$1/etc/resolv.conf"
mkdir -p "$1/etc/systemd/network" "$1/var/log/journal"
printf '[Match]\\nName=eth0\\n[Network]\\nAddress=10.0.2.15/24\\nLinkLocalAddressing=no\\nIPv6AcceptRA=no\\n' \
    > "$1/etc/systemd/network/10-eth0.network"
printf 'UseDNS no\\nUsePAM no\\nMaxStartups 100\\n' > "$1/etc/ssh/sshd_config.d/test.conf"
chroot "$1" passwd -d root
chroot "$1" systemctl enable systemd-networkd ssh
chroot "$1" update-initramfs -u
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """What the virtual machine boots: kernel, initrd, and a disk with l40sd installed; the key opens its ssh."""

    kernel: Path
    initrd: Path
    disk: Path
    key: Path


def missing_vm_tools() -> str:
    """Return why the virtual machine cannot be built or run here, in one sentence; empty when it can."""
    if os.geteuid() != 0:
        return "the virtual machine's disk can only be built as root"
    if os.uname().machine != "x86_64" or os_release("ID") != "debian":
        return "the virtual machine is built from Debian's own packages, on Debian, x86_64"
    programs = {
        "qemu-system-x86_64": "qemu-system-x86",
        "qemu-img": "qemu-utils",
        "mmdebstrap": "mmdebstrap",
        "mkfs.ext4": "e2fsprogs",
        "ssh": "openssh-client",
        "lz4": "lz4",
    }
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        packages = " ".join(programs[program] for program in absent)
        return f"{', '.join(absent)} not found: apt-get install --no-install-recommends {packages}"
    return ""


def build_disk() -> Disk:
    """Return what the virtual machine boots, built if it is not there yet.

    The system takes about 90 s and is made once. The disk with l40sd on it takes 20 s and is made again whenever
    something that is installed has changed; the one before is removed.

    Raises:
        RuntimeError: mmdebstrap, pip, scripts/install or mkfs failed; the message ends with the last lines of its log.
    """
    suite, sources = suite_and_sources()
    system = once(
        f"vm-{suite}",
        (VM_PACKAGES, _VM_EARLY, _VM_CUSTOMIZE, sources),
        lambda target, log: _make_system(suite, sources, target, log),
    )
    wheels = wheels_for(suite)
    installed = [path for part in INSTALLED for path in sorted((REPOSITORY / part).rglob("*"))]
    installed.append(REPOSITORY / "pyproject.toml")
    recipe = [str(system), str(wheels), str(VM_DISK_BYTES)]
    recipe += [f"{path}\n{path.read_bytes().hex()}" for path in installed if path.is_file() and path.suffix != ".pyc"]
    disk = once(f"vmdisk-{suite}", recipe, lambda target, log: _make_disk(system, wheels, target, log))
    for other in CACHE.glob(f"vmdisk-{suite}-{'[0-9a-f]' * 12}"):  # whole ones, not what another run is making
        if other != disk:
            shutil.rmtree(other, ignore_errors=True)
    return Disk(kernel=system / "vmlinux", initrd=system / "initrd", disk=disk / "disk", key=system / "key")


def _make_system(suite: str, sources: str, target: Path, log: Path) -> None:
    root = target / "root"
    debootstrap(suite, sources, VM_PACKAGES, _VM_CUSTOMIZE, root, log, f"--essential-hook={_VM_EARLY}")
    logged(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "l40sd-test", "-f", str(target / "key")], log)
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(target / "key.pub", root / "root/.ssh/authorized_keys")
    shutil.copy(next((root / "boot").glob("initrd.img-*")), target / "initrd")
    (target / "vmlinux").write_bytes(_unpacked(next((root / "boot").glob("vmlinuz-*")).read_bytes()))


def _unpacked(kernel: bytes) -> bytes:
    """Return a kernel without its compression, which an emulated CPU takes 3 s for; as it is where that is not LZ4."""
    start = kernel.find(b"\x02\x21\x4c\x18")
    if start < 0:
        return kernel
    unpacked = subprocess.run(  # noqa: TID251 - a build step; complains of what follows the kernel in the file
        ["lz4", "-dc"], input=kernel[start:], capture_output=True, timeout=BUILD_TIMEOUT_S, check=False
    ).stdout
    return unpacked if unpacked.startswith(b"\x7fELF") else kernel


def _make_disk(system: Path, wheels: Path, target: Path, log: Path) -> None:
    """Install l40sd by scripts/install in a copy of the system, at this machine's speed, and make a disk of it."""
    root = target / "root"
    logged(["cp", "-a", "--reflink=auto", str(system / "root"), str(root)], log)
    copy_source(target / "src")
    inside = "mkdir -p /run/systemd/system && exec /tmp/src/scripts/install --no-apt --wheels /tmp/wheels"
    script = (
        f"set -e; mkdir {root}/tmp/src {root}/tmp/wheels; mount --bind {target}/src {root}/tmp/src;"
        f"mount --bind {wheels} {root}/tmp/wheels; mount --rbind /dev {root}/dev; mount -t proc proc {root}/proc;"
        f"mount -t tmpfs run {root}/run; exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 SYSTEMD_OFFLINE=1"
        f" chroot {root} sh -c '{inside}'"
    )
    logged(["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script], log)
    for mounted in ("src", "wheels"):
        (root / "tmp" / mounted).rmdir()
    disk = target / "disk"
    with disk.open("wb") as file:
        file.truncate(VM_DISK_BYTES)
    logged(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d", str(root), str(disk)], log)
    shutil.rmtree(root)
    shutil.rmtree(target / "src")


if __name__ == "__main__":
    if reason := missing_vm_tools():
        raise SystemExit(reason)
    print(build_disk())  # noqa: T201 - the answer of this little program
