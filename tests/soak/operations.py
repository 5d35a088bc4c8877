"""Random operations, drawn by hypothesis's state machine, on a daemon with real processes.

A step asks for something or breaks something and does not wait for what follows, so that operations meet in each
other's middle; ``rest`` is one of the steps. The claims of ``ground`` are made after every one.
"""

import asyncio
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from l40sd.errors import L40sError
from soak.ground import GOOD, SHAPES, Broken, Census, Ground, config, kill, parts_of, worker_of
from soak.living import living

STEPS_EACH = 50
RSS_TOLERANCE_MIB = 20.0
HISTORY_SHOWN = 40

BROKEN = {
    "syntax": "[daemon\n",
    "unknown key": "[proxy]\nlistne = 1\n",
    "a value out of bounds": "[workers]\nport_first = 1\n",
    "an engine nobody knows": '[models.odd]\nengine = "odd"\n',
}
ANY = st.integers(min_value=0, max_value=11)


@dataclass(slots=True, kw_only=True)
class Run:
    """One run of operations on one ground, over all of hypothesis's examples.

    Attributes:
        may_end_daemon: Whether the daemon is killed, stopped and upgraded too, or lives through all of it.
        limit: Operations to carry out; further ones that are drawn are not.
        is_idle: The operations of the present example are not carried out.
    """

    ground: Ground
    may_end_daemon: bool
    limit: int
    say: Callable[[str], None]
    loop: asyncio.Runner
    counts: Counter[str] = field(default_factory=Counter)
    history: list[str] = field(default_factory=list)
    censuses: list[Census] = field(default_factory=list)
    is_idle: bool = False
    failure: BaseException | None = None

    @property
    def done(self) -> int:
        """How many operations were carried out."""
        return self.counts.total()

    def step(self, name: str, work: Coroutine[Any, Any, object], detail: object = "") -> None:
        """Carry out one operation and look; a failure is kept, since hypothesis will ask for it again.

        Raises:
            Broken: A claim does not hold, now or in an earlier step.
        """
        if self.failure is not None or self.is_idle or self.done >= self.limit:
            work.close()
            if self.failure is not None:
                raise self.failure
            return
        self.counts[name] += 1
        self.history.append(f"{self.done:5} {name} {detail}".rstrip())
        try:
            self.loop.run(work)
            self.ground.look()
        except (Broken, L40sError) as error:
            self.failure = error
            raise

    async def rest(self) -> None:
        """Wait until nothing is under way, and count."""
        self.censuses.append(await self.ground.rest())


class Operations(RuleBasedStateMachine):
    """The operations; ``run`` is set before an example begins."""

    run: ClassVar[Run]

    @property
    def ground(self) -> Ground:
        return self.run.ground

    def is_up(self) -> bool:
        return self.ground.is_up

    def may_end(self) -> bool:
        return self.ground.is_up and self.run.may_end_daemon

    @initialize(simplicity=st.integers(min_value=0, max_value=1 << 16))
    def begin(self, simplicity: int) -> None:
        # Hypothesis begins with its simplest example, one operation again and again: that one is left out.
        self.run.is_idle = simplicity == 0

        async def work() -> None:
            if not self.ground.is_up:
                await self.ground.start()
            await self.ground.wake()
            await self.run.rest()

        self.run.step("rest", work())

    # -- the operator ----------------------------------------------------------------------------------------------

    @precondition(is_up)
    @rule(pattern=st.sampled_from(sorted(SHAPES)))
    def change(self, pattern: str) -> None:
        self.run.step("change", self.ground.ask(pattern), pattern)

    @precondition(is_up)
    @rule(patterns=st.lists(st.sampled_from(GOOD), min_size=2, max_size=3))
    def replaced_changes(self, patterns: list[str]) -> None:
        async def work() -> None:
            for pattern in patterns:
                await self.ground.ask(pattern)

        self.run.step("replaced changes", work(), ", ".join(patterns))

    @precondition(is_up)
    @rule(number=ANY, verb=st.sampled_from(["drain", "undrain", "restart", "reset"]))
    def command(self, number: int, verb: str) -> None:
        async def work() -> None:
            workers = (await self.ground.site.status()).workers
            if workers:
                worker = workers[number % len(workers)].id
                await self.ground.tell(worker, verb)
                self.run.history[-1] += f" {worker}"

        self.run.step(verb, work())

    @precondition(is_up)
    @rule(speed=st.sampled_from([60, 61]), probe_s=st.sampled_from([0.4, 0.5]))
    def reload(self, speed: int, probe_s: float) -> None:
        async def work() -> None:
            args = f'"--tokens-per-s", "{speed}"'
            # Also when nothing changed in the file: a pattern that has gone back went back to the configuration that it
            # began with, which may be older than the file; the reload brings those workers up to date.
            self.ground.keep_only(w for w in self.ground.keeps if not w.startswith("other"))
            text = config(self.ground.host_file, other_args=args).replace(
                "probe_interval_s = 0.5", f"probe_interval_s = {probe_s}"
            )
            self.ground.site.config_file.write_text(text)
            self.ground.site.config = text
            await self.ground.site.post("/v1/reload")

        self.run.step("reload", work(), f"other at {speed}, probes every {probe_s} s")

    @precondition(is_up)
    @rule(what=st.sampled_from(sorted(BROKEN)))
    def reload_what_is_broken(self, what: str) -> None:
        async def work() -> None:
            good = self.ground.site.config
            self.ground.site.config_file.write_text(good + BROKEN[what])
            try:
                await self.ground.site.post("/v1/reload")
            except L40sError as error:
                if error.code == "unreachable":
                    raise
            else:
                raise Broken(f"a configuration with {what} was taken")
            finally:
                self.ground.site.config_file.write_text(good)

        self.run.step("broken reload", work(), what)

    # -- what breaks -----------------------------------------------------------------------------------------------

    @rule(part=st.sampled_from(["leader", "shim", "child"]), number=ANY)
    def kill_part(self, part: str, number: int) -> None:
        async def work() -> None:
            parts = parts_of(living(self.ground.runtime_dir), part)
            if parts:
                victim = parts[number % len(parts)]
                self.ground.touched(worker_of(victim))
                self.ground.is_disturbed = True
                kill(victim)
                self.run.history[-1] += f" {victim.instance} ({victim.pid})"

        self.run.step(f"kill {part}", work())

    @precondition(may_end)
    @rule()
    def kill_daemon(self) -> None:
        self.run.step("kill daemon", self.ground.kill())

    @precondition(may_end)
    @rule()
    def stop_daemon(self) -> None:
        self.run.step("stop daemon", self.ground.stop())

    @precondition(may_end)
    @rule()
    def upgrade(self) -> None:
        self.run.step("upgrade", self.ground.upgrade())

    @precondition(lambda self: not self.ground.is_up)
    @rule()
    def start_daemon(self) -> None:
        self.run.step("start daemon", self.ground.start())

    # -- nothing ---------------------------------------------------------------------------------------------------

    @precondition(is_up)
    @rule()
    def rest(self) -> None:
        self.run.step("rest", self.run.rest())

    @rule(seconds=st.sampled_from([0.05, 0.2, 0.5]))
    def pass_time(self, seconds: float) -> None:
        async def work() -> None:
            deadline_s = time.monotonic() + seconds
            while time.monotonic() < deadline_s:
                self.ground.look()
                await asyncio.sleep(0.02)

        self.run.step("pass time", work(), f"{seconds} s")


def operate(run: Run, number: int) -> None:
    """Carry out so many operations; examples follow each other on the same ground.

    Raises:
        Broken: A claim did not hold; the last operations are in the run's history.
    """
    Operations.run = run
    while run.done < run.limit and run.failure is None:
        plain = settings(
            max_examples=1 + math.ceil((run.limit - run.done) / STEPS_EACH),
            stateful_step_count=STEPS_EACH,
            phases=[Phase.generate],
            deadline=None,
            database=None,
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )
        machine = seed(number + run.done)(type("Operations", (Operations,), {}))
        try:
            run_state_machine_as_test(machine, settings=plain)
        except BaseException:
            if run.failure is not None:
                raise run.failure from None
            raise


def compare(run: Run, number: int) -> None:
    """Carry out a run's operations, and say what the daemon took before and after.

    Raises:
        Broken: A claim did not hold, or it takes more afterwards.
    """
    began_s = time.monotonic()
    first = run.loop.run(level(run.ground))
    operate(run, number)
    last = run.loop.run(level(run.ground, base=first))
    lives = "all there is" if run.may_end_daemon else "one daemon lives through it"
    run.say(f"operations ({lives}), seed {number}: {run.done} in {time.monotonic() - began_s:.0f} s")
    run.say("  " + ", ".join(f"{count} {name}" for name, count in sorted(run.counts.items())))
    run.say(f"  at rest {len(run.censuses)} times; {len({c.life for c in run.censuses})} daemons' processes")
    for name in ("descriptors", "threads", "rss_mib", "cgroups", "directories"):
        before, after = getattr(first, name), getattr(last, name)
        most = max(getattr(census, name) for census in (first, *run.censuses, last))
        run.say(f"  {name.replace('_', ' ')}: first {before:g}, last {after:g}, most at any rest {most:g}")
    if not run.may_end_daemon and first.life != last.life:
        raise Broken(f"the daemon was to live through it: {first.life} became {last.life}")
    if last.rss_mib > first.rss_mib + RSS_TOLERANCE_MIB:
        raise Broken(f"memory has grown from {first.rss_mib:.0f} to {last.rss_mib:.0f} MiB")


async def level(ground: Ground, *, base: Census | None = None) -> Census:
    """Come to rest in the pattern of the beginning, so that what is counted can be compared."""
    if not ground.is_up:
        await ground.start()
    await ground.wake()
    await ground.rest()
    await ground.ask("pairs")
    return await ground.rest(base=base)


def soak(count: int, number: int, say: Callable[[str], None]) -> None:
    """Half of the operations with all there is, half on one daemon that lives through them; say what was seen.

    Raises:
        Broken: A claim did not hold.
    """
    ground = Ground.make(Path(tempfile.mkdtemp(prefix="l40sd-soak-")))
    with asyncio.Runner() as loop:
        try:
            for may_end_daemon, limit in ((True, count // 2), (False, count - count // 2)):
                run = Run(ground=ground, may_end_daemon=may_end_daemon, limit=limit, say=say, loop=loop)
                try:
                    compare(run, number)
                except BaseException:
                    say("\n".join(["the last operations:", *run.history[-HISTORY_SHOWN:]]))
                    raise
            loop.run(ground.stop())
        finally:
            left = ground.site.clear()
            say(f"left behind: {', '.join(left) or 'nothing'}")
    if left:
        raise Broken(f"left behind: {left}")
    shutil.rmtree(ground.folder)
