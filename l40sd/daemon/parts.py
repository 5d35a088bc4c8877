"""What runs already when the host and its workers are looked at."""

from dataclasses import dataclass
from pathlib import Path

from l40sd import systemd
from l40sd.config.load import Loaded
from l40sd.control.events import Events
from l40sd.daemon.lock import DaemonLock
from l40sd.proxy.server import Proxy
from l40sd.routing.routes import Routes


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Made by ``main.run``, for what comes behind the endpoint.

    Attributes:
        path: Of the configuration's main file.
        loaded: The configuration that this daemon started with.
    """

    path: Path
    loaded: Loaded
    events: Events
    notifier: systemd.Notifier
    lock: DaemonLock
    routes: Routes
    proxy: Proxy
