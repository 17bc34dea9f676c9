# SPDX-License-Identifier: Apache-2.0
"""Where CPU time went, by group, with and without Kmap; scripts/perf runs it.

Linux perf takes samples with call chains.  A sample belongs to the group of the first
frame, from the innermost outwards, that one of the patterns knows; what copies is
looked for in the innermost frames alone.

copy      bytes from one place to another, in the kernel, the library or libc
wake-up   waiting and being woken: scheduler, futexes, epoll, eventfds
stack     TCP, IP, Unix sockets, pipes, and the calls that lead there
entry     the way of a system call into the kernel, and out of it
kernel    everything else in the kernel
library   libkmap_preload
program   everything else in user space
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kmap import launch, native
from kmap.demo import cpu, programs, wrk
from kmap.demo.children import Child, none_left
from kmap.demo.rig import Rig, Setup
from kmap.demo.wrk import LOADS
from kmap.progress import orderly_end
from kmap.results import CannotRun, CommandFailed, UsageError

GROUPS = ("copy", "wake-up", "stack", "entry", "kernel", "library", "program")
# perf's event that needs no hardware; its samples weigh nanoseconds.
CLOCK = "cpu-clock"
# A prime, so that it beats with no timer.
_FREQUENCY = 1999
_STOP_S = 60.0

_COPY_KERNEL = re.compile(
    r"copy_(to|from)_(user|iter)|_copy_(to|from)|rep_movs|rep_stos|memcpy|memmove"
    r"|copy_page|skb_copy_datagram|copyin|copyout|csum_partial_copy|copy_user"
)
# km_user_begin is another name of the same address.
_COPY_USER = re.compile(r"mem(cpy|move)|km_user_(copy|begin)")
_WAKE = re.compile(
    r"^(__)?schedule|try_to_wake_up|ttwu|futex|eventfd|ep_|__x64_sys_epoll|epoll"
    r"|do_epoll|wake_up|autoremove_wake|sock_def_readable|sock_def_write_space"
    r"|finish_task_switch|pick_next|enqueue_task|dequeue_task|hrtimer_|do_nanosleep"
    r"|exit_to_user_mode_loop|__x64_sys_(poll|ppoll|select|pselect)|do_(sys_)?poll"
    r"|sk_wait|wait_woken|schedule_timeout|pollwake|default_wake|select_task_rq"
)
_STACK = re.compile(
    r"tcp_|^ip6?_|^__ip_|inet6?_|^sock_|__sock|sk_|skb|unix_|napi|net_rx|__netif"
    r"|dev_queue|loopback|nf_|pipe_|^__sys_(send|recv|accept|connect|socket|shutdown)"
    r"|__x64_sys_(send|recv|accept|connect|socket|shutdown|setsockopt|getsockopt)"
    r"|ksys_(read|write)|__x64_sys_(read|write)|do_(read|write)v|vfs_(read|write)"
    r"|sendfile|splice|do_iter_readv|__softirqentry|handle_softirqs|do_softirq"
)
# Only as the innermost frame: everything in the kernel has it at its end.
_ENTRY = re.compile(
    r"^(do_syscall_64|x64_sys_call|entry_SYS(CALL|RET)|syscall_|__syscall_|do_el0_svc|el0_"
    r"|el0t_64_sync|invoke_syscall)"
)
_FRAME = re.compile(
    r"^\s+[0-9a-f]+ (?P<symbol>.+?) \((?P<object>[^()]*(\[[^]]*\])?)\)$"
)
_HEAD = re.compile(r"^(?P<comm>\S.*?)\s+(?P<pid>\d+)\s+(?P<period>\d+)\s*$")
_INNERMOST = 3


@dataclass
class Profile:
    """Weights by group and by symbol: nanoseconds, or cycles."""

    groups: Counter[str] = field(default_factory=Counter)
    symbols: dict[str, Counter[str]] = field(default_factory=dict)
    samples: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.groups.values())

    def add(self, group: str, symbol: str, weight: int) -> None:
        """One sample."""
        self.groups[group] += weight
        self.symbols.setdefault(group, Counter())[symbol] += weight
        self.samples += 1


def _in_kernel(where: str) -> bool:
    return where.startswith("[") and where != "[vdso]"


def group_of(frames: Sequence[tuple[str, str]]) -> str:
    """The group of a call chain of (symbol, object), innermost first."""
    if not frames:
        return "kernel"
    symbol, where = frames[0]
    if not _in_kernel(where):
        if _COPY_USER.search(symbol):
            return "copy"
        own = any(name in where for name in native.PRELOAD_NAMES)
        return "library" if own else "program"
    kernel = [symbol for symbol, where in frames if _in_kernel(where)]
    if any(_COPY_KERNEL.search(symbol) for symbol in kernel[:_INNERMOST]):
        return "copy"
    for symbol in kernel:
        if _WAKE.search(symbol):
            return "wake-up"
        if _STACK.search(symbol):
            return "stack"
    return "entry" if _ENTRY.search(kernel[0]) else "kernel"


def parse(lines: Iterable[str]) -> dict[str, Profile]:
    """Profiles by the name of the program, from perf script's output."""
    found: dict[str, Profile] = {}
    head: tuple[str, int] | None = None
    frames: list[tuple[str, str]] = []

    def close() -> None:
        if head is not None:
            name, weight = head
            symbol = frames[0][0] if frames else "[unknown]"
            profile = found.setdefault(name, Profile())
            profile.add(group_of(frames), symbol, weight)

    for line in lines:
        if match := _HEAD.match(line):
            close()
            head, frames = (match["comm"], int(match["period"])), []
        elif match := _FRAME.match(line):
            # An address inside a function has +0x... behind its name.
            frames.append((match["symbol"].partition("+0x")[0], match["object"]))
    close()
    return found


def merged(profiles: Iterable[Profile]) -> Profile:
    """Several programs as one."""
    whole = Profile()
    for profile in profiles:
        whole.groups.update(profile.groups)
        whole.samples += profile.samples
        for group, symbols in profile.symbols.items():
            whole.symbols.setdefault(group, Counter()).update(symbols)
    return whole


def find_perf() -> str:
    """The perf of this machine."""
    path = shutil.which("perf")
    if path is None:
        raise CannotRun("perf is not installed: apt-get install linux-perf")
    return path


def best_event(perf: str) -> str:
    """Cycles, or the clock where there are no hardware counters, as in many VMs."""
    # perf record would take the clock by itself, and not say so.
    argv = [perf, "stat", "-x,", "-e", "cycles:u", "--", "/bin/true"]
    done = subprocess.run(argv, capture_output=True, text=True)
    supported = done.returncode == 0 and "<not" not in done.stderr
    return "cycles" if supported else CLOCK


def _record(perf: str, event: str, output: Path) -> list[str]:
    return [
        *(perf, "record", "-q", "-e", event, "-F", str(_FREQUENCY), "-g"),
        *("-o", str(output)),
    ]


def read(perf: str, data: Path) -> dict[str, Profile]:
    """What a file of perf record holds."""
    script = subprocess.Popen(
        [perf, "script", "-i", str(data), "-F", "comm,pid,period,ip,sym,dso"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
    )
    assert script.stdout is not None
    with script.stdout as lines:
        profiles = parse(lines)
    if script.wait():
        raise CommandFailed(f"perf script ended with {script.returncode}")
    if not profiles:
        raise CommandFailed(
            "perf took no samples: it needs to run as root, or "
            "kernel.perf_event_paranoid of 1 or less"
        )
    return profiles


def of_command(
    perf: str, event: str, argv: Sequence[str], env: Mapping[str, str]
) -> tuple[dict[str, Profile], float]:
    """Runs a command under perf; the profiles and the seconds it took."""
    with tempfile.TemporaryDirectory(prefix="kmap-perf-") as directory:
        data = Path(directory) / "perf.data"
        # perf itself is not to be under Kmap.
        given = [f"{name}={value}" for name, value in env.items()]
        began = time.monotonic()
        done = subprocess.run(
            [*_record(perf, event, data), "--", "env", "-i", *given, *argv],
            env=launch.without_kmap(env),
            stdout=sys.stderr,
        )
        took = time.monotonic() - began
        if done.returncode:
            raise CommandFailed(f"{' '.join(argv)} ended with {done.returncode}")
        return read(perf, data), took


def of_envoy(
    perf: str,
    event: str,
    load_name: str,
    setup: Setup,
    seconds: int,
    where: frozenset[int],
) -> tuple[dict[str, Profile], int]:
    """Envoy, nginx and wrk on these CPUs; the profiles and the requests served."""
    load = LOADS[load_name]
    found = programs.find_all()
    with tempfile.TemporaryDirectory(prefix="kmap-perf-") as name:
        directory = Path(name)
        root = directory / "root"
        root.mkdir()
        (root / load.path.lstrip("/")).write_bytes(b"x" * load.body_bytes)
        rig = Rig(found, setup, directory / "rig", root, cpus=where)
        try:
            with wrk.start(found, rig, load, 1, cpus=where) as warm_up:
                wrk.report(warm_up, 1)
            data = directory / "perf.data"
            with wrk.start(found, rig, load, seconds, cpus=where) as client:
                pids = [client.pid, rig.envoy.child.pid, *rig.nginx.family()]
                recorder = Child(
                    "perf",
                    [*_record(perf, event, data), "-p", ",".join(map(str, pids))],
                    env=rig.plain_env,
                    log=directory / "perf.log",
                )
                with recorder:
                    report = wrk.report(client, seconds)
                    recorder.send(signal.SIGINT)
                    if not recorder.wait(_STOP_S):
                        raise recorder.failure("did not end")
            profiles = read(perf, data)
        finally:
            rig.close()
    if report.errors:
        raise CommandFailed(f"wrk met {report.errors} errors")
    # Envoy names its threads; the one that does not work for us is idle.
    named: dict[str, Profile] = {}
    for comm, profile in profiles.items():
        program = comm if comm in ("wrk", "nginx") else "envoy"
        named[program] = merged(
            [profile, *([named[program]] if program in named else [])]
        )
    return named, report.requests


@dataclass(frozen=True)
class Column:
    """One set-up of one program in the table."""

    title: str
    profile: Profile
    # What everything is divided by, and the unit of what is left.
    divisor: float
    unit: str


def table(columns: Sequence[Column]) -> str:
    """Groups by column, in Markdown: the amount, and the share of the column."""
    heads = [f"{column.title}, {column.unit}" for column in columns]
    lines = [
        f"| group | {' | '.join(heads)} |",
        "|---|" + "---|" * len(columns),
    ]
    for group in GROUPS:
        cells = []
        for column in columns:
            weight = column.profile.groups[group]
            share = weight / column.profile.total if column.profile.total else 0.0
            cells.append(f"{weight / column.divisor:.2f} ({share:.0%})")
        lines.append(f"| {group} | {' | '.join(cells)} |")
    totals = [f"{column.profile.total / column.divisor:.2f}" for column in columns]
    lines.append(f"| all | {' | '.join(totals)} |")
    samples = [str(column.profile.samples) for column in columns]
    lines.append(f"| samples | {' | '.join(samples)} |")
    return "\n".join(lines)


def symbols(column: Column, count: int) -> str:
    """The functions that took most of each group."""
    lines = [f"{column.title}, the most of each group, {column.unit}:"]
    for group in GROUPS:
        top = column.profile.symbols.get(group, Counter()).most_common(count)
        text = ", ".join(
            f"{name} {weight / column.divisor:.2f}" for name, weight in top
        )
        lines.append(f"  {group}: {text}")
    return "\n".join(lines)


def _setups(text: str) -> list[Setup]:
    known = {setup.value: setup for setup in Setup}
    names = [name for name in text.split(",") if name]
    if not names or any(name not in known for name in names):
        raise UsageError(f"--setups {text}: there are {', '.join(known)}")
    return [known[name] for name in names]


def _of_command(options: argparse.Namespace, perf: str, event: str) -> list[Column]:
    columns = []
    for setup in _setups(options.setups):
        if setup is Setup.UNIX:
            raise UsageError("--setups unix: a command runs on kernel or kmap")
        env = setup.environment(os.environ)
        profiles, took = of_command(perf, event, options.command, env)
        unit, divisor = ("ms", 1e6) if event == CLOCK else ("Mcycles", 1e6)
        print(f"{setup.value}: {took:.2f} s", file=sys.stderr)
        columns.append(Column(setup.value, merged(profiles.values()), divisor, unit))
    return columns


def _of_envoy(options: argparse.Namespace, perf: str, event: str) -> list[Column]:
    if options.envoy not in LOADS:
        raise UsageError(f"--envoy {options.envoy}: there are {', '.join(LOADS)}")
    columns = []
    unit, divisor = ("us", 1e3) if event == CLOCK else ("cycles", 1)
    where = frozenset({max(os.sched_getaffinity(0))})
    for setup in _setups(options.setups):
        with cpu.out_of_the_way(where):
            profiles, requests = of_envoy(
                perf, event, options.envoy, setup, options.seconds, where
            )
        whole = merged(profiles.values())
        each = f"{unit}/request"
        columns.append(Column(f"{setup.value}, all", whole, divisor * requests, each))
        columns.append(
            Column(f"{setup.value}, Envoy", profiles["envoy"], divisor * requests, each)
        )
    return columns


def main(argv: Sequence[str] | None = None) -> int:
    """Records, and prints where CPU time went."""
    parser = argparse.ArgumentParser(
        prog="scripts/perf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="scripts/perf [OPTION...] (--envoy LOAD | -- COMMAND...)",
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    parser.add_argument(
        "--envoy",
        metavar="LOAD",
        help="instead of a command, the demo's Envoy, nginx and wrk: "
        + ", ".join(LOADS),
    )
    parser.add_argument(
        "--setups",
        default="kernel,kmap",
        metavar="NAMES",
        help="comma-separated (default %(default)s; --envoy has unix, too)",
    )
    parser.add_argument(
        "--seconds",
        type=int,
        default=5,
        metavar="S",
        help="of --envoy (default 5)",
    )
    parser.add_argument(
        "--top", type=int, default=0, metavar="N", help="name so many functions, too"
    )
    options = parser.parse_args(argv)
    if bool(options.command) == bool(options.envoy):
        parser.error("name a command or --envoy LOAD")
    try:
        perf = find_perf()
        event = best_event(perf)
        with orderly_end(), none_left():
            measure = _of_envoy if options.envoy else _of_command
            columns = measure(options, perf, event)
    except UsageError as error:
        parser.error(str(error))
    except CannotRun as error:
        print(f"scripts/perf: {error}", file=sys.stderr)
        return 77
    except CommandFailed as error:
        print(f"scripts/perf: {error}", file=sys.stderr)
        return 1
    print(f"event {event}, {_FREQUENCY} samples per second of CPU time\n")
    print(table(columns))
    for column in columns if options.top else ():
        print(f"\n{symbols(column, options.top)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
