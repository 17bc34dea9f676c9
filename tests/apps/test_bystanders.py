# SPDX-License-Identifier: Apache-2.0
"""Programs that never upgrade a connection behave as without the library."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.apps.process import Launch, find_program

# Prints what the process has open and how many threads it has.
LOOK = """
import os, sys
def link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return None
names = [link(fd) for fd in os.listdir("/proc/self/fd")]
print(sorted(n for n in names if n and not n.startswith("/proc/")))
print([l for l in open("/proc/self/status") if l.startswith(("Threads", "SigCgt"))])
"""

ONE_SHOT = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
client.sendall(b"question")
assert server.recv(100) == b"question"
server.sendall(b"answer")
server.close()
assert client.recv(100) == b"answer"
assert client.recv(100) == b""
client.close()
listener.close()
"""

CHILDREN = """
import subprocess, os, sys
print(subprocess.check_output(["sh", "-c", "echo $0; cat"], input=b"text"))
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    os.write(write, b"from the child")
    os._exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.read(read, 100))
os.execv(sys.executable, [sys.executable, "-c", "print('after exec')"])
"""

NODE = """
const fs = require('fs');
const names = fs.readdirSync('/proc/self/fd').map((fd) => {
  try { return fs.readlinkSync('/proc/self/fd/' + fd); } catch { return ''; }
});
console.log(names.filter((n) => n && !n.startsWith('/proc/')).sort().join('\\n'));
"""

HELLO = '#include <stdio.h>\nint main(void) { puts("hello"); return 5; }\n'

COMMANDS = {
    "bash": [
        "bash",
        "-c",
        "set -e; x=$(seq 1000 | sort -rn | head -n 3 | tr '\\n' ,); echo $x; "
        "exec 9</dev/null; exec 9<&-; (exit 4) || echo $?; ulimit -n; kill -TERM $$",
    ],
    "bash-tcp": ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/1 || exit 7"],
    "git": ["git", "--version"],
    "gcc": ["gcc", "--version"],
    "gcc-compiles": ["gcc", "-pipe", "-x", "c", "-o", "hello", "hello.c"],
    "java": ["java", "-XX:-UsePerfData", "-version"],
    "node": ["node", "-e", "console.log(process.argv.length, [1, 2].map(String))"],
    "sort": ["sort", "-rn", "-S", "1M", "-T", ".", "numbers"],
    "tar": ["tar", "-czf", "out.tar.gz", "--mtime=@0", "numbers", "hello.c"],
    "missing": ["ls", "/does/not/exist"],
    "python-one-shot": ["python3", "-c", ONE_SHOT],
    "python-children": ["python3", "-c", CHILDREN],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_same_status_and_output(
    launch: Launch,
    tmp_path: Path,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    name: str,
) -> None:
    program = find_program(COMMANDS[name][0])
    results: list[tuple[int, str, str]] = []
    for env in (kernel_env, kmap_env):
        directory = tmp_path / str(len(results))
        directory.mkdir()
        (directory / "hello.c").write_text(HELLO)
        numbers = "".join(f"{n * 7919 % 100_003}\n" for n in range(100_000))
        (directory / "numbers").write_text(numbers)
        done = launch([program, *COMMANDS[name][1:]], env=env, cwd=directory)
        done.close_input()
        results.append((done.join(), done.stdout(), done.stderr()))
    assert results[0] == results[1]
    # It did do something.
    assert (
        results[0][0] != 0
        or name.startswith("python")
        or (results[0][1] or results[0][2] or len(list(directory.iterdir())) > 2)
    )


def shape(line: str) -> str:
    """A line of output without what differs from run to run."""
    return re.sub(r"\[\d+\]|/proc/\d+/|/\d+-\w+/", "[]", line)


@pytest.mark.parametrize(
    "command",
    [
        ["python3", "-c", LOOK],
        ["python3", "-c", ONE_SHOT + LOOK],
        ["node", "-e", NODE],
        ["ls", "-l", "--time-style=+", "/proc/self/fd"],
        ["bash", "-c", "ls -l --time-style=+ /proc/self/fd; : | cat"],
    ],
    ids=["python", "python-sockets", "node", "ls", "bash"],
)
def test_no_descriptor_and_no_thread_more(
    launch: Launch,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    command: list[str],
) -> None:
    program = find_program(command[0])
    seen = []
    for env in (kernel_env, kmap_env):
        done = launch([program, *command[1:]], env=env)
        output = done.finish()
        assert output.strip()
        seen.append(Counter(map(shape, output.splitlines())))
    assert seen[0] == seen[1]
