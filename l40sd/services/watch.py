"""Asks one process how it is, and posts what core/health.py makes of the answers.

Two jobs, one after the other: ``startup`` until it has made a token, then ``follow`` for as long as it lives.
"""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from l40sd.adapters.activity import activity_of
from l40sd.adapters.clock import now_s
from l40sd.adapters.probe import Prober
from l40sd.adapters.process import Instance
from l40sd.core.config import HealthConfig
from l40sd.core.health import TIMEOUT, Pace, ProbeResult, Progress, Readiness, Stage, Startup, StartVerdict, Turn
from l40sd.core.launch import Launch
from l40sd.core.lifecycle import Event
from l40sd.core.model import ListedModel

HUNG = "hung"
"""What the failure of a worker is filed under that makes no tokens."""


class Post(Protocol):
    """How a verdict reaches the worker."""

    def __call__(self, event: Event, reason: str = "", *, kind: str = "") -> None:
        """Post an event, its reason and what a failure is filed under."""


class Watch:
    """The three questions, asked of one process.

    Attributes:
        listed: What its engine says of the model, once it was asked; None: nothing.
    """

    def __init__(
        self,
        *,
        launch: Launch,
        prober: Prober,
        config: HealthConfig,
        deadline_s: float,
        past_loads_s: tuple[float, ...],
        instance: Instance | None,
        log_path: Path,
        leases: Callable[[], int],
        replies: Callable[[], int],
    ) -> None:
        self._launch = launch
        self._target = (launch.host, launch.port, launch.probes, launch.api_key)
        self._prober = prober
        self._config = config
        self._instance = instance
        self._log_path = log_path
        self._leases = leases
        self._replies = replies
        self._suspected = asyncio.Event()
        self._doubt = asyncio.Lock()
        self._doubted_s = -math.inf
        self._is_ending = False
        self.listed: ListedModel | None = None
        self._deadline_s = deadline_s
        self._startup = Startup(
            launch.probes,
            deadline_s=deadline_s,
            stall_s=config.startup_stall_s,
            now_s=now_s(),
            past_loads_s=past_loads_s,
        )

    @property
    def startup_reason(self) -> str:
        """What the start waits for."""
        return self._startup.reason

    def startup_fraction(self) -> float | None:
        """Return how far the start is, 0 to 1, judged by past loads; None without any."""
        return self._startup.fraction(now_s())

    def suspect(self) -> None:
        """Look now: a request has failed on it."""
        self._suspected.set()

    async def is_ending(self) -> bool:
        """Return whether its process is gone or its health says no; one that answers too late may only be busy.

        Whoever asks while one question is under way shares the next one's answer.
        """
        asked_s = now_s()
        async with self._doubt:
            if self._doubted_s < asked_s:
                self._doubted_s = now_s()
                result = await self._health()
                self._is_ending = not result.ok and result.error != TIMEOUT
        return self._is_ending or (self._instance is not None and not self._instance.is_running)

    async def startup(self, post: Post) -> None:
        """Ask until it is up or late; a worker that somebody else runs is never late.

        What was passed is followed by the next question at once: an adopted worker has all the answers, and requests
        are waiting for it.
        """
        while True:
            stage = self._startup.stage
            verdict = await self._ask_startup()
            if verdict is StartVerdict.READY:
                post(Event.UP)
                return
            if self._startup.stage > max(stage, Stage.HEALTH):
                continue
            if verdict is StartVerdict.LATE and self._instance is not None and await self._is_to_blame():
                reason = f"not up after {self._deadline_s:.0f} s: {self._startup.reason}"
                post(Event.START_FAILED, reason, kind=f"start deadline ({self._startup.stage.name.lower()})")
                return
            await asyncio.sleep(self._config.startup_interval_s)

    async def _ask_startup(self) -> StartVerdict:
        startup, launch = self._startup, self._launch
        match startup.stage:
            case Stage.PORT | Stage.HEALTH:
                startup.feed_health(await self._health(), now_s())
            case Stage.MODEL:
                models = await self._prober.models(*self._target, self._config.probe_timeout_s)
                self.listed = next((model for model in models if model.id == launch.served_name), None)
                startup.feed_models([model.id for model in models], launch.served_name, now_s())
            case Stage.TOKEN:
                timeout_s = max(self._config.canary_timeout_s, self._config.probe_timeout_s)
                startup.feed_token(await self._one_token(timeout_s), now_s())
            case Stage.READY:
                pass
        if self._instance is None:
            return startup.check(now_s())
        activity = await asyncio.to_thread(activity_of, self._instance.engine_pid, self._log_path)
        return startup.feed_activity(activity, now_s())

    async def follow(self, post: Post) -> None:
        """Probe readiness and progress for as long as the worker lives.

        1. Readiness: the health probe, ``fall`` and ``rise``.
        2. Progress: the engine's counters; when they prove nothing, one token as a canary, which runs beside the
           probes because it may take its time.
        3. Suspected (a request failed on it): probe now. A closed port takes it out at once, and one token is asked
           for, because an engine's front may say 200 while what is behind it is dead.
        """
        readiness = Readiness(fall=self._config.fall, rise=self._config.rise)
        progress = Progress(self._config, now_s=now_s())
        async with asyncio.TaskGroup() as canaries:
            canary: asyncio.Task[None] | None = None
            while True:
                began_s = now_s()
                was_suspected = self._suspected.is_set()
                self._suspected.clear()
                pace = await self._look(readiness, progress, post, was_suspected=was_suspected)
                if (pace is Pace.CANARY_DUE or was_suspected) and (canary is None or canary.done()):
                    canary = canaries.create_task(self._canary(progress, post))
                try:
                    # From the start of one look to the next: probes that time out must not make the looks rarer.
                    async with asyncio.timeout(max(0.0, self._config.probe_interval_s - (now_s() - began_s))):
                        await self._suspected.wait()
                except TimeoutError:
                    continue

    async def _look(self, readiness: Readiness, progress: Progress, post: Post, *, was_suspected: bool) -> Pace:
        replies = self._replies()
        result, counters = await asyncio.gather(
            self._health(), self._prober.counters(*self._target, self._config.probe_timeout_s)
        )
        if result.error == TIMEOUT and self._replies() != replies:  # 4
            result = ProbeResult(ok=True)
        is_closed = result.error == "refused"
        turn = readiness.trip() if is_closed and was_suspected else readiness.feed(result)  # 1, 3
        if turn is Turn.FELL:
            post(Event.FELL, f"health: {result.error}")
        elif turn is Turn.ROSE:
            post(Event.ROSE)
        pace = progress.feed(counters, leases=self._leases(), replies=self._replies(), now_s=now_s())  # 2
        if pace is Pace.STALLED:
            await self._stalled(
                post, f"no token for {self._config.stall_timeout_s:.0f} s although requests are running"
            )
        return pace

    async def _canary(self, progress: Progress, post: Post) -> None:
        result = await self._one_token(self._config.canary_timeout_s)
        if progress.feed_canary(result) is Pace.STALLED:
            await self._stalled(post, f"idle, and one token did not come: {result.error}")

    async def _stalled(self, post: Post, reason: str) -> None:
        if self._instance is None:
            post(Event.FELL, reason)  # somebody else's to restart
        elif await self._is_to_blame():
            post(Event.STALLED, reason, kind=HUNG)

    async def _is_to_blame(self) -> bool:
        """Return whether silence speaks against the worker: not while this host does not even reach itself.

        A restart would not mend a loopback that is down or filtered, and it would take every worker at once.
        """
        return await self._prober.loops_back(self._launch.host, self._config.probe_timeout_s)

    async def _health(self) -> ProbeResult:
        return await self._prober.health(*self._target, self._config.probe_timeout_s)

    async def _one_token(self, timeout_s: float) -> ProbeResult:
        return await self._prober.one_token(*self._target, self._launch.served_name, timeout_s)
