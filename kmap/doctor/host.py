# SPDX-License-Identifier: Apache-2.0
"""What an upgrade needs of the host, tried out one by one and then as a whole."""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import platform
import re
import resource
import secrets
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from kmap import native, procfs
from kmap import settings as values
from kmap.doctor.check import Check, Subject
from kmap.doctor.preloading import installed, trial
from kmap.render import byte_count

HOST = Subject("host")

_MACHINES = frozenset({"x86_64", "aarch64"})
# tcpi_bytes_retrans, the last field of struct tcp_info that the library reads, came
# with Linux 4.19.
_KERNEL_LEAST = (4, 19)
# From F_SEAL_FUTURE_WRITE on others cannot write a process's statistics.
_KERNEL_SEALED_STATISTICS = (5, 1)
_TCPI_BYTES_RECEIVED = 128
_TCPI_BYTES_SENT = 200
_TCPI_LEAST = 216

# linux/sock_diag.h, linux/inet_diag.h, linux/netlink.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_DIAG_UID = 16 + 64

_MAPPINGS_FEW = 8192


def _error(error: OSError) -> str:
    return error.strerror or str(error)


def _kernel() -> Check:
    name, release, machine = os.uname()[0], os.uname()[2], platform.machine()
    found = f"{name} {release}, {machine}"
    if name != "Linux":
        return HOST.cannot("kernel", found, "run it on Linux")
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < _KERNEL_LEAST:
        return HOST.cannot(
            "kernel", found, "4.19 or newer is needed: TCP_INFO is short"
        )
    if machine not in _MACHINES:
        return HOST.limited("kernel", found, "only x86-64 and arm64 are tested")
    if version < _KERNEL_SEALED_STATISTICS:
        return HOST.limited(
            "kernel",
            f"{found}: other processes of a user can write its statistics",
            "5.1 or newer seals them",
        )
    return HOST.ok("kernel", found)


def _cgroup_limit() -> str:
    """The memory limit of our cgroup (v2), in words; empty without one."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                group = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
                limit = int((group / "memory.max").read_text())
                return f", of which the cgroup may have {byte_count(limit)}"
    return ""


def _shared_memory() -> Check:
    name = "shared memory"
    step = "memfd_create"
    try:
        fd = os.memfd_create("kmap-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            step = "ftruncate"
            os.ftruncate(fd, mmap.PAGESIZE)
            step = "F_ADD_SEALS"
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            step = "mmap"
            with mmap.mmap(fd, mmap.PAGESIZE) as page:
                page[0] = 1
        finally:
            os.close(fd)
    except OSError as error:
        return HOST.cannot(
            name,
            f"{step}: {_error(error)}",
            "let memfd_create, ftruncate, fcntl and mmap through: a seccomp or SELinux "
            "rule, or a limit, refuses them",
        )
    return HOST.ok(
        name,
        "a memfd can be made, sealed and mapped; it counts as memory"
        f"{_cgroup_limit()}; the size of /dev/shm does not matter",
    )


def _rendezvous() -> Check:
    name = "rendezvous"
    step = "socket"
    kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
    try:
        with (
            socket.socket(socket.AF_UNIX, kind) as listener,
            socket.socket(socket.AF_UNIX, kind) as client,
            open(os.devnull) as passed,
        ):
            step = "bind"
            # Random, as anybody may have any name.
            address = b"\0kmap-doctor-" + secrets.token_hex(8).encode()
            listener.bind(address)
            step = "listen"
            listener.listen(1)
            step = "connect"
            client.connect(address)
            step = "accept"
            server, _ = listener.accept()
            with server:
                step = "sendmsg"
                socket.send_fds(client, [b"x"], [passed.fileno()])
                step = "recvmsg"
                _, fds, _, _ = socket.recv_fds(server, 1, 1)
                for fd in fds:
                    os.close(fd)
                if not fds:
                    raise OSError(0, "no descriptor arrived")
                step = "SO_PEERCRED"
                server.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError as error:
        return HOST.cannot(
            name,
            f"{step} on an abstract Unix socket: {_error(error)}",
            "let Unix sockets of type SOCK_SEQPACKET, abstract names and SCM_RIGHTS "
            "through: a seccomp, AppArmor or SELinux rule refuses them",
        )
    return HOST.ok(name, "an abstract Unix socket carries descriptors")


@contextlib.contextmanager
def _loopback() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection over 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname(), 5) as client:
            listener.settimeout(5)
            server, _ = listener.accept()
            with server:
                yield client, server


def _tcp_info() -> Check:
    name = "TCP_INFO"
    try:
        with _loopback() as (client, server):
            client.sendall(b"0123456789")
            server.settimeout(5)
            server.recv(10, socket.MSG_WAITALL)
            sent = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
            received = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
            fcntl.ioctl(server, 0x541B, array.array("i", [0]))  # FIONREAD
    except OSError as error:
        return HOST.cannot(
            name,
            f"a connection over 127.0.0.1: {_error(error)}",
            "bring the loopback device up (ip link set lo up), and let getsockopt and "
            "ioctl on sockets through",
        )
    if min(len(sent), len(received)) < _TCPI_LEAST:
        return HOST.cannot(
            name, f"{len(sent)} bytes long", "a kernel from 4.19 on counts bytes sent"
        )
    counts = (
        struct.unpack_from("Q", sent, _TCPI_BYTES_SENT)[0],
        struct.unpack_from("Q", received, _TCPI_BYTES_RECEIVED)[0],
    )
    if counts != (10, 10):
        return HOST.cannot(
            name,
            f"counts {counts[0]} bytes sent and {counts[1]} received of 10",
            "run it on a kernel of Linux itself: this one emulates TCP_INFO",
        )
    return HOST.ok(name, "the kernel counts the bytes of connections exactly")


def _ask_owner(sock: socket.socket) -> int:
    """The user id that sock_diag(7) gives for the other end of sock."""
    local, peer = sock.getsockname(), sock.getpeername()
    identity = struct.pack(
        "!HH16s16s",
        peer[1],
        local[1],
        socket.inet_aton(peer[0]),
        socket.inet_aton(local[0]),
    )
    request = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 2**32 - 1)
    request += identity + struct.pack("=III", 0, 2**32 - 1, 2**32 - 1)
    head = struct.pack(
        "=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0
    )
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as netlink:
        netlink.sendto(head + request, (0, 0))
        reply = netlink.recv(1024, socket.MSG_DONTWAIT)
    kind_of_reply = struct.unpack_from("=H", reply, 4)[0]
    if kind_of_reply == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", reply, 16)[0]
        raise OSError(number, os.strerror(number))
    return int(struct.unpack_from("=I", reply, _DIAG_UID)[0])


def _sock_diag() -> Check:
    name = "sock_diag"
    remedy = (
        "let AF_NETLINK sockets through, and load the module: modprobe tcp_diag; "
        "without it the owner of a connection's other end cannot be proven"
    )
    try:
        with _loopback() as (client, _):
            uid = _ask_owner(client)
    except (OSError, struct.error) as error:
        found = _error(error) if isinstance(error, OSError) else "a short answer"
        return HOST.cannot(name, found, remedy)
    if uid != os.geteuid():
        return HOST.cannot(
            name, f"names user {uid} as the owner, it is {os.geteuid()}", remedy
        )
    return HOST.ok(name, "the kernel names the owner of a connection's other end")


def descriptors(limits: tuple[int, int], subject: Subject) -> Check:
    """Whether RLIMIT_NOFILE leaves room for the library's own; docs/limits.md."""
    name = "descriptors"
    soft, hard = limits
    unlimited = resource.RLIM_INFINITY
    if soft != hard:
        above = "no limit" if hard == unlimited else str(hard)
        return subject.ok(
            name, f"limit {soft}, the library's own go above (up to {above})"
        )
    remedy = (
        "leave the hard limit above the soft one: ulimit -Sn and -Hn, LimitNOFILE="
        "SOFT:HARD of systemd, --ulimit nofile=SOFT:HARD of docker"
    )
    if soft != unlimited and soft < procfs.INSIDE_LEAST:
        return subject.cannot(
            name,
            f"soft limit = hard limit = {soft}: no room for the library's own",
            remedy,
        )
    return subject.limited(
        name,
        f"soft limit = hard limit = {soft}: the library takes numbers from 900 on",
        remedy,
    )


def _descriptors() -> Check:
    return descriptors(resource.getrlimit(resource.RLIMIT_NOFILE), HOST)


def _address_space() -> Check:
    name = "address space"
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        return HOST.limited(
            name,
            f"RLIMIT_AS is {byte_count(soft)}: each end of a connection takes up to "
            "712 KiB",
            "ulimit -v unlimited",
        )
    try:
        mappings = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return HOST.ok(name, "no limit")
    found = f"no limit, {mappings} mappings: one for each end of a connection"
    if mappings < _MAPPINGS_FEW:
        return HOST.limited(name, found, "sysctl vm.max_map_count=65530")
    return HOST.ok(name, found)


def seccomp(status: str, subject: Subject, *, outside: int = 0) -> Check:
    """Whether system calls are filtered, from the text of /proc/PID/status.

    outside is the number of filters that the asker has and that prove harmless.
    """
    name = "seccomp"
    fields = dict(re.findall(r"^(Seccomp\w*):\s*(\d+)$", status, re.MULTILINE))
    mode, filters = int(fields.get("Seccomp", 0)), int(fields.get("Seccomp_filters", 0))
    if mode == 0:
        return subject.ok(name, "no filter")
    if mode == 1:
        return subject.cannot(name, "strict mode", "do not use it with connections")
    found = f"{filters} filter{'s' if filters > 1 else ''}" if filters else "a filter"
    if filters and filters == outside:
        return subject.ok(name, f"{found}, as the doctor has, too")
    return subject.limited(
        name,
        f"{found}: one that it put itself under keeps its connections on the kernel, "
        "and others may refuse what an upgrade needs",
        "kmap ss -a has the reason (seccomp, syscall-failed); docs/limits.md lists the "
        "calls to let through",
    )


def own_status(pid: int | str = "self") -> str:
    """The text of /proc/PID/status; empty when it cannot be read."""
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def filters_of(status: str) -> int:
    """How many seccomp filters a status speaks of."""
    match = re.search(r"^Seccomp_filters:\s*(\d+)$", status, re.MULTILINE)
    return int(match[1]) if match else 0


def _seccomp() -> Check:
    status = own_status()
    # What the filter refuses, the other checks find out.
    return seccomp(status, HOST, outside=filters_of(status))


def _network() -> Check:
    name = "network namespace"
    try:
        own = os.stat("/proc/self/ns/net").st_ino
    except OSError as error:
        return HOST.limited(name, f"not to be seen: {_error(error)}", "mount /proc")
    with contextlib.suppress(OSError):
        same = own == os.stat("/proc/1/ns/net").st_ino
        whose = "that of process 1" if same else "not that of process 1"
        return HOST.ok(name, f"net:[{own}], {whose}; both ends have to be in one")
    return HOST.ok(name, f"net:[{own}]; both ends have to be in one")


def _ptrace() -> Check:
    name = "ptrace"
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        return HOST.ok(name, "not restricted among processes of one user")
    if scope == 0:
        return HOST.ok(name, "kernel.yama.ptrace_scope = 0")
    return HOST.ok(
        name,
        f"kernel.yama.ptrace_scope = {scope} keeps processes of one user apart, and "
        "the proof of a connection's other end does not; docs/security.md",
    )


def settings(environment: Mapping[str, str], subject: Subject) -> Check:
    """What the library makes of the settings in environment, but for the policy."""
    name = "settings"
    known = [option.env for option in native.options()]
    given = {key: environment[key] for key in known if key in environment}
    if given.get("KMAP_DISABLE") == "1":
        return subject.cannot(
            name,
            "KMAP_DISABLE=1: every call is forwarded",
            "start the program without KMAP_DISABLE",
        )
    faults = []
    for key, value in given.items():
        try:
            values.check(key, value)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        return subject.limited(
            name,
            "; ".join(faults) + "; the library uses its default",
            "correct it, and start the program again",
        )
    words = [f"{key}={value}" for key, value in given.items()]
    return subject.ok(name, "; ".join(words) or "all at their defaults")


def _settings() -> Check:
    """What programs started from here would inherit."""
    return settings(os.environ, HOST)


_CHECKS: tuple[Callable[[], Check], ...] = (
    _kernel,
    _shared_memory,
    _rendezvous,
    _tcp_info,
    _sock_diag,
    _descriptors,
    _address_space,
    _seccomp,
    _network,
    _ptrace,
)


def check() -> list[Check]:
    """All checks of the host, and of the library that is installed on it."""
    found = [each() for each in _CHECKS]
    library = installed(HOST)
    found.append(library)
    if library.state is not library.state.CANNOT:
        found += [_settings(), trial(HOST)]
    return found
