# SPDX-License-Identifier: Apache-2.0
"""Random programs: each operation is drawn for itself, so that any can be left out.

What an operation finds when it comes is the executor's business: one on a slot that
is empty, or that might block for ever, does nothing on either side.
"""

from __future__ import annotations

import select
import socket
from typing import Any

from hypothesis import strategies as st

Strategy = st.SearchStrategy[Any]

ENDS = st.integers(0, 1)
# Most programs have one descriptor an end.
SLOTS = st.integers(0, 19).map(lambda n: max(0, n - 17))
SMALL = st.integers(0, 64)
SIZES = st.integers(0, 15).flatmap(
    [
        *[SMALL] * 10,
        *[st.sampled_from([1, 4095, 4096, 4097, 16383, 16384, 16385, 40000])] * 3,
        *[st.integers(0, 30000)] * 2,
        st.integers(0, 300 * 1024),
    ].__getitem__
)
PARTS = st.integers(1, 3)
SET = st.integers(0, 9).map(lambda n: max(0, n - 7))
COOKIES = st.one_of(
    st.integers(0, 9),
    st.sampled_from([2**64 - 1, 2**63, 2**32, 0xFFFFFFFF, 0x80000000]),
    st.integers(0, 2**64 - 1),
)

IN, OUT, PRI, RDHUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLPRI, 0x2000
RDNORM, WRNORM = 0x40, 0x100
ET, ONESHOT, EXCLUSIVE = 1 << 31, 1 << 30, 1 << 28
EXCLUSIVES = st.sampled_from([EXCLUSIVE, EXCLUSIVE | ET])


def _flags(*choices: int) -> Strategy:
    return st.sets(st.sampled_from(choices), max_size=3).map(sum)


def _rarely(value: int) -> Strategy:
    return st.integers(0, 19).map(lambda n: value if n == 19 else 0)


FORKS = _rarely(1).map(bool)
GIVE_FLAGS = st.builds(
    int.__or__,
    _flags(socket.MSG_DONTWAIT, socket.MSG_NOSIGNAL, 0x8000),
    _rarely(socket.MSG_OOB),
)
TAKE_FLAGS = _flags(
    socket.MSG_DONTWAIT, socket.MSG_PEEK, socket.MSG_WAITALL, socket.MSG_TRUNC
)
POLL_EVENTS = _flags(IN, OUT, RDHUP, PRI, RDNORM, WRNORM)
EPOLL_EVENTS = st.one_of(
    st.builds(
        int.__or__,
        _flags(IN, OUT, RDHUP, PRI, RDNORM),
        st.sampled_from([0, ET, ET, ONESHOT, ET | ONESHOT]),
    ),
    st.builds(
        int.__or__, _flags(IN, OUT), st.sampled_from([EXCLUSIVE, EXCLUSIVE | ET])
    ),
)
GIVE_CALLS = st.sampled_from(
    ["send", "write", "writev", "sendmsg", "sendto", "sendmmsg", "pwritev2",
     "sendfile", "splice"]
)  # fmt: skip
TAKE_CALLS = st.sampled_from(
    ["recv", "read", "readv", "recvmsg", "recvfrom", "recvmmsg", "preadv2", "splice"]
)


def _op(name: str, **fields: Strategy) -> Strategy:
    return st.fixed_dictionaries({"op": st.just(name), **fields})


GIVE = _op(
    "give", end=ENDS, slot=SLOTS, call=GIVE_CALLS, size=SIZES, flags=GIVE_FLAGS,
    parts=PARTS, fork=FORKS,
)  # fmt: skip
TAKE = _op(
    "take", end=ENDS, slot=SLOTS, call=TAKE_CALLS, size=SIZES, flags=TAKE_FLAGS,
    parts=PARTS, fork=FORKS,
)  # fmt: skip
POLL = _op(
    "poll", end=ENDS, call=st.sampled_from(["poll", "ppoll", "select"]),
    events=POLL_EVENTS, sets=st.booleans(),
)  # fmt: skip
CONTROL = _op(
    "control", end=ENDS, slot=SLOTS, set=SET,
    how=st.integers(0, 5).map(lambda n: max(0, n - 2)), events=EPOLL_EVENTS,
    cookie=COOKIES,
)  # fmt: skip
WAIT = _op(
    "wait", end=ENDS, set=SET, most=st.sampled_from([64, 64, 1]),
    call=st.sampled_from(["epoll_wait", "epoll_pwait", "epoll_pwait2"]),
    ms=st.sampled_from([0, 0, 0, 2]),
)  # fmt: skip
NEST = _op(
    "nest", end=ENDS, set=st.integers(0, 1), how=st.sampled_from([1, 2]),
    cookie=COOKIES,
)  # fmt: skip
RENEW = _op("renew", end=ENDS, set=SET)
NONBLOCK = _op(
    "nonblock", end=ENDS, slot=SLOTS, how=st.sampled_from(["fcntl", "ioctl"]),
    on=st.booleans(),
)  # fmt: skip
SHUTDOWN = _op("shutdown", end=ENDS, slot=SLOTS, how=st.integers(0, 2), fork=FORKS)
CLOSE = _op("close", end=ENDS, slot=SLOTS, all=st.booleans(), linger=st.booleans())
DUP = _op(
    "dup", end=ENDS, slot=SLOTS, to=st.integers(0, 2),
    how=st.sampled_from(["dup", "dup2", "fcntl"]),
)  # fmt: skip
OPTION = st.one_of(
    _op(
        "option", end=ENDS, slot=SLOTS, value=st.just(0),
        what=st.sampled_from(["fionread", "fionread", "outq", "error", "state"]),
    ),
    _op(
        "option", end=ENDS, slot=SLOTS, value=st.sampled_from([0, 4]),
        what=st.just("timeout"),
    ),
    _op(
        "option", end=ENDS, slot=SLOTS, value=st.sampled_from([1, 2, 100]),
        what=st.just("lowat"),
    ),
)  # fmt: skip
FILL = _op("fill", end=ENDS)
DRAIN = _op("drain", end=ENDS)

# How often; the first of them is what a shrinking program tends to.
WEIGHTS = (
    (GIVE, 24), (TAKE, 24), (WAIT, 24), (CONTROL, 18), (POLL, 10), (OPTION, 10),
    (NONBLOCK, 2), (DUP, 4), (SHUTDOWN, 2), (CLOSE, 2), (NEST, 3), (DRAIN, 4),
    (FILL, 1), (RENEW, 1),
)  # fmt: skip
OPERATIONS = st.integers(0, sum(weight for _, weight in WEIGHTS) - 1).flatmap(
    [strategy for strategy, weight in WEIGHTS for _ in range(weight)].__getitem__
)
# Lists of lists are longer on average and still shrink to one operation.
PROGRAMS = st.tuples(
    st.lists(CONTROL, max_size=4),
    st.lists(st.lists(OPERATIONS, min_size=1, max_size=12), min_size=1, max_size=8),
).map(lambda parts: sum(parts[1], parts[0]))


NONBLOCKING = st.integers(0, 2).map(lambda n: n < 2)


def programs(variant: str) -> Strategy:
    return st.fixed_dictionaries(
        {
            "variant": st.just(variant),
            "nonblock": st.tuples(NONBLOCKING, NONBLOCKING),
            "ops": PROGRAMS,
        }
    )
