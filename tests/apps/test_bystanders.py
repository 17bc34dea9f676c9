# SPDX-License-Identifier: Apache-2.0
"""Programs that never upgrade a connection behave as without the library."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from kmap import procfs
from kmap.demo import programs
from kmap.results import CannotRun
from tests.apps.process import Launch, Ports, Program, find_program

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

BASH = r"""
set -m
cat <<END | while read -r line; do echo "<$line>"; done
$((6 * 7)) here
document
END
sed 's/^/> /' < <(tr a-z A-Z <<<"here string")
sleep 100 & kill %1; wait %1; echo "job $?"
(trap 'echo trapped; exit 3' TERM; kill -TERM $BASHPID; sleep 100) & wait $!; echo $?
coproc (read -r x; echo "coproc $x")
echo ping >&"${COPROC[1]}"; read -r answer <&"${COPROC[0]}"; echo "$answer"; wait
diff <(seq 3) <(seq 4); echo "pipes ${PIPESTATUS[*]}"
true | false | (exit 5); echo "pipes ${PIPESTATUS[*]}"
exec 7>out 8<out; echo kept >&7; read -r kept <&8; echo "$kept"; exec 7>&- 8<&-
echo gone >&7 || echo "closed: $?"
"""

BUILD = r"""
set -e
mkdir src && cp hello.c src/main.c
printf 'int twice(int x) { return 2 * x; }\n' >src/twice.c
gcc -O2 -g -c src/twice.c -o twice.o && ar rcs libtwice.a twice.o
gcc -shared -fPIC src/twice.c -o libtwice.so
gcc -flto -O2 src/main.c -L. -ltwice -o main && ./main || echo "status $?"
gcc src/missing.c || echo "status $?"
echo 'int main( {' | gcc -x c - || echo "status $?"
"""

JAVA = r"""
import java.io.*;
import java.net.*;
import java.nio.file.*;
import java.util.*;
import java.util.stream.*;

public class Bystander {
    public static void main(String[] args) throws Exception {
        InetAddress loopback = InetAddress.getLoopbackAddress();
        try (ServerSocket server = new ServerSocket(0, 5, loopback)) {
            Thread thread = new Thread(() -> {
                try (Socket one = server.accept()) {
                    one.getOutputStream().write(one.getInputStream().readNBytes(5));
                } catch (IOException error) {
                    System.out.println(error);
                }
            });
            thread.start();
            try (Socket other = new Socket(loopback, server.getLocalPort())) {
                other.getOutputStream().write("hello".getBytes());
                System.out.println(new String(other.getInputStream().readAllBytes()));
            }
            thread.join();
        }
        Process child = new ProcessBuilder("sh", "-c", "cat; exit 7").start();
        child.getOutputStream().write("to a child".getBytes());
        child.getOutputStream().close();
        System.out.println(new String(child.getInputStream().readAllBytes()));
        System.out.println(child.waitFor());
        try (Stream<Path> files = Files.list(Path.of("/proc/self/fd"))) {
            files.map(file -> {
                try {
                    return Files.readSymbolicLink(file).toString();
                } catch (IOException gone) {
                    return "";
                }
            }).filter(name -> !name.isEmpty() && !name.startsWith("/proc/"))
                // Those of the child are closed when a thread of Java gets to it.
                .filter(name -> !name.startsWith("pipe:"))
                .map(name -> name.replaceAll("\\[\\d+\\]", "")).sorted()
                .forEach(System.out::println);
        }
    }
}
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
    "bash-jobs": ["bash", "-c", BASH],
    "bash-builds": ["bash", "-c", BUILD],
    "gcc": ["gcc", "--version"],
    "gcc-compiles": ["gcc", "-pipe", "-x", "c", "-o", "hello", "hello.c"],
    "java": ["java", "-XX:-UsePerfData", "-version"],
    "java-sockets": ["java", "-XX:-UsePerfData", "Bystander.java"],
    "node": ["node", "-e", "console.log(process.argv.length, [1, 2].map(String))"],
    "sort": ["sort", "-rn", "-S", "1M", "-T", ".", "numbers"],
    "tar": ["tar", "-czf", "out.tar.gz", "--mtime=@0", "numbers", "hello.c"],
    "missing": ["ls", "/does/not/exist"],
    "python-one-shot": ["python3", "-c", ONE_SHOT],
    "python-children": ["python3", "-c", CHILDREN],
}


def shape(line: str) -> str:
    """A line of output without what differs from run to run."""
    return re.sub(r"\[\d+\]|/proc/\d+/|/\d+-\w+/", "[]", line)


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
        (directory / "Bystander.java").write_text(JAVA)
        numbers = "".join(f"{n * 7919 % 100_003}\n" for n in range(100_000))
        (directory / "numbers").write_text(numbers)
        done = launch([program, *COMMANDS[name][1:]], env=env, cwd=directory)
        done.close_input()
        results.append((done.join(), shape(done.stdout()), shape(done.stderr())))
    assert results[0] == results[1]
    # It did do something.
    assert (
        results[0][0] != 0
        or name.startswith("python")
        or (results[0][1] or results[0][2] or len(list(directory.iterdir())) > 3)
    )


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


def envoy_program() -> str:
    try:
        return programs.find_envoy().path
    except CannotRun as error:
        pytest.skip(str(error))


def bootstrap(admin: int, port: int) -> str:
    """Envoy answers by itself, and has a cluster that nobody uses."""

    def at(number: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    types = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"prefix": "/"}, "direct_response": {"status": 204}}
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": f"{types}.http.router.v3.Router"},
            }
        ],
    }
    endpoint = {"endpoint": {"address": at(1)}}
    cluster = {
        "name": "unused",
        "load_assignment": {
            "cluster_name": "unused",
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
    }
    listener = {
        "address": at(port),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return json.dumps(
        {
            "admin": {"address": at(admin)},
            "static_resources": {"listeners": [listener], "clusters": [cluster]},
        }
    )


def open_files(program: Program) -> Counter[str]:
    """What the program has open, by kind."""
    return Counter(map(shape, procfs.links(program.pid).values()))


def test_envoy_validates(
    launch: Launch,
    ports: Ports,
    tmp_path: Path,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
) -> None:
    settings = tmp_path / "envoy.json"
    settings.write_text(bootstrap(ports.take(), ports.take()))
    seen = []
    for env in (kernel_env, kmap_env):
        done = launch(
            [envoy_program(), "--mode", "validate", "-l", "warn", "-c", settings],
            env=env,
        )
        output = done.finish()
        assert "OK" in output
        # Lines of the log begin with the time and a thread's number.
        log = re.sub(r"^\[[^]]*\]\[\d+\]", "[]", done.stderr(), flags=re.MULTILINE)
        seen.append((output, log))
    assert seen[0] == seen[1]


def test_envoy_starts_and_stops(
    launch: Launch,
    ports: Ports,
    tmp_path: Path,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
) -> None:
    """No traffic but of programs without Kmap: no descriptor more, no thread more."""
    seen = []
    for env in (kernel_env, kmap_env):
        admin, port = ports.take(), ports.take()
        settings = tmp_path / "envoy.json"
        settings.write_text(bootstrap(admin, port))
        argv = [envoy_program(), "--disable-hot-restart", "--concurrency", "2"]
        envoy = launch([*argv, "-l", "warn", "-c", settings], env=env)
        envoy.wait_listening(port)
        for _ in range(20):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                assert answer.status == 204
        # Connections are closed when both ends say so, which Envoy may do later.
        files = Counter({"none yet": 1})

        def settled(envoy: Program = envoy) -> bool:
            nonlocal files
            before, files = files, open_files(envoy)
            return files == before

        envoy.wait_until(settled, "the same files twice")
        threads = len(os.listdir(f"/proc/{envoy.pid}/task"))
        envoy.stop()
        seen.append((files, threads, len(envoy.stdout())))
    assert seen[0] == seen[1]
