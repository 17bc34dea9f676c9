# SPDX-License-Identifier: Apache-2.0
"""Where pods and pod templates are in the objects of a manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kmap.kubernetes.changes import Path

# API group and kind, and where the pod is below the object.
_TEMPLATE: Path = ("spec", "template")
POD_PATHS: dict[tuple[str, str], Path] = {
    ("", "Pod"): (),
    ("", "ReplicationController"): _TEMPLATE,
    ("apps", "DaemonSet"): _TEMPLATE,
    ("apps", "Deployment"): _TEMPLATE,
    ("apps", "ReplicaSet"): _TEMPLATE,
    ("apps", "StatefulSet"): _TEMPLATE,
    ("batch", "Job"): _TEMPLATE,
    ("batch", "CronJob"): ("spec", "jobTemplate", "spec", "template"),
}


@dataclass(frozen=True)
class Workload:
    """An object that has a pod."""

    kind: str
    name: str
    # Where the pod is, from the root of the document.
    path: Path
    pod: Any


def name_of(data: Any) -> str:
    """The object's name, or what stands for it in objects that get theirs later."""
    metadata = data.get("metadata")
    if not isinstance(metadata, dict):
        return ""
    generated = metadata.get("generateName")
    return str(metadata.get("name") or (f"{generated}*" if generated else ""))


def workloads(data: Any, path: Path = ()) -> Iterator[Workload]:
    """The workloads of a document, also those in lists; others are not mentioned."""
    if not isinstance(data, dict):
        return
    kind, version = data.get("kind"), data.get("apiVersion")
    if not isinstance(kind, str) or not isinstance(version, str):
        return
    group, slash, _ = version.rpartition("/")
    if not slash and kind == "List":
        items = data.get("items")
        for index, item in enumerate(items if isinstance(items, list) else ()):
            yield from workloads(item, (*path, "items", index))
        return
    below = POD_PATHS.get((group, kind))
    if below is None:
        return
    pod: Any = data
    for step in below:
        pod = pod.get(step) if isinstance(pod, dict) else None
    yield Workload(kind, name_of(data), path + below, pod)
