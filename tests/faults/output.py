"""What happens with a worker's output: too much, too long, not text, no room for it."""

import asyncio
import contextlib
import os
import time
from pathlib import Path

import psutil
from daemonkit import Site

from faults.rig import PACED, Rig, ask, check, set_faults, until
from faults.suite import NotHereError, Outcome, fault

MIB = 1 << 20


def disk_bytes(site: Site, worker_id: str) -> int:
    """Return how much a worker's output takes on disk."""
    size = 0
    for path in (site.folder / "log").glob(f"{worker_id}.log*"):
        with contextlib.suppress(FileNotFoundError):  # just being rotated
            size += path.stat().st_size
    return size


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@fault(
    34,
    "a worker floods its output",
    how="it writes as fast as it can; log_file_bytes = 1 MiB, log_files = 3",
    expected="The files rotate at their cap; the worker is not blocked and serves on; the daemon does not notice.",
    promise="log_files x log_file_bytes",
)
async def log_flood(rig: Rig) -> Outcome:
    mib = 500 if rig.is_quick else 4000
    site = rig.site(count=1, args=PACED, workers={"log_file_bytes": MIB, "log_files": 3})
    status = await rig.serve(site)
    victim = status.workers[0]
    assert site.daemon is not None
    shim = psutil.Process(victim.pid).parent()
    daemon_cpu_s = cpu_s(site.daemon.pid)
    most = 0
    began = time.monotonic()
    await set_faults(victim, flood_log=mib)
    answers = 0

    async def is_written() -> bool:
        nonlocal most, answers
        most = max(most, disk_bytes(site, victim.id))
        answers += (await ask(site))[0] == 200
        return psutil.Process(shim.pid).io_counters().read_chars > mib * MIB

    await until(is_written, f"{mib} MiB are written", 300)
    took_s = time.monotonic() - began
    spent_s = cpu_s(site.daemon.pid) - daemon_cpu_s
    check(most <= 3 * MIB + 4096, f"{most} bytes on disk")
    check(answers > 0, "it answered meanwhile")
    check(spent_s < 0.5 * took_s + 1.0, f"the daemon used {spent_s} s of CPU")
    return Outcome(
        took_s=took_s,
        note=f"{mib / took_s:.0f} MiB/s, at most {most / MIB:.1f} MiB on disk, {answers} requests answered meanwhile",
    )


@fault(
    35,
    "a worker writes one line of 100 MB; NULs; invalid UTF-8",
    how="one line of 100 MiB without an end, then 100 lines of NULs and broken UTF-8",
    expected="The line is cut at the file's cap; what `l40sctl logs` shows is escaped; the shim does not grow.",
    promise="below 20 MB more",
)
async def odd_output(rig: Rig) -> Outcome:
    site = rig.site(count=1, workers={"log_file_bytes": MIB, "log_files": 3})
    status = await rig.serve(site)
    victim = status.workers[0]
    shim = psutil.Process(victim.pid).parent()
    before = shim.memory_info().rss
    began = time.monotonic()
    await set_faults(victim, long_line=100)
    await until(lambda: shim.io_counters().read_chars > 100 * MIB, "the line is written")
    await set_faults(victim, bad_output=100)

    def logs() -> str:
        return b"".join(site.client.stream(f"/v1/workers/{victim.id}/logs", tail=20)).decode()

    async def is_shown() -> bool:
        return "\\xff\\xfe" in await asyncio.to_thread(logs)

    await until(is_shown, "the odd lines are shown, escaped")
    text = await asyncio.to_thread(logs)
    took_s = time.monotonic() - began
    check("\x00" not in text, "no NUL comes out")
    check(all(len(line) <= 2100 for line in text.splitlines()), "lines are cut")
    grown = shim.memory_info().rss - before
    check(grown < 20_000_000, f"the shim grew by {grown} bytes")
    check(disk_bytes(site, victim.id) <= 3 * MIB + 4096, "the cap holds")
    return Outcome(took_s=took_s, note=f"the shim grew by {grown / MIB:.1f} MiB")


class SmallDisk:
    """A tmpfs of so many KiB on a folder, for as long as it is not unmounted."""

    def __init__(self, folder: Path, kib: int) -> None:
        self.folder = folder
        self._kib = kib

    async def mount(self, *, options: str = "") -> None:
        """Mount it.

        Raises:
            NotHereError: This user may not.
        """
        if os.geteuid() != 0:
            raise NotHereError("needs root to mount a small disk")
        self.folder.mkdir(parents=True, exist_ok=True)
        await run("mount", "-t", "tmpfs", "-o", f"size={self._kib}k,mode=0755{options}", "tmpfs", str(self.folder))

    def unmount(self) -> None:
        """Unmount it; lazily, because whoever writes there may still live."""
        os.spawnlp(os.P_WAIT, "umount", "umount", "-l", str(self.folder))

    def fill(self) -> None:
        """Leave no byte free."""
        with (self.folder / "ballast").open("ab", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                return

    def empty(self) -> None:
        """Free it again."""
        (self.folder / "ballast").unlink()


async def run(*argv: str) -> None:
    """Run a program that must succeed.

    Raises:
        NotHereError: It did not; its own words.
    """
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    if process.returncode != 0:
        raise NotHereError(f"{' '.join(argv)}: {said.decode(errors='replace').strip()}")


@fault(
    36,
    "the disk is full for logs",
    how="log_dir is a small tmpfs, filled to the last byte; freed later",
    expected="Output is dropped and counted, the worker lives and serves; once there is room a line says how much.",
    promise="nothing is blocked",
)
async def disk_full_for_logs(rig: Rig) -> Outcome:
    site = rig.site(count=1, workers={"log_file_bytes": 64 * 1024, "log_files": 3})
    disk = SmallDisk(site.folder / "log", 512)
    await disk.mount()
    rig.at_end(disk.unmount)
    before = await rig.serve(site)
    victim = before.workers[0]
    disk.fill()
    began = time.monotonic()
    await set_faults(victim, flood_log=20)
    shim = psutil.Process(victim.pid).parent()
    await until(lambda: shim.io_counters().read_chars > 20 * MIB, "its output is taken although nothing can be written")
    check((await ask(site))[0] == 200, "it serves")
    disk.empty()

    def is_told() -> bool:
        paths = (site.folder / "log").glob("*.log*")
        return any(b"bytes of output dropped" in path.read_bytes() for path in paths)

    await until(is_told, "the log says how much was dropped")
    took_s = time.monotonic() - began
    check((await site.status()).workers[0].pid == victim.pid, "the worker was not touched")
    return Outcome(took_s=took_s)
