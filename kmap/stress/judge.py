# SPDX-License-Identifier: Apache-2.0
"""What must come out of a case, whoever carried the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kmap.stress.flow import Outcome
from kmap.stress.plan import SIDES, CasePlan, ConnectionPlan, other

# Kinds of failure that mean that bytes were not what they must be.
MISMATCH_KINDS = ("mismatch", "incomplete", "lost")


@dataclass(frozen=True)
class Finding:
    """One thing that went wrong in a case."""

    # "mismatch" (a wrong byte), "incomplete" (an end too early), "lost" (bytes of a
    # dead peer that must still have arrived), "hang", "leak", "died" (a worker that
    # nobody killed), "error" (a call failed in a way that no peer can cause),
    # "upgraded" (a ring where none may be).
    kind: str
    detail: str


def _name(plan: ConnectionPlan, side: str) -> str:
    end = plan.ends[side]
    how = end.style + (" threads" if end.threads else "")
    how += f" fork={end.fork}" if end.fork else ""
    how += " dup" if end.dup else ""
    role = "connector" if plan.connector == side else "acceptor"
    return (
        f"connection {plan.number} ({plan.kind}), side {side} ({role}, {how}, "
        f"{end.finish})"
    )


def own_faults(plan: ConnectionPlan, side: str, outcome: Outcome) -> list[Finding]:
    """What one end says went wrong."""
    name = _name(plan, side)
    if outcome.mismatch:
        return [Finding("mismatch", f"{name}: {outcome.mismatch}")]
    if outcome.trouble:
        return [Finding("error", f"{name}: {outcome.trouble}")]
    return []


def _complete(plan: ConnectionPlan, side: str, outcome: Outcome) -> bool:
    return (
        outcome.sent == plan.total(side)
        and outcome.received == plan.total(other(side))
        and outcome.end in ("eof", "closed")
    )


def _cut_short(
    plan: ConnectionPlan, side: str, own: Outcome, peer: Outcome
) -> list[Finding]:
    """What must hold although an end has cut its connection short.

    A stream that an end shut down, and nothing else, still arrives whole, unless the
    connection was reset.
    """
    gentle = all(end.act in ("", "shut-wr") for end in plan.ends.values())
    if gentle and own.end in ("eof", "closed") and own.received < peer.sent:
        return [
            Finding(
                "lost",
                f"{_name(plan, side)}: the peer had sent {peer.sent} bytes before "
                f"it ended its stream, {own.received} arrived, end {own.end}",
            )
        ]
    return []


def judge(
    plan: CasePlan,
    outcomes: Mapping[str, Sequence[Outcome]],
    dead: str | None,
    dead_positions: Mapping[int, tuple[int, int]],
    *,
    ring: bool,
) -> list[Finding]:
    """Findings of a case whose living workers have reported.

    dead is the side that was killed on purpose; dead_positions has what it had sent
    and received by then, by connection.  A ring holds what was published in any case.
    """
    findings: list[Finding] = []
    every = {
        side: {outcome.number: outcome for outcome in outcomes[side]}
        for side in SIDES
        if side != dead
    }
    for side, by_number in every.items():
        for connection in plan.connections:
            outcome = by_number[connection.number]
            found = own_faults(connection, side, outcome)
            name = _name(connection, side)
            cut = dead is None and connection.cut
            if cut and any(every[s][connection.number].acts for s in SIDES):
                if not found:
                    peer = every[other(side)][connection.number]
                    found = _cut_short(connection, side, outcome, peer)
            elif not found and dead is None:
                if not _complete(connection, side, outcome):
                    found = [
                        Finding(
                            "incomplete",
                            f"{name}: sent {outcome.sent} of {connection.total(side)}, "
                            f"received {outcome.received} of "
                            f"{connection.total(other(side))}, end {outcome.end}",
                        )
                    ]
            elif not found:
                sent, received = dead_positions[connection.number]
                # A peer that had taken everything leaves by FIN, and nothing that a
                # call of its took may be lost then.  One that had not leaves by RST,
                # which may overtake what it sent.
                if (ring or received == outcome.sent) and outcome.received < sent:
                    found = [
                        Finding(
                            "lost",
                            f"{name}: the dead peer had sent {sent} bytes and taken "
                            f"{received} of {outcome.sent}, {outcome.received} "
                            f"arrived, end {outcome.end}",
                        )
                    ]
            findings.extend(found)
    return findings


def outcome_class(
    plan: CasePlan, outcomes: Mapping[str, Sequence[Outcome]], dead: str | None
) -> str:
    """How a case ended, in words that do not depend on timing."""
    words = set()
    for side in SIDES:
        if side == dead:
            continue
        by_number = {outcome.number: outcome for outcome in outcomes[side]}
        for connection in plan.connections:
            outcome = by_number[connection.number]
            if outcome.mismatch:
                words.add("wrong bytes")
            elif outcome.trouble:
                words.add(outcome.trouble)
            elif _complete(connection, side, outcome):
                words.add("all bytes, then the end")
            elif outcome.end in ("eof", "closed"):
                words.add("a prefix, then the end")
            else:
                words.add("ECONNRESET or EPIPE")
    return "; ".join(sorted(words))
