# SPDX-License-Identifier: Apache-2.0
"""The kernel's own recorder: events of system calls and of calls into the library.

A recorder is an instance of tracefs (Documentation/trace/ftrace.rst in the kernel's
source), so that it disturbs no other user of it.  Nothing is stopped for an event, as
ptrace would do: the programs run as they always do, a microsecond later.

It needs root, and a kernel with CONFIG_FTRACE_SYSCALLS and CONFIG_UPROBE_EVENTS, which
the kernels of Debian, Ubuntu, Fedora and Red Hat have.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import platform
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmap import procfs
from kmap.results import CannotRun, CommandFailed

_MOUNTED = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
# Numbers that all architectures share; include/uapi/asm-generic/unistd.h and mount.h.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6

# A request is a few hundred events of a hundred bytes.
_BUFFER_KB = 4096
_PREFIX = "kmap-"
# First argument of a function, in the words of kernel/trace/trace_uprobe.c.
_FIRST_ARGUMENT = {"x86_64": "%di", "aarch64": "%x0"}
_ERRNO_LEAST = -4095

_LINE = re.compile(
    r"^\s*.{1,16}-(?P<tid>\d+)\s+\((?P<pid>[\s\d-]+)\)\s+\[\d+\]\s+\S+\s+"
    r"(?P<at>\d+\.\d+): (?P<text>.*)$"
)
_ENTER = re.compile(r"^sys_(?P<name>\w+)\((?P<arguments>.*)\)$")
_EXIT = re.compile(r"^sys_(?P<name>\w+) -> (?P<result>0x[0-9a-f]+)$")
_PROBE = re.compile(
    r"^(?P<way>call|back): \(.*\) function=(?P<function>\d+) value=(?P<value>-?\d+)$"
)
_STATE = re.compile(r"^inet_sock_set_state: .* dport=(?P<port>\d+) .*=TCP_SYN_SENT$")
_MARK = re.compile(r"^tracing_mark_write: (?P<text>.*)$")
_ARGUMENT = re.compile(r"(\w+): (0x[0-9a-f]+|\d+)")


@dataclass(frozen=True)
class Event:
    """One line of the kernel's recording.

    kind   name, value and arguments
    enter  a system call, its arguments by name
    exit   a system call and its result, -errno for an error
    call   a function of the library, and its first argument
    back   a function of the library and its result
    dial   connect() chose its destination: value is the port
    mark   name is what the recorder wrote
    """

    at_us: float
    pid: int
    tid: int
    kind: str
    name: str
    value: int = 0
    arguments: Mapping[str, int] | None = None


def _signed(text: str) -> int:
    value = int(text, 16)
    return value - (1 << 64) if value - (1 << 64) >= _ERRNO_LEAST else value


def parse(lines: Iterable[str], functions: Sequence[str] = ()) -> Iterator[Event]:
    """The events in the text of an instance's trace file.

    functions are the names of those that are recorded, in the order of their numbers.
    """
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        tid = int(match["tid"])
        # Dashes where the kernel does not know the process of a thread any more.
        pid = int(match["pid"]) if match["pid"].strip().isdigit() else tid
        at, text = float(match["at"]) * 1e6, match["text"]
        if found := _EXIT.match(text):
            result = _signed(found["result"])
            yield Event(at, pid, tid, "exit", found["name"], result)
        elif found := _ENTER.match(text):
            arguments = {
                name: int(value, 0)
                for name, value in _ARGUMENT.findall(found["arguments"])
            }
            yield Event(at, pid, tid, "enter", found["name"], 0, arguments)
        elif found := _PROBE.match(text):
            name = functions[int(found["function"])]
            yield Event(at, pid, tid, found["way"], name, int(found["value"]))
        elif found := _STATE.match(text):
            yield Event(at, pid, tid, "dial", "connect", int(found["port"]))
        elif found := _MARK.match(text):
            yield Event(at, pid, tid, "mark", found["text"])


def _mount() -> int:
    """A tracefs that only this process has, as a descriptor of its root.

    Nothing is to be cleaned up: it goes with the descriptor.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: int | bytes | None) -> int:
        value: int = libc.syscall(ctypes.c_long(number), *arguments)
        if value < 0:
            error = os.strerror(ctypes.get_errno())
            raise CannotRun(
                f"tracefs cannot be mounted ({error}): run as root, outside of a "
                "container, on a kernel with CONFIG_FTRACE"
            )
        return value

    context = call(_SYS_FSOPEN, b"tracefs", _FSOPEN_CLOEXEC)
    try:
        call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


@contextlib.contextmanager
def root() -> Iterator[Path]:
    """The directory of tracefs; raises CannotRun where there is none."""
    for place in _MOUNTED:
        if os.access(place / "instances", os.W_OK):
            yield place
            return
    root = _mount()
    try:
        yield Path(f"/proc/self/fd/{root}")
    finally:
        os.close(root)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts off the signals that end us, whose exceptions would cut it short."""
    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write(file: Path, text: str) -> None:
    # A signal's exception just after open() would leave the file open, and with it the
    # instance.  Not truncated, which is a command too: it takes out what is there.
    with _undisturbed():
        fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            # One write: the kernel reads a command from it.
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def function_offsets(library: Path, names: Iterable[str]) -> dict[str, int]:
    """Where functions begin in the file; of names for the same place, the first."""
    try:
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection
    except ImportError:
        raise CannotRun(
            "to find the library's functions takes pyelftools: pip install "
            "'kmap[trace]' (in the source tree, pip install '.[trace]')"
        ) from None
    wanted = dict.fromkeys(names)
    found: dict[str, int] = {}
    with library.open("rb") as file:
        elf = ELFFile(file)
        table = elf.get_section_by_name(".dynsym")
        assert isinstance(table, SymbolTableSection)
        segments = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        for name in wanted:
            for symbol in table.get_symbol_by_name(name) or ():
                value = symbol["st_value"]
                for segment in segments:
                    start = segment["p_vaddr"]
                    if start <= value < start + segment["p_filesz"]:
                        offset = value - start + segment["p_offset"]
                        if offset not in found.values():
                            found[name] = offset
    return found


class Recorder:
    """Records all system calls of some processes, until it is closed.

    library, if there is one, is the file whose functions are recorded, too; their
    processes may be running already.
    """

    def __init__(self, library: Path | None, functions: Sequence[str]) -> None:
        with contextlib.ExitStack() as stack:
            self._tracefs = stack.enter_context(root())
            self._remove_left_over()
            self._group = f"kmap_{os.getpid()}"
            self._instance = self._tracefs / "instances" / f"{_PREFIX}{os.getpid()}"
            stack.callback(self._remove, self._instance, self._group)
            try:
                self._instance.mkdir()
            except OSError as error:
                raise CannotRun(
                    f"an instance of tracefs cannot be made ({error.strerror}): run as "
                    "root, outside of a container"
                ) from error
            self._need("events/syscalls/enable", "CONFIG_FTRACE_SYSCALLS")
            self._set("tracing_on", "0")
            # The clock of time.monotonic().
            self._set("trace_clock", "mono")
            self._set("buffer_size_kb", str(_BUFFER_KB))
            self._set("options/event-fork", "1")
            self._set("options/record-tgid", "1")
            self._functions: tuple[str, ...] = ()
            if library is not None:
                offsets = function_offsets(library, functions)
                self._functions = tuple(offsets)
                self._probe(library, offsets)
            self._set("events/syscalls/enable", "1")
            self._set("events/sock/inet_sock_set_state/enable", "1")
            self._stack = stack.pop_all()
            # For a signal whose exception comes before anybody has a hold of us.
            atexit.register(self.close)

    def _need(self, file: str, option: str) -> None:
        if not (self._instance / file).exists():
            raise CannotRun(
                f"this kernel has no {file} in tracefs: boot one with {option}"
            )

    def _set(self, file: str, text: str) -> None:
        try:
            _write(self._instance / file, text)
        except OSError as error:
            raise CannotRun(
                f"tracefs refuses {text!r} in {file}: {error.strerror}; see dmesg, and "
                "/proc/sys/kernel/ftrace_enabled"
            ) from error

    def _probe(self, library: Path, offsets: Mapping[str, int]) -> None:
        register = _FIRST_ARGUMENT.get(platform.machine())
        if register is None:
            raise CannotRun(f"functions cannot be recorded on {platform.machine()}")
        commands = self._tracefs / "uprobe_events"
        if not commands.exists():
            raise CannotRun(
                "this kernel has no uprobe_events in tracefs: boot one with "
                "CONFIG_UPROBE_EVENTS"
            )
        # Two events with many probes each: to disable an event takes a while, however
        # many probes it has.
        for number, offset in enumerate(offsets.values()):
            place = f"{library}:{offset:#x}"
            which = f"function=\\{number}:u32"
            group = self._group
            _write(commands, f"p:{group}/call {place} {which} value={register}:s32")
            _write(commands, f"r:{group}/back {place} {which} value=$retval:s64")
        self._set(f"events/{self._group}/enable", "1")

    def _remove(self, instance: Path, group: str) -> None:
        with _undisturbed():
            self._take_out(instance, group)

    def _take_out(self, instance: Path, group: str) -> None:
        with contextlib.suppress(OSError):
            _write(instance / "tracing_on", "0")
        for events in (instance / "events/syscalls", instance / f"events/{group}"):
            with contextlib.suppress(OSError):
                _write(events / "enable", "0")
        with contextlib.suppress(OSError):
            instance.rmdir()
        with contextlib.suppress(OSError):
            for line in (self._tracefs / "uprobe_events").read_text().splitlines():
                name = line.split()[0].partition(":")[2]
                if name.startswith(f"{group}/"):
                    _write(self._tracefs / "uprobe_events", f"-:{name}")

    def _remove_left_over(self) -> None:
        """Removes what a recorder left that was killed."""
        for instance in (self._tracefs / "instances").glob(f"{_PREFIX}*"):
            pid = instance.name[len(_PREFIX) :]
            if pid.isdigit() and (
                int(pid) == os.getpid() or not procfs.exists(int(pid))
            ):
                self._remove(instance, f"kmap_{pid}")

    def follow(self, tids: Iterable[int]) -> None:
        """Records these threads too, and whatever they start."""
        self._set("set_event_pid", " ".join(map(str, tids)))

    def start(self) -> None:
        """Begins with an empty recording."""
        (self._instance / "trace").write_text("")
        self._set("tracing_on", "1")

    def mark(self, text: str) -> None:
        """Puts a line into the recording."""
        self._set("trace_marker", text)

    def stop(self) -> list[Event]:
        """Ends the recording and returns it; refuses one that has holes."""
        self._set("tracing_on", "0")
        lost = 0
        for file in (self._instance / "per_cpu").glob("cpu*/stats"):
            for line in file.read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("overrun", "commit overrun", "dropped events"):
                    lost += int(value)
        if lost:
            raise CommandFailed(
                f"the kernel lost {lost} events: record fewer requests (--requests)"
            )
        with (self._instance / "trace").open(errors="replace") as lines:
            return list(parse(lines, self._functions))

    def close(self) -> None:
        """Takes everything out of the kernel again."""
        self._stack.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
