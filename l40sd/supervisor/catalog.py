"""What the routes are told: which models there are and, for a request that finds no worker, what is on its way."""

from collections.abc import Iterator, Mapping
from statistics import median

from l40sd.config.options import Config
from l40sd.model import ModelName
from l40sd.routing.routes import CatalogEntry
from l40sd.supervisor.change import Want
from l40sd.supervisor.worker_set import WorkerSet
from l40sd.workers.known_models import KnownModels
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.outlook import Patience, Slot, outlook
from l40sd.workers.slot import Wanted


def catalog(want: Want, workers: WorkerSet, models: KnownModels) -> Mapping[ModelName, CatalogEntry]:
    """Return every configured model with its outlook, by name."""
    slots: dict[ModelName, list[Slot]] = {}
    for worker in workers.values():
        slots.setdefault(worker.wanted.placement.model, []).append(worker.slot())
    for w in _still_to_be_made(want, workers):
        is_held = not workers.unusable().isdisjoint(w.placement.gpus)
        slots.setdefault(w.placement.model, []).append(Slot(phase=Phase.STUCK if is_held else Phase.WAITING))
    wanted = {w.placement.model for w in want.wanted}
    return {
        name: CatalogEntry(
            aliases=model.aliases,
            outlook=outlook(
                slots.get(name, ()),
                _patience(name, want.config, models),
                pattern=want.pattern,
                is_wanted=name in wanted,
            ),
        )
        for name, model in want.config.models.items()
    }


def _still_to_be_made(want: Want, workers: WorkerSet) -> Iterator[Wanted]:
    there = {(w.id, w.wanted.fingerprint) for w in workers.values() if w.goal is not Goal.GONE}
    return (w for w in want.wanted if (w.placement.worker, w.fingerprint) not in there)


def _patience(model: ModelName, config: Config, models: KnownModels) -> Patience:
    loads_s = models.loads_of(model)
    return Patience(
        queue_s=config.proxy.queue_timeout_s,
        load_s=median(loads_s) if loads_s else None,
        external_s=config.health.startup_timeout_s,
    )
