"""Kill the daemon at random moments while it spawns, stops and changes patterns; start it again; look what is left."""

import asyncio
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from soak.ground import GOOD, Broken, Ground, belongs
from soak.living import living

LONGEST_LIFE_S = 1.5
AT_ONCE = 0.2
"""How often the daemon is killed as soon as it has accepted what is asked: that must not be lost with it."""
CHANGES = ("change", "change", "change", "restart", "drain", "replaced", "bad", "nothing")


async def one_kill(ground: Ground, chance: random.Random) -> tuple[str, float]:
    """Set something going, kill the daemon at a random moment of it, and start it again.

    Returns:
        What was under way, and the seconds until the next daemon answered.

    Raises:
        Broken: Somebody lives whom the next daemon does not know, or a claim of ``ground`` does not hold.
    """
    what = chance.choice(CHANGES)
    workers = sorted(ground.keeps) or [w.id for w in (await ground.site.status()).workers] or [""]
    match what:
        case "change":
            await ground.ask(chance.choice(GOOD))
        case "replaced":
            for pattern in chance.sample(GOOD, 2):
                await ground.ask(pattern)
        case "bad":
            await ground.ask("bad")
        case "restart" | "drain":
            await ground.tell(chance.choice(workers), what)
        case _:
            pass
    at_once = chance.random() < AT_ONCE
    until_s = time.monotonic() + (0.0 if at_once else chance.uniform(0.0, LONGEST_LIFE_S))
    while time.monotonic() < until_s:
        ground.look()
        await asyncio.sleep(min(0.02, max(0.0, until_s - time.monotonic())))
    await ground.kill()
    ground.look()
    began_s = time.monotonic()
    before = await ground.start()
    took_s = time.monotonic() - began_s
    found = living(ground.runtime_dir)
    if strangers := belongs(found, before, await ground.site.status()):
        raise Broken(f"alive after {what}, and no worker's: {', '.join(strangers)}")
    return what, took_s


async def kill_often(ground: Ground, count: int, number: int, say: Callable[[str], None]) -> None:
    """Kill the daemon so many times; every few times wait until all is as it is wanted.

    Raises:
        Broken: A claim does not hold.
    """
    chance = random.Random(number)
    await ground.start()
    await ground.rest()
    kinds: Counter[str] = Counter()
    starts_s = []
    rests = 0
    for kill in range(1, count + 1):
        try:
            what, took_s = await one_kill(ground, chance)
            kinds[what] += 1
            starts_s.append(took_s)
            if chance.random() < 1 / 3 or kill == count:
                await ground.wake()
                await ground.rest()
                rests += 1
        except Broken as error:
            raise Broken(f"kill {kill}: {error}") from error
        if kill % 50 == 0:
            say(f"  {kill} kills")
    starts_s.sort()
    say(f"killed {count} times: " + ", ".join(f"{n} in mid {what}" for what, n in sorted(kinds.items())))
    say(f"  back to answering in {starts_s[len(starts_s) // 2]:.2f} s (median), {starts_s[-1]:.2f} s (longest)")
    say(f"  all as wanted each of {rests} times; 0 processes without a worker, 0 GPUs with two owners,")
    say("  0 unreadable states, 0 workers that nothing touched lost")


def soak(count: int, number: int, say: Callable[[str], None]) -> None:
    """Kill the daemon ``count`` times.

    Raises:
        Broken: A claim did not hold, or something is left behind.
    """
    ground = Ground.make(Path(tempfile.mkdtemp(prefix="l40sd-soak-")))

    async def run() -> None:
        await kill_often(ground, count, number, say)
        await ground.stop()

    try:
        asyncio.run(run())
    finally:
        left = ground.site.clear()
        say(f"left behind: {', '.join(left) or 'nothing'}")
    if left:
        raise Broken(f"left behind: {left}")
    shutil.rmtree(ground.folder)
