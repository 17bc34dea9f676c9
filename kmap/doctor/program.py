# SPDX-License-Identifier: Apache-2.0
"""Whether a program can run under Kmap, from its file: nothing is started."""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
from dataclasses import dataclass

from kmap import native
from kmap.demo.programs import find_path
from kmap.doctor import elf, envoy
from kmap.doctor.check import Check, State, Subject
from kmap.doctor.elf import Elf, NotElf
from kmap.doctor.libraries import (
    Libraries,
    find,
    is_glibc_loader,
    is_musl_loader,
    musl_preload,
    preload,
    preload_for,
)
from kmap.results import CommandFailed

# The kernel's BINPRM_BUF_SIZE, and how often it follows a script to a script.
_SCRIPT_HEAD = 256
_SCRIPT_DEPTH = 5
_SHELLS = frozenset({"sh", "bash", "dash", "ash", "ksh", "zsh", "busybox"})

# Bits of vfs_cap_data.magic_etc, and capabilities by number, in linux/capability.h.
_CAP_EFFECTIVE = 0x1
_CAP_REVISION_1 = 0x01000000
_CAP_REVISION_MASK = 0xFF000000
_CAPABILITIES = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
]

_UNKNOWN = (
    "run a build of it for glibc or musl; as it is it works, and all its connections "
    "stay on the kernel"
)
_NO_MUSL = "apt-get install musl-tools, and then install the package again"
_WITHOUT_RUN = 'where kmap run cannot be used: LD_PRELOAD="$(kmap path --musl)"'
_GO = "nothing to be done: it works, and its connections stay on the kernel"
_NO_LOADER = (
    "link it dynamically; as it is it works, and all its connections stay on the kernel"
)


@dataclass(frozen=True)
class Program:
    """A program's file, and what stands between its name and that file."""

    name: str
    path: str
    # The scripts on the way, outermost first, each with its first line.
    scripts: tuple[tuple[str, str], ...]


def _script(path: str) -> str | None:
    """What follows #! in the first line; None if it is no script."""
    try:
        # Opening a pipe would wait for somebody to write.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CommandFailed(f"{path} is not a file: give the path of a program")
        with open(path, "rb") as file:
            head = file.read(_SCRIPT_HEAD)
    except OSError as error:
        raise CommandFailed(f"{path} cannot be read: {error.strerror}") from None
    if not head.startswith(b"#!"):
        return None
    return os.fsdecode(head[2:].split(b"\n", 1)[0]).strip()


def _of_env(argument: str) -> str | None:
    """The command in the arguments of env(1)."""
    for word in argument.split():
        if not word.startswith("-") and "=" not in word:
            return word
    return None


def _interpreter(line: str) -> str | None:
    path, _, argument = line.partition(" ")
    if os.path.basename(path) == "env" and (command := _of_env(argument)):
        return shutil.which(command)
    return path or None


def locate(name: str) -> Program:
    """Finds a program as a shell would, also in the directories of servers."""
    path = find_path(name) if "/" not in name else name
    if path is None:
        raise CommandFailed(
            f"{name}: there is no such program in PATH: give its path, or a process id"
        )
    scripts: list[tuple[str, str]] = []
    while len(scripts) < _SCRIPT_DEPTH and (line := _script(path)) is not None:
        scripts.append((path, line))
        interpreter = _interpreter(line)
        if interpreter is None:
            raise CommandFailed(f"{path} is a script for {line}, which does not exist")
        path = interpreter
    return Program(name, os.path.realpath(path), tuple(scripts))


def _capability_names(raw: bytes) -> list[str]:
    """What vfs_cap_data permits, by name."""
    try:
        (magic,) = struct.unpack_from("<I", raw)
        (low,) = struct.unpack_from("<I", raw, 4)
        high = 0
        if magic & _CAP_REVISION_MASK != _CAP_REVISION_1:
            (high,) = struct.unpack_from("<I", raw, 12)
    except struct.error:
        return ["unreadable"]
    bits = high << 32 | low
    return [
        f"cap_{_CAPABILITIES[bit]}" if bit < len(_CAPABILITIES) else f"cap_{bit}"
        for bit in range(64)
        if bits >> bit & 1
    ]


def file_capabilities(path: str) -> list[str] | None:
    """The capabilities that the file gives; None if it gives none."""
    try:
        raw = os.getxattr(path, "security.capability")
    except OSError:
        return None
    return _capability_names(raw) or ["none"]


def _file(program: Program, subject: Subject) -> Check:
    if not program.scripts:
        return subject.ok("file", program.path)
    chain = " -> ".join([*(path for path, _ in program.scripts), program.path])
    if os.path.basename(program.path) in _SHELLS:
        return subject.limited(
            "file",
            f"a script: {chain}; what follows is about the shell",
            "the programs that it starts get the library, too: check those, or the "
            "process that runs",
        )
    return subject.ok("file", f"a script: {chain}; what follows is about the latter")


def _machine(binary: Elf, subject: Subject) -> Check | None:
    library = preload_for(binary)
    if library is None or binary.machine == library.machine:
        return None
    return subject.cannot(
        "architecture",
        f"{binary.machine}, and the library is {library.machine}",
        f"run a build of it for {library.machine}",
    )


def linking(binary: Elf, subject: Subject) -> Check:
    """Whether a dynamic loader for which there is a library starts the program."""
    loader = binary.interpreter
    if loader is None:
        return subject.cannot(
            "loader",
            "a static program: no loader reads LD_PRELOAD",
            _NO_LOADER if binary.go is None else _GO,
        )
    if is_musl_loader(loader):
        if musl_preload() is None:
            return subject.cannot(
                "loader", f"{loader}: musl, and the library for it is missing", _NO_MUSL
            )
        return subject.ok("loader", f"{loader} (musl)", _WITHOUT_RUN)
    if not is_glibc_loader(loader):
        return subject.cannot("loader", f"{loader}: not glibc's or musl's", _UNKNOWN)
    return subject.ok("loader", f"{loader} (glibc)")


def _privileges(path: str, subject: Subject) -> Check:
    mode = os.stat(path).st_mode
    bits = [
        name for bit, name in ((0o4000, "setuid"), (0o2000, "setgid")) if mode & bit
    ]
    if bits:
        letters = ",".join({"setuid": "u-s", "setgid": "g-s"}[name] for name in bits)
        return subject.cannot(
            "privileges",
            f"{' and '.join(bits)}: the loader ignores LD_PRELOAD when somebody else "
            "than the owner runs it",
            f"chmod {letters} on a copy, and start that as the user it needs",
        )
    capabilities = file_capabilities(path)
    if capabilities is not None:
        return subject.cannot(
            "privileges",
            f"file capabilities {', '.join(capabilities)}: the loader ignores "
            "LD_PRELOAD unless root runs it",
            f"setcap -r {path}, and give the process the capability instead (systemd: "
            "AmbientCapabilities=); for low ports: sysctl "
            "net.ipv4.ip_unprivileged_port_start",
        )
    return subject.ok("privileges", "no setuid, setgid or file capabilities")


def glibc(libc: Elf | None, subject: Subject) -> Check | None:
    """Whether the program's glibc has all that the library needs."""
    library = preload()
    needed = library.glibc_needed if library is not None else None
    if libc is None or libc.glibc_defined is None or needed is None:
        return None
    has = ".".join(map(str, libc.glibc_defined))
    least = ".".join(map(str, needed))
    if libc.glibc_defined < needed:
        return subject.cannot(
            "glibc",
            f"{has} ({libc.path}), and the library needs {least}",
            "build the library where glibc is no newer than the program's, or move the "
            "program to a newer system",
        )
    return subject.ok("glibc", f"{has}; the library needs {least}")


def _loads_more(binaries: list[Elf]) -> bool:
    return any("dlopen" in binary.imports for binary in binaries)


def calls(
    binary: Elf, libraries: Libraries, subject: Subject, *, running: bool = False
) -> Check:
    """Which of the calls that the library stands in front of the program makes."""
    if binary.go is not None:
        version = f"Go {binary.go}".strip()
        return subject.cannot(
            "system calls",
            f"{version}: its system calls do not pass through libc",
            _GO,
        )
    binaries = [binary, *libraries.found]
    subjects = {symbol.name: symbol.subject for symbol in native.symbol_table()}
    made = sorted(set().union(*(each.imports for each in binaries)) & subjects.keys())
    sockets = [name for name in made if subjects[name] == "SOCKETS"]
    if sockets:
        others = len(made) - len(sockets)
        return subject.ok(
            "system calls",
            f"through libc: {', '.join(sockets)} and {others} other calls",
        )
    if not running and _loads_more(binaries):
        return subject.limited(
            "system calls",
            "none on sockets in what it is linked to; it loads more as it runs",
            "start it and check the process: kmap doctor PID",
        )
    if not made:
        return subject.cannot(
            "system calls",
            "none that the library stands in front of: it makes system calls itself, "
            "or has no connections",
            "nothing to be done: it works as before",
        )
    return subject.limited(
        "system calls",
        "opens no sockets through libc: it has none, or gets them from others, or "
        "makes those calls itself",
        "if it has connections, check the process: kmap doctor PID, kmap ss -a",
    )


def _libraries(libraries: Libraries, subject: Subject) -> Check | None:
    if not libraries.missing:
        return None
    return subject.limited(
        "libraries",
        f"not found: {', '.join(libraries.missing)}; so it does not start from here",
        "install them, or set LD_LIBRARY_PATH as where it runs",
    )


def malloc(binary: Elf, libraries: Libraries, subject: Subject) -> Check:
    """Whose malloc it has; any will do."""
    own = [each.path for each in (binary, *libraries.found) if each.own_malloc]
    if own:
        return subject.ok("malloc", f"its own, in {', '.join(own)}; any will do")
    return subject.ok("malloc", "libc's")


def _io_uring(binary: Elf, libraries: Libraries, subject: Subject) -> Check:
    for each in libraries.found:
        if re.match(r"liburing\.so", os.path.basename(each.path)):
            return envoy.may_use_io_uring(f"linked to {each.path}", subject)
    words = elf.mentions(binary.path, b"io_uring", *envoy.MARKS)
    if envoy.ENVOY_MARK in words:
        return subject.ok(
            "io_uring",
            "an Envoy: off unless its settings have io_uring_options",
            "--envoy-config FILE checks its settings",
        )
    if envoy.LIBUV_MARK in words:
        return subject.ok(
            "io_uring", "by libuv, which the library gives its epoll back"
        )
    if words:
        return envoy.may_use_io_uring("its text speaks of io_uring", subject)
    return subject.ok("io_uring", "not used")


def _checks_of(
    binary: Elf, subject: Subject, *, envoy_config: str | None
) -> list[Check | None]:
    libraries = find(binary)
    if linking(binary, subject).state is State.CANNOT:
        return [calls(binary, libraries, subject)]
    found = [
        _libraries(libraries, subject),
        glibc(libraries.libc, subject),
        calls(binary, libraries, subject),
        malloc(binary, libraries, subject),
    ]
    if envoy_config is not None:
        found.append(envoy.settings(envoy_config, subject))
    else:
        found.append(_io_uring(binary, libraries, subject))
    return found


def check(name: str, *, envoy_config: str | None = None) -> list[Check]:
    """All checks of the program that is called name."""
    program = locate(name)
    subject = Subject(os.path.basename(name))
    try:
        binary = elf.read(program.path)
    except NotElf as error:
        raise CommandFailed(f"{error}: give the path of a program") from None
    loader = linking(binary, subject)
    found = [
        _file(program, subject),
        _machine(binary, subject),
        loader,
        _privileges(program.path, subject),
    ]
    if binary.static or found[1] is not None:
        # Nothing to resolve; that it is Go explains why it is static.
        if binary.go is not None:
            found.append(calls(binary, Libraries((), (), None), subject))
    else:
        found += _checks_of(binary, subject, envoy_config=envoy_config)
    return [each for each in found if each is not None]
