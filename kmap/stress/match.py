# SPDX-License-Identifier: Apache-2.0
"""Runs cases, each between two workers."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from kmap.stress.disturb import Hog, stop_for
from kmap.stress.faults import (
    ATTACH_REFUSED,
    BUFFER_FULL,
    CLOSE_UNDER,
    CPU_HOG,
    DUP,
    EXEC,
    FAULTS,
    FEW_DESCRIPTORS,
    FORK,
    HAND_OVER,
    MEMORY_BUDGET,
    NONBLOCK,
    ONE_SIDE_DISABLED,
    ONE_SIDE_WITHOUT,
    PEER_CRASH,
    PEER_STOP,
    RESET,
    SHUTDOWN,
    SIGNALS,
    SMALL_RINGS,
)
from kmap.stress.flow import Outcome
from kmap.stress.judge import Finding, judge, outcome_class, own_faults
from kmap.stress.pair import (
    Message,
    RingCounts,
    SharedProgress,
    WorkerProcess,
    start_worker,
    variant_options,
)
from kmap.stress.plan import (
    CASES_PER_SETTINGS,
    DISABLED,
    NO_MEMORY,
    NORMAL,
    PLAIN,
    SIDES,
    CasePlan,
    other,
)
from kmap.stress.scenarios import CaseId, find_case
from kmap.stress.stream import Pattern

# Descriptors that a worker may hold at rest beyond those it started with: the
# library's own, which stay for the life of the process.
HIDDEN_DESCRIPTORS = 16

# Workers with special settings that are kept for the next case that needs them.
_KEPT_SPECIAL = 4
# Faults that ends bring about themselves, and count.
_BY_ENDS = frozenset(
    {CLOSE_UNDER, SHUTDOWN, RESET, FORK, EXEC, HAND_OVER, DUP, NONBLOCK}
)
# Faults that keep connections on the kernel.
_REFUSING = frozenset(
    {
        MEMORY_BUDGET,
        FEW_DESCRIPTORS,
        ATTACH_REFUSED,
        ONE_SIDE_DISABLED,
        ONE_SIDE_WITHOUT,
    }
)
_STOP_EVERY_S = 0.03


@dataclass
class CaseResult:
    """What one case did."""

    plan: CasePlan | None = None
    connections: int = 0
    upgraded: int = 0
    bytes: int = 0
    ring_bytes: int = 0
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    leaked_fds: int = 0
    findings: list[Finding] = field(default_factory=list)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    dead: str | None = None
    # How it ended, in words that do not depend on timing.
    way: str = ""


class _Hang(Exception):
    """Nothing has moved for as long as the session is patient."""


class _Enough(Exception):
    """A worker has reported what must not be; the rest would be its consequences."""


class _Died(Exception):
    """A worker ended that nobody killed."""

    def __init__(self, side: str) -> None:
        super().__init__(side)
        self.side = side


class Runner:
    """The workers of one job, kept from case to case as far as faults allow."""

    def __init__(
        self,
        level: str,
        seed: int,
        job: int,
        pattern: Pattern,
        *,
        kernel: bool,
        transport: str,
        patience: float,
    ) -> None:
        self._level = level
        self._transport = transport
        # Workers that are killed may leave names behind.
        self._directory = tempfile.TemporaryDirectory(prefix="kmap-stress-")
        self._fifo_dir = f"{self._directory.name}/fifos"
        self._seed = seed
        self._job = job
        self._pattern = pattern
        self._kernel = kernel
        self._patience = patience
        self._progress = SharedProgress()
        self._workers: dict[tuple[str, str], WorkerProcess] = {}
        self._generation = -1
        self._counted: dict[WorkerProcess, RingCounts] = {}

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers.values():
            worker.dispose()
        self._workers.clear()
        self._progress.close()
        self._directory.cleanup()

    def _start(self, variants: Mapping[str, str]) -> dict[str, WorkerProcess]:
        fresh = []
        chosen = {}
        for side in SIDES:
            key = (side, variants[side])
            if key not in self._workers:
                # Only normal workers change with the generation; the others are
                # the same in every case, so that one case alone finds them so.
                generation = self._generation if variants[side] == NORMAL else 0
                options = variant_options(
                    variants[side], self._seed, self._job, generation, side
                )
                if options:
                    options["KMAP_TRANSPORT"] = self._transport
                    options["KMAP_FIFO_DIR"] = self._fifo_dir
                self._workers[key] = start_worker(
                    self._level,
                    side,
                    self._pattern,
                    self._progress,
                    options,
                    kernel=self._kernel or variants[side] == PLAIN,
                )
                fresh.append(self._workers[key])
            # The one used last is at the end.
            chosen[side] = self._workers[key] = self._workers.pop(key)
        special = [
            worker
            for (_, variant), worker in self._workers.items()
            if variant != NORMAL and worker not in chosen.values()
        ]
        for worker in special[: max(0, len(special) - _KEPT_SPECIAL)]:
            self._drop(worker)
        for worker in fresh:
            worker.greet()
        return chosen

    def _drop(self, worker: WorkerProcess) -> None:
        for key, held in list(self._workers.items()):
            if held is worker:
                del self._workers[key]
        self._counted.pop(worker, None)
        worker.dispose()

    def run(self, identity: CaseId) -> CaseResult:
        """Runs one case to its end, whatever that is."""
        plan = find_case(identity)
        generation = (
            plan.number // CASES_PER_SETTINGS if identity[0] == self._level else 0
        )
        if generation != self._generation:
            self._generation = generation
            for (_, variant), worker in list(self._workers.items()):
                if variant == NORMAL:
                    self._drop(worker)
        self._progress.clear()
        workers = self._start(plan.variants)
        run = _Run(plan, identity, workers, self._progress, self._patience, self._level)
        result = run.result
        try:
            with self._neighbour(plan, workers):
                run.exchange()
        except _Enough:
            pass
        except _Hang:
            evidence = "\n".join(workers[side].examine() for side in SIDES)
            where = "\n".join(run.positions())
            text = f"nothing moved for {self._patience:g} s\n{where}\n{evidence}"
            result.findings.append(Finding("hang", text))
        except _Died as error:
            worker = workers[error.side]
            text = (
                f"worker {worker.label} ended by itself, status {worker.status()}: "
                f"{worker.error_text()[-3000:]}"
            )
            result.findings.append(Finding("died", text))
        else:
            run.conclude()
            self._count(run)
        if result.findings:
            for worker in workers.values():
                self._drop(worker)
        elif result.dead is not None:
            self._drop(workers[result.dead])
        return result

    def _neighbour(
        self, plan: CasePlan, workers: Mapping[str, WorkerProcess]
    ) -> contextlib.AbstractContextManager[object]:
        if not plan.hog:
            return contextlib.nullcontext()
        pids = [worker.pid for worker in workers.values()]
        return Hog(pids, random.Random(f"{plan.name}/hog"))

    def _count(self, run: _Run) -> None:
        """Adds what the library did, by its own statistics."""
        result, plan = run.result, run.plan
        deltas = {}
        for side, worker in run.workers.items():
            if self._level == "ring" or self._kernel:
                deltas[side] = RingCounts()
                continue
            now = worker.counts()
            deltas[side] = now - self._counted.get(worker, RingCounts())
            self._counted[worker] = now
        for side in SIDES:
            if side != result.dead:
                result.bytes += sum(o.received for o in result.outcomes[side])
                result.ring_bytes += deltas[side].ring_rx
        if plan.fault in _BY_ENDS:
            result.faults[plan.fault] += sum(
                outcome.acts for side in SIDES for outcome in result.outcomes[side]
            )
        elif plan.fault == CPU_HOG:
            result.faults[CPU_HOG] += 1
        if self._level == "ring":
            result.ring_bytes = result.bytes
            result.upgraded = len(plan.connections)
            if plan.fault == ATTACH_REFUSED:
                result.faults[plan.fault] += len(plan.connections)
            return
        result.upgraded = max(delta.upgrades for delta in deltas.values())
        never = {DISABLED, NO_MEMORY, PLAIN} & set(plan.variants.values())
        if result.upgraded and never:
            text = f"{result.upgraded} connections moved to a ring with {plan.variants}"
            result.findings.append(Finding("upgraded", text))
        if plan.fault in _REFUSING:
            result.faults[plan.fault] += len(plan.connections) - result.upgraded
        elif plan.fault == SMALL_RINGS:
            result.faults[SMALL_RINGS] += result.upgraded or len(plan.connections)


class _Run:
    """One case while it runs."""

    def __init__(
        self,
        plan: CasePlan,
        identity: CaseId,
        workers: dict[str, WorkerProcess],
        progress: SharedProgress,
        patience: float,
        level: str,
    ) -> None:
        self.plan = plan
        self.level = level
        self.workers = workers
        self.result = CaseResult(plan=plan, connections=len(plan.connections))
        self._identity = identity
        self._progress = progress
        self._patience = patience
        self._ports: dict[str, dict[str, int]] = {}
        self._done: dict[str, Message] = {}
        self._moved = (0, time.monotonic())
        self._killed: str | None = None
        self._stopped = 0
        self._next_stop = 0.0

    def exchange(self) -> None:
        """Until every worker that lives has reported."""
        poll = select.poll()
        sides = {}
        for side, worker in self.workers.items():
            poll.register(worker.control, select.POLLIN)
            sides[worker.control.fileno()] = side
        with contextlib.ExitStack() as stack:
            ends = self._channels_sockets(stack)
            for side, worker in self.workers.items():
                peer = self.workers[other(side)].hello["listen"]
                message = {"op": "case", "id": self._identity, "peer": peer}
                worker.send(message, ends[side])
        while not self._over():
            self._kill_when_due()
            self._stop_when_due()
            waiting = bool(self.plan.stop_ms) or (
                self.plan.crash is not None and self._killed is None
            )
            for fd, _ in poll.poll(1 if waiting else 200):
                side = sides[fd]
                heard = self.workers[side].receive()
                if heard is None:
                    poll.unregister(fd)
                    self._gone(side)
                else:
                    self._moved = (-1, time.monotonic())
                    self._heard(side, heard)
            for side in SIDES:
                if side != self.result.dead and not self.workers[side].alive:
                    self._gone(side)
            self._watch()

    def _channels_sockets(self, stack: contextlib.ExitStack) -> dict[str, list[int]]:
        """A Unix socket pair per channel; only the workers keep them open."""
        ends: dict[str, list[int]] = {side: [] for side in SIDES}
        if self.level == "ring":
            for _ in self.plan.connections:
                for side, sock in zip(SIDES, socket.socketpair(), strict=True):
                    ends[side].append(stack.enter_context(sock).fileno())
        return ends

    def _over(self) -> bool:
        dead = self.result.dead is not None
        # A worker that was killed after it reported is not for the next case.
        if self._killed and not dead:
            return False
        return len(self._done) + dead == len(SIDES)

    def _watch(self) -> None:
        total, since = self._moved
        now = time.monotonic()
        if self._progress.total() != total:
            self._moved = (self._progress.total(), now)
        elif now - since > self._patience:
            raise _Hang

    def _kill_when_due(self) -> None:
        crash = self.plan.crash
        if crash is None or crash.by_itself or self._killed or len(self._ports) < 2:
            return
        if self._progress.total() < 2 * crash.after_bytes or self._done:
            return
        # An instant between two calls as well as within one.
        time.sleep(crash.delay_us / 1e6)
        self._killed = crash.victim
        # So that what it has counted can be read when it is dead.
        self.workers[crash.victim].counts()
        self.workers[crash.victim].kill()

    def _stop_when_due(self) -> None:
        now = time.monotonic()
        stops = self.plan.stop_ms
        if not stops or len(self._ports) < len(SIDES) or now < self._next_stop:
            return
        self._next_stop = now + _STOP_EVERY_S
        side = SIDES[self._stopped % len(SIDES)]
        seconds = stops[self._stopped % len(stops)] / 1000
        self._stopped += 1
        if stop_for(self.workers[side].pid, seconds):
            self.result.faults[PEER_STOP] += 1

    def _gone(self, side: str) -> None:
        crash = self.plan.crash
        if crash is None or crash.victim != side or self.workers[side].status() != -9:
            raise _Died(side)
        if side not in self._done:
            self.result.faults[PEER_CRASH] += 1
        self._done.pop(side, None)
        self.result.dead = side

    def _heard(self, side: str, message: Message) -> None:
        op = message["op"]
        if op == "connected":
            self._ports[side] = message["ports"]
            if len(self._ports) == len(SIDES):
                for each, worker in self.workers.items():
                    worker.send({"op": "go", "ports": self._ports[other(each)]})
        elif op in ("stuck", "fitted"):
            if op == "stuck" and self.plan.fault == BUFFER_FULL:
                self.result.faults[BUFFER_FULL] += 1
            self.workers[other(side)].send(
                {"op": "release", "connection": message["connection"]}
            )
        elif op == "done":
            self._done[side] = message
            if self.plan.fault == SIGNALS:
                self.result.faults[SIGNALS] += message["signals"]
            self.result.outcomes[side] = [Outcome(**end) for end in message["ends"]]
        elif op == "failed":
            outcome = Outcome(**message["end"])
            plan = self.plan.connections[outcome.number]
            self.result.findings.extend(own_faults(plan, side, outcome))
            raise _Enough
        elif op == "broken":
            self.result.findings.append(
                Finding("error", f"side {side}: {message['error']}")
            )
            raise _Enough

    def conclude(self) -> None:
        """Judges what was reported."""
        dead = self.result.dead
        self.result.way = outcome_class(self.plan, self.result.outcomes, dead)
        positions = {
            connection.number: self._progress.end(dead, connection.number)
            for connection in self.plan.connections
            if dead is not None
        }
        self.result.findings.extend(
            judge(
                self.plan,
                self.result.outcomes,
                dead,
                positions,
                ring=self.level == "ring",
            )
        )
        for side, message in self._done.items():
            extra: Counter[str] = Counter(message["fds"]) - Counter(
                self.workers[side].hello["fds"]
            )
            leaked = max(0, extra.total() - HIDDEN_DESCRIPTORS)
            self.result.leaked_fds += leaked
            if leaked:
                text = (
                    f"side {side} holds {extra.total()} descriptors more than at its "
                    f"start: {dict(extra)}"
                )
                self.result.findings.append(Finding("leak", text))

    def positions(self) -> list[str]:
        """Where every connection is, for a person to read."""
        lines = [
            f"case {self.plan.name}, fault {self.plan.fault or 'none'}, reported: "
            f"{sorted(self._done) or 'nobody'}"
        ]
        for plan in self.plan.connections:
            for side in SIDES:
                sent, received = self._progress.end(side, plan.number)
                wanted = (plan.total(side), plan.total(other(side)))
                if (sent, received) == wanted:
                    continue
                end = plan.ends[side]
                lines.append(
                    f"connection {plan.number} ({plan.kind}) side {side}: sent {sent} "
                    f"of {wanted[0]}, received {received} of {wanted[1]}; {end}"
                )
        return lines
