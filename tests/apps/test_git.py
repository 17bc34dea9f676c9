# SPDX-License-Identifier: Apache-2.0
"""git, with all the processes that it starts: on files, pipes and HTTP."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.apps.process import Launch, Ports, find_program, python

SCRIPT = r"""
set -e
port=$1
git init -q -b main work
cd work
for n in $(seq 60); do seq "$n" $((n * 50)) >"file-$n"; done
git add .
git commit -qm "first"
for n in $(seq 20); do echo "$n" >>file-1; git commit -qam "change $n"; done
git checkout -q -b side && git mv file-2 moved && git commit -qm side
git checkout -q main && git merge -q --no-edit side
git gc -q
git log --oneline --graph | head -n 30
git fsck --full
cd ..
git clone -q --bare work served.git
git -C served.git config http.receivepack true
git -C served.git update-server-info
git clone -q "file://$PWD/served.git" by-file
git clone -q "http://127.0.0.1:$port/served.git" by-dumb-http
git clone -q "http://127.0.0.1:$port/smart/served.git" by-smart-http
cd by-smart-http
head -c 300000 /dev/zero | tr '\0' x >big
git add big && git commit -qm big && git push -q
cd ../by-file && git pull -q && git rev-parse HEAD && git status --short
git -C ../by-dumb-http rev-parse HEAD
git -C ../by-smart-http rev-parse HEAD
git clone -q http://127.0.0.1:$port/none.git || echo "status $?"
git archive HEAD | tar -t | wc -l
git diff HEAD~3 --stat | cat
git grep -c 42 | sort | head -n 5
"""

FIXED = {
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_AUTHOR_DATE": "2024-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "C",
    "GIT_COMMITTER_EMAIL": "c@example.org",
    "GIT_COMMITTER_DATE": "2024-01-02T00:00:00Z",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}


def test_git(
    launch: Launch,
    ports: Ports,
    tmp_path: Path,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
) -> None:
    """Commits have the same names, so all their contents are the same."""
    find_program("git")
    bash = find_program("bash")
    port = ports.take()
    results: list[tuple[int, str, str]] = []
    for env in (kernel_env, kmap_env):
        # The same names, so that the same is printed.
        directory = tmp_path / "repositories"
        directory.mkdir()
        env = {**env, **FIXED, "HOME": str(directory), "no_proxy": "127.0.0.1"}
        server = launch(python("git_server", directory, port), env=env)
        server.wait_listening(port)
        done = launch([bash, "-c", SCRIPT, "-", str(port)], env=env, cwd=directory)
        done.close_input()
        results.append((done.join(), done.stdout(), done.stderr()))
        server.stop(signal.SIGKILL, exits=-signal.SIGKILL)
        directory.rename(tmp_path / f"repositories-{len(results)}")
    assert results[0] == results[1]
    assert results[0][0] == 0, results[0]
    assert results[0][1].count("status 128") == 1
