# SPDX-License-Identifier: Apache-2.0
"""Manifests: YAML (or JSON) text of any number of objects, with Kmap put in or out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kmap.kubernetes.changes import Change
from kmap.kubernetes.edit import CannotEdit, edit
from kmap.kubernetes.pods import Plan, Pod, Refused
from kmap.kubernetes.workloads import workloads
from kmap.kubernetes.yaml_nodes import BadYaml, parse


@dataclass(frozen=True)
class Report:
    """What became of one workload."""

    file: str
    # Where its document starts, from 1.
    line: int
    kind: str
    name: str
    outcome: Literal["changed", "unchanged"]
    # The containers that have the library now.
    containers: tuple[str, ...]
    # Why none has.
    reason: str


@dataclass(frozen=True)
class Problem:
    """Why a manifest was not changed, and where."""

    file: str
    # From 1; None where no line is known.
    line: int | None
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message}"


@dataclass(frozen=True)
class Changed:
    """A manifest afterwards.  With problems, its text is as it was."""

    text: str
    reports: tuple[Report, ...]
    problems: tuple[Problem, ...]


def change(text: str, file: str, decide: Callable[[Pod], Plan]) -> Changed:
    """Makes decide's changes to every pod in text; file is its name in messages."""
    try:
        documents = parse(text)
    except BadYaml as error:
        return Changed(text, (), (Problem(file, error.line, str(error)),))
    reports: list[Report] = []
    problems: list[Problem] = []
    steps: list[list[Change]] = []
    for number, document in enumerate(documents):
        for workload in workloads(document.data):
            try:
                if not isinstance(workload.pod, dict):
                    raise Refused("there is no pod in it")
                plan = decide(workload.pod)
            except Refused as error:
                message = f"{workload.kind} {workload.name}: {error}"
                problems.append(Problem(file, document.line, message))
                continue
            prefix = (number, *workload.path)
            for index, step in enumerate(plan.steps):
                if index == len(steps):
                    steps.append([])
                steps[index] += [change.under(prefix) for change in step]
            reports.append(
                Report(
                    file=file,
                    line=document.line,
                    kind=workload.kind,
                    name=workload.name,
                    outcome="changed" if plan.steps else "unchanged",
                    containers=plan.containers,
                    reason=plan.reason,
                )
            )
    if problems:
        return Changed(text, (), tuple(problems))
    try:
        edited = edit(text, steps)
    except CannotEdit as error:
        return Changed(text, (), (Problem(file, error.line, str(error)),))
    return Changed(edited, tuple(reports), ())
