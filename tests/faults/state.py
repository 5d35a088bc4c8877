"""What happens to state and configuration: full, corrupt and read-only disks, a jumping clock, broken reloads."""

import asyncio
import shutil
import signal
import sys
import time

import msgspec
from daemonkit import pids

from faults import machine
from faults.output import SmallDisk
from faults.rig import PACED, PATIENCE_S, Rig, ask, busiest, check, until
from faults.suite import NotHereError, Outcome, fault
from l40sd.errors import L40sError

TWO = """
[[patterns.pairs.replicas]]
model = "toy"
count = 2
tp = 2
"""


@fault(
    37,
    "the disk is full for state",
    how="state_dir is a tmpfs, filled to the last byte; then a pattern change; then it is freed",
    expected="The change is made and kept in memory, status says so, what is on disk stays whole; once there is room"
    " it is written.",
    promise="retried every 5 s",
    within_s=30.0,
)
async def disk_full_for_state(rig: Rig) -> Outcome:
    site = rig.site(extra=TWO)
    disk = SmallDisk(site.folder / "state", 128)
    await disk.mount()
    rig.at_end(disk.unmount)
    await rig.serve(site)
    state = site.folder / "state" / "state.json"
    old = state.read_bytes()
    disk.fill()
    began = time.monotonic()
    ended = await site.change("pairs", PATIENCE_S)
    check(ended.state == "done", ended)
    check(state.read_bytes() == old, "the old state is whole")
    status = await site.status()
    check(any("memory only" in line for line in status.degraded), status.degraded)
    check((await ask(site))[0] == 200, "it serves")
    disk.empty()
    await site.until(lambda s: not s.degraded, "it is written once there is room", 30)
    took_s = time.monotonic() - began
    check(msgspec.json.decode(state.read_bytes())["pattern"] == "pairs", "it is the new one")
    return Outcome(took_s=took_s)


@fault(
    38,
    "the state file is corrupt, cut short, or a newer version's",
    how="junk, half of it, nothing; then a version number of the future",
    expected="Moved to .corrupt-TIME and rebuilt: workers that run are adopted. A newer version's is not touched: the"
    " start is refused and says what to do.",
    promise="start within 2 s",
    within_s=3.0,
)
async def state_corrupt(rig: Rig) -> Outcome:
    site = rig.site()
    before = await rig.serve(site)
    state = site.folder / "state" / "state.json"
    longest_s = 0.0
    for junk in (b"\x00\xffjunk", state.read_bytes()[:40], b""):
        await site.kill()
        state.write_bytes(junk)
        began = time.monotonic()
        check(pids(await site.start()) == pids(before), "the workers are adopted")
        longest_s = max(longest_s, time.monotonic() - began)
        await site.until_ready("few", PATIENCE_S)
        aside = list(state.parent.glob("state.json.corrupt-*"))
        check(any(path.read_bytes() == junk for path in aside), aside)
        for path in aside:
            path.unlink()
    good = state.read_bytes()
    await site.kill()
    newer = msgspec.json.encode({**msgspec.json.decode(good), "version": 99})
    state.write_bytes(newer)
    site.spawn()
    code = await site.ended(20)
    check(code in (1, 78), f"it ended with {code}")
    check("newer l40sd" in site.log_file.read_text(), site.tail())
    check(state.read_bytes() == newer, "it is not touched")
    state.write_bytes(good)
    check(pids(await site.start()) == pids(before), "the workers were not touched")
    await site.until_ready("few", PATIENCE_S)
    return Outcome(took_s=longest_s)


@fault(
    39,
    "the state directory is read-only",
    how="a read-only mount; then its place is taken by a file",
    expected="The start is refused with exit 78 and the directory's name, before anything is touched.",
    promise="1 s",
    within_s=2.5,
)
async def state_read_only(rig: Rig) -> Outcome:
    site = rig.site()
    disk = SmallDisk(site.folder / "state", 64)
    await disk.mount(options=",ro")
    rig.at_end(disk.unmount)
    began = time.monotonic()
    site.spawn()
    code = await site.ended(20)
    took_s = time.monotonic() - began
    check(code == 78, f"it ended with {code}: {site.tail()}")
    check("state_dir" in site.log_file.read_text(), site.tail())
    other = rig.site()
    other.folder.mkdir()
    (other.folder / "state").write_text("a file")
    other.spawn()
    code = await other.ended(20)
    check(code == 78, f"it ended with {code}: {other.tail()}")
    return Outcome(took_s=took_s)


CRASHER = """
import itertools, sys
from pathlib import Path
from l40sd.shim.files import write_file
import msgspec
for number in itertools.count():
    write_file(sys.argv[1], msgspec.json.encode({"version": 1, "number": number, "filler": "x" * 20000}))
"""


@fault(
    40,
    "kill -9 in the middle of writing the state, again and again",
    how="a process writes state files as the daemon does, and is killed at random moments",
    expected="The old or the new one is there, whole; never a third thing.",
    promise="0 corrupt",
)
async def killed_while_writing(rig: Rig) -> Outcome:
    rounds = 60 if rig.is_quick else 1000
    path = rig.folder / "state.json"
    began = time.monotonic()
    seen = 0
    for turn in range(rounds):
        writer = await asyncio.create_subprocess_exec(sys.executable, "-c", CRASHER, str(path))
        before = path.stat().st_mtime_ns if path.exists() else 0
        await until(lambda b=before: path.exists() and path.stat().st_mtime_ns != b, "it has begun to write", 20)
        await asyncio.sleep((turn * 7 % 50) / 10_000)
        writer.kill()
        await writer.wait()
        content = msgspec.json.decode(path.read_bytes())
        check(len(content["filler"]) == 20000, "half a file")
        seen = max(seen, content["number"])
    return Outcome(took_s=time.monotonic() - began, note=f"{rounds} kills, 0 corrupt")


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long offset(void) {
    long s = 0;
    const char *path = getenv("FAKE_CLOCK");
    FILE *file = path ? fopen(path, "re") : NULL;
    if (file) { if (fscanf(file, "%ld", &s) != 1) s = 0; fclose(file); }
    return s;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (!code && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += offset();
    return code;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec; t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


@fault(
    41,
    "the wall clock jumps: an hour back, a year ahead",
    how="a preloaded C library answers the daemon's questions for the time of day; probes, a drain and a back-off"
    " under way; in the virtual machine by `date -s`",
    expected="Deadlines, back-off and ages are monotonic: nothing is restarted, cut or late.",
    promise="no effect",
    within_s=15.0,
)
async def clock_jumps(rig: Rig) -> Outcome:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotHereError("needs a C compiler for a preloaded clock")
    source, library, offset = rig.folder / "clock.c", rig.folder / "clock.so", rig.folder / "offset"
    source.write_text(CLOCK)
    offset.write_text("0")
    built = await asyncio.create_subprocess_exec(compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
    check(await built.wait() == 0, "the library is built")
    environ = {"LD_PRELOAD": str(library), "FAKE_CLOCK": str(offset)}
    site = rig.site(args=PACED, environ=environ)
    before = await rig.serve(site)
    began = time.monotonic()
    async with rig.loaded(site) as tally:
        for jump_s in (-3600, 365 * 86400, 0):
            offset.write_text(str(jump_s))
            answered = tally.answered
            await until(lambda a=answered: tally.answered > a + 12, "the load goes on", 20)
            status = await site.status()
            check(pids(status) == pids(before), "no worker was restarted")
            check(all(w.phase == "ready" for w in status.workers), status.workers)
            check(0 <= status.uptime_s < 60, f"up for {status.uptime_s} s")
            times = [event.time for event in await site.events()]
            await site.post("/v1/reload")
            check(times, "there are events")
    check(tally.lost == 0, tally.examples)
    years = {event.time[:4] for event in await site.events()}
    check(len(years) > 1, f"the daemon did see another year: {years}")
    here = Outcome(took_s=time.monotonic() - began, lost=tally.lost, note="the load went on over three jumps")
    return await machine.inject_too(rig, 41, here)


@fault(
    42,
    "the configuration is broken at a reload",
    how="bad TOML, an unknown key, a host that does not exist; by SIGHUP and by l40sctl",
    expected="The old one stays in force, the refusal names file and key, workers are untouched.",
    promise="1 s",
    within_s=1.0,
)
async def broken_reload(rig: Rig) -> Outcome:
    site = rig.site()
    before = await rig.serve(site)
    longest_s = 0.0
    for broken in ("[models.toy", "[proxy2]\nlisten_on = 1", '[models.x]\nengine = "nothing"'):
        site.config_file.write_text(f"{site.config}\n{broken}\n")
        began = time.monotonic()
        try:
            await site.post("/v1/reload")
        except L40sError as error:
            check(str(site.config_file) in str(error), f"{error} names no file")
        else:
            check(False, f"{broken!r} was taken over")
        longest_s = max(longest_s, time.monotonic() - began)
        mark = await rig.mark(site)
        site.signal(signal.SIGHUP)
        await rig.told(site, mark, "config.reload.failed")
    status = await site.status()
    check(pids(status) == pids(before), "the workers are untouched")
    check((await ask(site))[0] == 200, "it serves")
    site.write_config()
    return Outcome(took_s=longest_s)


@fault(
    43,
    "a new configuration has no use for a busy worker",
    how="reload with one replica fewer while streams run on all",
    expected="It is drained, its streams run to their end, then it is stopped; the others are not touched.",
    promise="drain_timeout_s",
    within_s=12.0,
)
async def worker_removed(rig: Rig) -> Outcome:
    site = rig.site(count=3, args=PACED)
    before = await rig.serve(site)
    async with rig.loaded(site, streams=6, shorts=0, stream_tokens=80) as tally:
        await busiest(site)
        await site.until(lambda s: bool(s.workers) and all(w.in_flight for w in s.workers), "all are busy", 20)
        site.config_file.write_text(site.config.replace("count = 3", "count = 2"))
        began = time.monotonic()
        await site.post("/v1/reload")
        after = await site.until(lambda s: len(s.workers) == 2, "one has gone", 30)
        took_s = time.monotonic() - began
    check(pids(after).items() <= pids(before).items(), "the others were not touched")
    check(tally.lost == 0, tally.examples)
    return Outcome(took_s=took_s, lost=tally.lost)


@fault(
    44,
    "reloads in the middle of starts, stops and pattern changes",
    how="reloads, pattern changes and restarts at the same time, from several clients",
    expected="One after the other, the last wish wins, nothing is locked up.",
    promise="no deadlock",
    within_s=40.0,
)
async def many_at_once(rig: Rig) -> Outcome:
    site = rig.site(count=4, extra=TWO)
    await site.start(PATIENCE_S)  # not waiting for anybody to be ready
    began = time.monotonic()

    async def reload() -> None:
        for turn in range(6):
            timeout_s = 10.0 + turn
            text = site.config.replace('"drain_timeout_s": 10.0', "").replace(
                "drain_timeout_s = 10.0", f"drain_timeout_s = {timeout_s}"
            )
            site.config_file.write_text(text)
            await site.post("/v1/reload")
            await asyncio.sleep(0.05)

    async def change() -> None:
        for turn in range(6):
            await site.request(("pairs", "few")[turn % 2])
            await asyncio.sleep(0.1)

    async def restart() -> None:
        for _ in range(6):
            for worker in (await site.status()).workers:
                try:
                    await site.post(f"/v1/workers/{worker.id}/restart")
                except L40sError as error:
                    check(error.code in ("unknown_worker", "worker_retiring"), error)
            await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as group:
        for job in (reload, change, restart):
            group.create_task(job())
    await site.request("pairs")
    status = await site.until_ready("pairs", PATIENCE_S)
    check(len(status.workers) == 2, status.workers)
    check((await ask(site))[0] == 200, "it serves")
    return Outcome(took_s=time.monotonic() - began)
