"""Asks one process how it is; startup.py, health.py and fitness.py say what the answers come to.

Two jobs, one after the other: ``startup`` until it has made a token, then ``follow`` for as long as it lives.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from l40sd.clock import now_s
from l40sd.config.options import HealthConfig
from l40sd.model import ListedModel
from l40sd.routing.outliers import Peer
from l40sd.workers.activity import activity_of
from l40sd.workers.fitness import Fitness, Look
from l40sd.workers.health import TIMEOUT, ProbeResult
from l40sd.workers.lifecycle import Event
from l40sd.workers.probe import Prober
from l40sd.workers.requests import Requests
from l40sd.workers.run import Run
from l40sd.workers.startup import Stage, Startup, StartVerdict

LOOKS_PER_INTERVAL = 4
"""Looks at a worker on which requests go on failing, in one ``probe_interval_s``."""

HUNG = "hung"
"""What the failure of a worker is filed under that makes no tokens."""


class Post(Protocol):
    """How a verdict reaches the worker."""

    def __call__(self, event: Event, reason: str = "", *, kind: str = "") -> None:
        """Post an event, its reason and what a failure is filed under."""


class Watch:
    """The questions, asked of one process.

    Attributes:
        fitness: What is made of the answers once it has come up.
        listed: What its engine says of the model, once it was asked; None: nothing.
    """

    def __init__(
        self,
        *,
        run: Run,
        requests: Requests,
        prober: Prober,
        config: HealthConfig,
        deadline_s: float,
        past_loads_s: tuple[float, ...],
        log_path: Path,
        peers: Callable[[], Sequence[Peer]],
    ) -> None:
        self._launch = launch = run.launch
        self._requests = requests
        self._target = (launch.host, launch.port, launch.probes, launch.api_key)
        self._prober = prober
        self._config = config
        self._instance = run.instance
        self._log_path = log_path
        self._peers = peers
        self.fitness = Fitness(config, now_s=now_s())
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
        """Look now: a request has failed on it. What requests see of it is judged before this returns."""
        self.judge_requests()
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
                result, models = await self._prober.models(*self._target, self._config.probe_timeout_s)
                self.listed = next((model for model in models if model.id == launch.served_name), None)
                startup.feed_models([model.id for model in models], launch.served_name, now_s(), result)
            case Stage.TOKEN:
                timeout_s = max(self._config.canary_timeout_s, self._config.probe_timeout_s)
                startup.feed_token(await self._one_token(timeout_s), now_s())
            case Stage.READY:
                pass
        if self._instance is None:
            return startup.check(now_s())
        activity = await asyncio.to_thread(activity_of, self._instance.engine_pid, self._log_path)
        return startup.feed_activity(activity, now_s())

    async def follow(self, post: Post, heed: Callable[[], None]) -> None:
        """Look at readiness, progress and requests for as long as the worker lives; ``heed`` is called after each.

        A canary runs beside the looks because it may take its time. Suspected (a request failed on it): look now, and
        from then on at most ``LOOKS_PER_INTERVAL`` times in an interval, for a worker may fail a thousand a second.
        """
        async with asyncio.TaskGroup() as canaries:
            while True:
                began_s = now_s()
                is_suspected = self._suspected.is_set()
                self._suspected.clear()
                if await self._look(is_suspected=is_suspected):
                    canaries.create_task(self._canary(post, heed))
                await self._draw(post, heed)
                # From the start of one look to the next: probes that time out must not make the looks rarer.
                interval_s = self._config.probe_interval_s
                least_s = interval_s / LOOKS_PER_INTERVAL if is_suspected else 0.0
                await asyncio.sleep(max(0.0, least_s - (now_s() - began_s)))
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, interval_s - (now_s() - began_s))):
                        await self._suspected.wait()

    async def _look(self, *, is_suspected: bool) -> bool:
        replies = self._requests.served
        health, counters = await asyncio.gather(
            self._health(), self._prober.counters(*self._target, self._config.probe_timeout_s)
        )
        look = Look(
            health=health,
            counters=counters,
            leases=self._requests.in_flight,
            replies=self._requests.served,
            replied_meanwhile=self._requests.served != replies,
            is_suspected=is_suspected,
        )
        is_canary_due = self.fitness.feed(look, now_s())
        self.judge_requests()
        return is_canary_due

    async def _canary(self, post: Post, heed: Callable[[], None]) -> None:
        is_reached = self._instance is None or await self._is_to_blame()
        self.fitness.feed_canary(await self._one_token(self._config.canary_timeout_s), now_s())
        if not is_reached:  # when it was asked; by now it may be, and the silence before that is still no evidence
            self.fitness.excuse()
        await self._draw(post, heed)

    async def _draw(self, post: Post, heed: Callable[[], None]) -> None:
        """Draw the consequences: one that is hung is restarted, unless it is somebody else's to restart."""
        stalled = self.fitness.stalled
        if stalled and self._instance is not None:
            if await self._is_to_blame():
                post(Event.STALLED, stalled, kind=HUNG)
                return
            self.fitness.excuse()
        heed()

    def judge_requests(self) -> None:
        """Judge the worker by what requests have seen of it so far."""
        self.fitness.feed_requests(self._requests.counts(), self._peers(), now_s())

    async def _is_to_blame(self) -> bool:
        """Return whether silence speaks against the worker: not while this host does not even reach itself.

        A restart would not mend a loopback that is down or filtered, and it would take every worker at once.
        """
        return await self._prober.loops_back(self._launch.host, self._config.probe_timeout_s)

    async def _health(self) -> ProbeResult:
        return await self._prober.health(*self._target, self._config.probe_timeout_s)

    async def _one_token(self, timeout_s: float) -> ProbeResult:
        if not self._launch.probes.token_path:  # a script of one's own: what can be asked is how it is
            return await self._health()
        return await self._prober.one_token(*self._target, self._launch.served_name, timeout_s)
