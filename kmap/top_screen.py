# SPDX-License-Identifier: Apache-2.0
"""The screen of ``kmap top``, in textual."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.pilot import Pilot
from textual.widgets import DataTable, Footer, Static

from kmap.columns import Column
from kmap.commands.top import COLUMNS, cells
from kmap.load import ConnectionLoad, Load, Meter, ProcessLoad
from kmap.render import byte_count, printable
from kmap.render import picture as without_fonts

# A screen of more is of no use, and takes long to draw.
MOST_CONNECTIONS = 500
_PICTURE_SIZE = (96, 18)

_CONNECTION_COLUMNS = (
    Column("state"),
    Column("local"),
    Column("peer"),
    Column("ring rx/s", True),
    Column("ring tx/s", True),
    Column("kernel rx/s", True),
    Column("kernel tx/s", True),
    Column("queued", True),
    Column("why"),
)
_STYLES = {"ring": "green", "pending": "yellow", "kernel": "red"}

_PROCESS_ORDERS: dict[str, Callable[[ProcessLoad], Any]] = {
    "cpu": lambda each: -(each.cpu_percent or 0.0),
    "ring": lambda each: -each.rates.ring,
    "kernel": lambda each: -each.rates.kernel,
    "wakes": lambda each: -(each.wakeups or 0.0),
    "name": lambda each: (each.comm, each.pid),
}
_CONNECTION_ORDERS: dict[str, Callable[[ConnectionLoad], Any]] = {
    "ring": lambda each: -each.rates.ring,
    "kernel": lambda each: -each.rates.kernel,
    "name": lambda each: (each.connection.local, each.connection.peer),
}


def _rate(value: float | None) -> str:
    return byte_count(None if value is None else int(value))


def _connection_cells(each: ConnectionLoad) -> tuple[str, ...]:
    row = each.connection
    peer = row.peer
    if row.original_dst is not None:
        peer += f" (to {row.original_dst})"
    return (
        row.state,
        row.local,
        peer,
        *(_rate(rate) for rate in each.rates),
        byte_count(row.rx_queued + row.tx_queued),
        row.reason,
    )


class TopApp(App[int]):
    """Processes; after Enter the connections of one."""

    CSS = """
    #head, #note { height: 1; padding: 0 1; }
    #head { background: $panel; }
    #note { color: $text-muted; }
    DataTable { height: 1fr; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "leave", "quit", priority=True),
        Binding("ctrl+c", "leave", show=False, priority=True),
        Binding("escape", "outside", "back"),
        Binding("c", "order('cpu')", "cpu"),
        Binding("r", "order('ring')", "ring"),
        Binding("k", "order('kernel')", "kernel"),
        Binding("w", "order('wakes')", "wakes"),
        Binding("n", "order('name')", "name"),
        Binding("i", "reverse", "reverse"),
        Binding("space", "pause", "pause"),
    ]

    def __init__(self, interval: float) -> None:
        super().__init__()
        self.load = Load(0.0, (), (), 0, ())
        self.samples = 0
        self._interval = interval
        self._meter = Meter()
        self._order = "ring"
        self._reversed = False
        self._paused = False
        # pids of the process whose connections are shown.
        self._inside: tuple[int, ...] = ()
        self._inside_name = ""
        self._columns: Sequence[Column] = ()

    def compose(self) -> ComposeResult:
        """One table between a line above and two below."""
        yield Static(id="head")
        yield DataTable[Text](cursor_type="row", zebra_stripes=True)
        yield Static(id="note")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Starts to look; from here on signals end it in order."""
        loop = asyncio.get_running_loop()
        for number, code in (
            (signal.SIGTERM, 143),
            (signal.SIGHUP, 129),
            (signal.SIGINT, 0),
        ):
            loop.add_signal_handler(number, self.exit, code)
        self.theme = "textual-dark"
        self.run_worker(self._follow())

    async def _follow(self) -> None:
        while True:
            if not self._paused:
                # It takes long where there are many connections; keys work meanwhile.
                load = await asyncio.to_thread(self._meter.sample)
                # The first look knows no rates: the second is soon to come.
                self.load = load
                self.samples += 1
                self._draw()
            await asyncio.sleep(self._interval if self.samples != 1 else 0.2)

    @property
    def _table(self) -> DataTable[Text]:
        table: DataTable[Text] = self.query_one(DataTable)
        return table

    def _rows(self) -> tuple[Sequence[Column], list[tuple[str, str, tuple[str, ...]]]]:
        """Columns; and key, style and texts of each line."""
        if not self._inside:
            order = _PROCESS_ORDERS[self._order]
            processes = sorted(self.load.processes, key=order, reverse=self._reversed)
            return COLUMNS, [(str(each.pid), "", cells(each)) for each in processes]
        by = _CONNECTION_ORDERS.get(self._order, _CONNECTION_ORDERS["ring"])
        mine = [c for c in self.load.connections if c.connection.pid in self._inside]
        mine.sort(key=by, reverse=self._reversed)
        return _CONNECTION_COLUMNS, [
            (
                f"{each.connection.pid} {each.connection.fd} {each.connection.peer}",
                _STYLES[each.connection.state],
                _connection_cells(each),
            )
            for each in mine[:MOST_CONNECTIONS]
        ]

    def _draw(self) -> None:
        columns, rows = self._rows()
        table = self._table
        if columns is not self._columns:
            table.clear(columns=True)
            for column in columns:
                name = Text(column.name, justify="right" if column.right else "left")
                table.add_column(name)
            self._columns = columns
        chosen = self._chosen()
        table.clear()
        for key, style, texts in rows:
            table.add_row(
                *(
                    Text(text, style, justify="right" if column.right else "left")
                    for text, column in zip(texts, columns, strict=True)
                ),
                key=key,
            )
        self._choose(chosen)
        self._annotate(len(rows))

    def _chosen(self) -> str | None:
        table = self._table
        # The first line is whichever comes first; another one is followed.
        if not table.row_count or table.cursor_row == 0:
            return None
        return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value

    def _choose(self, key: str | None) -> None:
        table = self._table
        if key is not None and key in table.rows:
            table.move_cursor(row=table.get_row_index(key), animate=False)

    def _annotate(self, shown: int) -> None:
        load = self.load
        states = [each.connection.state for each in load.connections]
        ring = sum(each.rates.ring for each in load.processes)
        kernel = sum(each.rates.kernel for each in load.processes)
        head = (
            f"{len(load.processes)} processes; ends: "
            + ", ".join(f"{states.count(name)} {name}" for name in _STYLES)
            + f"; {byte_count(int(ring))}/s ring, {byte_count(int(kernel))}/s kernel"
        )
        if self._inside:
            head = f"{self._inside_name}: connections"
        self.query_one("#head", Static).update(Text(head, "bold"))
        notes = [f"by {self._order}{', reversed' if self._reversed else ''}"]
        if self._paused:
            notes.append("paused")
        if self._inside and shown == MOST_CONNECTIONS:
            notes.append(f"the first {shown}; kmap ss --pid shows all")
        if load.hidden:
            notes.append(f"{load.hidden} processes may not be looked at")
        if load.notes:
            notes.append(f"{len(load.notes)} of another version")
        self.query_one("#note", Static).update(Text("; ".join(notes)))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Enter: into the process."""
        key = event.row_key.value
        if self._inside or key is None:
            return
        for each in self.load.processes:
            if str(each.pid) == key:
                self._inside = each.pids
                self._inside_name = f"{printable(each.comm)}/{each.pid}"
                self._draw()

    def action_outside(self) -> None:
        """From connections to processes."""
        if self._inside:
            first = str(self._inside[0])
            self._inside = ()
            self._draw()
            self._choose(first)

    def action_order(self, name: str) -> None:
        """Sorts by another column."""
        self._order = name
        self._draw()

    def action_reverse(self) -> None:
        """The other way round."""
        self._reversed = not self._reversed
        self._draw()

    def action_pause(self) -> None:
        """Stops looking, or goes on."""
        self._paused = not self._paused
        self._draw()

    def action_leave(self) -> None:
        """Ends it."""
        self.exit(0)


def show(interval: float) -> tuple[Load, int]:
    """Until it is ended: the last look, and the exit code (128 and a signal)."""
    app = TopApp(interval)
    code = app.run(mouse=False)
    # None after an exception, which textual has shown.
    return app.load, 1 if code is None else code


def picture(interval: float) -> tuple[str, Load]:
    """One frame of two looks as SVG, and the load that it shows."""
    app = TopApp(interval)
    found: list[str] = []

    async def take(pilot: Pilot[object]) -> None:
        while app.samples < 3:
            await pilot.pause(interval / 10)
        await pilot.pause()
        found.append(app.export_screenshot(title="kmap top"))
        app.exit(0)

    app.run(headless=True, size=_PICTURE_SIZE, auto_pilot=take)
    if not found:
        raise RuntimeError("the screen ended before a picture was taken")
    return without_fonts(found[0]), app.load
