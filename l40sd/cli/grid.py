"""Aligned columns in which a row may be followed by a line of its own: what a rich Table cannot do."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

NOTE_INDENT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column.

    Attributes:
        is_right: Numbers are aligned on the right.
        dropped: Where the console is too narrow, columns are left out, the highest number first; 0: never.
    """

    title: str
    is_right: bool = False
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One row: as many cells as there are columns, and lines below it that may use the whole width."""

    cells: Sequence[str | Text]
    notes: Sequence[Text] = ()


class Grid:
    """Columns as wide as their widest cell; empty columns are left out; no padding at a line's end."""

    def __init__(self, columns: Sequence[Column], rows: Sequence[Row], *, gap: int = 2) -> None:
        assert all(len(row.cells) == len(columns) for row in rows)
        self._columns = columns
        self._rows = rows
        self._gap = gap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [[_text(cell) for cell in row.cells] for row in self._rows]
        widths = {
            place: max(len(column.title), *(row[place].cell_len for row in cells))
            for place, column in enumerate(self._columns)
            if any(row[place].plain for row in cells)
        }
        shown = self._fitting(widths, options.max_width)
        titles = [Text(column.title, style="dim") for column in self._columns]
        if any(column.title for column in self._columns) and shown:
            yield self._line(titles, shown, widths)
        for row, texts in zip(self._rows, cells, strict=True):
            yield self._line(texts, shown, widths)
            for note in row.notes:
                yield indented(note, NOTE_INDENT, options.max_width)

    def _fitting(self, widths: dict[int, int], limit: int) -> list[int]:
        shown = list(widths)
        by_rank = sorted((place for place in shown if self._columns[place].dropped), key=self._rank)
        while by_rank and sum(widths[place] + self._gap for place in shown) - self._gap > limit:
            shown.remove(by_rank.pop())
        return shown

    def _rank(self, place: int) -> int:
        return self._columns[place].dropped

    def _line(self, cells: Sequence[Text], shown: Sequence[int], widths: dict[int, int]) -> Text:
        line = Text(no_wrap=True, overflow="ignore")
        for position, place in enumerate(shown):
            space = " " * (widths[place] - cells[place].cell_len)
            is_last = position == len(shown) - 1
            if self._columns[place].is_right:
                line.append(space)
            line.append_text(cells[place])
            if not is_last:
                line.append(("" if self._columns[place].is_right else space) + " " * self._gap)
        return line


class Flow:
    """Items one after the other; a line is broken only between two of them."""

    def __init__(self, items: Sequence[str | Text], *, between: str = " · ", style: str = "") -> None:
        self._items = [_text(item) for item in items]
        self._between = between
        self._style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(style=self._style)
        for item in self._items:
            if line.plain and line.cell_len + len(self._between) + item.cell_len > options.max_width:
                yield line
                line = Text("  ", style=self._style)  # what goes on is indented
            elif line.plain:
                line.append(self._between)
            line.append_text(item)
        yield line


class Window:
    """As much of a view as the terminal is high; the last line says how much is below it, when something is."""

    def __init__(self, view: RenderableType) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._view, options.update(height=None), pad=False)
        height = console.size.height
        hidden = 0 if len(lines) <= height else len(lines) - height + 1
        for line in lines[: len(lines) - hidden]:
            yield from line
            yield Segment.line()
        if hidden:
            more = f"{hidden} more {'line' if hidden == 1 else 'lines'} below: the window is too low for all of it"
            yield Text(more, style="reverse", no_wrap=True, overflow="ellipsis", end="")


def indented(text: Text, indent: int, width: int) -> Text:
    """Return a text wrapped to the width with every line indented."""
    lines = text.wrap(_MEASURE, max(20, width - indent))
    return Text("\n").join([Text(" " * indent).append_text(line) for line in lines])


_MEASURE = Console(width=80, color_system=None)


def _text(cell: str | Text) -> Text:
    return Text(cell) if isinstance(cell, str) else cell
