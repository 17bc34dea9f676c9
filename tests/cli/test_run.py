# SPDX-License-Identifier: Apache-2.0
"""kmap run: the program behaves as if it had been started without it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kmap import launch, native
from tests.apps.process import find_program
from tests.cli.peers import KMAP, Spawn, kmap, python, start, wait_until

RUN = (*KMAP, "run", "--")


@pytest.mark.parametrize("options", [(), ("--stats",)])
@pytest.mark.parametrize("status", [0, 1, 45, 255])
def test_exit_status_is_the_programs(
    options: tuple[str, ...], status: int, kernel_env: dict[str, str]
) -> None:
    done = kmap("run", *options, "--", "sh", "-c", f"exit {status}", env=kernel_env)
    assert done.returncode == status


def test_json_is_the_only_thing_on_standard_output(kernel_env: dict[str, str]) -> None:
    command = ("sh", "-c", "echo hello; exit 3")
    done = kmap("run", "--json", "--", *command, env=kernel_env)
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert document["schema"] == "kmap.run/1"
    assert (document["ok"], document["exit_code"]) == (False, 3)
    assert (document["processes"], document["counters"]) == (0, {})
    assert "hello" in done.stderr


@pytest.mark.parametrize("options", [(), ("--stats",)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_so_is_a_signal_that_ends_it(
    options: tuple[str, ...], number: signal.Signals, kernel_env: dict[str, str]
) -> None:
    done = kmap("run", *options, "--", "sh", "-c", f"kill -{number} $$", env=kernel_env)
    assert done.returncode == -number


@pytest.mark.parametrize("script", [False, True])
def test_a_program_on_musl_gets_its_library(
    script: bool, kernel_env: dict[str, str], tmp_path: Path
) -> None:
    compiler = find_program("musl-gcc")
    source = "#include <stdio.h>\n#include <stdlib.h>\n"
    source += 'int main(void) { return puts(getenv("LD_PRELOAD")) < 0; }'
    program = tmp_path / "program"
    command = [compiler, "-x", "c", "-", "-o", str(program)]
    subprocess.run(command, input=source, text=True, check=True)
    if script:
        (tmp_path / "script").write_text(f"#! {program} argument\n")
        program = tmp_path / "script"
        program.chmod(0o755)
    done = kmap("run", "--", str(program), env=kernel_env)
    assert done.stdout == f"{native.musl_path()}\n"


def test_a_pipe_for_a_command_is_not_waited_for(
    kernel_env: dict[str, str], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe", 0o755)
    done = kmap("run", "--", str(tmp_path / "pipe"), env=kernel_env)
    assert done.returncode == 126
    assert "Permission denied" in done.stderr


def test_it_becomes_the_program(spawn: Spawn, kernel_env: dict[str, str]) -> None:
    process = spawn(
        [*RUN, "sh", "-c", "echo $$"], env=kernel_env, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [("no-such-command", 127, "not found"), ("/", 126, "Permission denied")],
)
def test_a_command_that_cannot_be_run(
    command: str, status: int, message: str, kernel_env: dict[str, str]
) -> None:
    done = kmap("run", "--", command, env=kernel_env)
    assert (done.returncode, done.stdout) == (status, "")
    assert command in done.stderr
    assert message in done.stderr


def test_usage(kernel_env: dict[str, str]) -> None:
    assert kmap("run", env=kernel_env).returncode == 2
    assert kmap("run", "--", env=kernel_env).returncode == 2
    assert kmap("run", "--transport", "pigeon", "true", env=kernel_env).returncode == 2
    wrong = kmap("run", "--log", "loud", "true", env=kernel_env)
    assert wrong.returncode == 2
    assert "loud" in wrong.stderr


def test_help_has_every_setting(kernel_env: dict[str, str]) -> None:
    done = kmap("run", "--help", env=kernel_env)
    assert done.returncode == 0
    assert native.options()
    for option in native.options():
        assert f"{option.env}={option.default}\n" in done.stdout


def test_options_of_the_program_are_its_own(kernel_env: dict[str, str]) -> None:
    done = kmap("run", "echo", "--stats", "--", "--json", env=kernel_env)
    assert (done.returncode, done.stdout) == (0, "--stats -- --json\n")


def test_environment(kernel_env: dict[str, str]) -> None:
    # An empty locale is what makes Python invent LC_CTYPE for its children.
    env = {
        name: value
        for name, value in kernel_env.items()
        if name != "LANG" and not name.startswith("LC_")
    }
    done = kmap("run", "--log", "info:/dev/null", "--", "env", "-0", env=env)
    assert done.returncode == 0
    seen = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    expected = {
        **env,
        "LD_PRELOAD": str(native.preload_path()),
        "KMAP_LOG": "info:/dev/null",
    }
    # Not of the environment but of the shell or of env itself.
    seen.pop("_", None)
    expected.pop("_", None)
    assert seen == expected


def test_preload_is_appended_once() -> None:
    library = str(native.preload_path())
    env = launch.environment({"LD_PRELOAD": "/x/other.so"})
    assert env["LD_PRELOAD"] == f"/x/other.so:{library}"
    assert launch.environment(env) == env
    assert launch.without_kmap(env) == {"LD_PRELOAD": "/x/other.so"}
    with pytest.raises(ValueError, match="KMAP_NOSUCH"):
        launch.environment({}, options={"KMAP_NOSUCH": "1"})


def test_signal_dispositions_are_inherited(kernel_env: dict[str, str]) -> None:
    command = ["grep", "-E", "^Sig(Ign|Blk|Cgt)", "/proc/self/status"]
    plain = subprocess.run(command, env=kernel_env, text=True, capture_output=True)
    under = kmap("run", "--", *command, env=kernel_env)
    with_statistics = kmap("run", "--stats", "--", *command, env=kernel_env)
    assert plain.stdout
    assert under.stdout == plain.stdout
    assert with_statistics.stdout == plain.stdout


def test_traffic_under_run(spawn: Spawn, kernel_env: dict[str, str]) -> None:
    peers = start(spawn, kernel_env, kernel_env, prefix=RUN)
    assert peers.finish() == (0, 0)


def test_statistics_line(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str], tmp_path: Path
) -> None:
    line = tmp_path / "stderr"
    with line.open("w") as stderr:
        server = spawn(
            [*KMAP, "run", "--stats", "--", *python("echo_server")],
            env=kernel_env,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    client = spawn(
        python("echo_client", port, 100, 1000),
        env=kmap_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    assert client.stdout.readline() == "ready\n"
    # The collector looks at intervals: wait until it holds the server's memfd.
    wait_until(lambda: _holds_statistics(server.pid), "kmap run found the statistics")
    client.stdin.close()
    assert (client.wait(), server.wait()) == (0, 0)
    found = re.fullmatch(r"kmap: 1 process, (.*)\n", line.read_text())
    assert found, line.read_text()
    counts = dict(pair.split(" ") for pair in found[1].split(", "))
    assert counts["upgrades"] == "1"
    total = int(counts["ring_rx_bytes"]) + int(counts.get("kernel_rx_bytes", "0"))
    assert total == 100 * 1000


def _holds_statistics(pid: int) -> bool:
    directory = f"/proc/{pid}/fd"
    try:
        return any(
            os.readlink(f"{directory}/{fd}").startswith("/memfd:kmap-stats")
            for fd in os.listdir(directory)
        )
    except OSError:
        return False


def test_statistics_pass_signals_on(spawn: Spawn, kernel_env: dict[str, str]) -> None:
    # Blocked and waited for: a trap in a shell can miss the moment before its read.
    script = """if True:
        import signal, sys
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        print("up", flush=True)
        signal.sigwait({signal.SIGUSR1})
        print("got it", flush=True)
        sys.exit(7)
    """
    process = spawn(
        [*KMAP, "run", "--stats", "--", sys.executable, "-c", script],
        env=kernel_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "got it\n"
    assert process.wait() == 7
    assert process.stderr.read().startswith("kmap: ")
