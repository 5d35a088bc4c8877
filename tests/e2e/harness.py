"""What the end-to-end tests share: where the engine is, configurations, and the claims made again and again."""

from pathlib import Path

from loadkit import Mix, Tally

from l40sd.control.messages import Status

ENGINE = Path(__file__).resolve().parents[2] / ".cache" / "engine"
MODEL = ENGINE / "models" / "smollm2-135m.gguf"

STOP_S = 60.0
START_S = 120.0
CHANGE_S = 240.0


SMOLLM2 = f"""
[host]
inventory = "l40s-12-4+2"

[models.smollm2]
engine = "llama-cpp"
source = "{MODEL}"
attention_heads = 64
args = ["-t", "1", "-c", "2048", "-np", "4", "--no-warmup"]
"""

SIMULATED = """
[host]
inventory = "l40s-12-4+2"

[models.small]
engine = "simulated"
attention_heads = 64
args = ["--tokens-per-s", "40", "--drain-s", "30"]

[models.large]
engine = "simulated"
attention_heads = 64
args = ["--tokens-per-s", "20", "--drain-s", "30"]

[[patterns.small.replicas]]
model = "small"
count = "fill"

[[patterns.pairs.replicas]]
model = "small"
tp = 2
count = "fill"

[[patterns.mixed.replicas]]
model = "small"
count = 4

[[patterns.mixed.replicas]]
model = "large"
count = 2
tp = 4

[[patterns.wide.replicas]]
model = "large"
count = 1
tp = 4

[[patterns.wide.replicas]]
model = "small"
count = "fill"
tp = 2
"""


def mix(url: str, *models: str, streams: int = 5, shorts: int = 3) -> Mix:
    return Mix(url=url, models=models or ("smollm2",), streams=streams, shorts=shorts)


def assert_nothing_lost(tally: Tally) -> None:
    assert tally.lost == 0, tally.examples
    assert tally.answered > 0


def assert_no_gpu_has_two_owners(status: Status) -> None:
    owned = [gpu for worker in status.workers for gpu in worker.gpu_ids]
    assert len(owned) == len(set(owned)), status.workers
