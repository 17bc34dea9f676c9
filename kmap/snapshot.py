# SPDX-License-Identifier: Apache-2.0
"""One look at the host: processes under Kmap, their counters and their connections.

``kmap ss``, ``kmap top`` and ``kmap exporter`` all show what is found here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kmap import native, procfs, sockdiag, wire
from kmap.procfs import Process, StatisticsFile, TcpSocket
from kmap.wire import Endpoint, Role, Row, RowState


class Connection(NamedTuple):
    """One end of a TCP connection; sizes and counts in bytes.

    Counts of the kernel are None where nobody knows them: a connection that was never
    upgraded, where sock_diag cannot be asked.
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
class Group:
    """Processes that share a statistics memfd: one, and what it has forked since."""

    file: StatisticsFile
    # The creator first, if it is still there.
    holders: tuple[Process, ...]
    statistics: wire.Statistics


@dataclass(frozen=True)
class Snapshot:
    """What there was at one moment."""

    processes: tuple[Process, ...]
    groups: tuple[Group, ...]
    connections: tuple[Connection, ...]
    # Of the socket of each connection; no two sockets of a host have the same.
    inodes: tuple[int, ...]
    # Programs that may not be looked at, mostly those of other users.
    hidden: int
    # What could not be read and why, a line each: other versions of the library.
    notes: tuple[str, ...]


class _Namespace:
    """The sockets of a network namespace, by what they are looked up by."""

    def __init__(self, sockets: Sequence[TcpSocket]) -> None:
        self.connected: dict[tuple[Endpoint, Endpoint], TcpSocket] = {}
        self.by_peer: dict[Endpoint, list[TcpSocket]] = {}
        self.by_local: dict[Endpoint, list[TcpSocket]] = {}
        self.listeners: dict[int, list[TcpSocket]] = {}
        self.addresses = {tcp.local.raw for tcp in sockets}
        for tcp in sockets:
            if tcp.connected:
                self.connected[tcp.local, tcp.peer] = tcp
                self.by_peer.setdefault(tcp.peer, []).append(tcp)
                self.by_local.setdefault(tcp.local, []).append(tcp)
            elif tcp.state == procfs.LISTEN:
                self.listeners.setdefault(tcp.local.port, []).append(tcp)


def _tcp_sockets(process: Process) -> list[TcpSocket] | None:
    """By sock_diag if that is allowed and built in, else as text without counts."""
    try:
        return sockdiag.tcp_sockets(process.pid)
    except OSError:
        return procfs.tcp_sockets(process.pid)


class _View:
    """Who holds which socket, and the sockets of each network namespace."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.processes = processes
        self.holders: dict[int, list[Process]] = {}
        for process in processes:
            for inode in process.sockets:
                self.holders.setdefault(inode, []).append(process)
        # Sockets by network namespace: the addresses of two namespaces overlap.
        self.sockets: dict[int, dict[int, TcpSocket]] = {}
        self._found: dict[int, list[TcpSocket]] = {}
        self._namespaces: dict[int, _Namespace] = {}
        for process in processes:
            if process.network in self.sockets:
                continue
            found = _tcp_sockets(process)
            if found is None:
                continue
            # A connection that waits to be accepted has no inode yet.
            self.sockets[process.network] = {tcp.inode: tcp for tcp in found}
            self._found[process.network] = found

    def _namespace(self, process: Process) -> _Namespace | None:
        """Made when it is first asked for: rings alone do not need it."""
        namespace = self._namespaces.get(process.network)
        if namespace is None and process.network in self._found:
            namespace = _Namespace(self._found[process.network])
            self._namespaces[process.network] = namespace
        return namespace

    def socket(self, process: Process, inode: int) -> TcpSocket | None:
        return self.sockets.get(process.network, {}).get(inode)

    def peer_of(self, process: Process, tcp: TcpSocket) -> TcpSocket | None:
        """The socket at the other end, if it is in the same network namespace."""
        namespace = self._namespace(process)
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
        namespace = self._namespace(process)
        return endpoint.address.is_loopback or (
            namespace is not None and endpoint.raw in namespace.addresses
        )

    def listeners(self, process: Process, port: int) -> list[TcpSocket]:
        """The sockets of the namespace that listen on the port."""
        namespace = self._namespace(process)
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


def groups(processes: Sequence[Process]) -> tuple[list[Group], list[str]]:
    """The statistics that the processes hold, each once; and what cannot be read."""
    files: dict[tuple[int, int], StatisticsFile] = {}
    holders: dict[tuple[int, int], list[Process]] = {}
    for process in processes:
        for file in process.statistics:
            files.setdefault(file.identity, file)
            holders.setdefault(file.identity, []).append(process)
    found: list[Group] = []
    notes: list[str] = []
    for identity, file in files.items():
        try:
            statistics = procfs.read_statistics(file)
        except wire.NotStatistics as error:
            # Another build's process must not hide everybody else's connections.
            notes.append(
                f"{file.path}: {error}: the process runs another version of the library"
            )
            continue
        if statistics is not None:
            by_creator = sorted(
                holders[identity], key=lambda each: each.inner_pid != statistics.pid
            )
            found.append(Group(file, tuple(by_creator), statistics))
    return found, notes


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


def _known(asked: int | None, noted: int) -> int:
    """The kernel's own count, or what the library noted when it left the kernel."""
    return noted if asked is None else asked


def _from_row(
    view: _View, row: Row, ends: list[Row], refused: set[int]
) -> Connection | None:
    """The line of a row; None if no process holds its socket any more."""
    holders = view.holders.get(row.inode)
    if not holders:
        return None
    holder = holders[0]
    if len(holders) > 1:
        holder = next((p for p in holders if p.inner_pid == row.pid), holder)
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
        kernel_rx_bytes=_known(tcp.rx_bytes if tcp else None, row.kernel_rx_bytes),
        kernel_tx_bytes=_known(tcp.tx_bytes if tcp else None, row.kernel_tx_bytes),
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
        not holder.disabled
        for end in ends
        for holder in view.holders.get(end.inode, [])
    )
    return "not-hot" if able else "peer-absent"


def _kernel_connections(
    view: _View, processes: Iterable[Process], known: set[int], refused: set[int]
) -> Iterable[tuple[Connection, int]]:
    for process in processes:
        for inode, fd in process.sockets.items():
            tcp = view.socket(process, inode)
            if tcp is None or not tcp.connected or inode in known:
                continue
            known.add(inode)
            connection = Connection(
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
                kernel_rx_bytes=tcp.rx_bytes,
                kernel_tx_bytes=tcp.tx_bytes,
                rx_queued=tcp.rx_queue,
                tx_queued=tcp.tx_queue,
                ring_size=0,
            )
            yield connection, inode


def look(*, include_kernel: bool, pids: Container[int] | None = None) -> Snapshot:
    """Processes, counters and connections of this host as they are now.

    Without include_kernel connections on the kernel are left out; with pids all but
    those of these processes.  What is said of statistics that cannot be read is then of
    these processes and of those at the other ends.
    """
    processes, hidden = procfs.survey()
    view = _View(processes)
    if pids is not None:
        processes = view.involved(pids)
    found_groups, notes = groups(processes)
    rows = [row for group in found_groups for row in group.statistics.rows]
    by_token: dict[bytes, list[Row]] = {}
    for row in rows:
        if any(row.token):
            by_token.setdefault(row.token, []).append(row)
    # Sockets that the policy of their process keeps on the kernel.
    refused = {row.inode for row in rows if _reason_name(row.reason) == "policy"}
    found: list[tuple[Connection, int]] = []
    known: set[int] = set()
    for row in rows:
        connection = _from_row(view, row, by_token.get(row.token, [row]), refused)
        if connection is None:
            continue
        known.add(row.inode)
        if include_kernel or row.state != RowState.KERNEL:
            found.append((connection, row.inode))
    if include_kernel:
        found.extend(_kernel_connections(view, processes, known, refused))
    if pids is not None:
        found = [each for each in found if each[0].pid in pids]
    found.sort(key=lambda each: (each[0].pid, each[0].fd))
    return Snapshot(
        processes=tuple(processes),
        groups=tuple(found_groups),
        connections=tuple(each[0] for each in found),
        inodes=tuple(each[1] for each in found),
        hidden=hidden,
        notes=tuple(notes),
    )


def connections(
    *, include_kernel: bool, pids: Container[int] | None = None
) -> tuple[Connection, ...]:
    """The connections of this host, or of the processes pids, as they are now."""
    return look(include_kernel=include_kernel, pids=pids).connections
