# SPDX-License-Identifier: Apache-2.0
"""kmap help and kmap completion."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from kmap.commands import COMMANDS
from tests.builds import ROOT
from tests.cli.peers import kmap, kmap_json

PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


def test_topics(kernel_env: dict[str, str]) -> None:
    """All pages but the site's first one, each with a title."""
    found = kmap_json("help", env=kernel_env)
    assert sorted(found["topics"]) == [page for page in PAGES if page != "index"]
    assert found["topics"]["musl"] == "Programs on musl"
    assert all(title and "<" not in title for title in found["topics"].values())
    shown = kmap("help", env=kernel_env).stdout
    assert all(topic in shown for topic in found["topics"])


def test_a_page_is_printed_as_it_is(kernel_env: dict[str, str]) -> None:
    done = kmap("help", "limits", env={**kernel_env, "COLUMNS": "20"})
    assert done.stdout == (ROOT / "docs/limits.md").read_text()
    assert done.returncode == 0


def test_an_unknown_topic(kernel_env: dict[str, str]) -> None:
    done = kmap("help", "polcy", env=kernel_env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean policy?" in done.stderr


def test_completion_in_bash(kernel_env: dict[str, str]) -> None:
    """What the script makes bash call answers with commands and options."""
    bash = shutil.which("bash")
    assert bash
    script = kmap("completion", "bash", env=kernel_env).stdout

    def complete(*words: str) -> set[str]:
        line = " ".join(map(shlex.quote, ("kmap", *words)))
        asked = (
            f"COMP_WORDS=({line}); COMP_CWORD={len(words)}\n"
            'name=$(complete -p kmap); name=${name##*-F }; "${name%% *}"\n'
            'printf "%s\\n" "${COMPREPLY[@]}"\n'
        )
        done = subprocess.run(
            [bash, "--norc", "-c", script + asked],
            env=kernel_env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    assert set(COMMANDS) <= complete("")
    assert complete("sta") == {"stats"}
    assert "--musl" in complete("path", "--")
    assert complete("completion", "z") == {"zsh"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_is_a_script(kernel_env: dict[str, str], shell: str) -> None:
    found = kmap_json("completion", shell, env=kernel_env)
    assert found["shell"] == shell
    assert "stats" in found["script"]
    interpreter = shutil.which(shell)
    if interpreter is None or shell == "tcsh":
        return
    subprocess.run([interpreter, "-n"], input=found["script"], text=True, check=True)
