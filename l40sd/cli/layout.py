"""Topology, patterns and previews of a change: records of the control API -> what a terminal shows."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from l40sd.cli.grid import Column, Flow, Grid, Row
from l40sd.cli.status import GIB, numbers, percent, span
from l40sd.control.messages import ChangePreview, GroupView, PatternView, Topology

LINK_STYLES = {"NV": "bold green", "PIX": "green", "PXB": "cyan", "PHB": "blue", "NODE": "yellow", "SYS": "red"}
LINK_WORDS = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "a PCIe host bridge",
    "NODE": "host bridges of one NUMA node",
    "SYS": "across sockets",
}
ACTION_STYLES = {"start": "green", "drain": "yellow", "stop": "yellow"}


def topology_view(topology: Topology, *, is_short: bool = False) -> RenderableType:
    """Return the link matrix, what the GPUs hang on, and the GPU groups with their reasons; short: what GPUs share."""
    kind = "this machine" if topology.is_live else "recorded" if is_short else "recorded: pinning is shown, not applied"
    head = Flow([Text(topology.host, style="bold"), f"{len(topology.gpus)} GPUs", topology.source, kind])
    rows = [Row((name, numbers(gpus))) for name, gpus in topology.switches if gpus]
    shared = Grid((Column(title="SHARED"), Column(title="GPUS")), rows)
    if is_short:
        return Group(head, *([shared] if rows else [Text("they share nothing that is known", style="dim")]))
    parts: list[RenderableType] = [head, Text(""), *_matrix(topology), Text("")]
    parts += [_gpus(topology), Text("")]
    parts += [shared, Text("")] if rows else []
    nodes = [
        Row((str(number), cpus, f"{size / GIB:.0f} GiB" if size else "")) for number, cpus, size in topology.numa_nodes
    ]
    if nodes:
        parts += [Grid((Column(title="NUMA"), Column(title="CPUS"), Column(title="MEMORY", is_right=True)), nodes)]
    if topology.groups:
        parts += [Text(""), Text.assemble("pattern ", (topology.pattern, "bold")), groups_view(topology.groups)]
    parts += [Text(f"! {warning}", style="yellow") for warning in topology.warnings]
    return Group(*parts)


def groups_view(groups: Sequence[GroupView]) -> RenderableType:
    """Return one line a GPU group, and the reason below it."""
    columns = (
        Column(title="WORKER"),
        Column(title="SHAPE"),
        Column(title="GPU"),
        Column(title="LINK"),
        Column(title="NUMA"),
        Column(title="PINNING", dropped=1),
    )
    rows = [
        Row(
            (
                group.worker,
                _shape(group),
                numbers(group.gpus),
                Text(group.link, style=LINK_STYLES.get(group.link, "")),
                numbers(group.numa),
                Text(group.pinning, style="dim"),
            ),
            [Text(group.reason, style="dim")] if group.reason else [],
        )
        for group in groups
    ]
    return Grid(columns, rows)


def patterns_view(patterns: Sequence[PatternView]) -> RenderableType:
    """Return every pattern: what it would be on this host, or why it does not fit."""
    rows = []
    for pattern in patterns:
        mark = Text("*" if pattern.is_current else " ", style="bold green")
        name = Text(pattern.name, style="bold" if pattern.is_current else "")
        verdict = Text("fits", style="green") if pattern.fits else Text("no", style="red")
        notes = [Text(f"! {warning}", style="yellow") for warning in pattern.warnings]
        if pattern.problem:
            notes.append(Text(pattern.problem, style="red"))
        if pattern.hint:
            notes.append(Text(f"hint: {pattern.hint}", style="cyan"))
        rows.append(Row((mark, name, verdict, pattern.summary, Text(pattern.description, style="dim")), notes))
    columns = (
        Column(title=""),
        Column(title="PATTERN"),
        Column(title="FITS"),
        Column(title="REPLICAS"),
        Column(title="FOR", dropped=1),
    )
    return Grid(columns, rows)


def preview_view(preview: ChangePreview) -> RenderableType:
    """Return `switch-pattern --dry-run`: each GPU before and after, the order, and the lowest capacity."""
    changed = [row for row in preview.gpus if row[1] != row[2]]
    change = Text.assemble("pattern ", (preview.previous or "none", "bold"), " → ", (preview.pattern, "bold"))
    head = Flow([change, "nothing is changed yet", f"{len(changed)} of {len(preview.gpus)} GPUs change hands"])
    parts: list[RenderableType] = [head, Text(""), _difference(preview), Text("")]
    if preview.steps:
        parts += [_steps(preview)]
    else:
        parts += [Text("nothing to do", style="green")]
    parts += [Text("")]
    if preview.kept:
        parts.append(Flow([f"not touched: {preview.kept[0]}", *preview.kept[1:]], between=", "))
    parts += [Text(f"! {line}", style="bold yellow") for line in warnings_of(preview)]
    for model, share in preview.lowest_ready.items():
        style = "green" if share >= 0.5 else "yellow" if share > 0 else "bold red"
        parts.append(Text.assemble(f"{model}: never below ", (percent(share), style), " of its ready capacity"))
    parts += [Text(line) for line in _times(preview)] if preview.steps else []
    parts += [Text(f"! {warning}", style="yellow") for warning in preview.warnings]
    return Group(*parts)


def warnings_of(preview: ChangePreview) -> list[str]:
    """Return what others would notice of the change: models without a worker from then on, a change that it ends."""
    lines = [f"{model} leaves service: its requests are refused from then on" for model in preview.leaving]
    return [*lines, f"it replaces {preview.replaces}"] if preview.replaces else lines


def _times(preview: ChangePreview) -> list[str]:
    """Return how long it would take, how long callers would wait, and when it is over at the latest."""
    if preview.expected_s is None:
        lines = ["how long it takes is not known yet: not every model of it has been loaded on this host"]
    else:
        lines = [f"takes about {span(preview.expected_s)} by past loads, and what open requests need to end"]
    lines += [f"{model}: no worker for about {span(s)}, its requests wait" for model, s in preview.waits_s.items()]
    return [*lines, f"over within {span(preview.ends_within_s)}, whatever happens: all its steps' own deadlines"]


def _difference(preview: ChangePreview) -> RenderableType:
    rows = []
    for index, before, after in preview.gpus:
        is_kept = before == after
        arrow = "" if is_kept else "→"
        rows.append(
            Row(
                (
                    str(index),
                    Text(before or "-", style="dim" if is_kept else "red"),
                    Text(arrow, style="dim"),
                    Text("stays" if is_kept else after or "-", style="dim" if is_kept else "green"),
                )
            )
        )
    return Grid((Column(title="GPU", is_right=True), Column(title="NOW"), Column(title=""), Column(title="THEN")), rows)


def _steps(preview: ChangePreview) -> RenderableType:
    rows = [
        Row(
            (
                Text(str(place), style="dim"),
                Text(step.action, style=ACTION_STYLES.get(step.action.split()[0], "")),
                step.worker,
                numbers(step.gpus),
                "-" if step.ready_after is None else percent(step.ready_after),
            ),
            [Text(step.note, style="dim")] if step.note else [],
        )
        for place, step in enumerate(preview.steps, 1)
    ]
    columns = (
        Column(title="", is_right=True),
        Column(title="STEP"),
        Column(title="WORKER"),
        Column(title="GPU"),
        Column(title="READY", is_right=True),
    )
    return Grid(columns, rows)


def _matrix(topology: Topology) -> list[RenderableType]:
    """Return the matrix as nvidia-smi draws it; links within a GPU group are underlined."""
    together = {(a, b) for group in topology.groups for a in group.gpus for b in group.gpus}
    indices = [gpu.index for gpu in topology.gpus]
    columns = [Column(title=""), *(Column(title=str(index)) for index in indices), Column(title="NUMA")]
    rows = []
    for place, gpu in enumerate(topology.gpus):
        cells: list[str | Text] = [Text(f"GPU{gpu.index}", style="bold")]
        for other, letters in zip(indices, topology.matrix[place], strict=True):
            style = LINK_STYLES.get(letters.rstrip("0123456789"), "dim")
            is_chosen = (gpu.index, other) in together and gpu.index != other
            cells.append(Text(letters, style=f"{style} underline" if is_chosen else style))
        cells.append("" if gpu.numa_node is None else str(gpu.numa_node))
        rows.append(Row(cells))
    seen = {letters.rstrip("0123456789") for row in topology.matrix for letters in row}
    legend = [
        Text.assemble((letters, LINK_STYLES[letters]), " ", (words, "dim"))
        for letters, words in LINK_WORDS.items()
        if letters in seen
    ]
    if together:
        legend.append(Text.assemble(("underlined", "underline"), (" in one GPU group", "dim")))
    return [Grid(columns, rows, gap=1), Flow(legend, between="  ")]


def _gpus(topology: Topology) -> RenderableType:
    rows = [
        Row(
            (
                str(gpu.index),
                gpu.pci,
                gpu.name,
                f"{gpu.memory_bytes / GIB:.0f} GiB" if gpu.memory_bytes else "",
                "" if gpu.numa_node is None else str(gpu.numa_node),
                gpu.cpus,
                Text(" > ".join(gpu.path), style="dim"),
            )
        )
        for gpu in topology.gpus
    ]
    columns = (
        Column(title="GPU", is_right=True),
        Column(title="PCI"),
        Column(title="NAME", dropped=1),
        Column(title="MEMORY", is_right=True),
        Column(title="NUMA", is_right=True),
        Column(title="CPUS"),
        Column(title="BELOW", dropped=2),
    )
    return Grid(columns, rows)


def _shape(group: GroupView) -> str:
    return f"TP{group.tp}" + (f" PP{group.pp}" if group.pp > 1 else "")
