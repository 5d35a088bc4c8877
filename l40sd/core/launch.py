"""Placement and engine -> exactly what is run, and how it is probed and stopped."""

from collections.abc import Mapping
from dataclasses import dataclass

from l40sd.core.model import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """How one engine shows that it lives, and what it counts.

    Attributes:
        health_path: GET answers 200 when it can serve.
        health_timeout_s: Least deadline for that GET (SGLang generates a token first); 0: the config's.
        models_path: GET lists the served names; empty: the engine has no such list.
        token_path: POST makes one token here (``/v1/completions``); empty: it cannot be asked.
        metrics_path: Prometheus text; empty: none.
        metrics_need_key: The scrape needs the worker's API key (llama.cpp).
        running_metric: Gauge of requests being decoded; empty: unknown.
        waiting_metric: Gauge of requests in the engine's own queue; empty: unknown.
        tokens_metrics: Counters that move whenever the engine makes progress; their sum is watched.
    """

    health_path: str = "/health"
    health_timeout_s: float = 0.0
    models_path: str = "/v1/models"
    token_path: str = "/v1/completions"
    metrics_path: str = "/metrics"
    metrics_need_key: bool = False
    running_metric: str = ""
    waiting_metric: str = ""
    tokens_metrics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One worker's process, ready to be spawned; or, for an external worker, only how to probe it.

    Attributes:
        argv: Whole command line, numactl prefix first where the worker is pinned; empty for external.
        env: Added to a minimal environment (PATH, HOME, LANG); never the daemon's own secrets.
        host: Address the worker listens on.
        port: 0 in a launch that was only built for its fingerprint.
        api_key: Key between proxy and worker; empty where the engine takes none.
        served_name: The model name that the engine answers to.
        term_timeout_s: From SIGTERM to the kill.
        fingerprint: Same fingerprint, same process: covers argv, env and probes with port and key left out.
        pinning: What numactl was told, or would be told on a live host; for display.
    """

    worker: WorkerId
    engine: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int
    api_key: str
    served_name: str
    probes: Probes
    term_timeout_s: float
    fingerprint: str
    pinning: str = ""
