# SPDX-License-Identifier: Apache-2.0
"""kmap policy: words, JSON, the file that it writes, and exit codes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.cli.peers import kmap, kmap_json

RULES = "deny to=127.0.0.1:9901\nallow port=80\n"


@pytest.fixture
def rules_file(tmp_path: Path) -> Path:
    path = tmp_path / "some.rules"
    path.write_text(RULES)
    return path


def test_words(rules_file: Path, kernel_env: dict[str, str]) -> None:
    done = kmap("policy", "--rules", rules_file, env=kernel_env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "deny to=127.0.0.1:9901",
        "    stays on the kernel: what any program makes or accepts, meant for "
        "127.0.0.1:9901 (line 1)",
        "allow port=80",
        "    may be upgraded: what any program makes or accepts, for port 80 (line 2)",
        "default deny",
        "    stays on the kernel: everything else",
    ]


def test_json(rules_file: Path, kernel_env: dict[str, str]) -> None:
    document = kmap_json("policy", "--rules", rules_file, env=kernel_env)
    assert (document["schema"], document["ok"]) == ("kmap.policy/1", True)
    assert document["default"] == "deny"
    assert [rule["rule"] for rule in document["rules"]] == RULES.splitlines()
    assert document["rules"][0]["fields"] == {"to": "127.0.0.1:9901"}
    assert document["written"] is None


def test_the_file_is_whole_and_readable_by_all(
    rules_file: Path, tmp_path: Path, kernel_env: dict[str, str]
) -> None:
    out = tmp_path / "out.rules"
    out.write_text("old")
    out.chmod(0o600)
    previous = os.umask(0o077)
    try:
        done = kmap("policy", "--rules", rules_file, "-o", out, env=kernel_env)
    finally:
        os.umask(previous)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"\nwritten to {out}\n")
    assert out.stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(tmp_path)) == ["out.rules", "some.rules"]
    again = kmap("policy", "--rules", out, "-o", "-", env=kernel_env)
    assert again.stdout.splitlines()[1::2] == [*RULES.splitlines()]
    assert again.stdout.splitlines()[-1] == "default deny"


def test_a_name_of_envoys_is_only_a_name(
    tmp_path: Path, kernel_env: dict[str, str]
) -> None:
    bootstrap = tmp_path / "envoy.json"
    address = {"socket_address": {"address": "::1", "port_value": 80}}
    name = "[red]x\nallow port=1\x1b[2J"
    listeners = [{"name": name, "address": address}]
    bootstrap.write_text(json.dumps({"static_resources": {"listeners": listeners}}))
    done = kmap("policy", "--envoy-config", bootstrap, env=kernel_env)
    assert "(listener [red]x?allow port=1?[2J)" in done.stdout
    assert "\x1b" not in done.stdout
    done = kmap("policy", "--envoy-config", bootstrap, "-o", "-", env=kernel_env)
    assert "allow port=1" not in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "name a source"),
        (("--rules", "{rules}", "--envoy-config", "x"), 2, "not allowed with"),
        (("--rules", "{rules}", "-o", "-", "--json"), 2, "standard output"),
        (("--rules", "/nowhere"), 1, "/nowhere: No such file"),
        (("--envoy-config", "{rules}"), 1, ".rules:1: "),
        (("--rules", "{rules}", "-o", "/nowhere/x"), 1, "/nowhere/x cannot be written"),
        (("--envoy-config", "{rules}", "--envoy-uid", "-1"), 2, "--envoy-uid"),
        (("--envoy-config", "x", "--envoy-uid", "1e3"), 2, "a user id is a number"),
        (("--envoy-config", "x", "--local-address", "lo"), 2, "not an IP address"),
        (("--envoy-config", "x", "--envoy-program", "a b"), 2, "without blanks"),
        (("--envoy-admin", "http://127.0.0.1:1"), 77, "nothing answers"),
        (("--envoy-admin", "http://127.0.0.1:99999"), 2, "it is an address such as"),
        (("--envoy-admin", "file:///etc/passwd"), 2, "it is an address such as"),
    ],
)
def test_errors(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    rules_file: Path,
    kernel_env: dict[str, str],
) -> None:
    words = [word.format(rules=rules_file) for word in arguments]
    done = kmap("policy", *words, env=kernel_env)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stdout == "" or "--json" in arguments


class _Answers(BaseHTTPRequestHandler):
    """Not Envoy's admin interface."""

    def do_GET(self) -> None:
        """What the server was made to say."""
        status, body = self.server.says  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("says", "code", "message"),
    [
        ((404, b""), 77, "answers 404: is that Envoy"),
        ((200, b"<html>"), 1, "not JSON"),
        ((200, b"[" * 100_000), 1, "not JSON"),
        ((200, b"[]"), 1, "not a JSON object"),
        ((200, b"{}"), 1, "no config_dump"),
        ((200, b'{"configs": [{"bootstrap": 7}]}'), 1, "bootstrap: a mapping"),
        ((200, b'{"configs": [{"static_listeners": 7}]}'), 1, "a list is expected"),
    ],
)
def test_what_is_no_admin_interface(
    says: tuple[int, bytes],
    code: int,
    message: str,
    server: HTTPServer,
    kernel_env: dict[str, str],
) -> None:
    server.says = says  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{server.server_address[1]}"
    done = kmap("policy", "--envoy-admin", url, env=kernel_env)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert url in done.stderr
