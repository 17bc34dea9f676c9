# SPDX-License-Identifier: Apache-2.0
"""``kmap stress``: short runs, and proof that the tool notices what it is there for."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest

# A few kinds at a time, so that each has its turns in a short run.
GROUPS = (
    ("peer-crash", "peer-stop", "signals", "cpu-hog", "reset"),
    ("close-under", "shutdown", "dup", "nonblock", "fork"),
    ("exec", "hand-over", "buffer-full", "small-rings"),
    ("memory-budget", "few-descriptors"),
    ("attach-refused", "one-side-disabled", "one-side-without"),
)
FAULTS = tuple(kind for group in GROUPS for kind in group)
COMPARED = ("peer-crash", "buffer-full", "attach-refused", "one-side-disabled")


def stress(
    env: dict[str, str], *arguments: str, code: int = 0
) -> tuple[dict[str, Any], str]:
    """Runs the tool; returns its document and its standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "kmap.stress", "--json", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == code, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document, done.stderr


def check_clean(document: dict[str, Any]) -> None:
    assert document["ok"] is True
    assert document["mismatches"] == 0
    assert document["hangs"] == 0
    assert document["leaked_fds"] == 0
    assert document["errors"] == 0
    assert document["failures"] == []
    assert document["bytes"] == document["ring_bytes"] + document["kernel_bytes"]


def test_the_kernel_vouches_for_the_tool(kernel_env: dict[str, str]) -> None:
    seed = 1
    document, _ = stress(kernel_env, "--kernel", "--seed", str(seed), "--duration", "6")
    check_clean(document)
    assert document["schema"] == "kmap.stress/1"
    assert document["seed"] == seed
    assert document["connections"] > 20
    assert document["bytes"] > 1_000_000
    assert document["upgraded"] == 0
    assert document["ring_bytes"] == 0
    assert set(document["faults"]) == set(FAULTS)
    assert any(document["faults"].values()), document["faults"]


def test_programs_under_kmap(kernel_env: dict[str, str]) -> None:
    document, _ = stress(
        kernel_env, "--level", "socket", "--seed", "2", "--duration", "8"
    )
    check_clean(document)
    assert document["connections"] > 20
    assert document["upgraded"] > 0
    assert document["ring_bytes"] > 0
    assert any(document["faults"].values()), document["faults"]


@pytest.mark.parametrize("transport", ["pipe", "fifo"])
def test_programs_under_kmap_with_pipes(
    kernel_env: dict[str, str], transport: str
) -> None:
    document, _ = stress(
        kernel_env, "--transport", transport, "--seed", "4", "--duration", "8"
    )
    check_clean(document)
    assert document["transport"] == transport
    assert list(document["levels"]) == ["socket"]
    assert document["upgraded"] > 0
    assert document["ring_bytes"] > 0
    assert any(document["faults"].values()), document["faults"]


@pytest.mark.parametrize("kinds", GROUPS, ids=lambda kinds: kinds[0])
@pytest.mark.parametrize("level", ["--kernel", "--level=socket"])
def test_each_kind_of_fault(
    kernel_env: dict[str, str], kinds: tuple[str, ...], level: str
) -> None:
    document, _ = stress(
        kernel_env,
        *(level, "--faults", ",".join(kinds), "--duration", "2", "--at-least", "2"),
    )
    check_clean(document)
    for kind, count in document["faults"].items():
        assert (count > 0) == (kind in kinds), document["faults"]


def test_rings(kernel_env: dict[str, str]) -> None:
    document, _ = stress(
        kernel_env,
        *("--level", "ring", "--seed", "7", "--duration", "4", "--at-least", "1"),
    )
    check_clean(document)
    assert document["connections"] == document["upgraded"] > 5
    assert document["bytes"] == document["ring_bytes"] > 1_000_000
    faults = document["faults"]
    assert faults["peer-crash"] > 0
    assert faults["buffer-full"] > 0
    assert faults["attach-refused"] > 0
    assert faults["peer-stop"] > 0
    assert faults["signals"] > 0
    assert faults["cpu-hog"] > 0


def test_both_levels_count_the_sockets(kernel_env: dict[str, str]) -> None:
    document, _ = stress(kernel_env, "--duration", "5", "--faults", "none")
    check_clean(document)
    assert list(document["levels"]) == ["ring", "socket"]
    assert document["levels"]["ring"]["connections"] > 0
    assert document["connections"] == document["levels"]["socket"]["connections"]
    assert not any(document["faults"].values())


def test_only_the_faults_that_were_asked_for(kernel_env: dict[str, str]) -> None:
    document, _ = stress(
        kernel_env,
        *("--kernel", "--duration", "1", "--at-least", "1"),
        *("--faults", "peer-crash,buffer-full"),
    )
    check_clean(document)
    assert document["faults"]["peer-crash"] > 0
    assert document["faults"]["buffer-full"] > 0
    assert document["faults"]["attach-refused"] == 0
    assert document["faults"]["one-side-disabled"] == 0


@pytest.mark.parametrize(
    "level",
    [
        pytest.param(("--kernel",), id="kernel"),
        pytest.param(("--level", "socket"), id="socket"),
        pytest.param(("--level", "ring"), id="ring"),
    ],
)
def test_one_wrong_byte_is_found_and_replayed(
    kernel_env: dict[str, str], level: tuple[str, ...]
) -> None:
    env = {**kernel_env, "KMAP_STRESS_BREAK": "flip"}
    document, stderr = stress(
        env, *level, "--duration", "8", "--faults", "none", "--jobs", "1", code=1
    )
    assert document["ok"] is False
    assert document["mismatches"] == 1
    assert document["hangs"] == 0
    (failure,) = document["failures"]
    assert failure["kind"] == "mismatch"
    assert "byte 1000 is" in failure["detail"]
    assert f"replay: {failure['replay']}\n" in stderr

    # The line alone finds it again, and without the fault there is nothing to find.
    words = shlex.split(failure["replay"])
    assert words[:3] == ["python", "-m", "kmap.stress"]
    again, _ = stress(env, *words[3:], code=1)
    assert again["failures"][0]["case"] == failure["case"]
    assert again["failures"][0]["kind"] == "mismatch"
    clean, _ = stress(kernel_env, *words[3:], "--duration", "1")
    check_clean(clean)


def test_a_hang_is_reported_with_what_everybody_does(
    kernel_env: dict[str, str],
) -> None:
    env = {**kernel_env, "KMAP_STRESS_BREAK": "stall"}
    document, _ = stress(
        env,
        *("--kernel", "--duration", "8", "--faults", "none", "--jobs", "1"),
        *("--patience", "2"),
        code=1,
    )
    assert document["hangs"] == 1
    (failure,) = document["failures"]
    assert failure["kind"] == "hang"
    # Positions, system calls, Python stacks and the kernel's view, of both sides.
    for word in ("received", "syscall=", "in receive_some", "kernel: 127.0.0.1:"):
        assert word in failure["detail"]
    assert "--case" in failure["replay"]


def test_leaked_descriptors_are_counted(kernel_env: dict[str, str]) -> None:
    env = {**kernel_env, "KMAP_STRESS_BREAK": "leak"}
    document, _ = stress(
        env, "--kernel", "--duration", "8", "--faults", "none", "--jobs", "1", code=1
    )
    assert document["leaked_fds"] > 0
    assert {failure["kind"] for failure in document["failures"]} == {"leak"}


def test_fallback_ends_as_on_the_kernel(kernel_env: dict[str, str]) -> None:
    document, _ = stress(kernel_env, "--verify-fallback", "--seed", "5")
    check_clean(document)
    assert {line["fault"] for line in document["fallback"]} == set(COMPARED)
    for line in document["fallback"]:
        assert line["ok"], line
        assert line["kernel"] == line["kmap"] != []
        assert line["upgraded"] == line["upgraded_expected"]
    # Both kinds of scenario are there: on a ring when the fault comes, and never.
    assert {line["upgraded_expected"] > 0 for line in document["fallback"]} == {
        True,
        False,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--faults", "earthquake"), "the kinds are peer-crash"),
        (("--jobs", "0"), "at least one"),
        (("--duration", "0"), "more than 0"),
        (("--case", "0:1"), "--level"),
        (("--case", "first", "--level", "ring"), "JOB:NUMBER"),
        (("--kernel", "--level", "ring"), "--level ring has none"),
        (("--transport", "pigeon"), "it is one of shm, pipe, fifo"),
        (("--transport", "pipe", "--kernel"), "about programs under Kmap"),
        (("--transport", "fifo", "--level", "ring"), "about programs under Kmap"),
        (("--verify-fallback", "--kernel"), "compares sockets with the kernel"),
        (("--verify-fallback", "--faults", "fork"), "compares attach-refused"),
    ],
)
def test_usage(
    kernel_env: dict[str, str], arguments: tuple[str, ...], message: str
) -> None:
    document, stderr = stress(kernel_env, *arguments, code=2)
    assert document["ok"] is False
    assert message in document["error"]
    assert message in stderr


def test_a_missing_library_cannot_run_here(kernel_env: dict[str, str]) -> None:
    env = {**kernel_env, "KMAP_LIB_DIR": "/nonexistent"}
    document, _ = stress(env, "--duration", "1", code=77)
    assert "/nonexistent" in document["error"]
