"""How fast a change may go, and how fast it goes: by the configuration, by this host's past loads."""

from collections.abc import Mapping, Sequence
from statistics import median

from l40sd.core.config import Config
from l40sd.core.engines import resolve
from l40sd.core.health import PROLONGED_AT_MOST, startup_timeout_s
from l40sd.core.launch import term_timeout_s
from l40sd.core.lifecycle import Phase
from l40sd.core.model import ModelFacts, ModelName
from l40sd.core.plan import Observed, Wanted, slot
from l40sd.core.rehearsal import Pace, rehearse
from l40sd.core.rollout import Terms, begin

SLACK_S = 30.0
"""For the turns between the steps."""

Facts = Mapping[ModelName, ModelFacts]
Loads = Mapping[ModelName, Sequence[float]]
"""Seconds that each model's latest starts took, on this host."""


def slowest(config: Config, facts: Facts, loads_s: Loads) -> Pace:
    """Return the pace at which every step takes all the time that the configuration gives it."""
    workers = config.workers
    before_s = workers.gpu_free_timeout_s + workers.spawn_timeout_s
    term_s = max((term_timeout_s(config, resolve(m.engine, config.engines)) for m in config.models.values()), default=0)
    return Pace(
        start_parallel=workers.start_parallel,
        min_ready=workers.min_ready,
        load_s={
            name: before_s + PROLONGED_AT_MOST * startup_timeout_s(config, name, facts.get(name), loads_s.get(name, ()))
            for name in config.models
        },
        stop_s=workers.drain_timeout_s + term_s + 2 * workers.kill_timeout_s,
    )


def usual(config: Config, loads_s: Loads) -> Pace:
    """Return the pace of this host's past loads, with drains that are over at once."""
    return Pace(
        start_parallel=config.workers.start_parallel,
        min_ready=config.workers.min_ready,
        load_s={name: median(took_s) for name, took_s in loads_s.items() if took_s},
        stop_s=0.0,
    )


def bound_s(wanted: Sequence[Wanted], observed: Sequence[Observed], terms: Terms, pace: Pace) -> float:
    """Return after how long a change is ended, whatever still moves: all its steps, each as slow as it may be."""
    return rehearse(wanted, observed, terms, pace).duration_s + SLACK_S


def bound_back_s(wanted: Sequence[Wanted], previous: Sequence[Wanted], pace: Pace) -> float:
    """Return after how long going back to ``previous`` is ended: as if all of ``wanted`` had come about before."""
    there = [slot(w, Phase.READY) for w in wanted]
    return bound_s(previous, there, begin(previous, there, former=None, is_trial=False), pace)
