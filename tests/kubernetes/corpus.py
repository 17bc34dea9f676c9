# SPDX-License-Identifier: Apache-2.0
"""The manifests of the tests, and what tests ask of any manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate

from kmap.kubernetes import manifest, pods
from kmap.kubernetes.pods import Options, Pod
from kmap.kubernetes.workloads import workloads
from kmap.kubernetes.yaml_nodes import parse

FILES = sorted((Path(__file__).parent / "manifests").iterdir())
SETTINGS = {"KMAP_UPGRADE_AFTER": "4"}


def injected(
    text: str, options: Options | None = None, file: str = "file"
) -> manifest.Changed:
    """Text with Kmap in it."""
    chosen = options or Options()
    return manifest.change(text, file, lambda pod: pods.inject(pod, chosen))


def uninjected(text: str) -> manifest.Changed:
    """Text with Kmap taken out."""
    return manifest.change(text, "file", pods.uninject)


def data_of(text: str) -> list[Any]:
    """All documents."""
    return [document.data for document in parse(text)]


def pods_of(text: str) -> Iterator[Pod]:
    """The pods of all workloads."""
    for data in data_of(text):
        for workload in workloads(data):
            yield workload.pod


def validate(data: Any) -> None:
    """Holds an object, or each of a list, against the API's own schemas."""
    if data is None:
        return
    if data.get("kind") == "List":
        for item in data["items"]:
            validate(item)
        return
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(data, version, strict=True)


def containers(pod: Pod) -> dict[str, Any]:
    """The containers of a pod by name, without the one that Kmap adds."""
    spec = pod["spec"]
    both = [*(spec.get("initContainers") or ()), *spec["containers"]]
    found = {container["name"]: container for container in both}
    found.pop(pods.INIT_CONTAINER, None)
    return found


def variables(container: Any) -> dict[str, Any]:
    """The environment of a container."""
    return {v["name"]: v.get("value") for v in container.get("env") or ()}


def has_library(container: Any) -> bool:
    """Whether a container gets it; half of it is an error."""
    entries = (variables(container).get("LD_PRELOAD") or "").replace(":", " ").split()
    mounts = {m["name"]: m for m in container.get("volumeMounts") or ()}
    there = pods.LIBRARY in entries
    assert entries.count(pods.LIBRARY) <= 1
    assert there == (pods.VOLUME in mounts)
    if there:
        assert mounts[pods.VOLUME]["mountPath"] == "/kmap"
    return there
