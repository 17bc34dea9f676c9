# SPDX-License-Identifier: Apache-2.0
"""kmap tap on a sidecar: a client, Envoy and nginx."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from kmap.demo import config, programs
from kmap.demo.programs import Programs
from kmap.demo.rig import Envoy, start_nginx
from kmap.results import CannotRun
from tests.tap.tapping import (
    Spawn,
    assert_well_formed,
    fields,
    needs,
    on_ring,
    someone,
    start_tap,
    talker,
    tshark,
)


@pytest.fixture
def found() -> Programs:
    try:
        return Programs(programs.find_envoy(), programs.find_nginx(), None, None)  # type: ignore[arg-type]
    except CannotRun as error:
        pytest.skip(str(error))


def test_both_hops_of_a_request_are_seen(
    spawn: Spawn,
    found: Programs,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    tmp_path: Path,
) -> None:
    needs("tshark", "tshark")
    who = someone("root")
    root = tmp_path / "served"
    root.mkdir()
    sizes = (1, 128, 9000)
    source = random.Random(3)
    for size in sizes:
        (root / f"file-{size}").write_bytes(source.randbytes(size))
    with contextlib.ExitStack() as exits:
        nginx, nginx_port = start_nginx(found, tmp_path, root, env=kmap_env)
        exits.callback(nginx.close)
        envoy = Envoy(
            found,
            tmp_path,
            config.envoy(config.Upstream(port=nginx_port)),
            env=kmap_env,
            arguments=("--disable-hot-restart",),
        )
        exits.callback(envoy.child.close)
        port = envoy.ports["http"]
        client = talker(spawn, who, kmap_env, "client", "127.0.0.1", port)
        while not (on_ring(client.process.pid) and on_ring(*nginx.family()[1:])):
            client.ask("GET /file-1")
        file = tmp_path / "envoy.pcapng"
        tap = start_tap(spawn, who, kernel_env, file, "--comm", "envoy")
        for size in sizes:
            seen = tap.size()
            client.ask(f"GET /file-{size}")
            tap.wait_for(seen + 2 * size)
        client.end()
        summary = tap.finish()

    assert (summary["gaps"], summary["lost_bytes"]) == (0, 0)
    assert_well_formed(file)
    for hop in (port, nginx_port):
        uris = fields(
            file, f"http.request && tcp.dstport == {hop}", ["http.request.uri"]
        )
        assert ",".join(uri for (uri,) in uris) == ",".join(
            f"/file-{size}" for size in sizes
        )
        codes = fields(
            file, f"http.response && tcp.srcport == {hop}", ["http.response.code"]
        )
        assert ",".join(code for (code,) in codes) == "200,200,200"
    objects = tmp_path / "objects"
    tshark(file, "--export-objects", f"http,{objects}", "-q")
    bodies = sorted(each.read_bytes() for each in objects.iterdir())
    assert bodies == sorted(
        2 * [(root / f"file-{size}").read_bytes() for size in sizes]
    )
