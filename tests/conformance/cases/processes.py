# SPDX-License-Identifier: Apache-2.0
"""fork, vfork, exec, spawned children and descriptors that travel."""

from __future__ import annotations

import array
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys

from tests.conformance.kit import (
    EPOLLIN,
    Epoll,
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
    libc,
    listener,
    no_delay,
    ok,
    on_ring,
    pair,
    pattern,
    ping_pong,
    poll_one,
    reap,
    receive,
    receive_pattern,
    upgrade,
)


@each(False, True)
def far_process(spawned: bool) -> None:
    """Two processes, forked or started afresh, either of them connecting."""
    for far_accepts in (False, True):
        sock, peer = far_pair(far_accepts=far_accepts, spawned=spawned)
        peer.start("echo", 100000)
        task = Task(sock.sendall, pattern(100000))
        receive_pattern(sock, 100000)
        task.result()
        peer.result()
        sock.close()
        assert peer.call("recv", 1) == b""
        peer.finish()


def child_goes_on_parent_closes() -> None:
    """After fork the child alone uses the upgraded connection."""
    ends = pair()
    go, gone = os.pipe()

    def child() -> None:
        ends.a.close()
        os.read(go, 1)  # until the parent has closed
        for turn in range(100):
            assert ends.b.recv(10) == b"%d" % turn
            ends.b.sendall(b"%d" % turn)
        assert ends.b.recv(1) == b""

    pid = forked(child)
    ends.b.close()
    os.write(gone, b"x")
    for turn in range(100):
        ends.a.sendall(b"%d" % turn)
        assert ends.a.recv(10) == b"%d" % turn
    ends.a.close()
    reap(pid)


def parent_goes_on_child_closes() -> None:
    ends = pair()
    reap(forked(ends.close))
    ping_pong(ends.a, ends.b, 20)
    assert_on_ring(ends.a)
    reap(forked(lambda: None))  # a child that exits without closing
    ping_pong(ends.a, ends.b, 20)


def child_killed_parent_goes_on() -> None:
    ends = pair()
    pid = forked(lambda: signal.pause())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    ping_pong(ends.a, ends.b, 20)


def both_write_after_fork() -> None:
    """Parent and child write to one connection; short writes arrive whole."""
    ends = pair()

    def write(word: bytes) -> None:
        for _ in range(500):
            ends.a.sendall(word)

    pid = forked(lambda: write(b"child!"))
    write(b"parent")
    counts = {b"child!": 0, b"parent": 0}
    for _ in range(1000):
        counts[receive(ends.b, 6)] += 1
    reap(pid)
    assert counts == {b"child!": 500, b"parent": 500}
    ends.a.close()
    assert ends.b.recv(1) == b""


def both_read_after_fork() -> None:
    """Each byte goes to one of the two processes."""
    ends = pair()
    reading, writing = os.pipe()

    def count() -> int:
        total = 0
        while data := ends.b.recv(100):
            total += sum(data)
        return total

    def child() -> None:
        ends.a.close()
        os.write(writing, b"%d" % count())

    pid = forked(child)
    data = pattern(50000)
    task = Task(count)
    ends.a.sendall(data)
    ends.a.shutdown(socket.SHUT_WR)
    mine = task.result()
    reap(pid)
    assert mine + int(os.read(reading, 100)) == sum(data)


def in_turns_after_fork() -> None:
    """Parent and child take turns on both ends, with bytes left over each time."""
    ends = pair()
    ends.a.sendall(b"before")
    assert receive(ends.b, 3) == b"bef"

    def child() -> None:
        assert receive(ends.b, 3) == b"ore"
        ends.b.sendall(b"from the child")
        ends.a.sendall(b"to the parent")

    reap(forked(child))
    assert receive(ends.a, 14) == b"from the child"
    assert receive(ends.b, 13) == b"to the parent"
    reap(forked(lambda: ping_pong(ends.a, ends.b, 20)))
    ping_pong(ends.a, ends.b, 20)


def sleeper_in_the_child_wakes() -> None:
    """The child sleeps in recv, in poll and in epoll on a connection of its parent."""
    ends = pair()
    ready, said = os.pipe()

    def child() -> None:
        assert ends.b.recv(10) == b"one"
        os.write(said, b"1")
        assert poll_one(ends.b, select.POLLIN) == select.POLLIN
        assert ends.b.recv(10) == b"two"
        os.write(said, b"2")
        epoll = Epoll()
        epoll.add(ends.b, EPOLLIN, 1)
        assert epoll.wait() == [(1, EPOLLIN)]
        assert ends.b.recv(10) == b"three"

    pid = forked(child)
    from tests.conformance.kit import until_asleep

    for word in (b"one", b"two", b"three"):
        until_asleep(pid)
        ends.a.sendall(word)
        if word != b"three":
            os.read(ready, 1)
    reap(pid)


def end_only_after_the_last_close() -> None:
    """The peer sees the end when parent and child have both closed."""
    ends = pair()
    go, gone = os.pipe()

    def child() -> None:
        os.read(go, 1)
        ends.b.sendall(b"child was here")

    pid = forked(child)
    ends.b.close()
    assert poll_one(ends.a, select.POLLIN, 10) == 0
    os.write(gone, b"x")
    assert receive(ends.a, 14) == b"child was here"
    reap(pid)
    assert ends.a.recv(1) == b""


@each(False, True)
def accept_then_fork(parent_closes_first: bool) -> None:
    """PostgreSQL: the parent accepts, the child serves, the parent closes."""
    peer = Peer()
    with listener() as listening:
        peer.start("connect", listening.getsockname())
        sock, _ = listening.accept()
        peer.result()
        no_delay(sock)
        go, gone = os.pipe()

        def serve() -> None:
            listening.close()
            if parent_closes_first:
                os.read(go, 1)
            for _ in range(200):
                sock.sendall(sock.recv(100))
            assert_on_ring(sock)
            assert sock.recv(1) == b""

        pid = forked(serve)
        sock.close()
        os.write(gone, b"x")
    peer.call(_call_and_answer, 200)
    peer.call("close")
    reap(pid)
    peer.finish()


def _call_and_answer(far: Far, rounds: int) -> None:
    for turn in range(rounds):
        far.sock.sendall(b"%d" % turn)
        assert far.sock.recv(100) == b"%d" % turn
    assert_on_ring(far.sock)


def workers_accept() -> None:
    """Pre-forked workers share one listener; each connection is served and upgrades."""
    with listener() as listening:

        def worker() -> None:
            while True:
                sock, _ = listening.accept()
                no_delay(sock)
                served = 0
                while data := sock.recv(100):
                    if data == b"stop":
                        return
                    sock.sendall(data)
                    served += 1
                if served > 1:
                    assert_on_ring(sock)
                sock.close()

        pids = [forked(worker) for _ in range(2)]
        clients = [socket.create_connection(listening.getsockname()) for _ in range(2)]
        for client in clients:
            no_delay(client)
        for turn in range(100):
            for client in clients:
                client.sendall(b"%d" % turn)
                assert client.recv(100) == b"%d" % turn
        for client in clients:
            assert_on_ring(client)
            client.close()
        stops = []
        for _ in pids:
            stop = socket.create_connection(listening.getsockname())
            stop.sendall(b"stop")
            stops.append(stop)
        for pid in pids:
            reap(pid)


def worker_dies_another_goes_on() -> None:
    with listener() as listening:

        def worker() -> None:
            while True:
                sock, _ = listening.accept()
                no_delay(sock)
                while data := sock.recv(100):
                    sock.sendall(data)
                sock.close()

        for _ in range(2):
            pid = forked(worker)
            client = no_delay(socket.create_connection(listening.getsockname()))
            for turn in range(80):
                client.sendall(b"%d" % turn)
                assert client.recv(100) == b"%d" % turn
            assert_on_ring(client)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            assert client.recv(1) == b""
            client.close()


def grandchild() -> None:
    ends = pair()

    def child() -> None:
        reap(forked(lambda: ping_pong(ends.a, ends.b, 10)))
        ping_pong(ends.a, ends.b, 10)

    reap(forked(child))
    ping_pong(ends.a, ends.b, 10)


def pairs_made_after_fork() -> None:
    """A child of a process with rings makes rings of its own."""
    first = pair()

    def child() -> None:
        second = pair()
        ping_pong(second.a, second.b, 10)
        ping_pong(first.a, first.b, 10)

    reap(forked(child))
    third = pair()
    ping_pong(third.a, third.b, 10)
    ping_pong(first.a, first.b, 10)


def fork_with_threads_in_calls() -> None:
    """Other threads of the parent are in recv and epoll_wait; the child is whole."""
    one, two = pair(), pair()
    epoll = Epoll()
    epoll.add(two.b, EPOLLIN, 1)
    reader = Task(one.b.recv, 10).until_asleep()
    waiter = Task(epoll.wait).until_asleep()
    for _ in range(5):
        reap(forked(lambda: _own_pair()))
    one.a.sendall(b"x")
    two.a.sendall(b"y")
    assert reader.result() == b"x"
    assert waiter.result() == [(1, EPOLLIN)]


def _own_pair() -> None:
    ends = pair()
    ping_pong(ends.a, ends.b, 10)


_CHILD = """
import os, sys
numbers = sorted(int(n) for n in os.listdir("/proc/self/fd"))
print([n for n in numbers if os.path.exists(f"/proc/self/fd/{n}")])
"""


def subprocess_closes_all() -> None:
    """CPython's vfork with close_range in the child leaves the parent's state whole."""
    ends = pair()
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-S", "-c", _CHILD],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
            close_fds=True,
        ).stdout
        assert out.strip() == b"[0, 1, 2]"
        ping_pong(ends.a, ends.b, 5)
        assert_on_ring(ends.a)


def subprocess_with_files() -> None:
    """pass_fds, and pipes dup2'ed to the child's standard files."""
    ends = pair()
    reading, writing = os.pipe()
    with subprocess.Popen(
        ["/bin/sh", "-c", f"cat; echo passed >&{writing}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[writing],
    ) as child:
        out, _ = child.communicate(b"through cat")
    assert out == b"through cat"
    assert os.read(reading, 100) == b"passed\n"
    ping_pong(ends.a, ends.b, 5)
    assert_on_ring(ends.a)


def posix_spawn_with_file_actions() -> None:
    ends = pair()
    reading, writing = os.pipe()
    pid = os.posix_spawn(
        "/bin/echo",
        ["echo", "spawned"],
        dict(os.environ),
        file_actions=[
            (os.POSIX_SPAWN_DUP2, writing, 1),
            (os.POSIX_SPAWN_CLOSE, reading),
            (os.POSIX_SPAWN_CLOSE, ends.a.fileno()),
        ],
    )
    reap(pid)
    assert os.read(reading, 100) == b"spawned\n"
    ping_pong(ends.a, ends.b, 5)


def system_and_popen() -> None:
    ends = pair()
    assert os.system("exit 3") == 3 << 8
    with os.popen("echo out") as out:
        assert out.read() == "out\n"
    ping_pong(ends.a, ends.b, 5)


_SERVE = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
while data := sock.recv(1000):
    sock.sendall(data)
"""


@each("system", "popen")
def shell_uses_a_connection(how: str) -> None:
    """A command of system or popen talks over a connection that it inherits."""
    ends = pair()
    os.dup2(ends.b.fileno(), 0)
    echo = Task(lambda: ends.a.sendall(receive(ends.a, 5)))
    command = 'printf hello >&0; test "$(head -c 5 <&0)" = hello'
    if how == "system":
        assert ok("system", command.encode()) == 0
    else:
        libc.popen.restype = ctypes.c_void_p
        stream = libc.popen(command.encode(), b"r")
        assert libc.pclose(ctypes.c_void_p(stream)) == 0
    echo.result()
    ends.b.sendall(b"goes on")
    assert receive(ends.a, 7) == b"goes on"


@each(False, True)
def program_inherits_a_socket(must_upgrade: bool) -> None:
    """inetd: the accepted connection becomes a fresh program's; and upgrades there."""
    with listener() as listening:
        client = no_delay(socket.create_connection(listening.getsockname()))
        sock, _ = listening.accept()
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", _SERVE, str(sock.fileno())],
        pass_fds=[sock.fileno()],
    )
    sock.close()
    for turn in range(100):
        client.sendall(b"%d" % turn)
        assert client.recv(100) == b"%d" % turn
    if must_upgrade:
        assert_on_ring(client)
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    assert child.wait(8) == 0


def program_inherits_a_listener() -> None:
    """Socket activation: the listener is inherited, the program accepts."""
    code = (
        "import socket, sys\n"
        "listening = socket.socket(fileno=int(sys.argv[1]))\n"
        "sock, _ = listening.accept()\n"
        "while data := sock.recv(1000):\n"
        "    sock.sendall(data)\n"
    )
    with listener() as listening:
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", code, str(listening.fileno())],
            pass_fds=[listening.fileno()],
        )
        client = no_delay(socket.create_connection(listening.getsockname()))
    for turn in range(100):
        client.sendall(b"%d" % turn)
        assert client.recv(100) == b"%d" % turn
    assert_on_ring(client)
    client.close()
    assert child.wait(8) == 0


def program_on_standard_files() -> None:
    """The connection is the standard input and output of a program."""
    with listener() as listening:
        client = no_delay(socket.create_connection(listening.getsockname()))
        sock, _ = listening.accept()
    child = subprocess.Popen(["/bin/cat"], stdin=sock.fileno(), stdout=sock.fileno())
    sock.close()
    for turn in range(50):
        client.sendall(b"line %d\n" % turn)
        assert client.recv(100) == b"line %d\n" % turn
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    assert child.wait(8) == 0


def program_inherits_an_upgraded_socket() -> None:
    """Exec with an fd that is on its rings: served on, or reset; never wrong bytes."""
    ends = pair()
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", _SERVE, str(ends.b.fileno())],
        pass_fds=[ends.b.fileno()],
        stderr=subprocess.DEVNULL,
    )
    ends.b.close()
    for turn in range(20):
        ends.a.sendall(b"%d" % turn)
        assert ends.a.recv(100) == b"%d" % turn
    ends.a.shutdown(socket.SHUT_WR)
    assert ends.a.recv(1) == b""
    assert child.wait(8) == 0


def _take_descriptor(far: Far) -> None:
    data, rights, flags, _ = far.kept["rights"].recvmsg(1, socket.CMSG_SPACE(4))
    assert data == b"d"
    assert flags == 0
    numbers = array.array("i")
    numbers.frombytes(rights[0][2][:4])
    far.sock = socket.socket(fileno=numbers[0])


def _keep(far: Far, descriptor: int) -> None:
    far.kept["rights"] = socket.socket(fileno=os.dup(descriptor))


def _pass(channel: socket.socket, sock: socket.socket) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))]
    assert channel.sendmsg([b"d"], rights) == 1


@each(False, True)
def descriptor_passed_before_the_upgrade(must_upgrade: bool) -> None:
    """SCM_RIGHTS: another process gets the connection, and upgrades it."""
    mine, other = socket.socketpair()
    peer = Peer()
    peer.call(_keep, other.fileno())
    with listener() as listening:
        ends = connected(listening)
    _pass(mine, ends.b)
    peer.call(_take_descriptor)
    ends.b.close()
    if must_upgrade:
        far_upgrade(ends.a, peer)
    peer.start("echo", 100)
    for _ in range(100):
        ends.a.sendall(b"x")
        assert ends.a.recv(1) == b"x"
    peer.result()
    peer.start("send_pattern", 100000)
    receive_pattern(ends.a, 100000)
    peer.result()
    ends.a.close()
    assert peer.call("recv", 1) == b""
    peer.finish()


def descriptor_passed_after_the_upgrade() -> None:
    """An upgraded connection goes on in the process that gets it."""
    mine, other = socket.socketpair()
    peer = Peer()
    peer.call(_keep, other.fileno())
    ends = pair()
    _pass(mine, ends.b)
    peer.call(_take_descriptor)
    ends.b.close()
    for turn in range(20):
        ends.a.sendall(b"%2d" % turn)
        assert peer.call("receive", 2) == b"%2d" % turn
        peer.call("send", b"%2d" % turn)
        assert receive(ends.a, 2) == b"%2d" % turn
    ends.a.close()
    assert peer.call("recv", 1) == b""
    peer.finish()


def descriptor_passed_within_one_process() -> None:
    """The number that arrives is the same connection."""
    mine, other = socket.socketpair()
    ends = pair()
    _pass(mine, ends.b)
    data, rights, flags, _ = other.recvmsg(1, socket.CMSG_SPACE(4))
    assert (data, flags) == (b"d", 0)
    numbers = array.array("i")
    numbers.frombytes(rights[0][2][:4])
    again = socket.socket(fileno=numbers[0])
    ends.b.close()
    ping_pong(ends.a, again, 20)
    again.close()
    assert ends.a.recv(1) == b""


def exec_closes_an_upgraded_socket() -> None:
    """Close-on-exec ends the connection as close does."""
    ends = pair()

    def child() -> None:
        ends.a.close()
        os.execv("/bin/true", ["true"])

    pid = os.fork()
    if pid == 0:
        child()
    ends.b.close()
    assert ends.a.recv(1) == b""
    reap(pid)


def daemon_closes_everything() -> None:
    """A child that closes all numbers and starts anew works as a fresh process."""
    ends = pair()

    def child() -> None:
        keep = {0, 1, 2}
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    continue
        ends.a.detach()
        ends.b.detach()
        _own_pair()

    reap(forked(child))
    ping_pong(ends.a, ends.b, 10)


def vfork_child_only_execs() -> None:
    """Many short children while rings are in use in another thread."""
    ends = pair()
    task = Task(ping_pong, ends.a, ends.b, 3000)
    for _ in range(5):
        assert subprocess.run(["/bin/true"], check=False).returncode == 0
    task.result()
    assert on_ring(ends.a) == on_ring(ends.b)


def wrong_descriptor_in_a_child() -> None:
    """What a child does to its own numbers does not reach the parent's."""
    ends = pair()

    def child() -> None:
        os.dup2(0, ends.b.fileno())
        os.close(ends.a.fileno())
        expect(9, os.read, ends.a.fileno(), 1)

    reap(forked(child))
    ping_pong(ends.a, ends.b, 10)
    upgrade(ends)
