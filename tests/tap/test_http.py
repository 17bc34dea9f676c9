# SPDX-License-Identifier: Apache-2.0
"""kmap tap on real HTTP, as tshark understands it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.tap.programs.web import body
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


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("name", ["root", "owner"])
def test_requests_and_answers_are_dissected(
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    tmp_path: Path,
    name: str,
    address: str,
) -> None:
    needs("tshark", "tshark")
    who = someone(name)
    web = talker(spawn, who, kmap_env, "web", address)
    port = int(web.answer())
    client = talker(spawn, who, kmap_env, "client", address, port)
    while not on_ring(client.process.pid):
        client.ask("GET /before/1")
    file = tmp_path / "http.pcapng"
    tap = start_tap(spawn, who, kernel_env, file, "--port", port)
    paths = [f"/body/{number}/{size}" for number, size in enumerate((0, 1, 700, 9000))]
    for path in paths:
        size = int(path.rpartition("/")[2])
        seen = tap.size()
        digest = client.ask(f"GET {path}")
        tap.wait_for(seen + len(path) + size)
        assert digest == hashlib.sha256(body(path)[:size]).hexdigest()
    posted = b"posted!" * 500
    seen = tap.size()
    assert client.ask("POST /echo 500") == hashlib.sha256(posted).hexdigest()
    tap.wait_for(seen + 2 * len(posted))
    assert client.ask("close") == "closed"
    client.end()
    summary = tap.finish()
    web.end()

    assert (summary["gaps"], summary["lost_bytes"]) == (0, 0)
    assert summary["connections"] == 1
    assert_well_formed(file)
    # A packet has more than one of them if they went by faster than it looked.
    requests = [
        [value for cell in cells for value in cell.split(",")]
        for cells in zip(
            *fields(file, "http.request", ["http.request.method", "http.request.uri"]),
            strict=True,
        )
    ]
    assert requests == [["GET"] * len(paths) + ["POST"], [*paths, "/echo"]]
    answers = fields(file, "http.response", ["http.response.code", "tcp.srcport"])
    assert {source for _, source in answers} == {str(port)}
    assert ",".join(codes for codes, _ in answers) == ",".join(["200"] * 5)
    objects = tmp_path / "objects"
    tshark(file, "--export-objects", f"http,{objects}", "-q")
    bodies = [body(path)[: int(path.rpartition("/")[2])] for path in paths[1:]]
    found = sorted(each.read_bytes() for each in objects.iterdir())
    assert found == sorted([*bodies, posted, posted])
    # Which packets are made up is said in each of them.
    version = "ip" if address == "127.0.0.1" else "ipv6"
    begin = fields(
        file, "tcp.flags.syn == 1", [f"{version}.src", "tcp.dstport", "frame.comment"]
    )
    assert [(row[0], row[1]) for row in begin[:1]] == [(address, str(port))]
    assert len(begin) == 2
    assert all("made up" in row[2] for row in begin)
    assert fields(
        file, "tcp.flags.fin == 1 && tcp.srcport != " + str(port), ["tcp.seq"]
    )
    holes = fields(file, "tcp.analysis.lost_segment", ["frame.number"])
    assert holes == [], "the stream has holes that nobody counted"


def test_a_new_connection_begins_where_the_kernel_ended(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str], tmp_path: Path
) -> None:
    needs("tshark", "tshark")
    who = someone("owner")
    web = talker(spawn, who, kmap_env, "web", "127.0.0.1")
    port = int(web.answer())
    file = tmp_path / "new.pcapng"
    tap = start_tap(spawn, who, kernel_env, file)
    client = talker(spawn, who, kmap_env, "client", "127.0.0.1", port)
    seen = tap.size()
    for number in range(20):
        client.ask(f"GET /body/{number}/100")
    # It is found in time as long as its first bytes are still in its ring.
    tap.wait_for(seen + 10 * 100)
    tap.finish()
    assert client.ask("close") == "closed"
    client.end()
    web.end()

    assert_well_formed(file)
    display = f"http.request && tcp.dstport == {port}"
    rows = fields(file, display, ["http.request.uri"])
    paths = [path for (cell,) in rows for path in cell.split(",")]
    # Those before went by the kernel, and what is there is there without a hole.
    assert paths == [f"/body/{n}/100" for n in range(20)][-len(paths) :]
    assert len(paths) > 10
    # Sequence number 1 is the first byte of the stream.
    (first, *_) = fields(file, display, ["tcp.seq_raw"])
    before = 20 - len(paths)
    assert before < 10, "the lengths of requests differ from there on"
    head = f"GET /body/0/100 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += "Accept-Encoding: identity\r\n\r\n"
    assert int(first[0]) == 1 + len(head) * before
