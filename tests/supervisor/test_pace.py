"""How many workers start at once, and when a change is over at the latest."""

from dataclasses import replace

import pytest
from hosts import tree_host
from test_reconcile import ready, wanted_layout

from l40sd.config.options import Config, ModelConfig, WorkersConfig
from l40sd.model import Inventory, ModelFacts, ModelName, NumaNode
from l40sd.supervisor.pace import FEW, SLACK_S, bound_back_s, bound_s, slowest, start_parallel, usual
from l40sd.supervisor.rehearsal import rehearse
from l40sd.supervisor.rollout import begin
from l40sd.workers.startup import PROLONGED_AT_MOST

M = ModelName("m")
GIB = 1 << 30
A = wanted_layout([("m", 1)] * 12)
B = wanted_layout([("m", 2)] * 6)
CONFIG = Config(models={M: ModelConfig(name=M, engine="simulated")})


def host(memory_gib: int, cpus: int = 128) -> Inventory:
    node = NumaNode(id=0, cpus=frozenset(range(cpus)), memory_bytes=memory_gib * GIB)
    return replace(tree_host([[[["g"] * 12]]]), numa_nodes=(node,))


@pytest.mark.parametrize(
    ("memory_gib", "cpus", "checkpoint_gib", "at_once"),
    [
        (512, 128, 16, 30),  # memory: (256 - 16) / 8 for each
        (512, 16, 16, 8),  # CPUs: two for each
        (512, 128, 300, FEW),  # does not stay in the page cache
        (0, 128, 16, FEW),  # nobody knows
        (64, 128, 20, FEW),
    ],
)
def test_as_many_start_at_once_as_find_their_checkpoint_in_memory(
    memory_gib: int, cpus: int, checkpoint_gib: int, at_once: int
) -> None:
    """Two at a time made a start of twelve workers six loads long, where the first had brought all of it to memory."""
    facts = {M: ModelFacts(size_bytes=checkpoint_gib * GIB)}
    assert start_parallel(CONFIG, host(memory_gib, cpus), facts, A) == at_once
    said = replace(CONFIG, workers=WorkersConfig(start_parallel=3))
    assert start_parallel(said, host(memory_gib, cpus), facts, A) == 3


def test_a_checkpoint_of_unknown_size_is_as_large_as_its_gpus() -> None:
    memory = host(0).gpus[0].memory_bytes
    enough = host(2 * memory // GIB + 2 * 8 * 6 + 2)
    assert start_parallel(CONFIG, enough, {}, A) >= 6
    assert start_parallel(CONFIG, host(2 * memory // GIB - 1), {}, A) == FEW


def test_a_change_is_over_at_the_latest_when_all_its_steps_took_all_their_time() -> None:
    pace = slowest(CONFIG, {}, {}, 2)
    workers, health = CONFIG.workers, CONFIG.health
    start_s = workers.gpu_free_timeout_s + workers.spawn_timeout_s + PROLONGED_AT_MOST * health.startup_timeout_s
    assert pace.load_s == {M: start_s}
    assert pace.stop_s == workers.drain_timeout_s + workers.term_timeout_s + 2 * workers.kill_timeout_s
    terms = begin(B, ready(A), former=None, is_trial=True)
    forward_s = bound_s(B, ready(A), terms, pace)
    assert forward_s == 4 * (start_s + pace.stop_s) + SLACK_S  # the first alone, then 2, 2 and 1
    assert bound_back_s(B, A, pace) >= 3 * (start_s + pace.stop_s)


def test_past_loads_say_how_long_it_takes_and_how_long_callers_wait() -> None:
    one = wanted_layout([("m", 12)])
    pace = usual(CONFIG, {M: [70.0, 60.0, 65.0]}, 12)
    played = rehearse(A, ready(one), begin(A, ready(one), former=None, is_trial=True), pace)
    assert played.waits_s == {M: 65.0}  # nothing else can move before the one that holds all GPUs is gone
    assert played.duration_s == 130.0  # the first proves itself, then the others at once
    quick = rehearse(A, ready(one), begin(A, ready(one), former=None, is_trial=True, remembered={"f"}), pace)
    assert quick.duration_s == 65.0
