"""How fast a change may go, and how fast it goes: by the configuration, by this host's past loads."""

from collections.abc import Mapping, Sequence
from statistics import median

from l40sd.config.options import Config
from l40sd.engines.launch import term_timeout_s
from l40sd.engines.table import resolve
from l40sd.model import Inventory, ModelFacts, ModelName
from l40sd.supervisor.rehearsal import Pace, rehearse
from l40sd.supervisor.rollout import Terms, begin
from l40sd.workers.lifecycle import Phase
from l40sd.workers.slot import Observed, Wanted, slot
from l40sd.workers.startup import PROLONGED_AT_MOST, startup_timeout_s

SLACK_S = 30.0
"""For the passes between the steps."""

MOST = 64
FEW = 2
"""Starts at once where reading is what they wait for: more of them would only share the disk."""
LOADING_CPUS_PER_GPU = 2
"""Logical CPUs that a rank keeps busy while it loads."""
LOADING_BYTES_PER_GPU = 8 << 30
"""Host memory that a rank takes while it loads, beside the page cache."""

Facts = Mapping[ModelName, ModelFacts]
Loads = Mapping[ModelName, Sequence[float]]
"""Seconds that each model's latest starts took, on this host."""


def start_parallel(config: Config, inventory: Inventory, facts: Facts, wanted: Sequence[Wanted]) -> int:
    """Return how many workers may be starting at once.

    1. As configured, if it is.
    2. Few where each start reads its checkpoint from the disk: those of the wanted models do not fit into half of the
       host's memory together, or nobody knows how large that is.
    3. Else the first reads a checkpoint and the others find it in the page cache: as many as CPUs and memory carry.

    Measured on two busy CPUs: twelve llama.cpp workers (135M, in page cache) are ready after 32 s one by one, 20 s two
    by two, 16 s by fours, 11 s all at once; twelve simulated loads of 4 s after 28 s two by two, 7 s all at once.

    A checkpoint of unknown size is taken to be as large as the memory of the GPUs that it is loaded to.
    """
    if config.workers.start_parallel:
        return config.workers.start_parallel  # 1
    gpu_bytes = max((gpu.memory_bytes for gpu in inventory.gpus), default=0)
    sizes_bytes = {
        w.placement.model: (facts[w.placement.model].size_bytes if w.placement.model in facts else None)
        or w.placement.weight * gpu_bytes
        for w in wanted
    }
    spare_bytes = sum(node.memory_bytes for node in inventory.numa_nodes) // 2 - sum(sizes_bytes.values())
    if spare_bytes <= 0:
        return FEW  # 2
    widest = max((w.placement.weight for w in wanted), default=1) or 1
    cpus = sum(len(node.cpus) for node in inventory.numa_nodes)
    most = min(cpus // (LOADING_CPUS_PER_GPU * widest), spare_bytes // (LOADING_BYTES_PER_GPU * widest))
    return max(FEW, min(MOST, most))  # 3


def slowest(config: Config, facts: Facts, loads_s: Loads, at_once: int) -> Pace:
    """Return the pace at which every step takes all the time that the configuration gives it."""
    workers = config.workers
    before_s = workers.gpu_free_timeout_s + workers.spawn_timeout_s
    term_s = max((term_timeout_s(config, resolve(m.engine, config.engines)) for m in config.models.values()), default=0)
    return Pace(
        start_parallel=at_once,
        min_ready=workers.min_ready,
        load_s={
            name: before_s + PROLONGED_AT_MOST * startup_timeout_s(config, name, facts.get(name), loads_s.get(name, ()))
            for name in config.models
        },
        stop_s=workers.drain_timeout_s + term_s + 2 * workers.kill_timeout_s,
    )


def usual(config: Config, loads_s: Loads, at_once: int) -> Pace:
    """Return the pace of this host's past loads, with drains that are over at once."""
    return Pace(
        start_parallel=at_once,
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
