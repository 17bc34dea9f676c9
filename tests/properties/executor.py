# SPDX-License-Identifier: Apache-2.0
"""Runs programs of socket calls on the two ends of a fresh connection each.

    python executor.py    (reads programs from stdin, one JSON document a line)

For each operation one line goes out: what its calls returned, with everything taken
out that TCP leaves open, so that a run on the kernel and one under Kmap must say the
same.  What is left open, and how it is taken out:

- *When* what one end did arrives at the other.  Before each operation that looks, the
  program settles: TCP_INFO says that all bytes, the FIN or the reset have arrived.
- *Where a read splits, and how much fits.*  As long as little is unread (``STRICT``
  bytes a direction), every call must take or give exactly what the kernel's does.
  Beyond that a direction is *loose*, until ``drain`` has read all of it: reads and
  polls are made and bytes are checked against the stream, but numbers, readiness and
  edges are not told.
- *How a splice is cut up*: it goes on until all was moved or it is refused.
- *Urgent data* changes which bytes a read may cross; a direction in which there was
  some is compared by what is read, and no call may block on it.
- *SIOCOUTQ* is anything between nothing and all that was sent: the kernel counts what
  is not acknowledged.
- With ``maxevents`` 1 the *order* of events is open: the program asks until each
  registration had several turns, and tells which it saw.

A call that the kernel might leave blocked is not made; so one that does not come back
is a fault, which the watchdog of whoever started this process reports.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(p for p in sys.path if p != str(Path(__file__).parent))]

from tests.conformance import kit  # noqa: E402
from tests.properties.calls import IN, MOST, SETS, Host  # noqa: E402

STRICT = 96 * 1024
ROUNDS, MOST_ROUNDS = 8, 200
LATE = 0.4  # seconds after which a program goes on without what it waited for

MSG_OOB, MSG_PEEK, MSG_DONTWAIT = socket.MSG_OOB, socket.MSG_PEEK, socket.MSG_DONTWAIT
MSG_WAITALL, MSG_TRUNC, MSG_MORE = socket.MSG_WAITALL, socket.MSG_TRUNC, 0x8000
FIN_WAIT1, CLOSED, LAST_ACK, CLOSING = 4, 7, 9, 11
FINISHED = {6, 7, 8, 9, 11}  # the peer's FIN or reset has arrived
ERR = 0x8

Op = dict[str, Any]


class Remote:
    """A host in another process."""

    def __init__(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            here.close()
            _serve(there)
            os._exit(0)
        there.close()
        self._wire = here

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.start(name, *args)
            return self.result()

        return call

    def start(self, name: str, *args: Any) -> None:
        self._wire.send(pickle.dumps((name, args)))

    def result(self) -> Any:
        said = self._wire.recv(1 << 20)
        if not said:
            raise RuntimeError("the second process is gone")
        fine, value = pickle.loads(said)
        if not fine:
            raise AssertionError(value)
        return value


def _serve(control: socket.socket) -> None:
    host = Host()
    while request := control.recv(1 << 20):
        name, args = pickle.loads(request)
        try:
            answer = (True, getattr(host, name)(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        control.send(pickle.dumps(answer))


class End:
    """What the program has done with one end so far."""

    def __init__(self) -> None:
        self.slots = {0}
        self.sent = 0  # bytes, since the program began
        self.read = 0
        self.nonblock = False
        self.timeout = False
        self.lowat = 1
        self.wr_shut = self.rd_shut = False
        self.closed = False
        self.reset = False  # this end should see a reset
        self.loose = False  # more went out than may be compared
        self.filled = False  # and how much that was is open
        self.urgent = False  # some of what went out was urgent


class Program:
    """One program under way."""

    def __init__(self, near: Host, far: Any, program: Op) -> None:
        self.hosts = [near, far if program["variant"] == "two" else near]
        self.program = program
        self.ends = [End(), End()]
        self.dirty = True
        self.warmed = [0, 0]

    def host(self, end: int) -> Any:
        return self.hosts[end]

    @property
    def two(self) -> bool:
        return self.hosts[0] is not self.hosts[1]

    def begin(self) -> None:
        near, far = self.hosts
        address = far.listen() if self.two else near.listen()
        near.connect(address)
        connector, acceptor = self.program["nonblock"]
        far.accept(os.O_NONBLOCK if acceptor else 0)
        near.blocking(0, not connector)
        self.ends[0].nonblock, self.ends[1].nonblock = connector, acceptor
        for host in self.hosts if self.two else self.hosts[:1]:
            host.fresh_sets()
        if self.program["variant"] != "midway":
            self._warm_up()

    def _warm_up(self) -> None:
        """Round trips until both ends are on their rings; on the kernel, a few."""
        for turn in range(MOST_ROUNDS):
            for end in 0, 1:
                self.host(end).throw(end)
                self.host(1 - end).catch(1 - end)
            if turn < ROUNDS:
                continue
            if not kit.UNDER_KMAP or all(self.host(i).on_ring(i) for i in (0, 1)):
                return
        raise AssertionError("the connection does not get on its rings")

    # -- settling

    def unread(self, end: int) -> int:
        return self.ends[1 - end].sent - self.ends[end].read

    def settle(self) -> None:
        """Waits until the kernel has delivered what the ends did to each other."""
        if not self.dirty:
            return
        late = time.monotonic() + LATE
        while not self._settled() and time.monotonic() < late:
            time.sleep(0.0002)
        self.dirty = False

    def _settled(self) -> bool:
        infos = [
            None if end.closed else self.host(i).info(i)
            for i, end in enumerate(self.ends)
        ]
        for i, (end, info) in enumerate(zip(self.ends, infos, strict=True)):
            peer, there = self.ends[1 - i], infos[1 - i]
            if info is None:
                continue
            if end.reset:
                if info[0] != CLOSED:
                    return False
                continue
            if peer.loose or end.loose:
                continue
            if info[0] in (FIN_WAIT1, LAST_ACK, CLOSING):
                return False
            if (peer.wr_shut or peer.closed) and info[0] not in FINISHED:
                return False
            if there is None or peer.reset or there[0] == CLOSED or info[0] == CLOSED:
                continue
            if there[3] or info[1] < there[2]:
                return False
        return True

    # -- operations

    def run(self, op: Op) -> Any:
        return getattr(self, "op_" + op["op"])(op)

    def _there(self, op: Op) -> bool:
        return op["slot"] in self.ends[op["end"]].slots

    def op_give(self, op: Op) -> Any:
        i = op["end"]
        end, peer = self.ends[i], self.ends[1 - i]
        if not self._there(op):
            return "no such slot"
        call, size, flags = op["call"], op["size"], op["flags"]
        if call == "splice":
            # The rest of a splice that was cut up would meet the reset.
            size = min(size, 4096 if peer.closed or peer.rd_shut else 1 << 16)
        if call not in ("send", "sendto", "sendmsg", "sendmmsg", "pwritev2"):
            flags = 0
        if end.loose or peer.loose:
            return "loose"
        large = self.unread(1 - i) + size > STRICT
        if large and not (flags & MSG_DONTWAIT or end.nonblock):
            return "might block"
        if large and (end.urgent or op.get("fork") or call == "splice"):
            return "not told"
        self.settle()
        arguments = (i, op["slot"], call, size, end.sent, flags, op["parts"])
        result = self._call(op, "give", *arguments)
        if len(result) < 2:
            return result
        self.dirty = True
        end.loose |= large
        end.filled |= large
        if result[0] > 0:
            end.sent += result[0]
            end.urgent |= bool(flags & MSG_OOB)
            if peer.closed:
                end.reset = True
        if flags & MSG_MORE and result[0] > 0:
            self.host(i).push(i)
        if end.loose:
            return "loose" if result[0] > 0 or result[1] == 11 else result[1:]
        return result

    def _call(self, op: Op, name: str, *arguments: Any) -> Any:
        host = self.host(op["end"])
        if op.get("fork"):
            return host.fork(name, *arguments)
        return getattr(host, name)(*arguments)

    def _returns(self, i: int, size: int, flags: int) -> bool:
        """Whether the kernel's read would come back."""
        end, peer = self.ends[i], self.ends[1 - i]
        if flags & MSG_DONTWAIT or end.nonblock or end.timeout:
            return True
        if peer.urgent or peer.loose:
            return False
        if peer.wr_shut or peer.closed or end.rd_shut or end.reset:
            return True
        need = size if flags & MSG_WAITALL else min(end.lowat, size)
        return self.unread(i) >= max(need, 1)

    def op_take(self, op: Op) -> Any:
        i = op["end"]
        end, peer = self.ends[i], self.ends[1 - i]
        if not self._there(op):
            return "no such slot"
        call, size, flags = op["call"], op["size"], op["flags"]
        if call in ("read", "readv", "splice"):
            flags = 0
        elif call == "preadv2":
            flags &= MSG_DONTWAIT
        self.settle()
        # A second message is received only when the first one was.
        needs = size if call != "recvmmsg" or flags & MSG_DONTWAIT else 2 * size
        if call == "splice" and peer.loose:
            return "not told"
        if call == "splice" and not end.nonblock and self.unread(i) < size:
            return "might block"
        if call == "recvmmsg" and not (end.nonblock or flags & MSG_DONTWAIT):
            return "might block"
        if not self._returns(i, needs, flags):
            return "might block"
        arguments = (i, op["slot"], call, size, flags, op["parts"])
        result = self._call(op, "take", *arguments)
        if len(result) < 3:
            return result
        # Two messages that only look see the same bytes.
        twice = bool(call == "recvmmsg" and flags & MSG_PEEK)
        return self._taken(i, result, flags, twice)

    def _taken(self, i: int, result: list[Any], flags: int, twice: bool = False) -> Any:
        end, peer = self.ends[i], self.ends[1 - i]
        count = result[0]
        if count > 0 and not peer.urgent and not twice:
            data = kit.pattern(count, end.read)
            if flags & MSG_TRUNC:
                data = b""
            if zlib.crc32(data) != result[2]:
                return ["WRONG BYTES", end.read, *result]
            # What was sent before may differ in length, and so where this began.
            result[2] = "as sent"
        elif count > 0 and peer.filled:
            # Urgent data takes bytes out of the count, and where they began is open.
            result[2] = "somewhere"
        if count > 0 and not flags & (MSG_PEEK | MSG_OOB):
            end.read += count
        if peer.loose:
            return "loose" if count > 0 or result[1] == 11 else result[:2]
        return result

    def op_fill(self, op: Op) -> Any:
        i = op["end"]
        end, peer = self.ends[i], self.ends[1 - i]
        gone = end.closed or peer.closed or end.wr_shut or end.reset
        if gone or end.urgent or peer.rd_shut:
            return "not told"
        self.settle()
        end.sent += self.host(i).fill(i, end.sent)
        end.loose = end.filled = self.dirty = True
        return "full"

    def op_drain(self, op: Op) -> Any:
        """Reads to the end of what was sent, whichever way it comes."""
        i = op["end"]
        end, peer = self.ends[i], self.ends[1 - i]
        if end.closed or peer.urgent:
            return "not told"
        slot = min(end.slots)
        self.settle()
        late = time.monotonic() + 5
        while self.unread(i) and time.monotonic() < late:
            size = min(1 << 16, MOST)
            result = self.host(i).take(i, slot, "recv", size, MSG_DONTWAIT, 1)
            if result[0] == 0 or (result[0] < 0 and result[1] != 11):
                if end.reset and peer.loose:
                    break  # how much of it survives a reset is open
                return ["drained", peer.loose or self.unread(i), *result[:2]]
            if result[0] < 0:
                self.host(i).poll("ppoll", i, IN, False)
                continue
            told = self._taken(i, result, 0)
            if isinstance(told, list) and told[0] == "WRONG BYTES":
                return told
        if end.reset and peer.loose:
            # And so is whether the error was met on the way.
            self.host(i).take(i, slot, "recv", 1, MSG_DONTWAIT, 1)
            end.read = peer.sent
            return "reset"
        if self.unread(i):
            return ["STUCK", self.unread(i)]
        if peer.loose:
            peer.loose = False
            self.dirty = True
            self.settle()
            self._forget_edges()
        return ["drained", 0]

    def _forget_edges(self) -> None:
        """How many there were while a direction was loose is not told."""
        for host in self.hosts if self.two else self.hosts[:1]:
            for which in range(SETS):
                for _ in range(2):
                    host.wait(which, "epoll_wait", 64, 0)

    def op_nonblock(self, op: Op) -> Any:
        if not self._there(op):
            return "no such slot"
        self.ends[op["end"]].nonblock = op["on"]
        return self.host(op["end"]).nonblock(op["end"], op["slot"], op["how"], op["on"])

    def op_shutdown(self, op: Op) -> Any:
        if not self._there(op):
            return "no such slot"
        end, how = self.ends[op["end"]], op["how"]
        if any(one.loose for one in self.ends):
            return "loose"
        self.settle()
        result = self._call(op, "shutdown", op["end"], op["slot"], how)
        if result[0] == 0:
            end.rd_shut |= how != 1
            end.wr_shut |= how != 0
        self.dirty = True
        return result

    def op_close(self, op: Op) -> Any:
        if not self._there(op):
            return "no such slot"
        i = op["end"]
        end, peer = self.ends[i], self.ends[1 - i]
        self.settle()
        if op["all"] and op["linger"]:
            self.host(i).linger(i)
        results = []
        for slot in sorted(end.slots) if op["all"] else [op["slot"]]:
            results.append(self.host(i).close(i, slot))
            end.slots.discard(slot)
        if not end.slots:
            end.closed = True
            if (op["all"] and op["linger"]) or self.unread(i) > 0:
                peer.reset = True
            self.dirty = True
        return results

    def op_dup(self, op: Op) -> Any:
        if not self._there(op) or op["to"] == op["slot"]:
            return "no such slot"
        self.settle()
        result = self.host(op["end"]).dup(op["end"], op["slot"], op["to"], op["how"])
        self.ends[op["end"]].slots.add(op["to"])
        return result

    def op_option(self, op: Op) -> Any:
        if not self._there(op):
            return "no such slot"
        i, what, value = op["end"], op["what"], op["value"]
        end, peer = self.ends[i], self.ends[1 - i]
        self.settle()
        if what == "state":
            loose = end.loose or peer.loose
            return "not told" if loose else self.host(i).info(i)[0]
        result = self.host(i).option(i, op["slot"], what, value)
        if what == "timeout":
            end.timeout = value > 0
        elif what == "lowat":
            end.lowat = max(value, 1)
        elif what == "outq":
            most = end.sent + 64  # what is not acknowledged yet; warming up counts
            fine = result[:2] == [0, 0] and 0 <= result[2] <= most
            return "within bounds" if fine or end.urgent or end.reset else result
        elif what == "fionread" and peer.loose:
            return "loose"
        return result

    def _masked(self, name: str, mask: int) -> int:
        if not any(end.loose for end in self.ends):
            return mask
        return 0 if name.startswith("set") else mask & ERR

    def op_poll(self, op: Op) -> Any:
        self.settle()
        end = op["end"] if self.two else None
        result = self.host(op["end"]).poll(op["call"], end, op["events"], op["sets"])
        return [[name, self._masked(name, mask)] for name, mask in result]

    def op_control(self, op: Op) -> Any:
        if not self._there(op):
            return "no such slot"
        self.settle()
        arguments = (op["end"], op["slot"], op["events"], op["cookie"])
        control = self.host(op["end"]).control
        if op["how"]:
            return control(op["set"], op["how"], *arguments)
        # Whatever it takes: ADD, or MOD when it is there already.
        result = control(op["set"], 1, *arguments)
        return result if result[0] == 0 else control(op["set"], 3, *arguments)

    def op_nest(self, op: Op) -> Any:
        self.settle()
        return self.host(op["end"]).nest(op["set"], op["how"], op["cookie"])

    def op_renew(self, op: Op) -> Any:
        self.settle()
        self.host(op["end"]).renew(op["set"])
        return []

    def op_wait(self, op: Op) -> Any:
        if any(end.loose for end in self.ends):
            return "loose"
        self.settle()
        host, which = self.host(op["end"]), op["set"]
        if op["most"] > 1:
            return sorted(host.wait(which, op["call"], op["most"], op["ms"]))
        # Each of the 6 slots and 2 inner sets gets its turn, several times.
        seen: list[tuple[int, int]] = []
        for _ in range(24):
            got = host.wait(which, op["call"], 1, op["ms"] if not seen else 0)
            if not got:
                break
            seen += got
        return sorted(set(map(tuple, seen)))


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    near, far = Host(), Remote()

    def say(value: Any) -> None:
        os.write(1, json.dumps(value).encode() + b"\n")

    for line in sys.stdin:
        program = json.loads(line)
        running = Program(near, far, program)
        try:
            running.begin()
            for op in program["ops"]:
                say(running.run(op))
        except Exception:
            say({"fault": traceback.format_exc()})
        near.finish()
        far.finish()
        say({"done": True})


if __name__ == "__main__":
    main()
