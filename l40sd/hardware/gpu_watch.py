"""Tells when a GPU is lost and when one is back, and takes GPUs in where there were none at all.

Otherwise a GPU that is back is only offered: to place the pattern anew moves workers, and that is the operator's to
say (`l40sctl reload`).
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from l40sd.clock import now_s
from l40sd.config.options import HostConfig
from l40sd.hardware.host import Host
from l40sd.hardware.presence import Lost

OFFER = "`l40sctl reload` takes it in: the pattern is placed anew"


class GpuWatch:
    """Looks at the host's GPUs now and then.

    Args:
        config: Returns the configuration in force.
        take_in: Looks at the host anew and places the pattern on what is found.
    """

    def __init__(self, host: Host, config: Callable[[], HostConfig], take_in: Callable[[], Awaitable[None]]) -> None:
        self._host = host
        self._config = config
        self._take_in = take_in
        self._lost: dict[str, Lost] = {}
        self._offered: frozenset[str] = frozenset()
        self._renewed_at_s = now_s()
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()

    async def run(self) -> None:
        """Look until cancelled; a host file has nothing to look at."""
        while self._host.inventory.is_live:
            self.tell()
            await asyncio.sleep(self._config().gpu_check_interval_s)
            await self.look()

    async def look(self) -> None:
        """Ask NVML which GPUs answer; a new helper now and then, while any is missing, finds those that came back."""
        is_due = now_s() >= self._renewed_at_s + self._config().gpu_rescan_interval_s
        if is_due and (self._host.lost or not self._host.inventory.gpus):
            self._renewed_at_s = now_s()
            await self._host.renew()
        await self._host.memory()
        if not self._host.inventory.gpus and self._offered and self._offered == frozenset(self._host.offered):
            await self._take_in()  # seen twice: a driver that is just loading finds one GPU after the other

    def tell(self) -> None:
        """Log what is different since the last time."""
        lost = {gpu.name: gpu for gpu in self._host.lost}
        offered = frozenset(self._host.offered)
        for name in lost.keys() - self._lost.keys():
            self._log.error("inventory.gpu_lost", gpu=name, reason=lost[name].reason)
        for name in sorted(self._lost.keys() - lost.keys() - offered):
            self._log.info("inventory.gpu_back", gpu=name)
        for name in sorted(offered - self._offered):
            self._log.warning("inventory.gpu_offered", gpu=name, hint=OFFER)
        self._lost, self._offered = lost, offered
