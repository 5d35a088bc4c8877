"""Adopt what an earlier daemon left: what it wanted, the change it was at, its workers."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from l40sd.clock import boot_id, now_s
from l40sd.codec import restore
from l40sd.config.options import Config, ModelConfig
from l40sd.errors import DoesNotFit, L40sError
from l40sd.hardware.topology import NvmlGpu
from l40sd.model import GpuId, Layout, ModelName, Placement, WorkerId
from l40sd.supervisor.change import Change, Want
from l40sd.supervisor.design import Designer
from l40sd.supervisor.operation import Operation, ended_of
from l40sd.supervisor.rolling_restart import RollingRestart
from l40sd.supervisor.worker_set import MakeWorker
from l40sd.workers.context import WorkerContext
from l40sd.workers.ends import end_of
from l40sd.workers.process import Adoption, ExitRecord, Instance, InstanceSpec
from l40sd.workers.saved import SavedWorker, read
from l40sd.workers.slot import Wanted
from l40sd.workers.worker import Worker


@dataclass(slots=True, kw_only=True)
class Adopted:
    """What the supervisor begins with.

    Attributes:
        trouble: A sentence for the operator when not all of what was wanted is possible any more.
        drained: Workers that rest by the operator's wish.
        floor: The baseline of a change that ended incomplete.
        restart: A rolling restart that is not over.
        ended: How the latest operations ended.
    """

    want: Want
    workers: dict[WorkerId, Worker] = field(default_factory=dict)
    change: Change | None = None
    trouble: str = ""
    drained: set[WorkerId] = field(default_factory=set)
    floor: Mapping[ModelName, int] = field(default_factory=dict)
    restart: RollingRestart | None = None
    ended: tuple[Operation, ...] = ()


async def adopt(
    adoption: Adoption,
    state: Mapping[str, Any],
    config: Config,
    context: WorkerContext,
    *,
    designer: Designer,
    make_worker: MakeWorker,
) -> Adopted:
    """Return what to begin with.

    0. The host knows again which GPUs it had.
    1. Running and stuck instances become workers as they were recorded, wanted or not: the reconciler sorts them out.
    2. What is wanted is placed again, which keeps it where it is unless host or config changed.
    3. A change in the middle is carried on.
    4. What ended meanwhile counts as the failure it was.
    5. Who waits for its next try, or was given up, goes on with that.
    6. Whom the operator drained rests.

    Raises:
        L40sError: The pattern is not possible, for no reason that lies in what the host has lost.
    """
    await _adopt_gpus(adoption, state.get("gpus"), context)  # 0
    saved, note = read(state.get("pasts"), boot_id(), now_s())
    if note:
        context.log.warning("state.unreadable", reason=note)
    workers: dict[WorkerId, Worker] = {}
    for instance in (*adoption.running, *adoption.stuck):  # 1
        await _adopt(instance, workers, saved, config, context, make_worker)
    adopted = _adopt_want(state, config, context, designer)  # 2
    adopted.workers = workers
    if isinstance(saved_change := state.get("change"), dict):  # 3
        former = [p for p in _placements(saved_change.get("placements"), context) if _is_possible(p, config, context)]
        layout = Layout(pattern=str(saved_change.get("previous", "")), placements=tuple(former))
        previous = designer.want_of(layout, config) if former else None
        adopted.change = Change.from_saved(saved_change, previous)
        context.log.warning("pattern.apply.resumed", pattern=adopted.want.pattern, operation=adopted.change.id)
    for spec, record in adoption.ended:  # 4
        await _note_ended(spec, record, adopted, saved, config, context, make_worker)
    _make_waiting(adopted, saved, config, make_worker)  # 5
    adopted.drained = _drained(state.get("drained"), adopted, context)  # 6
    adopted.floor = _floor(state.get("floor"))
    adopted.restart, adopted.ended = _restart(state.get("roll")), ended_of(state.get("ended"))
    for worker_id in adopted.drained & workers.keys():
        workers[worker_id].rest()
    was_older = isinstance(saved_change, dict) and "created" not in saved_change  # of an older l40sd
    if adopted.change is not None and was_older:
        created = {w.placement.worker for w in adopted.want.wanted} & workers.keys()
        adopted.change.terms = replace(adopted.change.terms, created=frozenset(created))
    return adopted


async def _adopt(
    instance: Instance,
    workers: dict[WorkerId, Worker],
    saved: Mapping[WorkerId, SavedWorker],
    config: Config,
    context: WorkerContext,
    make_worker: MakeWorker,
) -> None:
    """Make a worker of a running instance; one whose record says too little to talk to it is ended here."""
    try:
        placement = restore(Placement, instance.spec.meta["placement"])
        _refuse_second(placement, workers)
        wanted = Wanted(placement=placement, fingerprint=str(instance.spec.meta["fingerprint"]))
        worker = make_worker(wanted, _with_model(config, placement), _saved_of(wanted, saved), adopted=instance)
    except (KeyError, msgspec.ValidationError, L40sError) as error:
        context.log.warning("worker.not_adopted", instance=instance.spec.instance, reason=str(error))
        if await instance.kill(config.workers.kill_timeout_s):
            context.processes.forget(instance.spec.instance)
        return
    workers[worker.id] = worker
    context.log.info("worker.adopted", worker=worker.id, pid=instance.engine_pid, instance=instance.spec.instance)


async def _adopt_gpus(adoption: Adoption, stored: Any, context: WorkerContext) -> None:
    """Have the host know the GPUs that it had before, and keep those that running workers hold, lost or not."""
    try:
        known = restore(list[NvmlGpu], stored or [])
    except msgspec.ValidationError as error:
        context.log.warning("state.unreadable", reason=f"which GPUs there were is not known: {error}")
        known = []
    specs = [instance.spec for instance in (*adoption.running, *adoption.stuck)]
    held: set[GpuId] = set()
    for spec in specs:
        with suppress(KeyError, TypeError, msgspec.ValidationError):  # said when it is adopted
            held.update(restore(Placement, spec.meta["placement"]).gpus)
    await context.host.adopt(known, held=held)


def _saved_of(wanted: Wanted, saved: Mapping[WorkerId, SavedWorker]) -> SavedWorker | None:
    own = saved.get(wanted.placement.worker)
    return own if own is not None and own.fingerprint == wanted.fingerprint else None


def _refuse_second(placement: Placement, workers: Mapping[WorkerId, Worker]) -> None:
    if placement.worker in workers:
        raise L40sError("its worker has another instance already", where=placement.worker, code="bad_record")


def _with_model(config: Config, placement: Placement) -> Config:
    """Return a config that knows the placement's model. One that is not configured any more is only there to go."""
    if placement.model in config.models:
        return config
    gone = ModelConfig(name=placement.model, engine="simulated", source="not configured any more")
    return replace(config, models={**config.models, placement.model: gone})


def _adopt_want(
    state: Mapping[str, Any],
    config: Config,
    context: WorkerContext,
    designer: Designer,
) -> Adopted:
    pattern = str(state.get("pattern") or config.daemon.pattern)
    stored = _placements(state.get("placements"), context)
    try:
        return Adopted(want=designer.design(pattern, config, force=bool(state.get("force")), current=stored or None))
    except L40sError as error:
        is_shrunk = isinstance(error, DoesNotFit) and ("pattern" in state or not context.host.inventory.gpus)
        if not is_shrunk and not any(_is_possible(p, config, context) for p in stored):
            raise  # the configuration is wrong, and not the host smaller than it was
        want, trouble = designer.left_of(pattern, stored, config, error)
        return Adopted(want=want, trouble=trouble)


def _placements(stored: Any, context: WorkerContext) -> list[Placement]:
    try:
        return restore(list[Placement], stored or [])
    except msgspec.ValidationError as error:
        context.log.warning("state.unreadable", reason=str(error))
        return []


def _is_possible(p: Placement, config: Config, context: WorkerContext) -> bool:
    gpus = {gpu.id for gpu in context.host.inventory.gpus}
    return p.model in config.models and gpus.issuperset(p.gpus)


async def _note_ended(
    spec: InstanceSpec,
    record: ExitRecord,
    adopted: Adopted,
    saved: Mapping[WorkerId, SavedWorker],
    config: Config,
    context: WorkerContext,
    make_worker: MakeWorker,
) -> None:
    keys = {"cause": record.cause, "ended_at": record.ended_at, "ran_s": round(record.ran_s, 1)}
    keys |= {"exit_code": record.code, "exit_signal": record.signal, "oom": record.oom}
    context.log.warning("worker.ended_meanwhile", worker=spec.worker, **keys)
    context.processes.forget(spec.instance)  # nobody else will: its directory and its cgroup go
    wanted = next((w for w in adopted.want.wanted if w.placement.worker == spec.worker), None)
    if wanted is None or spec.worker in adopted.workers:
        return
    own = _saved_of(wanted, saved)
    was_failing = own is not None and bool(own.of(spec.instance).kind)
    if record.cause in ("stopped", "killed", "orphaned") and not was_failing:  # as somebody wished
        return
    end = await end_of(context.processes, spec, record, is_wish=False)
    worker = make_worker(wanted, config, own, ended=(record, end))
    adopted.workers[worker.id] = worker


def _make_waiting(
    adopted: Adopted, saved: Mapping[WorkerId, SavedWorker], config: Config, make_worker: MakeWorker
) -> None:
    """Make the wanted workers that were saved and have no process. Nobody who lives holds their GPUs (invariant 1)."""
    for wanted in adopted.want.wanted:
        worker_id, gpus = wanted.placement.worker, set(wanted.placement.gpus)
        own = _saved_of(wanted, saved)
        is_free = all(gpus.isdisjoint(w.wanted.placement.gpus) for w in adopted.workers.values())
        if own is not None and worker_id not in adopted.workers and is_free:
            adopted.workers[worker_id] = make_worker(wanted, config, own)


def _floor(stored: Any) -> Mapping[ModelName, int]:
    try:
        return restore(dict[ModelName, int], stored or {})
    except msgspec.ValidationError:  # a change that ended long ago: it goes on without a floor
        return {}


def _restart(stored: Any) -> RollingRestart | None:
    try:
        return RollingRestart.from_saved(stored) if isinstance(stored, dict) else None
    except (KeyError, TypeError, ValueError):  # of another l40sd: nobody waits for it any more
        return None


def _drained(stored: Any, adopted: Adopted, context: WorkerContext) -> set[WorkerId]:
    """Return who shall rest: of those that are wanted, or may be wanted again while a change is under way."""
    try:
        drained = restore(set[WorkerId], stored or [])
    except msgspec.ValidationError as error:
        context.log.warning("state.unreadable", reason=f"who was drained is not known: {error}")
        return set()
    if adopted.change is not None:
        return drained
    return drained & {w.placement.worker for w in adopted.want.wanted}
