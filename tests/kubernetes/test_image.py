# SPDX-License-Identifier: Apache-2.0
"""The init image, built from deploy/Dockerfile by buildah, and what it does.

No registry is needed: the machine's own compiler stands in for the base image, as a
volume of the build.  Files are used where buildah mounts the image, in a chroot; no
container is started.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from kmap import native
from tests.apps.process import PROGRAMS
from tests.cli.peers import Spawn, kmap_json, start

ROOT = Path(__file__).parents[2]
LIBRARY, MUSL = native.PRELOAD_NAMES
LIBRARIES = [f"/{LIBRARY}", f"/{MUSL}"]
# What $LIB is, and the library for that: of glibc on Debian and elsewhere, of musl.
LINKS = {
    "lib": LIBRARY,
    f"lib/{platform.machine()}-linux-gnu": LIBRARY,
    "lib64": LIBRARY,
    "$LIB": MUSL,
}
SOMEBODY = 12345
HELLO = r"""
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
	int fds[2];
	char byte;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds))
		return 2;
	if (write(fds[0], "x", 1) != 1 || read(fds[1], &byte, 1) != 1)
		return 3;
	printf("ran %c\n", byte);
	return 0;
}
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="chroot is root's")


def in_root(
    root: Path, argv: Sequence[str], **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program that has root for its file system, as a user that owns nothing."""

    def enter() -> None:
        os.chroot(root)
        os.chdir("/")
        os.setgroups([])
        os.setgid(SOMEBODY)
        os.setuid(SOMEBODY)

    return subprocess.run(
        argv, env=env, text=True, capture_output=True, preexec_fn=enter
    )


def buildah(folder: Path, *arguments: object) -> str:
    """Runs buildah with a storage of its own."""
    own = ("--root", folder / "root", "--runroot", folder / "run")
    done = subprocess.run(
        ["buildah", *map(str, (*own, "--storage-driver", "vfs", *arguments))],
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout.strip()


def image(folder: Path) -> Path:
    """Builds the image; the directory where its files are."""
    base = folder / "base"
    for name in ("usr", "etc", "tmp", "root", "proc", "sys", "dev"):
        (base / name).mkdir(parents=True)
    (base / "tmp").chmod(0o1777)
    for name in ("bin", "lib", "lib64", "sbin"):
        (base / name).symlink_to(f"usr/{name}")
    (folder / "Base").write_text("FROM scratch\nCOPY base/ /\n")
    quiet = ("bud", "--isolation", "chroot", "--quiet")
    buildah(folder, *quiet, "-t", "tools", "-f", folder / "Base", folder)
    buildah(
        folder,
        *(*quiet, "--target", "init", "--build-arg", "TOOLS=localhost/tools"),
        *("-v", "/usr:/usr:ro", "-v", "/etc:/etc:ro", "-t", "kmap-init"),
        *("-f", ROOT / "deploy" / "Dockerfile", ROOT),
    )
    config = buildah(folder, "inspect", "--type", "image", "kmap-init")
    assert '"User": "65532:65532"' in config
    entry = re.search(r'"Entrypoint": \[([^]]*)\]', config)
    assert entry is not None
    assert re.findall(r'"([^"]*)"', entry[1]) == ["/kmap-install", *LIBRARIES]
    container = buildah(folder, "from", "--pull-never", "kmap-init")
    return Path(buildah(folder, "mount", container))


@pytest.mark.timeout(600)  # the library is compiled in it
def test_the_init_image(
    spawn: Spawn, kernel_env: dict[str, str], tmp_path: Path
) -> None:
    if shutil.which("buildah") is None:
        pytest.skip("buildah is not installed: apt-get install buildah")
    root = image(tmp_path)
    files = sorted(p.name for p in root.iterdir() if p.is_file())
    assert files == ["kmap-install", MUSL, LIBRARY]
    # What Kubernetes does: an empty directory that everybody may write.
    volume = root / "kmap"
    volume.mkdir()
    volume.chmod(0o777)
    command = ["/kmap-install", *LIBRARIES]
    done = in_root(root, [*command, "/kmap"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    there = sorted(str(path.relative_to(volume)) for path in volume.rglob("*"))
    for name in (LIBRARY, MUSL):
        copy = volume / name
        assert copy.read_bytes() == (root / name).read_bytes()
        assert copy.stat().st_mode & 0o7777 == 0o444
        # It has no need of more than the volume's limit.
        assert copy.stat().st_size < 2 << 20
    for directory, name in LINKS.items():
        link = volume / directory / LIBRARY
        assert link.resolve() == volume / name
        assert link.parent.stat().st_mode & 0o7777 == 0o755
        there.remove(f"{directory}/{LIBRARY}")
        there.remove(directory)
    assert there == [MUSL, LIBRARY]

    # Again, as when a pod's init containers are run again: another file in its place,
    # so that who has the old one mapped keeps it.
    copy = volume / LIBRARY
    before = sorted(volume.rglob("*"))
    with copy.open("rb") as old:
        assert in_root(root, [*command, "/kmap"]).returncode == 0
        assert os.fstat(old.fileno()).st_ino != copy.stat().st_ino
        assert os.fstat(old.fileno()).st_nlink == 0

    both = LIBRARIES
    for words, code, message in (
        (["/kmap-install"], 2, "usage: kmap-install GLIBC MUSL DIRECTORY"),
        ([*command, "/nowhere"], 1, "cannot make a file in /nowhere: No such file"),
        ([*command, "/"], 1, "cannot make a file in /: Permission denied"),
        (["/kmap-install", "/x", both[1], "/kmap"], 1, "cannot open /x: No such file"),
        (["/kmap-install", both[0], "/x", "/kmap"], 1, "cannot open /x: No such file"),
        (["/kmap-install", "/", both[1], "/kmap"], 1, "cannot"),
        ([*command, "/" + "x" * 5000], 1, "File name too long"),
    ):
        done = in_root(root, words)
        assert done.returncode == code
        assert message in done.stderr
    assert sorted(volume.rglob("*")) == before

    # Real programs on either libc load the library for theirs, and upgrade.
    public = tmp_path / "kmap"
    shutil.copytree(volume, public, symlinks=True)
    env = {**kernel_env, "LD_PRELOAD": f"{public}/$LIB/{LIBRARY}"}
    peers = start(spawn, env, env)
    rows = kmap_json("ss", env=kernel_env)["connections"]
    states = {row["state"] for row in rows if row["pid"] == peers.client.pid}
    assert states == {"ring"}
    maps = Path(f"/proc/{peers.client.pid}/maps").read_text()
    assert f"/{LIBRARY}" in maps
    assert f"/{MUSL}" not in maps
    assert peers.finish() == (0, 0)
    program = tmp_path / "many_calls"
    flags = ["-D_GNU_SOURCE", "-pthread", "-o", str(program)]
    source = str(PROGRAMS / "many_calls.c")
    subprocess.run(["musl-gcc", source, *flags], check=True)
    done = subprocess.run([program], env=env, text=True, capture_output=True)
    assert "on a ring: 1" in done.stdout
    assert done.stderr == ""


def musl_root(folder: Path) -> Path:
    """A root with musl and nothing of glibc, as in Alpine."""
    (folder / "hello.c").write_text(HELLO)
    root = folder / "root"
    (root / "lib").mkdir(parents=True)
    compiler = ["musl-gcc", "-o", str(root / "hello"), str(folder / "hello.c")]
    subprocess.run(compiler, check=True)
    headers = subprocess.run(
        ["readelf", "-l", root / "hello"], text=True, capture_output=True, check=True
    )
    loader = re.search(r"interpreter: (/lib/ld-musl[^]]*)", headers.stdout)
    assert loader is not None
    shutil.copy(loader[1], root / loader[1][1:])
    folder.chmod(0o755)
    return root


def test_a_container_with_musl_starts(tmp_path: Path) -> None:
    """Where it cannot upgrade, the library does nothing and is no error."""
    root = musl_root(tmp_path)
    shutil.copy(native.preload_path(), root)
    done = in_root(root, ["/hello"], LD_PRELOAD=f"/{LIBRARY}", KMAP_LOG="info")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran x\n", "")


def test_where_the_library_is_not_there(tmp_path: Path) -> None:
    """An init container that has failed otherwise, or a volume left out by hand."""
    root = musl_root(tmp_path)
    done = in_root(root, ["/hello"], LD_PRELOAD="/kmap/none.so")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran x\n", "")
    done = subprocess.run(
        ["/bin/echo", "ran x"],
        env={"LD_PRELOAD": "/kmap/none.so"},
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, "ran x\n")
    assert "cannot be preloaded" in done.stderr


def test_musl_says_when_a_library_does_not_fit(tmp_path: Path) -> None:
    """What would become of containers if ours did not fit musl: they do not start."""
    root = musl_root(tmp_path)
    (tmp_path / "other.c").write_text("int none(void); int f(void) { return none(); }")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", root / "other.so", tmp_path / "other.c"],
        check=True,
    )
    done = in_root(root, ["/hello"], LD_PRELOAD="/other.so")
    assert done.returncode == 127
    assert "symbol not found" in done.stderr
