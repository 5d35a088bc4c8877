"""Has it come up: one start, from a closed port to the first token."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from statistics import median

from l40sd.config.options import Config
from l40sd.engines.table import Probes
from l40sd.model import ModelFacts, ModelName
from l40sd.workers.health import REFUSED, ProbeResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What a worker's processes have done so far: output, CPU time and reading, all only ever growing."""

    log_bytes: int = 0
    cpu_s: float = 0.0
    read_bytes: int = 0


def startup_timeout_s(
    config: Config, model: ModelName, facts: ModelFacts | None = None, past_loads_s: Sequence[float] = ()
) -> float:
    """Return how long a start of this model may take.

    1. The model's own setting, if there is one.
    2. Else the general deadline and the time to read the checkpoint at the slowest rate that still counts as loading.
    3. Never less than twice the longest load seen: a page cache that was warm then may be cold now. Past loads only
       lengthen the deadline, for a quick one proves nothing about the next.
    """
    if config.models[model].startup_timeout_s > 0:
        return config.models[model].startup_timeout_s
    size_bytes = (facts.size_bytes if facts else None) or 0
    deadline_s = config.health.startup_timeout_s + size_bytes / config.health.load_bytes_per_s
    return max(deadline_s, 2 * max(past_loads_s, default=0.0))


ANSWERED = ProbeResult(ok=True)


class Stage(IntEnum):
    """How far a start has come; each is what is being waited for."""

    PORT = 0  # the health probe is refused
    HEALTH = 1  # it answers, not yet with 200
    MODEL = 2  # the served name is not listed yet
    TOKEN = 3  # the first token has not come
    READY = 4


class StartVerdict(StrEnum):
    """What a start has come to."""

    WAITING = "waiting"
    READY = "ready"
    LATE = "late"


PROLONGED_AT_MOST = 4
"""Times its deadline that a start may take while it shows progress: an engine that loops for ever is busy, too."""
BUSY_CORES = 0.2
"""CPU time per second that counts as work; below are timers, and the answers to our own probes."""
READ_STEP_BYTES = 1 << 20
"""Reading less than this between two looks is not loading a checkpoint."""


class Startup:
    """One start: port, health, model listed, one token.

    ``stage`` says what to ask next: PORT and HEALTH the health probe, MODEL the list of models, TOKEN one token.
    A stage once passed is not asked again; a worker that falls back meanwhile exits or fails its next stage.

    Past the deadline the start goes on as long as its last progress is young: a new stage, CPU time or reading; output
    only while the port is closed, because behind an open one it may be the log of our own probes. Young means
    ``stall_s``, but no more than half the deadline: what a short start did at its beginning says nothing at its end.
    """

    __slots__ = (
        "_activity",
        "_deadline_s",
        "_expected_s",
        "_progress_s",
        "_started_s",
        "_young_s",
        "probes",
        "reason",
        "stage",
    )

    def __init__(
        self, probes: Probes, *, deadline_s: float, stall_s: float, now_s: float, past_loads_s: Sequence[float] = ()
    ) -> None:
        self.probes = probes
        self.stage = Stage.PORT
        self.reason = "not asked yet"
        self._started_s = self._progress_s = now_s
        self._deadline_s = deadline_s
        self._young_s = min(stall_s, deadline_s / 2)
        self._expected_s = median(past_loads_s) if past_loads_s else None
        self._activity: tuple[Activity, float] | None = None

    def feed_health(self, result: ProbeResult, now_s: float) -> StartVerdict:
        """Take the answer to a health probe."""
        self.reason = "" if result.ok else f"health: {result.error}{self._mend(result, _HEALTH_MENDS)}"
        if result.ok:
            self._reach(Stage.MODEL, now_s)
        elif result.error != REFUSED:
            self._reach(Stage.HEALTH, now_s)
        return self.check(now_s)

    def feed_models(
        self, names: Collection[str], served_name: str, now_s: float, result: ProbeResult = ANSWERED
    ) -> StartVerdict:
        """Take the names that the engine lists; none when it did not answer, and ``result`` says how."""
        if served_name in names:
            self.reason = ""
            self._reach(Stage.TOKEN, now_s)
        elif not result.ok:
            self.reason = f"list of models: {result.error}{self._mend(result, _MODELS_MENDS)}"
        else:
            self.reason = f"lists {', '.join(sorted(names)) or 'no model'}, not {served_name}"
        return self.check(now_s)

    def feed_token(self, result: ProbeResult, now_s: float) -> StartVerdict:
        """Take the answer to a request for one token."""
        self.reason = "" if result.ok else f"first token: {result.error}{self._mend(result, _KEY_MENDS)}"
        if result.ok or result.status in _CANNOT_BE_ASKED:
            self._reach(Stage.READY, now_s)
        return self.check(now_s)

    def feed_activity(self, activity: Activity, now_s: float) -> StartVerdict:
        """Take what the worker's processes have done so far."""
        if self._activity is not None:
            before, before_s = self._activity
            works = activity.cpu_s - before.cpu_s > BUSY_CORES * (now_s - before_s)
            reads = activity.read_bytes - before.read_bytes >= READ_STEP_BYTES
            writes = activity.log_bytes > before.log_bytes and self.stage is Stage.PORT
            if works or reads or writes:
                self._progress_s = now_s
        self._activity = (activity, now_s)
        return self.check(now_s)

    def check(self, now_s: float) -> StartVerdict:
        """Return the verdict as of now."""
        took_s = now_s - self._started_s
        if self.stage is Stage.READY:
            return StartVerdict.READY
        if took_s < self._deadline_s:
            return StartVerdict.WAITING
        if took_s < PROLONGED_AT_MOST * self._deadline_s and now_s - self._progress_s < self._young_s:
            return StartVerdict.WAITING
        return StartVerdict.LATE

    def fraction(self, now_s: float) -> float | None:
        """Return how much of the start is done, 0 to 1, judged by past loads; None when there are none."""
        if self.stage is Stage.READY:
            return 1.0
        return min(0.99, (now_s - self._started_s) / self._expected_s) if self._expected_s else None

    def _mend(self, result: ProbeResult, mends: Mapping[int, str]) -> str:
        text = mends.get(result.status or 0, "")
        return f" ({text.format(health=self.probes.health_path, models=self.probes.models_path)})" if text else ""

    def _reach(self, stage: Stage, now_s: float) -> None:
        if stage is Stage.MODEL and not self.probes.models_path:
            stage = Stage.TOKEN
        if stage is Stage.TOKEN and not self.probes.token_path:
            stage = Stage.READY
        if stage > self.stage:
            self.stage, self._progress_s = stage, now_s


_ANOTHER_KEY = (
    "it wants another API key than the worker's: leave keys out of args and command, and give it"
    " {{api_key}} in env; external workers: endpoint_key"
)
_KEY_MENDS: Mapping[int, str] = {401: _ANOTHER_KEY, 403: _ANOTHER_KEY}
_MODELS_MENDS: Mapping[int, str] = {**_KEY_MENDS, 404: "it has no {models}: its API is elsewhere, e.g. below a prefix"}
_HEALTH_MENDS: Mapping[int, str] = {
    **_KEY_MENDS,
    404: "it has no {health}: set health_path of its [engines] entry, or leave out what moves its API",
}
"""By the status of an answer: what is behind it, and what mends it."""

_CANNOT_BE_ASKED = frozenset({400, 404, 405, 422, 501})
"""Answers of an engine that does not complete text (embeddings, rerank): it is up, and has no token to give."""
