# SPDX-License-Identifier: Apache-2.0
"""An upgraded connection is given to another program, and goes on there.

What the program gets is the kernel's socket; what is in the rings has to reach it all
the same, whether the library is in that program or not.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import random
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator

from tests.conformance.kit import (
    PATIENCE_MS,
    SLEEPS,
    UNDER_KMAP,
    Far,
    Peer,
    Task,
    assert_on_ring,
    connected,
    each,
    expect,
    far_pair,
    far_upgrade,
    forked,
    listener,
    ok,
    on_ring,
    pair,
    pattern,
    ping_pong,
    poll_one,
    readable,
    reap,
    receive,
    receive_pattern,
    row_of,
    send_until_full,
    settings,
    until,
    upgrade,
)

# Sends back what it reads, and then says that the stream has ended.
_ECHO = """
import os, sys
fd = int(sys.argv[1])
while data := os.read(fd, 65536):
    while data:
        data = data[os.write(fd, data):]
os.write(fd, b"end")
"""


def _echo_on(fd: int) -> list[str]:
    return [sys.executable, "-S", "-c", _ECHO, str(fd)]


def _without_library() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}


# --- ways to give a socket away: each returns what ends the program, and checks it ----


@contextlib.contextmanager
def _popen(sock: socket.socket) -> Iterator[None]:
    fd = sock.fileno()
    child = subprocess.Popen(_echo_on(fd), pass_fds=[fd])
    sock.close()
    yield
    assert child.wait(8) == 0


@contextlib.contextmanager
def _popen_stranger(sock: socket.socket) -> Iterator[None]:
    """A program that the library is not in."""
    fd = sock.fileno()
    child = subprocess.Popen(_echo_on(fd), pass_fds=[fd], env=_without_library())
    sock.close()
    yield
    assert child.wait(8) == 0


@contextlib.contextmanager
def _popen_stdin(sock: socket.socket) -> Iterator[None]:
    child = subprocess.Popen(_echo_on(0), stdin=sock.fileno())
    sock.close()
    yield
    assert child.wait(8) == 0


@contextlib.contextmanager
def _fork_exec(sock: socket.socket) -> Iterator[None]:
    fd = sock.fileno()

    def become() -> None:
        os.set_inheritable(fd, True)
        os.execv(sys.executable, _echo_on(fd))

    pid = forked(become)
    sock.close()
    yield
    reap(pid)


@contextlib.contextmanager
def _spawn(sock: socket.socket) -> Iterator[None]:
    os.set_inheritable(sock.fileno(), True)
    pid = os.posix_spawn(sys.executable, _echo_on(sock.fileno()), dict(os.environ))
    sock.close()
    yield
    reap(pid)


@contextlib.contextmanager
def _spawn_stdin(sock: socket.socket) -> Iterator[None]:
    actions = [(os.POSIX_SPAWN_DUP2, sock.fileno(), 0)]
    pid = os.posix_spawn(
        sys.executable, _echo_on(0), dict(os.environ), file_actions=actions
    )
    sock.close()
    yield
    reap(pid)


def _take(far: Far) -> None:
    _, rights, flags, _ = far.kept["rights"].recvmsg(1, socket.CMSG_SPACE(4))
    assert flags == 0
    numbers = array.array("i")
    numbers.frombytes(rights[0][2][:4])
    far.sock = socket.socket(fileno=numbers[0])


def _keep(far: Far, descriptor: int) -> None:
    far.kept["rights"] = socket.socket(fileno=os.dup(descriptor))


def _echo_and_end(far: Far) -> None:
    while data := far.sock.recv(65536):
        far.sock.sendall(data)
    far.sock.sendall(b"end")
    far.sock.close()


_RIGHTS: dict[str, tuple[Peer, socket.socket]] = {}


@contextlib.contextmanager
def _rights(sock: socket.socket) -> Iterator[None]:
    peer, channel = _RIGHTS["peer"]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))]
    assert channel.sendmsg([b"d"], rights) == 1
    peer.call(_take)
    sock.close()
    peer.start(_echo_and_end)
    yield
    peer.result()
    peer.finish()


def _ready_for(way: Callable[..., object]) -> None:
    """The process that gets a descriptor is there before the connection."""
    if way is _rights:
        mine, other = socket.socketpair()
        peer = Peer()
        peer.call(_keep, other.fileno())
        other.close()
        _RIGHTS["peer"] = (peer, mine)


_Way = Callable[[socket.socket], contextlib.AbstractContextManager[None]]
_WAYS: tuple[_Way, ...] = (
    _popen,
    _popen_stranger,
    _popen_stdin,
    _fork_exec,
    _spawn,
    _spawn_stdin,
    _rights,
)


def _finish(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)
    assert receive(sock, 3) == b"end"
    assert sock.recv(1) == b""


# --- cases -----------------------------------------------------------------------


@each(*_WAYS)
def nothing_unread(way: _Way) -> None:
    _ready_for(way)
    ends = pair()
    with way(ends.b):
        for turn in range(20):
            ends.a.sendall(b"%2d" % turn)
            assert receive(ends.a, 2) == b"%2d" % turn
        _finish(ends.a)


@each(*_WAYS)
def few_bytes_unread(way: _Way) -> None:
    _ready_for(way)
    ends = pair()
    ends.a.sendall(b"unread")
    assert_on_ring(ends.a)
    with way(ends.b):
        assert receive(ends.a, 6) == b"unread"
        ends.a.sendall(b"more")
        assert receive(ends.a, 4) == b"more"
        _finish(ends.a)


@each(*_WAYS)
def many_bytes_unread(way: _Way) -> None:
    """As many as take the ring through all of its sizes."""
    _ready_for(way)
    ends = pair()
    for start in range(0, 200000, 10000):
        ends.a.sendall(pattern(10000, start))
    receive_pattern(ends.b, 30000)
    with way(ends.b):
        receive_pattern(ends.a, 170000, 30000)
        ends.a.sendall(pattern(100000, 200000))
        receive_pattern(ends.a, 100000, 200000)
        _finish(ends.a)


@each(*_WAYS)
def answers_unread(way: _Way) -> None:
    """What was sent before by the one that gives it away comes first."""
    _ready_for(way)
    ends = pair()
    ends.b.sendall(pattern(50000))
    with way(ends.b):
        ends.a.sendall(pattern(1000, 50000))
        receive_pattern(ends.a, 51000)
        _finish(ends.a)


@each(*_WAYS)
def both_unread(way: _Way) -> None:
    _ready_for(way)
    ends = pair()
    ends.b.sendall(pattern(5000))
    ends.a.sendall(pattern(7000, 5000))
    with way(ends.b):
        receive_pattern(ends.a, 12000)
        _finish(ends.a)


def _under_a_sleeper(sleep: Callable[[socket.socket], bytes], way: _Way) -> None:
    _ready_for(way)
    ends = pair()
    ends.a.sendall(b"question")
    task = Task(sleep, ends.a).until_asleep()
    with way(ends.b):
        assert task.result() == b"question"
        ends.a.settimeout(None)
        _finish(ends.a)


@each(*SLEEPS)
def peer_sleeps_and_has_to_send_again(sleep: Callable[[socket.socket], bytes]) -> None:
    """Nobody but a thread that waits for the answer can send the question again."""
    _under_a_sleeper(sleep, _popen)


@each(*SLEEPS)
def peer_sleeps_while_rights_are_passed(
    sleep: Callable[[socket.socket], bytes],
) -> None:
    _under_a_sleeper(sleep, _rights)


def _sleep_in_far(far: Far) -> bytes:
    return far.sock.recv(100)


@each(*_WAYS)
def peer_in_another_process(way: _Way) -> None:
    sock, peer = far_pair(spawned=True)
    _ready_for(way)
    peer.call("send", b"question")
    readable(sock)
    peer.start(_sleep_in_far)
    peer.until_asleep()
    with way(sock):
        assert peer.result() == b"question"
        peer.call("shutdown", socket.SHUT_WR)
        assert peer.call("receive", 3) == b"end"
    peer.finish()


@each(*_WAYS)
def peer_blocked_in_send(way: _Way) -> None:
    """A writer that waits for space goes on, in order, by the kernel."""
    _ready_for(way)
    ends = pair()
    total = 16_000_000  # more than the kernel can be made to hold
    task = Task(ends.a.sendall, pattern(total)).until_asleep()
    with way(ends.b):
        receive_pattern(ends.a, total)
        task.result()
        _finish(ends.a)


@each(*_WAYS)
def peer_that_must_not_block(way: _Way) -> None:
    """Full, and then told of space when what it had written has gone."""
    _ready_for(way)
    ends = pair()
    sent = send_until_full(ends.a)
    with way(ends.b):
        done = 0
        while sent < 1_500_000 or done < sent:
            want = select.POLLIN | (select.POLLOUT if sent < 1_500_000 else 0)
            events = poll_one(ends.a, want)
            assert events, f"stuck with {sent} bytes sent, {done} received"
            if events & select.POLLOUT:
                with contextlib.suppress(BlockingIOError):
                    sent += ends.a.send(pattern(65536, sent))
            if events & select.POLLIN:
                data = ends.a.recv(1 << 18)
                assert data == pattern(len(data), done)
                done += len(data)
        ends.a.setblocking(True)
        _finish(ends.a)


@each(_popen, _popen_stdin, _fork_exec, _spawn, _spawn_stdin, _rights)
def peer_has_ended_its_stream(way: _Way) -> None:
    """What it wrote before is all that will ever come, and it has to arrive."""
    _ready_for(way)
    ends = pair()
    ends.a.sendall(pattern(40000))
    ends.a.shutdown(socket.SHUT_WR)
    with way(ends.b):
        receive_pattern(ends.a, 40000)
        assert receive(ends.a, 3) == b"end"
        assert ends.a.recv(1) == b""


def _untouched() -> tuple[socket.socket, socket.socket]:
    """A connection that is upgraded, and has not carried a byte.

    The two ends wait for each other for some milliseconds only, so not every one is.
    """
    with listener() as listening:
        for _ in range(200):
            task = Task(socket.create_connection, listening.getsockname())
            accepted, _ = listening.accept()
            client = task.result()
            # A look at it takes the last step of the upgrade.
            assert poll_one(accepted, select.POLLIN, 1) == 0
            row = row_of(accepted)
            if not UNDER_KMAP or (row is not None and row.upgraded):
                return client, accepted
            client.close()
            accepted.close()
    raise AssertionError("no connection was upgraded before its first byte")


@settings(KMAP_UPGRADE_AFTER="0")
@each(*_WAYS)
def nothing_was_ever_read(way: _Way) -> None:
    """The accepted connection is passed on untouched, and the client has said all."""
    _ready_for(way)
    client, accepted = _untouched()
    client.sendall(pattern(40000))
    if UNDER_KMAP:
        row = row_of(client)
        assert row is not None
        assert row.ring_tx > 0
    client.shutdown(socket.SHUT_WR)
    with way(accepted):
        receive_pattern(client, 40000)
        assert receive(client, 3) == b"end"
        assert client.recv(1) == b""


@settings(KMAP_UPGRADE_AFTER="0")
@each(*SLEEPS)
def taken_back_under_a_sleeper(sleep: Callable[[socket.socket], bytes]) -> None:
    """The first read finds everything, whichever way it came."""
    client, accepted = _untouched()
    reader = Task(sleep, accepted).until_asleep()
    client.sendall(b"all there is")
    client.close()
    data = reader.result()
    accepted.settimeout(None)
    while part := accepted.recv(100):
        data += part
    assert data == b"all there is"


_COUNT = """
import os, sys
n = 0
while data := os.read(int(sys.argv[1]), 65536):
    n += len(data)
os.write(1, b"%d" % n)
"""


def peer_has_closed() -> None:
    ends = pair()
    ends.a.sendall(pattern(40000))
    ends.a.close()
    fd = ends.b.fileno()
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", _COUNT, str(fd)],
        pass_fds=[fd],
        stdout=subprocess.PIPE,
    )
    ends.b.close()
    assert child.communicate(timeout=8)[0] == b"40000"


def _become_echo(far: Far) -> None:
    fd = far.sock.fileno()
    os.set_inheritable(fd, True)
    readable(far.sock)
    os.execv(sys.executable, _echo_on(fd))


def _become_stranger(far: Far) -> None:
    fd = far.sock.fileno()
    os.set_inheritable(fd, True)
    readable(far.sock)
    os.execve(sys.executable, _echo_on(fd), _without_library())


@each(_become_echo, _become_stranger)
def process_becomes_another_program(become: Callable[[Far], None]) -> None:
    """Exec without fork: nobody else has the connection."""
    sock, peer = far_pair(spawned=True)
    sock.sendall(pattern(30000))
    peer.start(become)
    receive_pattern(sock, 30000)
    for turn in range(20):
        sock.sendall(b"%2d" % turn)
        assert receive(sock, 2) == b"%2d" % turn
    _finish(sock)
    peer.finish()


def process_becomes_another_program_behind_the_end() -> None:
    """The peer has said all, and sleeps where nothing of the socket can wake it."""
    sock, peer = far_pair(spawned=True)
    sock.sendall(pattern(30000))
    sock.shutdown(socket.SHUT_WR)
    peer.start(_become_echo)
    peer.finish()
    receive_pattern(sock, 30000)
    assert receive(sock, 3) == b"end"


def peer_sleeps_elsewhere() -> None:
    """Whoever sent the bytes waits for a pipe, and not for the socket."""
    sock, peer = far_pair(spawned=True)
    sock.sendall(b"bytes")
    peer.start(_become_counter)
    data = peer.result()
    assert data == b"5"
    sock.close()
    peer.finish()


def _become_counter(far: Far) -> None:
    fd = far.sock.fileno()
    control = far.control.fileno()
    os.set_inheritable(fd, True)
    os.set_inheritable(control, True)
    readable(far.sock)
    code = (
        "import os, pickle\n"
        f"data = os.read({fd}, 100)\n"
        f"os.write({control}, pickle.dumps((True, b'%d' % len(data))))\n"
        f"assert os.read({fd}, 1) == b''\n"
    )
    os.execv(sys.executable, [sys.executable, "-S", "-c", code])


def parent_goes_on_with_the_connection() -> None:
    """A child that has the descriptor and never uses it changes nothing."""
    ends = pair()
    os.set_inheritable(ends.a.fileno(), True)
    os.set_inheritable(ends.b.fileno(), True)
    ends.a.sendall(b"before")
    reap(forked(lambda: os.execv("/bin/true", ["true"])))
    assert receive(ends.b, 6) == b"before"
    ping_pong(ends.a, ends.b, 20)
    pid = os.posix_spawn("/bin/true", ["true"], dict(os.environ))
    reap(pid)
    ping_pong(ends.a, ends.b, 20)
    ends.a.close()
    assert ends.b.recv(1) == b""


def parent_and_child_take_turns() -> None:
    """A CGI program: the server writes the head, its child the body, then the server.

    In this order at the client.
    """
    ends = pair()
    ends.b.sendall(b"head ")
    child = subprocess.Popen(["/bin/echo", "-n", "body"], stdout=ends.b.fileno())
    assert child.wait(8) == 0
    ends.b.sendall(b" tail")
    ends.b.close()
    data = b""
    while part := ends.a.recv(100):
        data += part
    assert data == b"head body tail"


def both_ends_are_given_away() -> None:
    ends = pair()
    ends.a.sendall(b"from a")
    ends.b.sendall(b"from b")
    a, b = ends.a.fileno(), ends.b.fileno()
    code = "import os,sys; print(os.read(int(sys.argv[1]), 100).decode(), end='')"
    children = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", code, str(fd)],
            pass_fds=[fd],
            stdout=subprocess.PIPE,
        )
        for fd in (a, b)
    ]
    assert children[0].communicate(timeout=8)[0] == b"from b"
    assert children[1].communicate(timeout=8)[0] == b"from a"


def option_that_needs_the_kernel() -> None:
    """An option that a ring cannot honour, with bytes in both rings."""
    ends = pair()
    ends.a.sendall(b"to b")
    ends.b.sendall(b"to a")
    ends.b.setsockopt(socket.SOL_SOCKET, 60, 1)  # SO_ZEROCOPY
    ends.a.sendall(b" more")
    assert receive(ends.a, 4) == b"to a"
    assert receive(ends.b, 9) == b"to b more"
    ping_pong(ends.a, ends.b)
    if UNDER_KMAP:
        assert not on_ring(ends.b)
    ends.a.close()
    assert ends.b.recv(1) == b""


def error_behind_the_last_bytes() -> None:
    """The call that finds both tells of the bytes, and the next one of the error."""
    ends = pair()
    ends.b.sendall(b"last")
    ends.b.setsockopt(socket.SOL_SOCKET, 60, 1)  # SO_ZEROCOPY: back to the kernel
    ends.b.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.b.close()
    assert poll_one(ends.a, select.POLLHUP)
    assert ends.a.recv(100) == b"last"
    expect(errno.ECONNRESET, ends.a.recv, 100)
    assert ends.a.recv(100) == b""


def closed_before_it_was_sent_again() -> None:
    """The peer closes at once: its close sees to the bytes."""
    mine, other = socket.socketpair()
    ends = pair()
    ends.a.sendall(pattern(50000))
    rights = [
        (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [ends.b.fileno()]))
    ]
    assert mine.sendmsg([b"d"], rights) == 1
    ends.a.close()
    _, got, _, _ = other.recvmsg(1, socket.CMSG_SPACE(4))
    numbers = array.array("i")
    numbers.frombytes(got[0][2][:4])
    again = socket.socket(fileno=numbers[0])
    ends.b.close()
    receive_pattern(again, 50000)
    assert again.recv(1) == b""


def process_ends_before_it_sent_again() -> None:
    """A process that returns from main without closing anything."""
    mine, other = socket.socketpair()
    ready, go = os.pipe(), os.pipe()
    ends = pair()
    code = 0
    pid = os.fork()
    if pid == 0:
        ends.b.close()
        ends.a.sendall(pattern(50000))
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        ok("exit", code)
    ends.a.close()
    os.read(ready[0], 1)
    rights = [
        (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [ends.b.fileno()]))
    ]
    assert mine.sendmsg([b"d"], rights) == 1
    ends.b.close()
    os.write(go[1], b"x")
    reap(pid)
    _, got, _, _ = other.recvmsg(1, socket.CMSG_SPACE(4))
    numbers = array.array("i")
    numbers.frombytes(got[0][2][:4])
    again = socket.socket(fileno=numbers[0])
    receive_pattern(again, 50000)
    assert again.recv(1) == b""


def passed_and_kept() -> None:
    """Two processes have the connection, and later one: then it is upgraded again."""
    _ready_for(_rights)
    peer, channel = _RIGHTS["peer"]
    with listener() as listening:
        ends = connected(listening)
    rights = [
        (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [ends.b.fileno()]))
    ]
    assert channel.sendmsg([b"d"], rights) == 1
    peer.call(_take)
    # Few enough that the far end has not given up for good.
    peer.start("echo", 5)
    for _ in range(5):
        ends.a.sendall(b"x")
        assert ends.a.recv(1) == b"x"
    peer.result()
    assert not on_ring(ends.a)
    ends.b.sendall(b"by the one that kept it")
    assert receive(ends.a, 23) == b"by the one that kept it"
    ends.b.close()
    far_upgrade(ends.a, peer)
    ends.a.close()
    assert peer.call("recv", 1) == b""
    peer.finish()


def _echo_for_ever(far: Far) -> None:
    while True:
        _take(far)
        while data := far.sock.recv(65536):
            far.sock.sendall(data)
        far.sock.close()


@each(1, 300, 40000)
def passed_in_full_flight(most: int) -> None:
    """The giver echoes, then gives the connection away with bytes under way."""
    _ready_for(_rights)
    peer, channel = _RIGHTS["peer"]
    peer.start(_echo_for_ever)
    source = random.Random(most)
    with listener() as listening:
        for _ in range(40):
            ends = upgrade(connected(listening))
            total = 60 * most + source.randrange(1 + min(most * 3000, 200000))
            task = Task(_send_in_pieces, ends.a, total, most)
            echoed = source.randrange(total)
            giver = Task(_give_after, ends.b, channel, echoed)
            receive_pattern(ends.a, total)
            task.result()
            giver.result()
            ends.a.shutdown(socket.SHUT_WR)
            assert ends.a.recv(1) == b""
            ends.a.close()
    peer.kill()


def _send_in_pieces(sock: socket.socket, total: int, most: int) -> None:
    source = random.Random(total)
    done = 0
    while done < total:
        n = min(source.randrange(most) + 1, total - done)
        sock.sendall(pattern(n, done))
        done += n


def _give_after(sock: socket.socket, channel: socket.socket, echoed: int) -> None:
    while echoed > 0:
        data = sock.recv(min(echoed, 5000))
        sock.sendall(data)
        echoed -= len(data)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))]
    assert channel.sendmsg([b"d"], rights) == 1
    sock.close()


def passed_by_a_stranger() -> None:
    """Nobody knows whether a sender without the library keeps what it sends."""
    mine, other = socket.socketpair()
    with listener() as listening:
        ends = connected(listening)
    code = (
        "import array, socket, sys\n"
        "channel = socket.socket(fileno=int(sys.argv[1]))\n"
        "rights = array.array('i', [int(sys.argv[2])])\n"
        "channel.sendmsg([b'd'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])\n"
        "channel.recv(1)\n"
    )
    fds = [other.fileno(), ends.b.fileno()]
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code, *map(str, fds)],
        pass_fds=fds,
        env=_without_library(),
    )
    ends.b.close()
    other.close()
    _, got, _, _ = mine.recvmsg(1, socket.CMSG_SPACE(4))
    numbers = array.array("i")
    numbers.frombytes(got[0][2][:4])
    with socket.socket(fileno=numbers[0]) as again:
        ping_pong(ends.a, again)
        assert not on_ring(ends.a)
        mine.send(b"x")
        assert child.wait(8) == 0
        ping_pong(ends.a, again)


def queue_lengths_afterwards() -> None:
    """SIOCOUTQ and FIONREAD count each byte once."""
    import fcntl
    import termios

    ends = pair()
    ends.a.sendall(b"x" * 100)
    os.set_inheritable(ends.b.fileno(), True)
    reap(os.posix_spawn("/bin/true", ["true"], dict(os.environ)))
    assert poll_one(ends.a, select.POLLOUT, PATIENCE_MS)

    def inq() -> int:
        answer = fcntl.ioctl(ends.b, termios.FIONREAD, struct.pack("i", 0))
        return int(struct.unpack("i", answer)[0])

    def outq() -> int:
        answer = fcntl.ioctl(ends.a, termios.TIOCOUTQ, struct.pack("i", 0))
        return int(struct.unpack("i", answer)[0])

    until(lambda: inq() == 100, "all of it waits at b")
    assert receive(ends.b, 100) == b"x" * 100
    until(lambda: outq() == 0, "all of it was taken")
