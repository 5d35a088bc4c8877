"""The trackers and the worker table, walked completely: no verdict is lost, and every way out has a way back."""

import itertools
from collections import deque
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace

import pytest

from l40sd.config.options import HealthConfig
from l40sd.routing.outliers import Counts, Peer, Standing
from l40sd.workers.fitness import Fitness, Look
from l40sd.workers.health import Counters, ProbeResult
from l40sd.workers.lifecycle import Event, Goal, Phase, step

HEALTH = HealthConfig(
    probe_interval_s=1,
    fall=2,
    rise=2,
    stall_timeout_s=4,
    canary_interval_s=1,
    canary_timeout_s=2,
    eject_failures=2,
    eject_first_s=1,
    eject_limit_s=1,
    eject_half_life_s=0.1,
    slow_start_s=0,
)
OK = ProbeResult(ok=True, status=200)
SAYS_NO = ProbeResult(ok=False, status=503, error="status 503")
TIMEOUT = ProbeResult(ok=False, error="timeout")
ERROR = ProbeResult(ok=False, status=500, error="status 500")
WELL = Peer(is_routed=True, failed_share=0.0)


@dataclass
class Run:
    """An external worker that has come up, its trackers, and the phase that the table has it in."""

    fitness: Fitness
    phase: Phase = Phase.READY
    goal: Goal = Goal.SERVE
    now_s: float = 0.0
    tokens: float = 0.0
    counts: Counts = Counts()  # noqa: RUF009 - it is frozen

    @property
    def is_asked(self) -> bool:
        return self.fitness.progress._is_asked

    @property
    def key(self) -> object:
        """What of it can make a difference later."""
        f = self.fitness
        p, r, o = f.progress, f.readiness, f.outlier
        still_s = min(p._still_s, HEALTH.stall_timeout_s if p._is_busy or p._is_asked else HEALTH.canary_interval_s)
        since_canary_s = min(p._still_s - p._canary_still_s, 4) if p._is_asked else 0
        return (
            *(self.phase, self.goal, p._is_asked, r.is_ready, r._streak, p.is_stalled, min(p._failures, 2)),
            *(p._is_busy, p._tokens is None, p._canary_moved and p._is_asked, still_s, since_canary_s),
            *(o.standing, o.is_due(self.now_s), self.phase is Phase.READY and self.counts.in_row),
        )

    def copy(self) -> "Run":
        """Return another one like it; what the trackers hold is immutable."""
        fitness = copy(self.fitness)
        for name in ("progress", "readiness", "outlier"):
            setattr(fitness, name, copy(getattr(fitness, name)))
        return replace(self, fitness=fitness)

    def happens(self, event: Event) -> None:
        after = step(self.phase, self.goal, event)
        if after is not None:
            assert isinstance(after.phase, Phase)
            assert after.goal is not None
            self.phase, self.goal = after.phase, after.goal
            if after.phase is Phase.READY:
                self.counts = replace(self.counts, in_row=0)

    def heed(self) -> None:
        event = self.fitness.follows(self.phase)
        if event is not None:
            self.happens(event)

    def look(self, health: ProbeResult, scrape: str, *, leases: int = 0, fails: bool = False) -> None:
        self.now_s += 1.0
        if scrape == "moved":
            self.tokens += 1
        busy = 2 if scrape == "busy" else 0
        counters = None if scrape == "none" else Counters(running=busy, waiting=0, tokens=self.tokens)
        if fails and self.phase is Phase.READY:
            self.counts = replace(self.counts, failed=self.counts.failed + 2, in_row=2)
        look = Look(health=health, counters=counters, leases=leases, replies=0, is_suspected=fails)
        was_asked = self.is_asked
        is_due = self.fitness.feed(look, self.now_s)
        assert self.is_asked == (was_asked or is_due)
        assert not (was_asked and is_due), "two canaries at once"
        self.fitness.feed_requests(self.counts, [WELL], self.now_s)
        self.heed()

    def canary(self, result: ProbeResult) -> None:
        self.fitness.feed_canary(result, self.now_s)
        self.heed()


def ways_on(run: Run) -> Iterator[Run]:
    """Yield where the next look, a canary's answer or the operator may take it."""
    scrapes = ("none", "still", "moved", "busy")
    looks = [(health, False) for health in (OK, TIMEOUT)]
    if run.phase is Phase.READY:  # only then can a request fail on it
        looks += [(health, True) for health in (OK, SAYS_NO, TIMEOUT)]
    for (health, fails), scrape, leases in itertools.product(looks, scrapes, (0, 1)):
        after = run.copy()
        after.look(health, scrape, leases=leases, fails=fails)
        yield after
    for result in (OK, ERROR, SAYS_NO, TIMEOUT) if run.is_asked else ():
        after = run.copy()
        after.canary(result)
        yield after
    for event in (Event.DRAIN, Event.EMPTY, Event.UNDRAIN):
        after = run.copy()
        after.happens(event)
        after.heed()
        yield after


STATES = 20_000


def walk() -> list[Run]:
    begin = Run(Fitness(HEALTH, now_s=0.0))
    begin.fitness.feed_requests(Counts(), [WELL], 0.0)
    seen: dict[object, Run] = {begin.key: begin}
    todo = deque([begin])
    while todo:
        for after in ways_on(todo.popleft()):
            if (key := after.key) not in seen:
                seen[key] = after
                assert len(seen) < STATES, "something of it grows without end"
                todo.append(after)
    return list(seen.values())


WALK = walk()
LOOKS = 16
"""In which a worker that is well must be back: its time out, a canary, and ``rise`` good probes."""


def test_the_walk_goes_everywhere() -> None:
    assert {run.phase for run in WALK} == {Phase.READY, Phase.UNREADY, Phase.DRAINING, Phase.DRAINED}
    assert {run.fitness.outlier.standing for run in WALK} == {Standing.IN, Standing.OUT}
    assert {run.fitness.progress.is_stalled for run in WALK} == {True, False}


def test_a_worker_receives_requests_exactly_while_nobody_objects() -> None:
    """An undrained worker received requests although its probes had failed; one that was well received none."""
    for run in WALK:
        if run.phase in (Phase.READY, Phase.UNREADY):
            assert bool(run.fitness.objection) == (run.phase is Phase.UNREADY), run


@pytest.mark.parametrize("scrape", ["none", "still", "moved"])
@pytest.mark.parametrize("leases", [0, 1])
def test_from_everywhere_a_worker_that_is_well_comes_back_by_itself(scrape: str, leases: int) -> None:
    """An external worker that was taken out by its canary never received a request again, although it answered all
    that came after."""
    for start in WALK:
        run = start.copy()
        if run.goal is Goal.REST:
            run.happens(Event.UNDRAIN)
        for _ in range(LOOKS):
            if run.is_asked:
                run.canary(OK)
            run.look(OK, scrape, leases=leases)
        if run.is_asked:
            run.canary(OK)
        assert run.phase is Phase.READY, (start, run)
        assert not run.fitness.stalled


def test_from_everywhere_a_worker_that_says_that_it_cannot_serve_receives_nothing() -> None:
    for start in WALK:
        run = start.copy()
        for _ in range(HEALTH.fall):
            run.look(SAYS_NO, "still")
        assert run.phase is not Phase.READY, (start, run)


def test_a_suspect_whose_health_says_503_is_out_at_once() -> None:
    """An engine that dies answers 500 for 0.3 s: it lost 48 requests in 83 ms while another worker was well."""
    for start in WALK:
        if start.phase is Phase.READY:
            run = start.copy()
            run.look(SAYS_NO, "still", fails=True)
            assert run.phase is Phase.UNREADY
            assert not run.fitness.readiness.is_ready, "for what it says, not only for its failed requests"


def test_one_whose_probes_fail_for_long_is_restarted_unless_it_still_has_requests() -> None:
    """Its port was closed, its process lived, canaries were switched off: it stayed unready until somebody came."""
    config = replace(HEALTH, canary_interval_s=0, unready_timeout_s=20)
    for leases in (0, 1):
        run = Run(Fitness(config, now_s=0.0))
        for _ in range(HEALTH.fall + 21):
            run.look(SAYS_NO, "still", leases=leases)
        assert ("not ready for 20 s: health: status 503" in run.fitness.stalled) == (leases == 0)
        run.fitness.excuse()
        assert not run.fitness.stalled


def test_from_everywhere_one_that_answers_every_canary_with_an_error_counts_as_hung() -> None:
    """It says that it is well, its gauges claim work, and every request gets 500.

    Fault 2 of docs/what-happens-when.md.
    """
    for start in WALK:
        run = start.copy()
        for _ in range(4):
            run.look(OK, "busy", fails=True)
            if run.is_asked:
                run.canary(ERROR)
        assert run.fitness.stalled, (start, run)


NO_CANARIES = replace(HEALTH, canary_interval_s=0, unready_timeout_s=20)


def look_at(fitness: Fitness, *times_s: float, health: ProbeResult = SAYS_NO, leases: int = 0) -> list[bool]:
    """Return after each look whether it is restarted for it."""
    seen = []
    for now_s in times_s:
        fitness.feed(Look(health=health, counters=None, leases=leases, replies=0), now_s)
        seen.append(fitness.stalled.startswith("not ready for"))
    return seen


def test_one_is_restarted_when_it_was_not_ready_for_so_long_to_the_second() -> None:
    fitness = Fitness(NO_CANARIES, now_s=0)
    assert look_at(fitness, 1) == [False], "once is not yet unready"
    assert look_at(fitness, 6, 11, 16, 20.5, 21) == [False] * 4 + [True]
    fitness.excuse()
    assert look_at(fitness, 26, 31, 36, 40.5, 41) == [False] * 4 + [True]


def test_a_request_on_it_or_a_good_probe_begins_that_time_anew() -> None:
    for health, leases in ((SAYS_NO, 1), (OK, 0)):
        fitness = Fitness(NO_CANARIES, now_s=0)
        assert look_at(fitness, 1, 6, 11, 16) == [False] * 4
        look_at(fitness, 17, 18, health=health, leases=leases)
        assert look_at(fitness, 22, 23, 28, 33, 37) == [False] * 5


def test_a_pause_counts_for_a_quarter_of_that_time() -> None:
    looks = look_at(Fitness(NO_CANARIES, now_s=0), 1, *(n * 1000 for n in range(1, 5)))
    assert looks == [False, False, False, False, True]


def test_without_such_a_time_nobody_is_restarted_for_it() -> None:
    off = Fitness(replace(NO_CANARIES, unready_timeout_s=0), now_s=0)
    assert look_at(off, *range(1, 100)) == [False] * 99
    assert off.objection == "health: status 503"


def test_a_probe_that_is_late_while_replies_come_is_no_failure_and_any_other_is() -> None:
    for health, is_ready in ((TIMEOUT, True), (SAYS_NO, False)):
        fitness = Fitness(HEALTH, now_s=0)
        for now_s in (1, 2, 3):
            fitness.feed(Look(health=health, counters=None, leases=1, replies=now_s, replied_meanwhile=True), now_s)
        assert fitness.readiness.is_ready is is_ready
    late = Fitness(HEALTH, now_s=0)
    look_at(late, 1, 2, health=TIMEOUT)
    assert late.objection == "health: timeout"


def test_why_its_probes_fail_is_told_until_enough_are_good() -> None:
    fitness = Fitness(NO_CANARIES, now_s=0)
    look_at(fitness, 1, 2)
    look_at(fitness, 3, health=OK)
    assert fitness.objection == "health: status 503"
    look_at(fitness, 4, health=OK)
    assert (fitness.objection, fitness.health_error) == ("", "")


def test_a_hang_says_what_showed_it() -> None:
    asked = Fitness(HEALTH, now_s=0)
    assert asked.feed(Look(health=OK, counters=None, leases=0, replies=0, is_suspected=True), 1)
    asked.feed_canary(TIMEOUT, 2)
    assert asked.stalled == asked.objection == "one token did not come: timeout"
    assert asked.follows(Phase.READY) is Event.FELL
    assert asked.follows(Phase.UNREADY) is None
    assert asked.feed(Look(health=OK, counters=None, leases=0, replies=0), 3), "in doubt, it is asked again"
    asked.feed_canary(OK, 4)
    assert (asked.stalled, asked.canary_error) == ("", "")
    assert asked.follows(Phase.UNREADY) is Event.ROSE
    assert asked.follows(Phase.READY) is None
    busy = Fitness(HEALTH, now_s=0)
    counters = Counters(running=1, waiting=0, tokens=5)
    for now_s in range(10):
        busy.feed(Look(health=OK, counters=counters, leases=1, replies=0), now_s)
    assert busy.stalled == "no token for 4 s although requests are running"
