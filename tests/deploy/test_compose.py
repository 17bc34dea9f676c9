# SPDX-License-Identifier: Apache-2.0
"""The compose example: its file is valid, and its two programs talk by ring.

Its programs run, with its files and environment, in a network namespace of their own as
the two containers do.  scripts/containers has an engine run the file itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from kmap import native
from kmap.demo import programs
from kmap.results import CannotRun
from tests.apps.process import Launch
from tests.apps.rings import rings
from tests.builds import ROOT

EXAMPLE = ROOT / "deploy/compose"
FETCH = Path(__file__).parent / "programs/fetch_many.py"
_VARIABLE = re.compile(r"\$\{KMAP_DIR:\?[^}]*\}")


def _text(directory: str) -> str:
    text = (EXAMPLE / "compose.yaml").read_text()
    assert len(_VARIABLE.findall(text)) == 2
    return _VARIABLE.sub(directory, text)


def _services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(_text("/opt/kmap"))["services"]
    return services


def test_it_is_a_compose_file(tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text(_text("/somewhere"))
    parsed = PyCompose.from_yaml(path.read_text())
    assert parsed is not None
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_yaml(path.read_text().replace("    image:", "    imagee:"))


def test_both_have_the_library_and_one_network() -> None:
    services = _services()
    assert services["service"]["network_mode"] == "service:envoy"
    for service in services.values():
        library = Path(service["environment"]["LD_PRELOAD"])
        assert library.name == native.PRELOAD_NAME
        assert f"/opt/kmap:{library.parent}:ro" in service["volumes"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source == "/opt/kmap" or (EXAMPLE / source).is_file()


@pytest.mark.timeout(90)
@pytest.mark.parametrize("on", [False, True])
def test_its_programs_talk_by_ring(
    launch: Launch, tmp_path: Path, kernel_env: dict[str, str], on: bool
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a network namespace takes root")
    try:
        envoy = programs.find_envoy().path
        nginx = programs.find_nginx().path
    except CannotRun as error:
        pytest.skip(str(error))
    unshare = shutil.which("unshare")
    assert unshare
    env = dict(kernel_env)
    if on:
        env["LD_PRELOAD"] = str(native.preload_path())
    plan = {
        "env": env,
        "nginx": [
            *(str(nginx), "-p", str(tmp_path), "-c", str(EXAMPLE / "nginx.conf")),
            *("-g", "daemon off; pid pid; error_log stderr; user root;"),
        ],
        "envoy": [
            *(str(envoy), "-c", str(EXAMPLE / "envoy.yaml"), "--log-level", "error"),
            *("--base-id-path", str(tmp_path / "base"), "--use-dynamic-base-id"),
            *("--concurrency", "1"),
        ],
    }
    pod = launch([unshare, "--net", sys.executable, str(FETCH)], env=kernel_env)
    pod.write(json.dumps(plan) + "\n")
    assert json.loads(pod.wait_line()) == {
        "answers": ["hello from the service\n"] * 300
    }
    seen = rings(pod.family())
    if on:
        # The answers of 300 requests, at both ends.
        assert seen.upgrades >= 2
        assert seen.bytes > 2 * 300 * len("hello from the service\n")
    else:
        assert seen.upgrades == 0
    pod.finish()


def test_the_readme_of_it_names_what_kmap_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kmap", "path", "--dir"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (Path(done.stdout.strip()) / native.PRELOAD_NAME).is_file()
    assert "kmap path --dir" in (EXAMPLE / "compose.yaml").read_text()
