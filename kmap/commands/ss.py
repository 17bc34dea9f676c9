# SPDX-License-Identifier: Apache-2.0
"""``kmap ss``: live connections of all processes, and which way their bytes go."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from kmap import native, procfs, wire
from kmap.procfs import Process, TcpSocket
from kmap.render import byte_count, renders
from kmap.results import EXIT_OK, JsonObject, SubParsers, UsageError, command_parser
from kmap.wire import Endpoint, Role, Row, RowState

_WATCH_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Connection:
    """One end of a TCP connection.

    Counts are None where nobody knows them: a connection that was never upgraded has
    no row in the statistics of its process.
    """

    pid: int
    comm: str
    fd: int
    role: str
    local: str
    peer: str
    original_dst: str | None
    state: str
    transport: str | None
    reason: str
    ring_rx_bytes: int
    ring_tx_bytes: int
    kernel_rx_bytes: int | None
    kernel_tx_bytes: int | None
    rx_queued: int
    tx_queued: int
    ring_size: int


@dataclass(frozen=True)
class SsResult:
    """All connections found, by process."""

    connections: tuple[Connection, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.ss/1",
            "ok": True,
            "connections": [asdict(connection) for connection in self.connections],
        }


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "ss",
        run,
        help="list live connections and which way their bytes go",
        description="Lists connections that are on a ring, of every process that can "
        "be looked at\n(run as root to see those of other users).  Each connection has "
        "two ends and so\ntwo lines if both are on this host.",
    )
    parser.add_argument(
        "-a",
        "--all",
        action="store_true",
        help="also TCP connections that processes under Kmap have on the kernel, with "
        "the reason",
    )
    parser.add_argument(
        "-w", "--watch", action="store_true", help="show it again every second"
    )


class _Namespace:
    """The sockets of a network namespace, by what they are looked up by."""

    def __init__(self, sockets: Sequence[TcpSocket]) -> None:
        self.connected: dict[tuple[Endpoint, Endpoint], TcpSocket] = {}
        self.by_peer: dict[Endpoint, list[TcpSocket]] = {}
        self.by_local: dict[Endpoint, list[TcpSocket]] = {}
        self.listeners: dict[int, list[TcpSocket]] = {}
        self.addresses = {tcp.local.address for tcp in sockets}
        for tcp in sockets:
            if tcp.connected:
                self.connected[tcp.local, tcp.peer] = tcp
                self.by_peer.setdefault(tcp.peer, []).append(tcp)
                self.by_local.setdefault(tcp.local, []).append(tcp)
            elif tcp.state == procfs.LISTEN:
                self.listeners.setdefault(tcp.local.port, []).append(tcp)


class _View:
    """One look at the host."""

    def __init__(self, processes: list[Process]) -> None:
        self.processes = processes
        self.holders: dict[int, list[Process]] = {}
        for process in processes:
            for inode in process.sockets:
                self.holders.setdefault(inode, []).append(process)
        # Sockets by network namespace: the addresses of two namespaces overlap.
        self.sockets: dict[int, dict[int, TcpSocket]] = {}
        self._namespaces: dict[int, _Namespace] = {}
        for process in processes:
            if not process.has_library or process.network in self.sockets:
                continue
            found = procfs.tcp_sockets(process.pid)
            if found is None:
                continue
            # A connection that waits to be accepted has no inode yet.
            self.sockets[process.network] = {tcp.inode: tcp for tcp in found}
            self._namespaces[process.network] = _Namespace(found)

    def socket(self, process: Process, inode: int) -> TcpSocket | None:
        return self.sockets.get(process.network, {}).get(inode)

    def peer_of(self, process: Process, tcp: TcpSocket) -> TcpSocket | None:
        """The socket at the other end, if it is in the same network namespace."""
        namespace = self._namespaces.get(process.network)
        if namespace is None:
            return None
        if found := namespace.connected.get((tcp.peer, tcp.local)):
            return found
        # A redirected connection has other addresses at its acceptor, which still
        # has ours as its peer; and the mirror image of that at the connector.
        matches = [f for f in namespace.by_peer.get(tcp.local, ()) if f is not tcp]
        matches = matches or [
            f
            for f in namespace.by_local.get(tcp.peer, ())
            if f is not tcp and f.state == procfs.ESTABLISHED
        ]
        return matches[0] if len(matches) == 1 else None

    def is_host_address(self, process: Process, endpoint: Endpoint) -> bool:
        """Whether a socket of the namespace uses the address as its own."""
        namespace = self._namespaces.get(process.network)
        return endpoint.address.is_loopback or (
            namespace is not None and endpoint.address in namespace.addresses
        )

    def listeners(self, process: Process, port: int) -> list[TcpSocket]:
        """The sockets of the namespace that listen on the port."""
        namespace = self._namespaces.get(process.network)
        return namespace.listeners.get(port, []) if namespace is not None else []

    def involved(self, pids: Container[int]) -> list[Process]:
        """The processes of pids, and those at the other ends of their connections."""
        found: dict[int, Process] = {}
        for process in self.processes:
            if process.pid not in pids:
                continue
            found[process.pid] = process
            for inode in process.sockets:
                tcp = self.socket(process, inode)
                peer = self.peer_of(process, tcp) if tcp is not None else None
                for holder in self.holders.get(peer.inode, ()) if peer else ():
                    found[holder.pid] = holder
        return list(found.values())

    def role(self, process: Process, tcp: TcpSocket) -> str:
        """An end whose local port is being listened on was accepted.

        Empty if nobody listens any more on either port of a local connection.
        """
        if self.listeners(process, tcp.local.port):
            return "acceptor"
        if self.listeners(process, tcp.peer.port) or not self.is_host_address(
            process, tcp.peer
        ):
            return "connector"
        return ""


def _rows(processes: Iterable[Process]) -> list[Row]:
    files: dict[tuple[int, int], procfs.StatisticsFile] = {}
    for process in processes:
        for file in process.statistics:
            files.setdefault(file.identity, file)
    rows: list[Row] = []
    for file in files.values():
        try:
            statistics = procfs.read_statistics(file)
        except wire.NotStatistics as error:
            # Another build's process must not hide everybody else's connections.
            print(f"kmap ss: {file.path}: {error}", file=sys.stderr)
            continue
        if statistics is not None:
            rows.extend(statistics.rows)
    return rows


def _reason_name(index: int) -> str:
    names = native.reasons()
    return names[index].name if index < len(names) else f"reason-{index}"


# What an end says that waits for one that will not come.
_WAITS = frozenset({"not-hot", "peer-absent", "peer-cancelled"})


def _why(
    view: _View, process: Process, tcp: TcpSocket | None, own: str, refused: set[int]
) -> str:
    """own, or the policy of the other end, which only that end knows of."""
    if own not in _WAITS or tcp is None:
        return own
    peer = view.peer_of(process, tcp)
    return "policy" if peer is not None and peer.inode in refused else own


def _transport_name(index: int) -> str:
    names = native.transports()
    return names[index].name if index < len(names) else f"transport-{index}"


def _from_row(
    view: _View, row: Row, ends: list[Row], refused: set[int]
) -> Connection | None:
    """The line of a row; None if no process holds its socket any more."""
    holders = [p for p in view.holders.get(row.inode, []) if p.has_library]
    if not holders:
        return None
    holder = next((p for p in holders if p.pid == row.pid), holders[0])
    others = [end for end in ends if end is not row]
    if len(others) == 1:
        rx_queued = others[0].ring_tx_bytes - row.ring_rx_bytes
        tx_queued = row.ring_tx_bytes - others[0].ring_rx_bytes
    else:
        # The other end is out of sight: what this end saw when it last looked.
        rx_queued = row.rx_seen - row.ring_rx_bytes
        tx_queued = row.ring_tx_bytes - row.tx_seen
    tcp = view.socket(holder, row.inode)
    # The two rows are not read at the same instant, so a difference can be negative.
    return Connection(
        pid=holder.pid,
        comm=holder.comm,
        fd=holder.sockets[row.inode],
        role=row.role.name.lower() if row.role != Role.UNKNOWN else "",
        local=str(row.local),
        peer=str(row.peer),
        original_dst=str(row.original_dst) if row.original_dst else None,
        state=row.state.name.lower(),
        transport=(
            _transport_name(row.transport) if row.state != RowState.KERNEL else None
        ),
        reason=_why(view, holder, tcp, _reason_name(row.reason), refused),
        ring_rx_bytes=row.ring_rx_bytes,
        ring_tx_bytes=row.ring_tx_bytes,
        kernel_rx_bytes=row.kernel_rx_bytes,
        kernel_tx_bytes=row.kernel_tx_bytes,
        rx_queued=max(0, rx_queued) + (tcp.rx_queue if tcp else 0),
        tx_queued=max(0, tx_queued) + (tcp.tx_queue if tcp else 0),
        ring_size=row.ring_size,
    )


def _infer_reason(view: _View, process: Process, tcp: TcpSocket) -> str:
    """Why a connection without a row is on the kernel."""
    if process.disabled:
        return "disabled"
    if process.cannot_hide and not process.statistics:
        return "budget-fd"
    peer = view.peer_of(process, tcp)
    if peer is None:
        local = view.is_host_address(process, tcp.peer)
        return "peer-absent" if local else "peer-remote"
    # Until it is accepted, a connection belongs to whoever listens.
    ends = [peer] if peer.inode else view.listeners(process, peer.local.port)
    able = any(
        holder.has_library and not holder.disabled
        for end in ends
        for holder in view.holders.get(end.inode, [])
    )
    return "not-hot" if able else "peer-absent"


def _kernel_connections(
    view: _View, processes: Iterable[Process], known: set[int], refused: set[int]
) -> Iterable[Connection]:
    for process in processes:
        if not process.has_library:
            continue
        for inode, fd in process.sockets.items():
            tcp = view.socket(process, inode)
            if tcp is None or not tcp.connected or inode in known:
                continue
            known.add(inode)
            yield Connection(
                pid=process.pid,
                comm=process.comm,
                fd=fd,
                role=view.role(process, tcp),
                local=str(tcp.local),
                peer=str(tcp.peer),
                original_dst=None,
                state="kernel",
                transport=None,
                reason=_why(
                    view, process, tcp, _infer_reason(view, process, tcp), refused
                ),
                ring_rx_bytes=0,
                ring_tx_bytes=0,
                kernel_rx_bytes=None,
                kernel_tx_bytes=None,
                rx_queued=tcp.rx_queue,
                tx_queued=tcp.tx_queue,
                ring_size=0,
            )


def connections(
    *, include_kernel: bool, pids: Container[int] | None = None
) -> tuple[Connection, ...]:
    """The connections of this host, or of the processes pids, as they are now."""
    view = _View(procfs.processes())
    processes = view.processes if pids is None else view.involved(pids)
    rows = _rows(processes)
    by_token: dict[bytes, list[Row]] = {}
    for row in rows:
        if any(row.token):
            by_token.setdefault(row.token, []).append(row)
    # Sockets that the policy of their process keeps on the kernel.
    refused = {row.inode for row in rows if _reason_name(row.reason) == "policy"}
    found: list[Connection] = []
    known: set[int] = set()
    for row in rows:
        connection = _from_row(view, row, by_token.get(row.token, [row]), refused)
        if connection is None:
            continue
        known.add(row.inode)
        if include_kernel or row.state != RowState.KERNEL:
            found.append(connection)
    if include_kernel:
        found.extend(_kernel_connections(view, processes, known, refused))
    if pids is not None:
        found = [each for each in found if each.pid in pids]
    return tuple(sorted(found, key=lambda each: (each.pid, each.fd)))


def run(args: argparse.Namespace) -> SsResult:
    """Looks once, or again and again until it is interrupted."""
    if not args.watch:
        return SsResult(connections(include_kernel=args.all))
    if args.json:
        raise UsageError("--json prints one document and --watch has no end")
    return _watch(include_kernel=args.all)


def _watch(*, include_kernel: bool) -> SsResult:
    console = _console()
    found: tuple[Connection, ...] = ()
    # Without a terminal there is nothing to draw over: one table after the other.
    with Live(
        console=console, screen=console.is_terminal, auto_refresh=False, transient=True
    ) as live:
        try:
            while True:
                found = connections(include_kernel=include_kernel)
                if console.is_terminal:
                    live.update(_table(found), refresh=True)
                else:
                    console.print(_table(found))
                    console.file.flush()
                time.sleep(_WATCH_INTERVAL_S)
        except KeyboardInterrupt:
            pass
    return SsResult(found)


def _console() -> Console:
    # A pipe has no width; wrapping there would break what reads it.
    console = Console()
    return console if console.is_terminal else Console(width=240)


_STYLES = {"ring": "green", "pending": "yellow", "kernel": "red"}


def _table(found: Iterable[Connection]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("state", "process", "fd", "role", "local", "peer"):
        table.add_column(name, no_wrap=True)
    for name in ("ring rx", "ring tx", "kernel rx", "kernel tx", "rx-q", "tx-q"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", no_wrap=True)
    for each in found:
        peer = each.peer
        if each.original_dst is not None:
            peer += f" (to {each.original_dst})"
        table.add_row(
            each.state,
            f"{each.comm}/{each.pid}",
            str(each.fd),
            each.role,
            each.local,
            peer,
            byte_count(each.ring_rx_bytes),
            byte_count(each.ring_tx_bytes),
            byte_count(each.kernel_rx_bytes),
            byte_count(each.kernel_tx_bytes),
            byte_count(each.rx_queued),
            byte_count(each.tx_queued),
            each.reason or each.transport or "",
            style=_STYLES.get(each.state, ""),
        )
    return table


@renders(SsResult)
def _render(result: SsResult, console: Console) -> None:
    if not result.connections:
        console.print(
            "No connection is on a ring; kmap ss -a also shows those on the kernel."
        )
        return
    if not console.is_terminal:
        console = _console()
    console.print(_table(result.connections))
