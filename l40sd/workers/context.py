"""What all workers share: made once by the daemon, never changed."""

from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from l40sd.hardware.host import Host
from l40sd.routing.routes import Routes
from l40sd.workers.keys import WorkerKeys
from l40sd.workers.known_models import KnownModels
from l40sd.workers.ports import PortPool
from l40sd.workers.probe import Prober
from l40sd.workers.process import Processes


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """The parts that a worker works with.

    Attributes:
        python: The interpreter that simulated workers are run with.
        base_env: What workers see of the daemon's own environment.
    """

    host: Host
    processes: Processes
    ports: PortPool
    keys: WorkerKeys
    prober: Prober
    routes: Routes
    models: KnownModels
    python: str
    base_env: Mapping[str, str]
    log: structlog.stdlib.BoundLogger
