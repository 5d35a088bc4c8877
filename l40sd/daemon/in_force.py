"""The configuration in force: which it is, how it is read anew, how its files differ from it."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import structlog

from l40sd import log
from l40sd.config import files as config_files
from l40sd.config import show as config_show
from l40sd.config.load import Loaded, load
from l40sd.config.options import Config, in_force
from l40sd.errors import L40sError
from l40sd.hardware.presence import changes
from l40sd.proxy.api_keys import read_keys
from l40sd.proxy.key_file import key_changes
from l40sd.proxy.server import Proxy
from l40sd.supervisor.supervisor import Supervisor


class ConfigInForce:
    """Owns what the daemon goes by; a bad one never takes its place.

    Attributes:
        path: The main file.
        reload_problem: Why the latest reload was refused; empty when it was not.
    """

    def __init__(self, path: Path, loaded: Loaded, supervisor: Supervisor, proxy: Proxy) -> None:
        self.path = path
        self.reload_problem = ""
        self._loaded = loaded  # its config is the one in force
        self._started = loaded.config
        self._supervisor = supervisor
        self._proxy = proxy
        self._log = structlog.get_logger()

    @property
    def config(self) -> Config:
        """What the daemon goes by."""
        return self._loaded.config

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it was read from."""
        return self._loaded.files

    def to_toml(self) -> str:
        """Return it as TOML, each option with where it comes from."""
        return config_show.to_toml(self._loaded.config, self._loaded.origins)

    async def reload(self, *, forget_gpus: bool = False) -> list[str]:
        """Read the configuration and look at the host again; what changed is returned. A bad one changes nothing.

        Args:
            forget_gpus: GPUs that are missing were removed.

        Raises:
            L40sError: The configuration is bad or does not fit this host.
        """
        try:
            fresh = load(config_files.read(self.path))
            config = in_force(self._started, fresh.config)
            keys = read_keys(config.proxy.api_keys_file)
            changed = self._differences(fresh.config, keys)
            changed += await self._reconfigure(config, forget_gpus=forget_gpus)
        except L40sError as error:
            self._log.error("config.reload.failed", reason=str(error))
            self.reload_problem = str(error)
            raise
        self.reload_problem = ""
        self._loaded = replace(fresh, config=config)
        self._proxy.configure(config.proxy)
        self._proxy.set_api_keys(keys)
        log.set_level(config.daemon.log_level)
        self._log.info("config.reloaded", changed=changed)
        return changed

    async def take_in_gpus(self) -> None:
        """Use GPUs that have come to a host that had none; what cannot be placed on them is said, and tried again."""
        try:
            changed = await self._reconfigure(self.config)
        except L40sError as error:
            self._log.error("pattern.degraded", pattern=self._supervisor.want.pattern, reason=str(error), workers=0)
        else:
            self._log.info("inventory.gpus_taken_in", changed=changed)

    def diff(self) -> str:
        """Return what a reload would say and change.

        Raises:
            L40sError: The files are bad.
        """
        fresh = load(config_files.read(self.path)).config
        return "\n".join(self._differences(fresh, read_keys(fresh.proxy.api_keys_file)))

    async def _reconfigure(self, config: Config, *, forget_gpus: bool = False) -> list[str]:
        """Place the pattern anew, with this configuration and on the GPUs that there are now; return which are others.

        Raises:
            L40sError: It does not fit; then nothing has changed.
        """
        host = self._supervisor.context.host
        facts = await host.facts(config)
        found = await host.look(held=self._supervisor.workers.held_gpus(), forget=forget_gpus)
        former = host.take(found)
        try:
            self._supervisor.reconfigure(config, facts)
        except L40sError:
            host.take(former)
            raise
        return list(changes(former.inventory, found.inventory))

    def _differences(self, fresh: Config, keys: Collection[str]) -> list[str]:
        """Return how files that were just read differ from what is in force."""
        return [*config_show.diff(self.config, fresh), *key_changes(self._proxy.api_keys, keys)]
