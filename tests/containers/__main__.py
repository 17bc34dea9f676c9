# SPDX-License-Identifier: Apache-2.0
"""What deploy/ has for containers, run by a Docker engine: scripts/containers.

It runs in namespaces of its own, so that nothing is left of the engine when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kmap import __version__, native
from kmap.kubernetes import pods
from tests.builds import ROOT
from tests.cli.peers import wait_until
from tests.containers.provide import BASES

_STARTS_S = 60
COMPOSE = ROOT / "deploy/compose/compose.yaml"
# Images that compose.yaml names, and how they start: as their makers' do, Envoy's and
# nginx's workers as a user of their own.
STAND_INS = {
    "envoyproxy/envoy:v1.36-latest": (
        "#!/bin/sh\nset -e\n"
        'exec setpriv --reuid 101 --regid 101 --clear-groups envoy "$@"\n'
    ),
    "nginx:1.28": "#!/bin/sh\nset -e\nexec nginx -g 'daemon off; user www-data;'\n",
}
ENDS = ROOT / "tests/musl/programs/ends.c"


class Engine:
    """A Docker engine with all of its files in one directory."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.env = {
            **os.environ,
            "DOCKER_HOST": f"unix://{work}/docker.sock",
            "DOCKER_CONFIG": str(work / "config"),
            # The builder that needs no plugin.
            "DOCKER_BUILDKIT": "0",
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Starts it, and ends it."""
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        log = (self.work / "dockerd.log").open("w")
        engine = subprocess.Popen(
            [
                *("dockerd", "--host", self.env["DOCKER_HOST"]),
                *("--data-root", str(self.work / "data")),
                *("--exec-root", str(self.work / "exec")),
                *("--pidfile", str(self.work / "dockerd.pid")),
            ],
            stdout=log,
            stderr=log,
        )
        try:
            wait_until(
                lambda: (
                    engine.poll() is not None
                    or not self.run("docker", "info", check=False).returncode
                ),
                "the engine answers",
                _STARTS_S,
            )
            if engine.poll() is not None:
                sys.exit((self.work / "dockerd.log").read_text()[-4000:])
            yield
        finally:
            engine.terminate()
            engine.wait()

    def run(
        self,
        *argv: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command that asks the engine; ends this program if it fails."""
        done = subprocess.run(
            list(map(str, argv)),
            env={**self.env, **(env or {})},
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            text = shlex.join(map(str, argv))
            sys.exit(
                f"{text} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done

    def image(self, tag: str, dockerfile: str, folder: Path) -> None:
        """Builds an image from a few lines."""
        (folder / "Dockerfile").write_text(dockerfile)
        self.run("docker", "build", "--network", "none", "-t", tag, folder)


def say(text: str) -> None:
    """What has been shown."""
    print(f"containers: {text}", flush=True)


def build(engine: Engine) -> None:
    """The two images of deploy/Dockerfile, and stand-ins for those of others."""
    for name in BASES:
        archive = engine.work / f"{name}.tar"
        subprocess.run(
            ["tar", "-C", engine.work / name, "-cf", archive, "."], check=True
        )
        # No stage of deploy/Dockerfile has this name.
        engine.run("docker", "import", archive, f"base-{name}")
        archive.unlink()
    for target in ("init", "webhook"):
        engine.run(
            *("docker", "build", "--network", "none", "-f", ROOT / "deploy/Dockerfile"),
            *("--target", target, "-t", f"kmap-{target}:{__version__}"),
            *("--build-arg", "DEBIAN=base-tools", "--build-arg", "TOOLS=base-tools"),
            *("--build-arg", "RUNTIME=base-runtime", ROOT),
        )
        size = engine.run(
            *("docker", "image", "inspect", "-f", "{{.Size}}"),
            f"kmap-{target}:{__version__}",
        ).stdout
        say(f"image kmap-{target}: {int(size) / 1e6:.1f} MB")
    for number, (tag, start) in enumerate(STAND_INS.items()):
        folder = engine.work / f"stand-in-{number}"
        folder.mkdir()
        (folder / "start").write_text(start)
        (folder / "start").chmod(0o755)
        engine.image(
            tag, 'FROM base-programs\nCOPY start /\nENTRYPOINT ["/start"]\n', folder
        )


def webhook(engine: Engine) -> None:
    """The image starts its command."""
    shown = engine.run(
        *("docker", "run", "--rm", "--network", "none", "--read-only"),
        *(f"kmap-webhook:{__version__}", "--help"),
    ).stdout
    assert "usage: kmap webhook" in shown, shown
    say("kmap-webhook shows its help, with a read-only root")


def _rings(pids: set[int]) -> list[dict[str, Any]]:
    """Ends of connections in these processes, as kmap ss on the host shows them."""
    done = subprocess.run(
        [sys.executable, "-m", "kmap", "ss", "-a", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = json.loads(done.stdout)["connections"]
    return [row for row in rows if row["pid"] in pids]


def _pids(engine: Engine, container: str) -> set[int]:
    """The processes of a container, as the host numbers them."""
    lines = engine.run("docker", "top", container, "-eo", "pid").stdout.split()
    return set(map(int, lines[1:]))


def _loaded(pid: int) -> set[str]:
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {name for name in native.PRELOAD_NAMES if f"/{name}" in maps}


def pod_programs(engine: Engine) -> None:
    """An image on glibc, and one on musl that has nothing of glibc, as Alpine's."""
    for libc, compiler in (("glibc", "gcc"), ("musl", "musl-gcc")):
        folder = engine.work / libc
        folder.mkdir()
        program = folder / "ends"
        flags = ["-O2", "-D_GNU_SOURCE", "-pthread", "-o", str(program)]
        subprocess.run([compiler, *flags, str(ENDS)], check=True)
        lines = ["FROM base-programs" if libc == "glibc" else "FROM scratch"]
        if libc == "musl":
            (loader,) = Path("/lib").glob("ld-musl-*.so.1")
            shutil.copy(loader, folder)
            lines.append(f"COPY {loader.name} /lib/")
        lines += ["COPY ends /", "USER 1337:1337", 'ENTRYPOINT ["/ends"]']
        engine.image(f"ends-{libc}", "\n".join(lines) + "\n", folder)


def pod(engine: Engine, server: str, asker: str) -> None:
    """Two containers of a pod, with what kmap inject adds; each on a libc."""
    volume = engine.work / f"volume-{server}-{asker}"
    volume.mkdir()
    volume.chmod(0o777)
    hardened = (
        "--read-only",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
    )
    engine.run(
        *("docker", "run", "--rm", "--network", "none", *hardened),
        *("-v", f"{volume}:{pods.MOUNT_PATH}", pods.IMAGE, pods.MOUNT_PATH),
    )
    given = (
        *("-v", f"{volume}:{pods.MOUNT_PATH}:ro", "-e", f"LD_PRELOAD={pods.LIBRARY}"),
        *("-i", *hardened),
    )
    name = f"server-{server}-{asker}"

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["docker", "run", "--rm", *arguments],
            env=engine.env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    serving = start(
        "--name", name, "--network", "none", *given, f"ends-{server}", "serve"
    )
    assert serving.stdout is not None
    port = serving.stdout.readline().strip()
    other = f"asker-{server}-{asker}"
    network = f"container:{name}"
    asking = start(
        *("--name", other, "--network", network, *given, f"ends-{asker}", "ask", port)
    )
    assert asking.stdout is not None
    assert asking.stdout.readline() == "done\n"
    for container, libc in ((name, server), (other, asker)):
        pids = _pids(engine, container)
        rows = _rings(pids)
        assert [row["state"] for row in rows] == ["ring"], rows
        wanted = native.MUSL_NAME if libc == "musl" else native.PRELOAD_NAME
        assert [_loaded(pid) for pid in pids] == [{wanted}]
    for process in (asking, serving):
        process.communicate()
        assert process.returncode == 0
    say(f"a pod with a server on {server} and a client on {asker}: by ring")


def compose(engine: Engine) -> None:
    """deploy/compose as its comment says."""
    command = ("docker-compose", "-p", "kmap", "-f", COMPOSE)
    where = {"KMAP_DIR": str(native.preload_path().parent)}
    engine.run(*command, "up", "-d", env=where)
    try:
        fetch = ["curl", "-sS", "--max-time", "5", "http://127.0.0.1:10000/"]
        try:
            wait_until(
                lambda: not subprocess.run(fetch, capture_output=True).returncode,
                "an answer",
            )
        except AssertionError:
            sys.exit(engine.run(*command, "logs", env=where).stdout[-4000:])
        for _ in range(300):
            done = subprocess.run(fetch, capture_output=True, text=True, check=True)
            assert done.stdout == "hello from the service\n", done.stdout
        found = engine.run(*command, "ps", "-q", env=where).stdout.split()
        pids = {pid for container in found for pid in _pids(engine, container)}
        rows = [row for row in _rings(pids) if ":8080" in row["local"] + row["peer"]]
        states = {(row["comm"], row["state"]) for row in rows}
        assert states == {("envoy", "ring"), ("nginx", "ring")}, rows
        say(
            "deploy/compose: 300 answers through Envoy, its connection to nginx by ring"
        )
    finally:
        engine.run(*command, "down", env=where)


def main() -> None:
    """Everything, in order; the first thing that is not so ends it."""
    engine = Engine(Path(sys.argv[1]))
    with engine.running():
        version = engine.run("docker", "version", "-f", "{{.Server.Version}}").stdout
        say(f"Docker {version.strip()}")
        build(engine)
        webhook(engine)
        pod_programs(engine)
        for server in ("glibc", "musl"):
            for asker in ("glibc", "musl"):
                pod(engine, server, asker)
        compose(engine)
    say("all as documented")


if __name__ == "__main__":
    main()
