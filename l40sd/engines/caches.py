"""Where engines keep what they compiled, and which of it goes when it becomes too much.

One folder for each model and shape: replicas alike share it, and what they compile depends on little else.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from l40sd.config.options import Config, slug
from l40sd.model import Placement

YOUNG_S = 3600.0
"""A cache used within this time may belong to a worker that is only just coming up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One folder; ``used_s`` on the same clock as ``now_s`` below."""

    name: str
    size_bytes: int
    used_s: float


def folder_of(placement: Placement, config: Config) -> str:
    """Return the folder for what the engine of a placement compiles."""
    root = config.daemon.cache_dir or f"{config.daemon.state_dir.rstrip('/')}/cache"
    return f"{root.rstrip('/')}/{slug(placement.model)}-tp{placement.tp}-pp{placement.pp}"


def to_remove(
    caches: Sequence[Cache], *, mine: str, in_use: Collection[str], now_s: float, limit_bytes: int
) -> tuple[str, ...]:
    """Return the caches that go so that the rest is within the limit, the one longest unused first.

    What a process may be using stays, so the rest may be above the limit after all. ``mine``, about to be used, goes
    last: a compilation more, where it alone is too much.
    """
    total_bytes = sum(cache.size_bytes for cache in caches)
    free = [each for each in caches if each.name not in in_use and (each.name == mine or now_s - each.used_s > YOUNG_S)]
    going: list[str] = []
    for cache in sorted(free, key=lambda each: (each.name == mine, each.used_s, each.name)):
        if total_bytes <= limit_bytes:
            break
        total_bytes -= cache.size_bytes
        going.append(cache.name)
    return tuple(going)
