"""Status, workers, events, doctor: records of the control API -> what a terminal shows."""

from collections.abc import Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text

from l40sd.cli.grid import Column, Flow, Grid, Row
from l40sd.control.messages import Check, Event, GpuStatus, OperationStatus, Status, WorkerStatus
from l40sd.event_line import told
from l40sd.model import OperationKind, OperationState
from l40sd.workers.last_end import LastEnd
from l40sd.workers.lifecycle import Phase

PHASE_STYLES = {
    Phase.WAITING: "cyan",
    Phase.SPAWNING: "cyan",
    Phase.STARTING: "cyan",
    Phase.READY: "green",
    Phase.UNREADY: "bold yellow",
    Phase.DRAINING: "yellow",
    Phase.DRAINED: "yellow",
    Phase.STOPPING: "yellow",
    Phase.BACKOFF: "bold yellow",
    Phase.QUARANTINED: "bold red",
    Phase.FAILED: "bold red",
    Phase.STUCK: "bold red",
    Phase.STOPPED: "dim",
}
CHECK_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
LEVEL_STYLES = {"info": "", "warning": "yellow", "error": "bold red"}
GIB = 1 << 30


def status_view(status: Status) -> RenderableType:
    """Return all of `l40sctl status`."""
    parts: list[RenderableType] = [*_header(status)]
    if status.operation is not None and status.operation.is_under_way:
        parts.append(operation_line(status.operation))
    in_their_row = {f"{worker.id} is {worker.phase}: {worker.reason}" for worker in status.workers}
    parts += [Text(f"! {line}", style="bold yellow") for line in status.degraded if line not in in_their_row]
    parts += [Text(f"! {line}", style="yellow") for line in status.warnings]
    parts += [Text(""), workers_view(status.workers), Text("")] if status.workers else [Text("no workers")]
    parts += _gpu_lines(status.gpus)
    return Group(*parts)


def workers_view(workers: Sequence[WorkerStatus]) -> RenderableType:
    """Return one line a worker, and a second one for those with something to explain."""
    columns = (
        Column(title="WORKER"),
        Column(title="PHASE"),
        Column(title="SHAPE", dropped=6),
        Column(title="GPU"),
        Column(title="LINK", dropped=3),
        Column(title="NUMA", dropped=2),
        Column(title="ADDRESS"),
        Column(title="PORT", is_right=True),
        Column(title="BUSY", is_right=True),
        Column(title="SERVED", is_right=True, dropped=5),
        Column(title="RESTARTS", is_right=True),
        Column(title="FOR", is_right=True, dropped=4),
    )
    return Grid(columns, [_worker_row(worker) for worker in workers])


def worker_view(worker: WorkerStatus) -> RenderableType:
    """Return everything of one worker, a line each."""
    shape = f"TP{worker.tp}" + (f" x PP{worker.pp}" if worker.pp > 1 else "")
    gpus = [f"{number}  {gpu_id}" for number, gpu_id in zip(worker.gpus, worker.gpu_ids, strict=False)]
    facts: list[tuple[str, str | Text]] = [
        ("phase", _phase(worker).append(f" for {span(worker.since_s)}", style="dim")),
        ("why", Text(worker.reason, style="yellow")),
        ("next start", "" if worker.next_start_s is None else f"in {span(worker.next_start_s)}"),
        ("model", f"{worker.model} on {worker.engine}, {shape}"),
        *[("GPUs" if place == 0 else "", text) for place, text in enumerate(gpus)],
        ("link", worker.link),
        ("placed", worker.placement_reason),
        ("NUMA", numbers(worker.numa)),
        ("CPUs", worker.cpus),
        ("address", worker.address),
        ("pid", "" if worker.pid is None else str(worker.pid)),
        ("instance", worker.instance),
        ("busy with", _count(worker.in_flight, "request")),
        ("served", _count(worker.served, "request")),
        ("restarts", str(worker.restarts)),
        ("up for", "" if worker.ready_s is None else span(worker.ready_s)),
        ("last end", "" if worker.last_end is None else _end(worker.last_end)),
    ]
    rows = [Row((Text(" "), Text(name, style="dim"), text)) for name, text in facts if _plain(text)]
    parts: list[RenderableType] = [
        Text(worker.id, style="bold"),
        Grid((Column(title=""), Column(title=""), Column(title="")), rows),
    ]
    if worker.last_lines:
        parts.append(Text("its last lines", style="dim"))
        parts += [Text(f"  | {printable(line)}", overflow="fold") for line in worker.last_lines]
    return Group(*parts)


def heading(operation: OperationStatus) -> str:
    """Return what it is about, in the direction that it takes."""
    if operation.kind == OperationKind.RESTART:
        return "restart"
    is_back = operation.state in (OperationState.ROLLING_BACK, OperationState.ROLLED_BACK)
    return f"back to {operation.previous}" if is_back else f"pattern {operation.pattern}"


def operation_line(operation: OperationStatus) -> Text:
    """Return a pattern change or a rolling restart in one line."""
    verbs: dict[str, str] = {OperationState.RUNNING: "changing to ", OperationState.ROLLING_BACK: "going "}
    line = Text("" if operation.kind == OperationKind.RESTART else verbs.get(operation.state, ""), style="bold cyan")
    line.append(heading(operation))
    line.append(f": {operation.done} of {operation.total} ready", style="not bold")
    if operation.step:
        line.append(f" · {operation.step}", style="not bold")
    line.append(f" · lowest {percent(operation.lowest_ready)} · {span(operation.duration_s)}", style="not bold")
    if operation.by:
        line.append(f" · by {operation.by}", style="not bold")
    if operation.ends_within_s:
        line.append(f" · over within {span(operation.ends_within_s)}", style="not bold dim")
    if operation.why:
        line.append(f" · {operation.why}", style="yellow")
    return line


def event_line(event: Event) -> Text:
    """Return one event on one line: time, level, what happened to whom and why, then the rest."""
    line = Text(no_wrap=True, overflow="ignore")
    line.append(f"{event.seq:>6} ", style="dim").append(_clock(event.time) + " ", style="dim")
    line.append(f"{event.level:<8}", style=LEVEL_STYLES.get(event.level, ""))
    subject, reason, rest = told(event.event, event.data)
    line.append(subject, style="bold").append(f": {reason}" if reason else "")
    for key, value in rest:
        line.append(f"  {key}=", style="cyan").append(value)
    return line


def checks_view(checks: Sequence[Check]) -> RenderableType:
    """Return `l40sctl doctor`: what was looked at, what was found, what to do."""
    rows = [
        Row(
            (Text(check.state, style=CHECK_STYLES.get(check.state, "")), check.name, check.found),
            [Text(f"hint: {check.hint}", style="cyan")] if check.hint and check.state != "ok" else [],
        )
        for check in checks
    ]
    return Grid((Column(title=""), Column(title="CHECK"), Column(title="FOUND")), rows)


def span(seconds: float, *, units: int = 2) -> str:
    """Return a duration in its one or two largest units: ``4.2 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    if seconds < 10 and units > 1:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, unit, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {part}" if rest and units > 1 else "")
    return f"{whole} s"


def percent(share: float) -> str:
    """Return 0.5 as ``50 %``."""
    return f"{share * 100:.0f} %"


def numbers(values: Sequence[int]) -> str:
    """Return numbers as ``0,1``."""
    return ",".join(map(str, values))


def printable(text: str) -> str:
    """Return a text without control characters: a worker's output must not drive the operator's terminal."""
    return "".join(char if char.isprintable() or char == "\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _header(status: Status) -> list[RenderableType]:
    ready = sum(worker.phase == Phase.READY for worker in status.workers)
    total = len(status.workers)
    style = "green" if ready == total and total else "bold yellow" if ready else "bold red"
    head: list[str | Text] = [
        Text(status.host, style="bold"),
        Text.assemble("pattern ", (status.pattern or "none", "bold")),
        Text(f"{ready} of {total} ready", style=style),
        f"{status.proxy.in_flight} in flight",
        f"up {span(status.uptime_s)}",
    ]
    proxy = status.proxy
    endpoint = [f"endpoint {' '.join(proxy.listen) or 'none'}", f"{proxy.served} served", f"{proxy.failed} failed"]
    for count, name in ((proxy.retried, "retried"), (proxy.waiting, "waiting"), (proxy.connections, "connections")):
        endpoint += [f"{count} {name}"] if count else []
    # What it cannot do is doctor's to say, and so is that nothing is pinned on a recorded host.
    rest = [f"workers in {_PROVIDERS.get(status.provider, status.provider)}"]
    if not status.is_live:
        rest += [f"recorded host {status.inventory}"]
    return [Flow(head), Flow(endpoint, style="dim"), Flow(rest, style="dim")]


_PROVIDERS = {"unit": "units of their own", "cgroup": "cgroups of their own", "none": "no cgroup"}


def _worker_row(worker: WorkerStatus) -> Row:
    host, _, port = worker.address.rpartition(":")
    is_local = host in ("127.0.0.1", "")
    shape = f"TP{worker.tp}" + (f" PP{worker.pp}" if worker.pp > 1 else "")
    why = worker.reason
    if worker.next_start_s is not None:
        why += f"{', ' if why else ''}next start in {span(worker.next_start_s)}"
    return Row(
        (
            worker.id,
            _phase(worker),
            shape if worker.gpus else "external",
            numbers(worker.gpus),
            worker.link,
            numbers(worker.numa),
            "" if is_local else worker.address,
            port,
            str(worker.in_flight) if worker.in_flight else "-",
            str(worker.served),
            str(worker.restarts) if worker.restarts else "-",
            Text(span(worker.since_s, units=1), style="dim"),
        ),
        [Text(why, style="yellow")] if why else [],
    )


def _phase(worker: WorkerStatus) -> Text:
    progress = f" {percent(worker.progress)}" if worker.progress is not None else ""
    styles = {phase.value: style for phase, style in PHASE_STYLES.items()}
    return Text(worker.phase + progress, style=styles.get(worker.phase, ""))


def _gpu_lines(gpus: Sequence[GpuStatus]) -> list[RenderableType]:
    """Return the GPUs: what they are, which are free or out of use, and how full their memory is."""
    kinds = dict.fromkeys((gpu.name, gpu.memory_bytes) for gpu in gpus)
    count = {kind: sum((gpu.name, gpu.memory_bytes) == kind for gpu in gpus) for kind in kinds}
    parts = [f"{count[kind]} x {kind[0]} {kind[1] / GIB:.0f} GiB" for kind in kinds]
    free = [gpu.index for gpu in gpus if not gpu.worker and gpu.state not in ("stuck", "lost")]
    line = Text(" + ".join(parts), style="dim")
    line.append(f" · free: {numbers(free)}" if free else " · all in use")
    for state, style in (("stuck", "bold red"), ("lost", "bold red"), ("unknown", "yellow")):
        if found := [gpu.index for gpu in gpus if gpu.state == state]:
            line.append(f" · {state}: {numbers(found)}", style=style)
    used = [
        f"{gpu.index}:{gpu.used_bytes / gpu.memory_bytes * 100:.0f}"
        for gpu in gpus
        if gpu.used_bytes is not None and gpu.memory_bytes
    ]
    memory = [Flow(["memory in use, %:", *used], between="  ", style="dim")] if used else []
    return [line, *memory] if gpus else []


def _end(end: LastEnd) -> str:
    """Return how a run ended: ``11-23 21:04:43 after 3 min 5 s: ended by signal 9; no token for 120 s``."""
    when = f"{_clock(end.at)} " if end.at else ""
    ran = f"after {span(end.ran_s)}" if end.ran_s else "after an unknown time"
    return f"{when}{ran}: {end.how}" + (f"; {end.why}" if end.why else "")


def _clock(time: str) -> str:
    """Return an ISO time as this machine's clock shows it, without year and fraction: ``11-23 21:04:43``."""
    try:
        return datetime.fromisoformat(time).astimezone().strftime("%m-%d %H:%M:%S")
    except ValueError:  # a daemon of another version
        return time


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _plain(text: str | Text) -> str:
    return text.plain if isinstance(text, Text) else text
