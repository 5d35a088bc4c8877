"""What all workers share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from l40sd.hardware.host import Host
from l40sd.model import ModelFacts, ModelName, WorkerId
from l40sd.routing.outliers import Peer
from l40sd.routing.routes import Routes
from l40sd.workers.keys import WorkerKeys
from l40sd.workers.ports import PortPool
from l40sd.workers.probe import Prober
from l40sd.workers.process import Processes


@dataclass(slots=True, kw_only=True)
class Tools:
    """The parts that a worker works with.

    Attributes:
        changed: Tells the supervisor that an observation is new.
        peers: Returns the other live workers of a worker's model.
    """

    host: Host
    processes: Processes
    ports: PortPool
    keys: WorkerKeys
    prober: Prober
    routes: Routes
    facts: Mapping[ModelName, ModelFacts]
    past_loads_s: dict[ModelName, list[float]]
    python: str
    base_env: Mapping[str, str]
    log: structlog.stdlib.BoundLogger
    changed: Callable[[], None] = lambda: None
    peers: Callable[[WorkerId], Sequence[Peer]] = lambda _: ()
