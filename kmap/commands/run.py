# SPDX-License-Identifier: Apache-2.0
"""``kmap run -- CMD``: runs CMD with the library preloaded.

Without ``--stats`` this process becomes CMD, so signals, exit status and process
number are CMD's own.  With it, CMD is a child: signals sent to this process are passed
on, and this process ends as CMD ended, after one line on standard error.  ``--json``
is ``--stats`` for scripts: the counters are the one document on standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from kmap import native, procfs, wire
from kmap.launch import environment, library_for, transport
from kmap.policy import arguments
from kmap.results import (
    CannotRun,
    CommandFailed,
    SubParsers,
    UsageError,
    command_parser,
)
from kmap.settings import LOG_LEVELS

# What a shell or a supervisor sends to a program to tell it something.
_PASSED_ON = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGALRM,
)
# The statistics memfd appears with a process's first upgrade, of which nothing tells
# us, so we look at intervals.  Frequent looks while the command is young find the
# short-lived ones, and rare ones later cost nothing that can be measured.
_LOOK_EARLY_S = 0.05
_LOOK_LATE_S = 0.5
_EARLY_FOR_S = 5.0


def _settings() -> str:
    """The table of settings, as ``kmap run --help`` ends with it."""
    try:
        options = native.options()
    except CannotRun as error:
        return f"settings: not known, {error}"
    lines = ["settings, in the environment:"]
    for option in options:
        lines.append(f"  {option.env}={option.default}")
        lines.extend(
            textwrap.wrap(
                option.help, 76, initial_indent="      ", subsequent_indent="      "
            )
        )
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """Reads the table of settings only when the help is asked for."""

    def format_help(self) -> str:
        self.epilog = _settings()
        return super().format_help()


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "run",
        run,
        help="run a program under Kmap",
        description="Runs CMD with the library preloaded.  This process becomes CMD, "
        "so signals and\nthe exit status are CMD's own; 127 if CMD is not found and "
        "126 if it cannot be\nexecuted.",
        json=False,
    )
    parser.__class__ = _Parser
    parser.usage = "kmap run [options] [--] CMD [ARG...]"
    parser.add_argument(
        "--transport",
        metavar="NAME",
        help="what carries the bytes of upgraded connections; the same as "
        "KMAP_TRANSPORT",
    )
    parser.add_argument(
        "--log",
        metavar="LEVEL[:FILE]",
        help="log to standard error or FILE at level "
        + ", ".join(LOG_LEVELS)
        + "; the same as KMAP_LOG",
    )
    arguments.add_source_arguments(parser, files="--policy")
    parser.add_argument(
        "--stats",
        action="store_true",
        help="stay as the parent of CMD and print one line of counters on standard "
        "error when it has ended; processes whose first upgrade is within the last "
        f"{_LOOK_LATE_S:g} s of their life can be missed",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="like --stats, with one JSON document on standard output instead of the "
        "line; what CMD writes to standard output goes to standard error",
    )
    parser.add_argument("cmd", nargs=argparse.REMAINDER, metavar="CMD [ARG...]")


def _initial_environment() -> dict[str, str]:
    """The environment as our caller set it.

    Python adds LC_CTYPE to its own in the C locale, and CMD must not inherit that.
    """
    env = dict(os.environ)
    try:
        with open("/proc/self/environ", "rb") as file:
            initial = file.read().split(b"\0")
    except OSError:
        return env
    if not any(entry.startswith(b"LC_CTYPE=") for entry in initial):
        env.pop("LC_CTYPE", None)
    return env


def _execute(cmd: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    # Python ignores these two, and what is ignored stays so across exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvpe(cmd[0], list(cmd), env)
    except FileNotFoundError:
        print(f"kmap run: {cmd[0]}: command not found", file=sys.stderr)
        code = 127
    except OSError as error:
        print(f"kmap run: {cmd[0]}: {error.strerror}", file=sys.stderr)
        code = 126
    sys.stderr.flush()
    os._exit(code)


def _policy(args: argparse.Namespace) -> str | None:
    """The value of KMAP_POLICY that the arguments ask for.

    Rules that were made here go into the environment themselves: no file stays behind,
    and there is none that a program of another user could not read.
    """
    if not arguments.names_source(args):
        return None
    # Here, because this command is in front of every program.
    from kmap.policy import rules, source

    try:
        label, derivation = source.read(args)
        if args.rules is not None and not rules.is_yaml(label):
            return os.path.abspath(label)
        return rules.INLINE + derivation.policy.text(comments=False)
    except CommandFailed as error:
        raise UsageError(str(error)) from None


def run(args: argparse.Namespace) -> NoReturn:
    """Becomes CMD, or ends as CMD ended."""
    cmd = args.cmd[1:] if args.cmd[:1] == ["--"] else args.cmd
    if not cmd:
        raise UsageError("no command: kmap run -- CMD [ARG...]")
    options: dict[str, str] = {}
    if args.transport is not None:
        options["KMAP_TRANSPORT"] = transport(args.transport)
    if args.log is not None:
        if args.log.split(":", 1)[0] not in LOG_LEVELS:
            raise UsageError(
                f"--log {args.log}: the level is one of {', '.join(LOG_LEVELS)}"
            )
        options["KMAP_LOG"] = args.log
    if (policy := _policy(args)) is not None:
        options["KMAP_POLICY"] = policy
    env = environment(
        _initial_environment(), options=options, preload=library_for(cmd[0])
    )
    if args.stats or args.json:
        _run_with_statistics(cmd, env, as_json=args.json)
    _execute(cmd, env)


class _Collector:
    """Keeps the statistics memfds of a process tree open beyond its end."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._fds: dict[tuple[int, int], int] = {}

    def look(self) -> None:
        for pid in procfs.descendants(self._root):
            for file in procfs.open_statistics(pid):
                if file.identity in self._fds:
                    continue
                fd = procfs.open_file(file)
                if fd is not None:
                    self._fds[file.identity] = fd

    def totals(self) -> tuple[int, dict[str, int]]:
        """How many processes had statistics, and the sums of their counters."""
        totals: dict[str, int] = {}
        names = [counter.name for counter in native.counters()]
        found = 0
        for fd in self._fds.values():
            try:
                statistics = wire.read_statistics(fd)
            except wire.NotStatistics:
                continue
            found += 1
            for name, value in zip(names, statistics.counters, strict=False):
                totals[name] = totals.get(name, 0) + value
            # Connections that the end of the process closed never got to the
            # counters of closed connections.
            for row in statistics.rows:
                for name in ("ring_rx_bytes", "ring_tx_bytes"):
                    totals[name] = totals.get(name, 0) + getattr(row, name)
                for name in ("kernel_rx_bytes", "kernel_tx_bytes"):
                    totals[name] = totals.get(name, 0) + getattr(row, name)
        return found, totals

    def line(self) -> str:
        found, totals = self.totals()
        if not found:
            return "kmap: no process was seen with an upgraded connection"
        return f"kmap: {found} process{'es' if found > 1 else ''}, " + ", ".join(
            f"{name} {value}" for name, value in totals.items() if value
        )


def _document(collector: _Collector, exit_code: int) -> str:
    processes, totals = collector.totals()
    return json.dumps(
        {
            "schema": "kmap.run/1",
            "ok": exit_code == 0,
            "exit_code": exit_code,
            "processes": processes,
            "counters": totals,
        }
    )


def _run_with_statistics(
    cmd: Sequence[str], env: Mapping[str, str], *, as_json: bool
) -> NoReturn:
    blocked = {signal.SIGCHLD, *_PASSED_ON}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if as_json:
            os.dup2(2, 1)
        _execute(cmd, env)
    collector = _Collector(child)
    began = time.monotonic()
    while True:
        early = time.monotonic() - began < _EARLY_FOR_S
        info = signal.sigtimedwait(blocked, _LOOK_EARLY_S if early else _LOOK_LATE_S)
        if info is None:
            collector.look()
        elif info.si_signo != signal.SIGCHLD:
            # What the terminal sends, it sends to CMD too; si_code of a signal that
            # a process sent is 0 or negative.
            if info.si_code <= 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, info.si_signo)
        else:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid == child:
                break
    if as_json:
        print(_document(collector, os.waitstatus_to_exitcode(status)), flush=True)
    else:
        print(collector.line(), file=sys.stderr, flush=True)
    if os.WIFSIGNALED(status):
        # End by the same signal, without a core file of our own.
        ended_by = os.WTERMSIG(status)
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
        if ended_by != signal.SIGKILL:
            signal.signal(ended_by, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {ended_by})
        os.kill(os.getpid(), ended_by)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
