# SPDX-License-Identifier: Apache-2.0
"""Handlers of SIGSEGV and SIGBUS are the program's, whatever the library does."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from tests.conformance.kit import (
    BAD_POINTER,
    UNDER_KMAP,
    Pair,
    Task,
    assert_on_ring,
    each,
    fails,
    libc,
    ok,
    page_size,
    pair,
    poll_one,
    receive,
    until_asleep,
    upgrade,
)

_SEGV, _BUS = signal.SIGSEGV, signal.SIGBUS
_SIGINFO, _ONSTACK, _RESTART = 0x4, 0x08000000, 0x10000000
_NODEFER, _RESETHAND = 0x40000000, 0x80000000
_DFL, _IGN = 0, 1
_RT_SIGACTION = {"x86_64": 13, "aarch64": 134}[os.uname().machine]
_SS_ONSTACK = 1
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """libc's struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_uint32),
        ("restorer", ctypes.c_void_p),
    )

    def key(self) -> tuple[int, int, int]:
        """Handler, flags and mask, without what libc adds for itself."""
        return self.handler or 0, self.flags & ~0x04000000, self.mask[0]


class _KernelAction(ctypes.Structure):
    """The kernel's struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("restorer", ctypes.c_void_p),
        ("mask", ctypes.c_uint64),
    )


class _Stack(ctypes.Structure):
    """stack_t."""

    _fields_ = (
        ("start", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


class _Info(ctypes.Structure):
    """The start of siginfo_t."""

    _fields_ = (
        ("signo", ctypes.c_int),
        ("error", ctypes.c_int),
        ("code", ctypes.c_int),
        ("address", ctypes.c_uint64),
    )


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _sigaction(signum: int, action: _Action | None = None) -> _Action:
    """Sets the action if there is one; what was there before."""
    before = _Action()
    new = ctypes.byref(action) if action else None
    ok("sigaction", int(signum), new, ctypes.byref(before))
    return before


def _set(signum: int, handler: int, flags: int = 0, mask: int = 0) -> None:
    action = _Action(handler=handler, flags=flags)
    action.mask[0] = mask
    _sigaction(signum, action)


def _bit(signum: int) -> int:
    return 1 << (signum - 1)


def _status(name: str, text: str) -> int:
    """A mask of what /proc/PID/status says."""
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1], 16)
    raise AssertionError(f"no {name}")


def _library_handles(signum: int) -> bool:
    with open("/proc/self/status") as file:
        return bool(_status("SigCgt", file.read()) & _bit(signum))


def _bad_calls(ends: Pair) -> None:
    assert fails("send", ends.a.fileno(), BAD_POINTER, 10, 0) == errno.EFAULT
    ends.b.sendall(b"kept")
    assert poll_one(ends.a, select.POLLIN)
    assert fails("recv", ends.a.fileno(), BAD_POINTER, 10, 0) == errno.EFAULT
    assert receive(ends.a, 4) == b"kept"


def _efault(ends: Pair) -> None:
    """A bad pointer is EFAULT, and the connection goes on."""
    _bad_calls(ends)
    assert_on_ring(ends.a)


class _Repair:
    """A handler that makes the page of a fault usable, so that the program goes on."""

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, page_size())
        view = (ctypes.c_char * page_size()).from_buffer(self.page)
        self.address = ctypes.addressof(view)
        self._view = view
        self.seen: list[_Info] = []
        self.signals: list[int] = []
        self.masks: list[int] = []
        self.on_stack: list[bool] = []
        self._handler = _HANDLER(self._run)
        self.handler = _address(self._handler)

    def _run(self, number: int, info: int, context: int) -> None:
        assert context
        self.signals.append(number)
        self.seen.append(_Info.from_buffer_copy(_Info.from_address(info)))
        mask = ctypes.c_uint64()
        libc.pthread_sigmask(0, None, ctypes.byref(mask))
        self.masks.append(mask.value)
        stack = _Stack()
        libc.sigaltstack(None, ctypes.byref(stack))
        self.on_stack.append(bool(stack.flags & _SS_ONSTACK))
        libc.mprotect(ctypes.c_void_p(self.address), page_size(), 3)

    def spoil(self) -> None:
        ok("mprotect", ctypes.c_void_p(self.address), page_size(), 0)

    def fault(self) -> None:
        """A fault of the program's own, which the handler repairs."""
        before = len(self.seen)
        self.spoil()
        ctypes.memset(self.address + 8, 7, 1)
        assert self.page[8] == 7
        assert len(self.seen) == before + 1
        assert self.signals[-1] == _SEGV
        if _sigaction(_SEGV).flags & _SIGINFO:
            assert self.seen[-1].signo == _SEGV
            assert self.seen[-1].code == 2
            assert self.seen[-1].address == self.address + 8


def _die(function: Callable[[], object]) -> tuple[int, str]:
    """The signal that a forked child dies of in function, and what it said."""
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(said.fileno(), 2)
            function()
            os._exit(99)
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        text = said.read().decode(errors="replace")
    assert os.WIFSIGNALED(status), f"status {status:#x}: {text}"
    return os.WTERMSIG(status), text


def _touch_null() -> None:
    ctypes.memset(8, 0, 1)


def _touch_truncated_file() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(page_size())
        mapped = mmap.mmap(file.fileno(), page_size())
        file.truncate(0)
        view = (ctypes.c_char * page_size()).from_buffer(mapped)
        ctypes.memset(ctypes.addressof(view), 0, 1)


def _default() -> None:
    faulthandler.disable()
    _set(_SEGV, _DFL)
    _set(_BUS, _DFL)


# --- the library's own handler is there, and cannot be seen ---------------------


def nothing_is_installed_before_an_upgrade() -> None:
    """A program that never upgrades keeps what it had in the kernel, too."""
    _default()
    ends = pair(upgraded=False)
    ends.a.sendall(b"x")
    assert receive(ends.b, 1) == b"x"
    assert not _library_handles(_SEGV)
    assert not _library_handles(_BUS)
    upgrade(ends)
    assert _library_handles(_SEGV) == _library_handles(_BUS) == UNDER_KMAP
    assert _sigaction(_SEGV).key() == _sigaction(_BUS).key() == (_DFL, 0, 0)
    _efault(ends)


@each("before", "after")
def action_reads_back_as_it_was_set(when: str) -> None:
    """Handler, flags and mask, in each call's answer."""
    ends = pair(upgraded=when == "after")
    first, second = _Repair(), _Repair()
    mask = _bit(signal.SIGUSR1) | _bit(signal.SIGUSR2)
    _set(_SEGV, first.handler, _RESETHAND | _NODEFER, mask)
    _set(_BUS, second.handler, _RESTART)
    if when == "before":
        upgrade(ends)
    expected = (first.handler, _RESETHAND | _NODEFER, mask)
    assert _sigaction(_SEGV).key() == expected
    assert _sigaction(_BUS).key() == (second.handler, _RESTART, 0)
    action = _Action(handler=second.handler, flags=_SIGINFO)
    assert _sigaction(_SEGV, action).key() == expected
    assert _sigaction(_SEGV).key() == (second.handler, _SIGINFO, 0)
    restored = _sigaction(_SEGV, _Action(handler=_DFL))
    assert restored.key() == (second.handler, _SIGINFO, 0)
    assert _sigaction(_SEGV).key() == (_DFL, 0, 0)
    _efault(ends)


@each("signal", "bsd_signal", "ssignal", "sysv_signal", "sigset", "other_sysv_signal")
def older_calls(name: str) -> None:
    """They set, and answer with what was set before."""
    ends = pair()
    first, second = _Repair(), _Repair()
    function = getattr(libc, name.replace("other", "_"))
    function.restype = ctypes.c_void_p
    _set(_SEGV, _DFL)
    assert not function(int(_SEGV), ctypes.c_void_p(first.handler))
    assert function(int(_SEGV), ctypes.c_void_p(second.handler)) == first.handler
    _efault(ends)
    second.fault()
    assert not first.seen
    flags = {"sigset": 0}.get(name, _RESTART)
    if "sysv" in name:
        # It fires once.
        assert _sigaction(_SEGV).handler is None
    else:
        mask = 0 if name == "sigset" else _bit(_SEGV)
        assert _sigaction(_SEGV).key() == (second.handler, flags, mask)
    assert function(int(_SEGV), ctypes.c_void_p(_DFL)) == (
        None if "sysv" in name else second.handler
    )


def sigset_and_sigignore() -> None:
    ends = pair()
    repair = _Repair()
    libc.sigset.restype = ctypes.c_void_p
    _set(_SEGV, repair.handler)
    assert libc.sigset(int(_SEGV), ctypes.c_void_p(2)) == repair.handler  # SIG_HOLD
    assert _SEGV in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert libc.sigset(int(_SEGV), ctypes.c_void_p(repair.handler)) == 2
    assert _SEGV not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    _efault(ends)
    assert ok("sigignore", int(_SEGV)) == 0
    assert _sigaction(_SEGV).handler == _IGN
    _set(_SEGV, _DFL)


def by_number() -> None:
    """syscall(SYS_rt_sigaction) is the same."""
    ends = pair()
    repair = _Repair()
    libc.syscall.restype = ctypes.c_long
    # A restorer is needed, and libc has one.
    _set(_SEGV, repair.handler, _SIGINFO)
    before = _KernelAction()
    size = ctypes.c_long(8)
    call = (_RT_SIGACTION, int(_SEGV))
    assert ok("syscall", *call, None, ctypes.byref(before), size) == 0
    assert before.handler == repair.handler
    other = _Repair()
    action = _KernelAction(
        other.handler, before.flags | _NODEFER, before.restorer, _bit(_BUS)
    )
    old = _KernelAction()
    assert ok("syscall", *call, ctypes.byref(action), ctypes.byref(old), size) == 0
    assert bytes(old) == bytes(before)
    assert _sigaction(_SEGV).key() == (other.handler, _SIGINFO | _NODEFER, _bit(_BUS))
    _efault(ends)
    other.fault()
    assert not repair.seen
    error = fails("syscall", *call, BAD_POINTER, None, size)
    assert error == errno.EFAULT
    assert fails("syscall", *call, None, BAD_POINTER, size) == errno.EFAULT


# --- real faults ----------------------------------------------------------------


@each("before", "after")
def fault_of_the_program(when: str) -> None:
    """Its handler gets the signal with all it carries; bad pointers are EFAULT."""
    ends = pair(upgraded=when == "after")
    repair = _Repair()
    _set(_SEGV, repair.handler, _SIGINFO)
    if when == "before":
        upgrade(ends)
    for _ in range(3):
        repair.fault()
        _efault(ends)
    assert len(repair.seen) == 3


@each("plain", "nodefer", "masked", "resethand")
def flags_and_mask_in_the_handler(how: str) -> None:
    ends = pair()
    repair = _Repair()
    flags = {"nodefer": _NODEFER, "resethand": _RESETHAND}.get(how, 0)
    mask = _bit(signal.SIGUSR1) if how == "masked" else 0
    _set(_SEGV, repair.handler, _SIGINFO | flags, mask)
    before = _Action()
    libc.pthread_sigmask(0, None, ctypes.byref(before))
    repair.fault()
    expected = mask | (0 if how == "nodefer" else _bit(_SEGV))
    assert repair.masks == [expected]
    assert repair.on_stack == [False]
    if how == "resethand":
        assert _sigaction(_SEGV).key() == (_DFL, _SIGINFO | flags, 0)
        assert _die(_touch_null)[0] == _SEGV
    else:
        repair.fault()
    _efault(ends)


@each(True, False)
def alternate_stack(onstack: bool) -> None:
    """Used exactly when the program asked for it."""
    ends = pair()
    repair = _Repair()
    memory = ctypes.create_string_buffer(1 << 20)
    stack = _Stack(ctypes.addressof(memory), 0, len(memory))
    ok("sigaltstack", ctypes.byref(stack), None)
    _set(_SEGV, repair.handler, _SIGINFO | (_ONSTACK if onstack else 0))
    repair.fault()
    _efault(ends)
    repair.fault()
    assert repair.on_stack == [onstack] * 2
    ok("sigaltstack", ctypes.byref(_Stack(None, 2, 0)), None)


def faults_in_threads() -> None:
    """Each thread's fault is handled there, while others make bad calls."""
    all_ends = [pair() for _ in range(3)]
    repair = _Repair()
    _set(_SEGV, repair.handler, _SIGINFO)

    def many(ends: Pair) -> None:
        for _ in range(100):
            _bad_calls(ends)
        assert_on_ring(ends.a)

    tasks = [Task(many, ends) for ends in all_ends]
    count = 0
    while count == 0 or not all(task.finished.is_set() for task in tasks):
        repair.fault()
        count += 1
    for task in tasks:
        task.result()
    assert count == len(repair.seen)


def handler_that_makes_a_bad_call() -> None:
    """From inside the program's handler of a real fault, EFAULT is EFAULT."""
    ends = pair()
    repair = _Repair()
    errors = []

    def run(number: int, info: int, context: int) -> None:
        repair._run(number, info, context)
        errors.append(fails("send", ends.a.fileno(), BAD_POINTER, 10, 0))

    handler = _HANDLER(run)
    _set(_SEGV, _address(handler), _SIGINFO | _NODEFER)
    repair.fault()
    assert errors == [errno.EFAULT]
    _efault(ends)


def bad_call_inside_a_bad_call() -> None:
    """A handler of another signal that comes in the middle of them."""
    ends, other = pair(), pair()
    turns: list[int] = []
    inside: list[int] = []

    def on_alarm(_number: int, _frame: object) -> None:
        if not inside:
            inside.append(1)
            _bad_calls(other)
            inside.clear()
            turns.append(1)

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    while len(turns) < 20:
        assert fails("send", ends.a.fileno(), BAD_POINTER, 10, 0) == errno.EFAULT
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    _efault(ends)


# --- the end --------------------------------------------------------------------


@each("before", "after")
def default_action_of_a_fault(when: str) -> None:
    """The process dies of that signal."""
    ends = pair(upgraded=when == "after")
    _default()
    if when == "before":
        upgrade(ends)
    _efault(ends)
    assert _die(_touch_null)[0] == _SEGV
    assert _die(_touch_truncated_file)[0] == _BUS
    _efault(ends)


@each(_SEGV, _BUS)
def default_action_of_a_sent_signal(signum: int) -> None:
    ends = pair()
    _default()
    assert _die(lambda: os.kill(os.getpid(), signum))[0] == signum
    assert _die(lambda: signal.raise_signal(signum))[0] == signum
    _efault(ends)


def signal_sent_to_a_sleeper() -> None:
    """A child that sleeps in recv dies of kill(SIGSEGV) from outside."""
    ends = pair()
    _default()
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(told, b"x")
        ends.a.recv(1)
        os._exit(99)
    assert os.read(ready, 1) == b"x"
    os.kill(pid, _SEGV)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == _SEGV


def sent_signal_reaches_the_handler() -> None:
    """With what kill says of the sender."""
    ends = pair()
    repair = _Repair()
    _set(_SEGV, repair.handler, _SIGINFO)
    os.kill(os.getpid(), _SEGV)
    assert [(info.signo, info.code) for info in repair.seen] == [(_SEGV, 0)]
    _efault(ends)


@each("before", "after")
def ignored(when: str) -> None:
    """One that is sent wakes nobody, and the next program ignores it too."""
    ends = pair(upgraded=when == "after")
    faulthandler.disable()
    _set(_SEGV, _IGN)
    if when == "before":
        upgrade(ends)
    assert _sigaction(_SEGV).key() == (_IGN, 0, 0)
    task = Task(poll_one, ends.a, select.POLLIN).until_asleep()
    os.kill(os.getpid(), _SEGV)
    ends.b.sendall(b"x")
    assert task.result() == select.POLLIN
    assert _status("SigIgn", _next_program()) & _bit(_SEGV)
    _set(_SEGV, _DFL)
    assert receive(ends.a, 1) == b"x"
    _efault(ends)


def next_program_starts_with_the_defaults() -> None:
    """Whatever was handled here."""
    ends = pair()
    repair = _Repair()
    _set(_SEGV, repair.handler, _SIGINFO)
    text = _next_program()
    assert not _status("SigCgt", text) & _bit(_SEGV)
    assert not _status("SigIgn", text) & _bit(_SEGV)
    assert not _status("SigBlk", text) & _bit(_SEGV)
    _efault(ends)


def _next_program() -> str:
    """/proc/self/status of a program that this one starts, not under the library."""
    done = subprocess.run(
        ["/bin/cat", "/proc/self/status"],
        env={},
        check=True,
        capture_output=True,
        text=True,
        restore_signals=False,
    )
    return done.stdout


def child_made_by_vfork_sets_its_own() -> None:
    """Nothing of it comes back to the parent, whose memory it uses."""
    ends = pair()
    repair = _Repair()
    _set(_SEGV, repair.handler, _SIGINFO)
    program = (
        "import signal; signal.signal(signal.SIGSEGV, signal.SIG_IGN);"
        "print(signal.getsignal(signal.SIGSEGV).name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "SIG_IGN"
    assert _sigaction(_SEGV).key() == (repair.handler, _SIGINFO, 0)
    repair.fault()
    _efault(ends)


@each("before", "after")
def faulthandler_of_python(when: str) -> None:
    """It writes its report and the process dies of the signal."""
    faulthandler.disable()
    ends = pair(upgraded=when == "after")

    def enabled_then_fault() -> None:
        if when == "after":
            faulthandler.enable()
        _efault(ends)
        _touch_null()

    if when == "before":
        faulthandler.enable()
        upgrade(ends)
    signum, text = _die(enabled_then_fault)
    assert signum == _SEGV
    assert "Fatal Python error: Segmentation fault" in text
    assert "_touch_null" in text
    faulthandler.disable()
    _default()
    assert _die(_touch_null)[0] == _SEGV


def waits_are_restarted_as_before() -> None:
    """The library's handlers do not count as handlers of the program's."""
    _default()
    ends = pair()
    assert _library_handles(_SEGV) == UNDER_KMAP
    buffer = ctypes.create_string_buffer(4)
    turns: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: turns.append(1))
    signal.siginterrupt(signal.SIGUSR1, True)
    pid = os.getpid()

    def interrupt() -> None:
        until_asleep(pid)
        os.kill(pid, signal.SIGUSR1)

    task = Task(interrupt)
    assert fails("recv", ends.a.fileno(), buffer, 4, 0) == errno.EINTR
    task.result()
    signal.signal(signal.SIGUSR1, before)
    _efault(ends)
