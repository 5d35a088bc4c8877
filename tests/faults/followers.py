"""What happens to whoever watches: `l40sctl events -f` and `l40sctl logs -f` while daemons come and go."""

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process

from daemonkit import Site

from faults.rig import PATIENCE_S, Rig, check, kill, until
from faults.suite import Outcome, fault


class Follower:
    """One l40sctl that follows; what it has printed so far."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.text = b""

    @classmethod
    async def start(cls, site: Site, *arguments: str) -> "Follower":
        # A background job of a shell is born deaf to Ctrl-C, and so are its children; this one is at a terminal.
        hearing = ("env", "--default-signal=INT")
        program = (*hearing, sys.executable, "-m", "l40sd.cli", "--socket", str(site.socket), *arguments)
        return cls(await asyncio.create_subprocess_exec(*program, stdout=PIPE, stderr=PIPE, env=dict(os.environ)))

    async def read(self) -> None:
        """Read until it ends."""
        assert self.process.stdout is not None
        while data := await self.process.stdout.read(65536):
            self.text += data

    async def stop(self) -> str:
        """End it as Ctrl-C does; return what it said on stderr."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stderr is not None
        said = (await self.process.stderr.read()).decode()
        check(await self.process.wait() == 0, f"ended with {self.process.returncode}: {said}")
        return said


@fault(
    79,
    "the daemon is killed and restarted under somebody who follows events and a log",
    how="SIGKILL to the daemon, three times, with `l40sctl events -f` and `l40sctl logs -f` running; before each next"
    " daemon starts the worker is killed, so that it writes while nobody passes it on",
    expected="Both wait and go on at the next daemon: every event once and in order, no line of the log missing or"
    " twice; the worker's last end is in `status`.",
    promise="at the next start",
)
async def killed_under_followers(rig: Rig) -> Outcome:
    site = rig.site(count=2)
    worker = (await rig.serve(site)).workers[0].id
    events = await Follower.start(site, "events", "-f", "-o", "json")
    log = await Follower.start(site, "logs", worker, "-f", "-n", "1000")
    took_s = 0.0
    async with asyncio.TaskGroup() as group:
        group.create_task(events.read())
        group.create_task(log.read())
        await until(lambda: events.text and log.text, "both follow", PATIENCE_S)
        for _ in range(3):
            engine = next(w.pid for w in (await site.status()).workers if w.id == worker)
            await site.kill()
            kill(engine)
            began = time.monotonic()
            await site.start(PATIENCE_S)
            await site.until_ready("few", PATIENCE_S)
            marker = (await site.events())[-1].seq
            await until(
                lambda seq=marker: f'"seq":{seq},'.encode() in events.text,
                f"the events go on: {events.text[-300:]}",
                PATIENCE_S,
            )
            took_s = max(took_s, time.monotonic() - began)
        written = (site.folder / "log" / f"{worker}.log").read_bytes()
        await until(lambda: log.text == written, "the log is followed to its end", PATIENCE_S)
        said = await events.stop() + await log.stop()
    seqs = [json.loads(line)["seq"] for line in events.text.splitlines()]
    check(seqs == list(range(1, len(seqs) + 1)), f"every event once and in order: {seqs}")
    check("Traceback" not in said, said)
    # Who is not scheduled between the kill and the next start has nothing to say of it.
    check(1 <= said.count("is away") == said.count("is back") <= 6, said)
    end = (await site.status()).workers[0].last_end
    check(end is not None and end.how == "ended by signal 9, while no daemon watched", end)
    return Outcome(took_s=took_s, note=f"{len(seqs)} events, {written.count(b'ended')} runs of the worker")
