"""What the running parts look like from outside, as the records of control/messages.py. Reads, changes nothing."""

from collections.abc import Mapping, Sequence

from l40sd import __version__
from l40sd.clock import now_s
from l40sd.control import views
from l40sd.control.messages import (
    ChangePreview,
    ChangeStep,
    GpuStatus,
    OperationStatus,
    PatternView,
    ProxyStatus,
    Status,
    Topology,
    WorkerStatus,
)
from l40sd.errors import L40sError
from l40sd.hardware.cpus import format_cpu_list
from l40sd.hardware.host import GpuMemory
from l40sd.model import GpuId, Layout, Link, OperationKind, OperationState, Placement
from l40sd.naming import natural
from l40sd.placement.patterns import patterns_of
from l40sd.proxy.server import Proxy
from l40sd.supervisor.change import Want
from l40sd.supervisor.operation import Operation
from l40sd.supervisor.pace import usual
from l40sd.supervisor.reconcile import Do
from l40sd.supervisor.rehearsal import rehearse
from l40sd.supervisor.supervisor import Supervisor
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.worker import Worker

SUMMARY_REASON = 160
"""Characters of what is wrong in the line that `systemctl status` shows."""


def worker_status(worker: Worker, supervisor: Supervisor) -> WorkerStatus:
    """Return one worker as `l40sctl status` shows it."""
    p, run, context = worker.wanted.placement, worker.run, supervisor.context
    instance = run.instance if run else None
    now = now_s()
    is_coming = worker.phase is Phase.STARTING and worker.watch is not None
    return WorkerStatus(
        id=worker.id,
        model=p.model,
        engine=worker.model.engine,
        phase=worker.phase,
        tp=p.tp,
        pp=p.pp,
        gpus=worker.gpu_numbers,
        gpu_ids=p.gpus,
        numa=p.memory_nodes,
        cpus=format_cpu_list(p.cpus),
        link=_letters(p),
        placement_reason=p.reason,
        instance=instance.spec.instance if instance else "",
        pid=instance.engine_pid if instance else None,
        address=run.address if run else "",
        in_flight=context.routes.in_flight(worker.id),
        served=context.routes.served(worker.id),
        restarts=worker.failures.restarts,
        reason=_why(worker, supervisor),
        last_lines=worker.last_lines,
        since_s=now - worker.since_s,
        ready_s=run.ready_for_s if run else None,
        progress=worker.watch.startup_fraction() if is_coming and worker.watch else None,
        next_start_s=None if worker.next_start_at_s is None else max(0.0, worker.next_start_at_s - now),
        last_end=worker.last_end,
    )


def _why(worker: Worker, supervisor: Supervisor) -> str:
    is_coming = worker.phase is Phase.STARTING and worker.watch is not None
    reason = worker.watch.startup_reason if is_coming and worker.watch else worker.reason or worker.concern
    parts = [reason, worker.way_back]
    if supervisor.commands.is_drained(worker) and worker.phase not in (Phase.DRAINING, Phase.DRAINED):
        parts.append("drained: it receives no requests until undrain")
    return "; ".join(filter(None, parts))


def status(
    supervisor: Supervisor,
    proxy: Proxy,
    memory: Mapping[GpuId, GpuMemory] | None,
    *,
    began_at_s: float,
    degraded: tuple[str, ...],
) -> Status:
    """Return everything of `l40sctl status`."""
    operation = supervisor.under_way
    context = supervisor.context
    return Status(
        version=__version__,
        host=context.host.inventory.host,
        inventory=context.host.inventory.source,
        is_live=context.host.inventory.is_live,
        uptime_s=now_s() - began_at_s,
        pattern=supervisor.want.pattern,
        operation=operation_status(operation) if operation is not None else None,
        provider=context.processes.provider,
        provider_note=context.processes.note,
        workers=tuple(worker_status(w, supervisor) for w in _in_order(supervisor)),
        gpus=_gpus(supervisor, memory),
        proxy=proxy_status(proxy),
        warnings=supervisor.want.layout.warnings,
        degraded=degraded,
    )


def operation_status(operation: Operation) -> OperationStatus:
    """Return a pattern change or a rolling restart as it is shown."""
    return OperationStatus(
        id=operation.id,
        kind=operation.kind,
        pattern=operation.pattern,
        previous=operation.previous,
        state=operation.state,
        done=operation.done,
        total=operation.total,
        step=operation.step,
        lowest_ready=operation.lowest_ready,
        why=operation.why,
        duration_s=operation.duration_s,
        ends_within_s=operation.ends_within_s,
        leaving=operation.leaving,
        by=operation.by,
    )


def summary(supervisor: Supervisor, degraded: Sequence[str]) -> str:
    """Return one line for `systemctl status`: who is ready, who has still to be looked at, what is wrong."""
    workers = supervisor.workers.values()
    return summary_line(
        supervisor.want.pattern,
        total=len(workers),
        ready=sum(w.phase is Phase.READY for w in workers),
        adopted=sum(
            w.phase in (Phase.WAITING, Phase.STARTING) and w.run is not None and w.run.is_adopted for w in workers
        ),
        degraded=degraded,
    )


def summary_line(pattern: str, *, total: int, ready: int, adopted: int, degraded: Sequence[str]) -> str:
    """Return ``summary``; ``adopted``: workers that run since before this daemon and have not been found ready yet."""
    line = f"pattern {pattern}: {ready} of {total} workers ready"
    if adopted:
        line += f", {adopted} adopted and not yet looked at"
    if degraded:
        first = " ".join(degraded[0].split())
        more = f" (and {len(degraded) - 1} more: l40sctl status)" if len(degraded) > 1 else ""
        line += f"; {first if len(first) <= SUMMARY_REASON else f'{first[:SUMMARY_REASON]}...'}{more}"
    return line


def proxy_status(proxy: Proxy) -> ProxyStatus:
    """Return the endpoint's state."""
    stats = proxy.stats
    return ProxyStatus(
        listen=tuple(proxy.addresses),
        connections=stats.connections,
        in_flight=stats.in_flight,
        waiting=stats.waiting,
        served=stats.served,
        failed=stats.failed,
        retried=stats.retried,
    )


def patterns(supervisor: Supervisor) -> list[PatternView]:
    """Return every pattern as it would be on this host now."""
    return [
        _pattern_view(name, supervisor) for name in patterns_of(supervisor.config, supervisor.context.host.inventory)
    ]


def topology(supervisor: Supervisor) -> Topology:
    """Return the link matrix, and the GPU groups in force with the reason for each."""
    want, inventory = supervisor.want, supervisor.context.host.inventory
    return views.topology(
        inventory,
        pattern=want.pattern,
        groups=views.groups(want.layout, want.config, inventory),
        leftover=want.layout.leftover,
        warnings=want.layout.warnings,
    )


def change_preview(want: Want, supervisor: Supervisor) -> ChangePreview:
    """Return what ``apply(want)`` would do, in order, if every step succeeds: the reconciler itself, played ahead."""
    inventory = supervisor.context.host.inventory
    number = {gpu.id: gpu.index for gpu in inventory.gpus}
    observed = supervisor.workers.observed()
    change, loads_s = supervisor.changes.change_to(want), supervisor.context.models.loads_s
    played = rehearse(
        want.wanted, observed, change.terms, usual(want.config, loads_s, supervisor.changes.at_once(want))
    )
    shown = played.steps
    loaded = {s.order.worker for s in shown if s.order.do is Do.START}
    is_known = all(loads_s.get(w.placement.model) for w in want.wanted if w.placement.worker in loaded)
    gpus_of = {o.worker: o.gpus for o in observed} | {w.placement.worker: w.placement.gpus for w in want.wanted}
    moved = {s.order.worker for s in shown}
    now = {g: o.worker for o in observed if o.goal is not Goal.GONE for g in o.gpus}
    then = {g: p.worker for p in want.layout.placements for g in p.gpus}
    return ChangePreview(
        pattern=want.pattern,
        previous=supervisor.want.pattern,
        gpus=tuple((g.index, now.get(g.id, ""), then.get(g.id, "")) for g in inventory.gpus),
        kept=tuple(w.placement.worker for w in want.wanted if w.placement.worker not in moved),
        steps=tuple(
            ChangeStep(
                action="start and prove" if s.order.do is Do.START else "drain and stop",
                worker=s.order.worker,
                gpus=tuple(number[g] for g in gpus_of[s.order.worker] if g in number),
                ready_after=min(s.ready.values(), default=None),
                note=s.order.why,
            )
            for s in shown
        ),
        groups=views.groups(want.layout, want.config, inventory),
        lowest_ready={str(model): share for model, share in played.lowest.items()} if shown else {},
        leftover=tuple(number[g] for g in want.layout.leftover if g in number),
        warnings=want.layout.warnings,
        leaving=change.leaving,
        expected_s=played.duration_s if is_known else None,
        waits_s={str(model): wait_s for model, wait_s in played.waits_s.items()} if is_known else {},
        ends_within_s=change.ends_in_s,
        replaces=under_way(supervisor),
    )


def notes_on(want: Want, supervisor: Supervisor) -> tuple[str, ...]:
    """Return what whoever asks for this want should know, when it is done at once: see ``ChangePreview``."""
    leaving = supervisor.changes.change_to(want).leaving
    replaced = under_way(supervisor)
    return (
        *([f"{', '.join(leaving)} leaves service with pattern {want.pattern}"] if leaving else ()),
        *([f"this replaces {replaced}"] if replaced else ()),
    )


def under_way(supervisor: Supervisor) -> str:
    """Return what is under way, and by whom, in one clause; empty when nothing is."""
    now = supervisor.under_way
    if now is None:
        return ""
    match now.kind, now.state:
        case OperationKind.RESTART, _:
            what = "a rolling restart"
        case _, OperationState.ROLLING_BACK:
            what = f"the way back to {now.previous}"
        case _:
            what = f"the change to {now.pattern}"
    return f"{what} that {now.by or 'a reload'} asked for ({now.done} of {now.total} ready)"


def _pattern_view(name: str, supervisor: Supervisor) -> PatternView:
    inventory = supervisor.context.host.inventory
    pattern = patterns_of(supervisor.config, inventory)[name]
    is_current = name == supervisor.want.pattern
    try:
        want = supervisor.designer.design(name, supervisor.config)
    except L40sError as error:
        return PatternView(
            name=name,
            description=pattern.description,
            is_current=is_current,
            fits=False,
            problem=error.what,
            hint=error.hint,
        )
    number = {gpu.id: gpu.index for gpu in inventory.gpus}
    return PatternView(
        name=name,
        description=pattern.description,
        is_current=is_current,
        fits=True,
        summary=_summary(want.layout),
        groups=views.groups(want.layout, want.config, inventory),
        leftover=tuple(number[g] for g in want.layout.leftover if g in number),
        warnings=want.layout.warnings,
    )


def _summary(layout: Layout) -> str:
    """Return e.g. ``6 x smollm2 TP2``, one part a model and shape."""
    counts: dict[str, int] = {}
    for p in layout.placements:
        shape = "external" if p.endpoint else " ".join(f"{k}{n}" for k, n in (("TP", p.tp), ("PP", p.pp)) if n > 1)
        label = f"{p.model} {shape or 'TP1'}"
        counts[label] = counts.get(label, 0) + 1
    return ", ".join(f"{n} x {label}" for label, n in counts.items())


def _letters(p: Placement) -> str:
    return "" if p.worst_link is Link.X else p.worst_link.name


def _in_order(supervisor: Supervisor) -> list[Worker]:
    """Return the workers in the order of their first GPU; one on its way out before what takes its place."""
    rank = {gpu.id: n for n, gpu in enumerate(supervisor.context.host.inventory.gpus)}

    def key(worker: Worker) -> tuple[object, ...]:
        gpus = worker.wanted.placement.gpus
        return (
            min((rank.get(g, 0) for g in gpus), default=len(rank)),
            worker.goal is not Goal.GONE,
            natural(worker.id),
        )

    return sorted(supervisor.workers.values(), key=key)


def _gpus(supervisor: Supervisor, memory: Mapping[GpuId, GpuMemory] | None) -> tuple[GpuStatus, ...]:
    inventory = supervisor.context.host.inventory
    owner = {
        g: w.id
        for w in supervisor.workers.values()
        if w.phase not in (Phase.STOPPED, Phase.WAITING)
        for g in w.wanted.placement.gpus
    }
    out_of_use = supervisor.workers.out_of_use()
    silent = "unknown" if inventory.is_live else "recorded"
    answers = inventory.is_live and memory is not None
    return tuple(
        GpuStatus(
            index=g.index,
            id=g.id,
            pci=g.pci,
            name=g.name,
            numa_node=g.numa_node,
            memory_bytes=g.memory_bytes,
            used_bytes=memory[g.id].used_bytes if inventory.is_live and memory and g.id in memory else None,
            worker=owner.get(g.id, ""),
            state=out_of_use.get(g.id, "ok" if answers else silent),
        )
        for g in inventory.gpus
    )
