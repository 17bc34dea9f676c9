# SPDX-License-Identifier: Apache-2.0
"""What becomes of a pod: the one place that decides it.

A pod gets an init container that copies the library into an ``emptyDir``, and its
chosen containers get that volume, ``LD_PRELOAD`` and settings.  Functions here are
pure: they take a pod (or a pod template: ``metadata`` and ``spec``) as plain data and
return the changes to make.

Field names are those of the pod API, version v1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmap import __version__, native, settings
from kmap.kubernetes.changes import Change, Path, append, apply, remove

# What a pod says of itself.  The first one may also be a label, which the API server
# can select by before it asks the webhook.
INJECT = "kmap.io/inject"
CONTAINERS = "kmap.io/containers"
SETTINGS = "kmap.io/settings"
ANNOTATIONS = (INJECT, CONTAINERS, SETTINGS)
PREFIX = "kmap.io/"

# The image that deploy/Dockerfile builds, target init.
IMAGE = f"kmap-init:{__version__}"

INIT_CONTAINER = "kmap-init"
# A variable of the init container: CONTAINER/NAME of settings that a container had of
# itself with the same value, and that are not to be taken out as ours.
KEPT = "KMAP_INIT_KEPT"
VOLUME = "kmap-library"
MOUNT_PATH = "/kmap"
# $LIB is for the loader: deploy/init/install.c says how that serves glibc and musl.
LIBRARY = f"{MOUNT_PATH}/$LIB/{native.PRELOAD_NAME}"

# For pods that ask for root; any other user id works too.  The image's own user.
_USER = 65532

Pod = Mapping[str, Any]


class Refused(Exception):
    """The pod cannot be changed as asked; the message says why, and the remedy."""


@dataclass(frozen=True)
class Options:
    """What is asked for beside what the pod says."""

    image: str = IMAGE
    # Name and value; the pod's own annotation goes before these.
    settings: Mapping[str, str] = field(default_factory=dict)
    # What becomes of pods that do not say anything.
    by_default: bool = True


@dataclass(frozen=True)
class Plan:
    """Changes to one pod."""

    # Each step holds for the result of the one before.
    steps: tuple[tuple[Change, ...], ...] = ()
    # The containers that have the library afterwards.
    containers: tuple[str, ...] = ()
    # Why the pod has it nowhere; empty where it has.
    reason: str = ""

    @property
    def changes(self) -> tuple[Change, ...]:
        """All steps in one."""
        return tuple(change for step in self.steps for change in step)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Refused(f"{what} is not a mapping")
    return value


def _items(parent: Mapping[str, Any], key: str, what: str) -> list[Mapping[str, Any]]:
    value = parent.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise Refused(f"{what}.{key} is not a list")
    for item in value:
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
            raise Refused(f"{what}.{key} has an item without a name")
    return value


def _says(pod: Pod) -> dict[str, str]:
    """The pod's kmap.io annotations, checked."""
    metadata = _mapping(pod.get("metadata"), "metadata")
    found: dict[str, str] = {}
    for kind in ("labels", "annotations"):
        for name, value in _mapping(metadata.get(kind), f"metadata.{kind}").items():
            if not isinstance(name, str) or not name.startswith(PREFIX):
                continue
            if kind == "labels" and name != INJECT:
                continue  # a label of the user's own
            if name not in ANNOTATIONS:
                raise Refused(
                    f"there is no annotation {name}; there are {', '.join(ANNOTATIONS)}"
                )
            if not isinstance(value, str):
                raise Refused(f"{name} is not a string: put its value in quotes")
            if found.setdefault(name, value) != value:
                raise Refused(
                    f"{name} is {found[name]} as a label and {value} as an annotation: "
                    "remove one"
                )
    if found.get(INJECT, "true") not in ("true", "false"):
        raise Refused(f'{INJECT} is "{found[INJECT]}": it is "true" or "false"')
    return found


def parse_settings(text: str) -> dict[str, str]:
    """Reads "KMAP_A=1,KMAP_B=2"; ValueError for what the library would not take."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part} has no value: write NAME=VALUE")
        settings.check(name, value)
        found[name] = value
    return found


def _lasting(spec: Mapping[str, Any]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Containers that run beside each other, native sidecars among them."""
    for index, container in enumerate(_items(spec, "initContainers", "spec")):
        if container.get("restartPolicy") == "Always":
            yield ("spec", "initContainers", index), container
    for index, container in enumerate(_items(spec, "containers", "spec")):
        yield ("spec", "containers", index), container


def _chosen(spec: Mapping[str, Any], wanted: str | None) -> list[str]:
    """Names of the containers to get the library."""
    here = [container["name"] for _, container in _lasting(spec)]
    if not here:
        raise Refused("spec.containers is empty")
    if wanted is None:
        return here
    names = [name for name in re.split(r"[\s,]+", wanted) if name]
    for name in names:
        if name not in here:
            raise Refused(
                f"{CONTAINERS} names {name}, which is not a container of the pod: "
                f"it has {', '.join(here)}"
            )
    return [name for name in here if name in names]


def _init_container(
    pod: Pod, image: str, values: Mapping[str, str], kept: Sequence[str]
) -> dict[str, Any]:
    pod_security = _mapping(pod["spec"].get("securityContext"), "spec.securityContext")
    security: dict[str, Any] = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if pod_security.get("runAsUser") == 0:
        security["runAsUser"] = _USER
    container: dict[str, Any] = {
        "name": INIT_CONTAINER,
        "image": image,
        "args": [MOUNT_PATH],
    }
    if values:
        # It has no use for them itself: they tell what the others were given.
        noted = {KEPT: ",".join(kept)} if kept else {}
        container["env"] = _variables({**values, **noted})
    # Requests are the limits, so that a pod whose other containers are of the class
    # Guaranteed stays in it.  Starting a container takes most of both.
    amounts = {"cpu": "100m", "memory": "64Mi"}
    return container | {
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "securityContext": security,
        "volumeMounts": [{"name": VOLUME, "mountPath": MOUNT_PATH}],
    }


def _variables(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _entries(preload: str) -> list[str]:
    """The loader splits the list at blanks and colons."""
    return [entry for entry in re.split(r"[\s:]+", preload) if entry]


def _find(items: list[Mapping[str, Any]], name: str) -> int | None:
    """The last item of that name: of variables, that is the one that counts."""
    found = [index for index, item in enumerate(items) if item["name"] == name]
    return found[-1] if found else None


def _into_container(
    path: Path, container: Mapping[str, Any], values: Mapping[str, str]
) -> list[Change]:
    name = container["name"]
    what = f"container {name}"
    env = _items(container, "env", what)
    names = {variable["name"] for variable in env}
    added = _variables({n: v for n, v in values.items() if n not in names})
    changes: list[Change] = []
    index = _find(env, "LD_PRELOAD")
    if index is None:
        added.append({"name": "LD_PRELOAD", "value": LIBRARY})
    else:
        variable = env[index]
        if "valueFrom" in variable:
            raise Refused(
                f"{what} takes LD_PRELOAD from elsewhere (valueFrom), so nothing can "
                f"be appended to it: write it as a value, or leave {name} out of "
                f"{CONTAINERS}"
            )
        before = variable.get("value") or ""
        if not isinstance(before, str):
            raise Refused(f"{what}: the value of LD_PRELOAD is not a string")
        value = f"{before}:{LIBRARY}" if before.strip() else LIBRARY
        if LIBRARY not in _entries(before):
            op: Any = "replace" if "value" in variable else "add"
            changes.append(Change(op, (*path, "env", index, "value"), value))
    changes += append((*path, "env"), container.get("env"), added)
    mounts = container.get("volumeMounts")
    if not isinstance(mounts, list | None):
        raise Refused(f"{what}.volumeMounts is not a list")
    for mount in mounts or ():
        if str(_mapping(mount, f"{what}.volumeMounts").get("mountPath")) == MOUNT_PATH:
            raise Refused(
                f"{what} mounts {mount.get('name')} at {MOUNT_PATH}, where Kmap's "
                f"library goes: mount it elsewhere, or leave {name} out of {CONTAINERS}"
            )
    mount = {"name": VOLUME, "mountPath": MOUNT_PATH, "readOnly": True}
    return changes + append((*path, "volumeMounts"), mounts, [mount])


def _clean_inject(pod: Pod, options: Options, said: Mapping[str, str]) -> Plan:
    """What a pod without any trace of Kmap gets."""
    spec = pod["spec"]
    values = dict(options.settings)
    try:
        values.update(parse_settings(said.get(SETTINGS, "")))
    except ValueError as error:
        raise Refused(f"{SETTINGS}: {error}") from error
    names = _chosen(spec, said.get(CONTAINERS))
    if not names:
        return Plan(reason=f"{CONTAINERS} is empty")
    changes: list[Change] = []
    for path, container in _lasting(spec):
        if container["name"] in names:
            changes += _into_container(path, container, values)
    volume = {"name": VOLUME, "emptyDir": {"sizeLimit": "8Mi"}}
    volumes = _items(spec, "volumes", "spec")
    if _find(volumes, VOLUME) is not None:
        raise Refused(f"the pod has a volume {VOLUME} of its own: rename it")
    changes += append(("spec", "volumes"), spec.get("volumes"), [volume])
    # Native sidecars start in the order of the list, so it has to be the first.  And it
    # is the last change, for the indices of the others to hold.
    kept = [
        f"{container['name']}/{variable['name']}"
        for _, container in _lasting(spec)
        for variable in _items(container, "env", container["name"])
        if values.get(variable["name"], variable) == variable.get("value")
    ]
    init = _init_container(pod, options.image, values, kept)
    if spec.get("initContainers"):
        changes.append(Change("add", ("spec", "initContainers", 0), init))
    else:
        changes.append(Change("add", ("spec", "initContainers"), [init]))
    return Plan((tuple(changes),), tuple(names))


def _spec(pod: Pod) -> Mapping[str, Any]:
    spec = pod.get("spec")
    if not isinstance(spec, Mapping):
        raise Refused("there is no spec")
    return spec


def uninject(pod: Pod) -> Plan:
    """Takes everything out that :func:`inject` has put in."""
    spec = _spec(pod)
    inits = _items(spec, "initContainers", "spec")
    index = _find(inits, INIT_CONTAINER)
    ours = [] if index is None else _items(inits[index], "env", INIT_CONTAINER)
    given = {(v["name"], v.get("value")) for v in ours}
    noted = [str(v.get("value")) for v in ours if v["name"] == KEPT]
    kept = set(",".join(noted).split(","))
    changes: list[Change] = []
    for path, container in _lasting(spec):
        name = container["name"]
        what = f"container {name}"
        env = _items(container, "env", what)
        gone = []
        for i, variable in enumerate(env):
            value = variable.get("value")
            if variable["name"] == "LD_PRELOAD" and isinstance(value, str):
                if LIBRARY not in _entries(value):
                    continue
                pattern = rf"(^|[\s:]){re.escape(LIBRARY)}(?=$|[\s:])"
                rest = re.sub(pattern, "", value)
                if value.startswith(LIBRARY):
                    rest = rest.lstrip(": ")
                if _entries(rest):
                    changes.append(Change("replace", (*path, "env", i, "value"), rest))
                    continue
                if set(variable) > {"name", "value"}:
                    # Of no sense to Kubernetes, but not ours.
                    changes.append(Change("remove", (*path, "env", i, "value")))
                    continue
                gone.append(i)
            elif f"{name}/{variable['name']}" in kept:
                continue
            elif (variable["name"], value) in given:
                gone.append(i)
        changes += remove((*path, "env"), env, gone)
        mounts = _items(container, "volumeMounts", what)
        gone = [i for i, mount in enumerate(mounts) if mount["name"] == VOLUME]
        changes += remove((*path, "volumeMounts"), mounts, gone)
    volumes = _items(spec, "volumes", "spec")
    gone = [i for i, v in enumerate(volumes) if v["name"] == VOLUME and "emptyDir" in v]
    changes += remove(("spec", "volumes"), volumes, gone)
    gone = [i for i, c in enumerate(inits) if c["name"] == INIT_CONTAINER]
    changes += remove(("spec", "initContainers"), inits, gone)
    return Plan((tuple(changes),) if changes else (), reason="taken out")


def _covers(there: Any, ours: Any) -> bool:
    """Whether there has all of ours; the API server adds its defaults to it."""
    if isinstance(ours, Mapping):
        return isinstance(there, Mapping) and all(
            key in there and _covers(there[key], value) for key, value in ours.items()
        )
    if isinstance(ours, list):
        return isinstance(there, list) and all(
            any(_covers(item, value) for item in there) for value in ours
        )
    return bool(there == ours)


def _same(pod: Pod, target: Pod) -> bool:
    """Whether pod is target, but for what the API server adds to the init container."""
    inits = pod["spec"].get("initContainers") or []
    wanted = target["spec"]["initContainers"]
    if len(inits) != len(wanted) or not _covers(inits[0], wanted[0]):
        return False
    spec = {**pod["spec"], "initContainers": [wanted[0], *inits[1:]]}
    return bool({**pod, "spec": spec} == target)


def inject(pod: Pod, options: Options) -> Plan:
    """What pod needs to have Kmap as it and options say; nothing if it has it so.

    Raises Refused.
    """
    _spec(pod)
    said = _says(pod)
    out = uninject(pod)
    wanted = said.get(INJECT, "true" if options.by_default else "")
    if wanted != "true":
        reason = f'{INJECT} is "false"' if wanted else f"no {INJECT}"
        return Plan(out.steps, reason=reason)
    system = _mapping(pod["spec"].get("os"), "spec.os").get("name", "linux")
    if system != "linux":
        return Plan(out.steps, reason=f"spec.os.name is {system}")
    bare = apply(pod, out.changes)
    plan = _clean_inject(bare, options, said)
    if plan.steps and out.steps and _same(pod, apply(bare, plan.changes)):
        return Plan((), plan.containers)
    return Plan((*out.steps, *plan.steps), plan.containers, plan.reason)
