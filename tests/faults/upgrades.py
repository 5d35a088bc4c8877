"""What happens when another version of the program takes over: its shims, its records, its open connections."""

import asyncio
import io
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from daemonkit import Site, pids
from loadkit import Mix, load

from faults.rig import PACED, PATIENCE_S, Rig, check, forge, until
from faults.suite import NotHereError, Outcome, fault

ROOT = Path(__file__).resolve().parents[2]
LAYOUT_BEFORE = "l40sd/core/errors.py"
"""A module that only the releases had whose packages were core, adapters and services."""


@fault(
    59,
    "an upgrade with the older version's shims alive",
    how="the running workers' records are rewritten as an older protocol's; then the next daemon",
    expected="They are adopted as they are, and replaced at their next restart.",
    promise="at the next start",
    within_s=4.0,
)
async def old_shims(rig: Rig) -> Outcome:
    site = rig.site()
    before = await rig.serve(site)
    await site.kill()
    forge(site, "run.json", protocol=0)
    began = time.monotonic()
    await site.start(PATIENCE_S)
    after = await site.until_ready("few", PATIENCE_S)
    took_s = time.monotonic() - began
    check(pids(after) == pids(before), "adopted")
    mark = await rig.mark(site)
    await site.post(f"/v1/workers/{before.workers[0].id}/restart")
    await rig.told(site, mark, "worker.ready", before.workers[0].id)
    return Outcome(took_s=took_s)


@fault(
    60,
    "an upgrade in place under load: 12 workers, 200 open streams",
    how="POST /v1/upgrade (exec in place) while connections are opened in a loop",
    expected="Same pid, workers untouched, no connection refused; open streams go on in the next daemon.",
    promise="no connection refused, nothing cut",
    within_s=12.0,
)
async def upgrade(rig: Rig) -> Outcome:
    streams = 60 if rig.is_quick else 200
    site = rig.site(count=12, args=(*PACED, "--drain-s", "5"), workers={"drain_timeout_s": 20.0})
    before = await rig.serve(site)
    assert site.daemon is not None
    pid = site.daemon.pid
    url = await site.url()
    address = url.removeprefix("http://").split(":")
    mix = Mix(url=url, models=("toy",), streams=streams, shorts=2, stream_tokens=40, timeout_s=60.0)
    async with load(mix) as tally:
        await site.until(lambda s: s.proxy.in_flight >= streams, "all streams are open", PATIENCE_S)
        knocks = Knocks(address[0], int(address[1]))
        async with asyncio.TaskGroup() as group:
            knocking = group.create_task(knocks.run())
            answered = tally.answered
            await until(lambda: tally.answered > answered + 20, "streams come to their end")
            usual_s, tally.longest_silence_s = tally.longest_silence_s, 0.0
            began = time.monotonic()
            await site.post("/v1/upgrade")
            await until(lambda: site.log_file.read_text().count("event=daemon.ready") == 2, "the next one is ready")
            took_s = time.monotonic() - began
            answered = tally.answered
            await until(lambda: tally.answered > answered + streams, "all streams have come to their end since")
            knocking.cancel()
    after = await site.until_ready("few", PATIENCE_S)
    check(site.daemon.poll() is None, "the same process")
    check(site.daemon.pid == pid, "the same pid")
    check(pids(after) == pids(before), "the same workers")
    check(knocks.refused == 0, f"{knocks.refused} connections were refused")
    check(tally.lost == 0, tally.examples)
    handed = said(site, "daemon.handing_over")
    check("lost=0" in handed, handed)
    taken = said(site, "proxy.taken_over")
    carried, paused = value(handed, "in_flight"), value(taken, "paused_s")
    note = (
        f"{streams} streams, {carried:.0f} of them went through the exec, nothing moved for {paused * 1000:.0f} ms; "
        f"longest silence in a stream {tally.longest_silence_s * 1000:.0f} ms ({usual_s * 1000:.0f} ms before); "
        f"{knocks.made} connections, 0 refused, the longest took {knocks.longest_s * 1000:.0f} ms"
    )
    return Outcome(took_s=took_s, lost=tally.lost, note=note)


def value(line: str, key: str) -> float:
    """Return a number from a line of the daemon's log."""
    found = re.search(rf" {key}=([0-9.]+)", line)
    check(found is not None, line)
    return float(found[1])


def said(site: Site, event: str) -> str:
    """Return the last line of the daemon's log with this event."""
    return next(line for line in reversed(site.log_file.read_text().splitlines()) if f"event={event}" in line)


class Knocks:
    """Opens connections one after the other and counts how that went."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.made = self.refused = 0
        self.longest_s = 0.0

    async def run(self) -> None:
        """Knock until cancelled."""
        while True:
            began = time.monotonic()
            try:
                await asyncio.to_thread(self._knock)
                self.made += 1
            except ConnectionRefusedError:
                self.refused += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            await asyncio.sleep(0.01)

    def _knock(self) -> None:
        with socket.create_connection(self._target, timeout=30):
            pass


@fault(
    81,
    "an upgrade from the release before the packages moved",
    how="the daemon runs from that release's files, which give way to today's; then POST /v1/upgrade",
    expected="Today's daemon reads what the other one wrote and handed over: the same workers, drained ones too, and no"
    " stream is cut.",
    promise="nothing cut",
    within_s=12.0,
)
async def earlier_release(rig: Rig) -> Outcome:
    earlier = earlier_files(rig.folder / "earlier")
    site = rig.site(count=12, args=(*PACED, "--drain-s", "5"), environ={"PYTHONPATH": str(earlier)})
    await rig.serve(site)
    check(found_by(site) == earlier, "the release before runs")
    drained = (await site.status()).workers[0].id
    await site.post(f"/v1/workers/{drained}/drain")
    before = await site.until(lambda s: s.workers[0].phase == "drained", "one is drained", PATIENCE_S)
    mix = Mix(url=await site.url(), models=("toy",), streams=40, shorts=2, stream_tokens=40, timeout_s=60.0)
    async with load(mix) as tally:
        await site.until(lambda s: s.proxy.in_flight >= mix.streams, "all streams are open", PATIENCE_S)
        earlier.rename(rig.folder / "gone")
        check(found_by(site) == ROOT, "the next daemon finds today's release")
        began = time.monotonic()
        await site.post("/v1/upgrade")
        await until(lambda: site.log_file.read_text().count("event=daemon.ready") == 2, "the next one is ready")
        took_s = time.monotonic() - began
        answered = tally.answered
        await until(lambda: tally.answered > answered + mix.streams, "all streams have come to their end since")
    after = await site.status()
    check(pids(after) == pids(before), "the same workers")
    check([w.phase for w in after.workers] == [w.phase for w in before.workers], "one is drained, the others are ready")
    check(tally.lost == 0, tally.examples)
    handed = said(site, "daemon.handing_over")
    check("lost=0" in handed, handed)
    return Outcome(took_s=took_s, note=f"{value(handed, 'in_flight'):.0f} requests went through the exec")


def earlier_files(folder: Path) -> Path:
    """Return that release's package in a folder of its own, from the repository's history.

    Raises:
        NotHereError: There is no such history here.
    """
    git = ("git", "-C", str(ROOT))
    try:
        gone = subprocess.check_output(
            [*git, "log", "-1", "--format=%H", "--diff-filter=DR", "--", LAYOUT_BEFORE], text=True
        )
        archive = subprocess.check_output([*git, "archive", f"{gone.strip()}^", "l40sd"])
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotHereError(f"the repository's history does not reach back to it: {error}") from error
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def found_by(site: Site) -> Path:
    """Return the folder in which a process that is started as the daemon is finds the package."""
    program = "import l40sd, pathlib; print(pathlib.Path(l40sd.__file__).parents[1])"
    command = [sys.executable, "-c", program]
    environ = os.environ | dict(site.environ)
    return Path(subprocess.check_output(command, env=environ, cwd=site.folder, text=True).strip())
