# SPDX-License-Identifier: Apache-2.0
"""Makes docs/semantics.md, from the table of symbols, the deviations and more tables.

scripts/semantics writes the file; test_semantics.py holds it to this.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kmap import native
from tests.conformance.test_conformance import DEVIATIONS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/semantics.md"

CLASSES = {
    "RING": "ring",
    "FORWARDED": "forwarded",
    "PINNED": "pinned",
    "DIFFERS": "differs",
}
SUBJECTS = {
    "BYTES": "Bytes",
    "READINESS": "Readiness",
    "SOCKETS": "Making, naming and ending connections",
    "OPTIONS": "Options and requests",
    "DESCRIPTORS": "Descriptors",
    "PROCESSES": "Processes",
    "SIGNALS": "Signals",
    "STREAMS": "Streams of stdio",
}

Rows = tuple[tuple[str, str, str], ...]

# name, class, what it does on an upgraded connection
RECEIVE_FLAGS: Rows = (
    ("MSG_DONTWAIT", "RING", ""),
    ("MSG_PEEK", "RING", "Waits for SO_RCVLOWAT like any read; while some bytes are "
     "still in the kernel it makes do with those."),
    ("MSG_WAITALL", "RING", "With MSG_PEEK too, up to the size of a ring."),
    ("MSG_TRUNC", "RING", "TCP's meaning: bytes are taken and thrown away."),
    ("MSG_CMSG_CLOEXEC", "RING", "Shows in msg_flags; no descriptors come by TCP."),
    ("MSG_WAITFORONE", "RING", "Of recvmmsg."),
    ("MSG_OOB", "FORWARDED", "Urgent data is the kernel's."),
    ("MSG_ERRQUEUE", "FORWARDED", "The error queue is the kernel's."),
)  # fmt: skip
SEND_FLAGS: Rows = (
    ("MSG_DONTWAIT", "RING", ""),
    ("MSG_NOSIGNAL", "RING", "EPIPE and SIGPIPE are the kernel's, with this flag."),
    ("MSG_MORE", "RING", "Nothing is held back: the peer may see the bytes sooner."),
    ("MSG_EOR, MSG_CONFIRM, MSG_DONTROUTE", "RING", "Mean nothing, as on TCP."),
    ("MSG_OOB", "PINNED", "Writing goes back to the kernel for good; bytes before it "
     "are read from the ring first, and a read ends at the urgent byte."),
    ("MSG_ZEROCOPY", "PINNED", "Needs SO_ZEROCOPY, which see."),
    ("MSG_FASTOPEN", "PINNED", "A connection made by it stays on the kernel."),
)  # fmt: skip
SOCKET_OPTIONS: Rows = (
    ("SO_RCVTIMEO, SO_SNDTIMEO", "RING", "Time limits of blocking calls."),
    ("SO_RCVLOWAT", "RING", "For reads and readiness; for readiness at most half of "
     "the ring."),
    ("SO_ERROR", "FORWARDED", "Resets and deaths come from the kernel's socket."),
    ("SO_LINGER", "FORWARDED", "Zero resets. With a time, close does not wait for "
     "what is still in the ring."),
    ("SO_RCVBUF, SO_SNDBUF", "FORWARDED", "Read and set, without effect on a ring, "
     "whose size is KMAP_RING_SIZE."),
    ("SO_KEEPALIVE", "FORWARDED", "The kernel goes on probing its connection."),
    ("SO_OOBINLINE", "FORWARDED", ""),
    ("SO_TYPE, SO_DOMAIN, SO_PROTOCOL, SO_ACCEPTCONN, SO_REUSEADDR, SO_REUSEPORT, "
     "SO_PRIORITY, SO_MARK, SO_BINDTODEVICE, SO_INCOMING_CPU, SO_MAX_PACING_RATE, "
     "SO_BUSY_POLL", "FORWARDED", "Without effect on a ring."),
    ("SO_ZEROCOPY", "PINNED", "The kernel tells of completions."),
    ("SO_PEEK_OFF", "PINNED", ""),
    ("SO_TIMESTAMP, SO_TIMESTAMPNS, SO_TIMESTAMPING", "PINNED", "Bytes that were "
     "unread in a ring have no times of their own."),
    ("SO_ATTACH_FILTER, SO_ATTACH_BPF", "PINNED", ""),
)  # fmt: skip
TCP_OPTIONS: Rows = (
    ("TCP_INFO", "FORWARDED", "The state is right; counts leave out what went by "
     "ring."),
    ("TCP_NODELAY, TCP_QUICKACK", "FORWARDED", "A ring delays nothing."),
    ("TCP_CORK", "RING", "A ring delays nothing. Once the kernel has switched it off, "
     "the library keeps it, and hands it back with the stream."),
    ("TCP_NOTSENT_LOWAT", "FORWARDED", "Writable is: a quarter of the ring is free."),
    ("TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT, TCP_LINGER2, "
     "TCP_SYNCNT, TCP_DEFER_ACCEPT, TCP_FASTOPEN, TCP_CONGESTION, TCP_MAXSEG, "
     "TCP_WINDOW_CLAMP", "FORWARDED", "Of the kernel's connection."),
    ("TCP_ULP", "PINNED", "Kernel TLS. ENOENT, as without the module, when unread "
     "bytes are in the ring of a peer that has ended its stream."),
    ("TCP_REPAIR", "PINNED", "EPERM in that case."),
    ("TCP_INQ", "PINNED", "ENOPROTOOPT in that case."),
    ("TCP_ZEROCOPY_RECEIVE", "PINNED", "ENOPROTOOPT in that case."),
)  # fmt: skip
REQUESTS: Rows = (
    ("ioctl FIONREAD (SIOCINQ)", "RING", "What the next reads would get."),
    ("ioctl SIOCOUTQ (TIOCOUTQ)", "RING", "What the peer has not read yet."),
    ("ioctl SIOCATMARK", "RING", "The kernel's answer, and no byte left in the ring."),
    ("ioctl FIONBIO, fcntl F_SETFL O_NONBLOCK", "FORWARDED", "Also when a "
     "process changes it that Kmap is not in: where one may, the kernel is asked."),
    ("ioctl FIOASYNC, fcntl F_SETFL O_ASYNC", "PINNED", "SIGIO is the "
     "kernel's."),
    ("fcntl F_DUPFD, F_DUPFD_CLOEXEC", "FORWARDED", "The same connection."),
    ("fcntl F_SETOWN, F_SETSIG", "FORWARDED", "SIGURG comes from the kernel."),
    ("all others", "FORWARDED", ""),
)  # fmt: skip

HEAD = """\
<!-- Made by scripts/semantics; do not edit. -->
# Semantics, call by call

What becomes of each call of a program under Kmap. On a descriptor that is not a TCP
socket, and on a connection that is not upgraded, every call is the kernel's own, with
its arguments, result and errno untouched. The tables say what happens on a connection
that is on its rings.

| class | means |
|---|---|
| ring | the library answers, from the rings, as the kernel would |
| forwarded | the kernel's call, or libc's; the library may take note of it |
| pinned | forwarded, and the connection stays on the kernel from then on |
| differs | something about it is not as on the kernel |

An upgraded connection that is pinned goes back to the kernel at the present byte, with
all that is still unread in its rings; both programs go on as if nothing had happened.

Whatever the class: results, errno, blocking, EINTR and SA_RESTART, SIGPIPE, and the
order of bytes, end of file and resets are the kernel's, and `tests/conformance` runs
the same cases on both. A call that succeeds leaves errno alone.
"""

UNSEEN = """\
## Not seen by the library

Calls that do not pass through libc's exported names. They work on the kernel's socket
and are correct on connections that are not upgraded.

| what | then |
|---|---|
| stdio's own reads and writes | pinned at fdopen |
| static programs, Go programs, setuid and setcap programs | the library is not there, or forwards everything |
| system calls made inline | on an upgraded connection they act on the kernel's socket: a read finds nothing, a write is a violation for the peer, which resets the connection |
| io_uring | io_uring_setup through syscall() is answered ENOSYS; libraries that make it inline are not seen |
"""  # noqa: E501

LIMITS = """\
## Limits

| what | limit |
|---|---|
| bytes of one call | 0x7ffff000, as on the kernel |
| parts of a vector | IOV_MAX (1024), as on the kernel |
| bytes on their way one way | {ring_size} unless KMAP_RING_SIZE says otherwise; the kernel's buffers may hold more |
| writable, for poll and epoll | a quarter of the largest ring is free |
| splice | at most 16 KiB from a connection and 4 KiB into one in one call |
| descriptors that are followed | below 1,048,576; connections on higher ones stay on the kernel |
| connections of one process, of one bell | docs/protocol.md, section 11 |
"""  # noqa: E501


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join(lines) + "\n"


def calls(subject: str) -> str:
    rows = [
        (f"`{symbol.name}`", CLASSES[symbol.class_name], symbol.text)
        for symbol in native.symbol_table()
        if symbol.subject == subject
    ]
    return table(("call", "class", "on an upgraded connection"), rows)


def flags(what: str, rows: Rows) -> str:
    made = [(f"`{'`, `'.join(n.split(', '))}`", CLASSES[c], t) for n, c, t in rows]
    return table((what, "class", "on an upgraded connection"), made)


def differences() -> str:
    by_reason: dict[str, list[str]] = {}
    for entry in DEVIATIONS.values():
        by_reason.setdefault(entry.reason, []).append(f"`{entry.case}`")
    rows = [(reason, ", ".join(cases)) for reason, cases in by_reason.items()]
    return table(("what differs, and why", "cases of tests/conformance"), rows)


def render() -> str:
    """The page."""
    ring_size = next(o for o in native.options() if o.env == "KMAP_RING_SIZE").default
    more = {
        "BYTES": [
            ("Flags of recv, recvfrom, recvmsg, recvmmsg", "flag", RECEIVE_FLAGS),
            ("Flags of send, sendto, sendmsg, sendmmsg", "flag", SEND_FLAGS),
        ],
        "OPTIONS": [
            ("Options of SOL_SOCKET", "option", SOCKET_OPTIONS),
            ("Options of IPPROTO_TCP", "option", TCP_OPTIONS),
            ("Requests", "request", REQUESTS),
        ],
    }
    parts = [HEAD]
    for subject, title in SUBJECTS.items():
        parts.append(f"## {title}\n\n{calls(subject)}")
        for heading, what, rows in more.get(subject, []):
            parts.append(f"### {heading}\n\n{flags(what, rows)}")
            if heading.startswith("Options of IPPROTO"):
                parts.append(
                    "Options of other levels (IP_TOS, IP_TTL, IPV6_TCLASS) are "
                    "forwarded, without effect\non a ring.\n"
                )
    parts.append(LIMITS.format(ring_size=f"{int(ring_size):,} bytes"))
    parts.append(
        "## What differs\n\n"
        "Each line is an entry of `tests/conformance/deviations.toml`; one that no "
        "longer\ndiffers fails the tests.\n\n" + differences()
    )
    parts.append(UNSEEN)
    return "\n".join(parts)


def main() -> None:
    PAGE.write_text(render())


def names_of(rows: Rows) -> set[str]:
    return {name for names, _, _ in rows for name in names.split(", ")}


if __name__ == "__main__":
    main()
