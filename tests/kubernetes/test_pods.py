# SPDX-License-Identifier: Apache-2.0
"""What a pod gets, beyond what the manifests of the other tests show."""

from __future__ import annotations

from typing import Any

import pytest

from kmap.kubernetes.changes import apply
from kmap.kubernetes.pods import INJECT, LIBRARY, Options, inject, uninject

OPTIONS = Options()


def pod(*containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    both = containers or ({"name": "a"},)
    return {"metadata": {}, "spec": {"containers": list(both), **spec}}


def made(given: dict[str, Any], options: Options = OPTIONS) -> Any:
    return apply(given, inject(given, options).changes)


def preloads(given: Any) -> list[str]:
    return [
        variable["value"]
        for variable in given["spec"]["containers"][0]["env"]
        if variable["name"] == "LD_PRELOAD"
    ]


@pytest.mark.parametrize("user", [None, 0, 1337])
def test_the_restricted_profile(user: int | None) -> None:
    """What Pod Security's profile of that name asks of a container."""
    context = {} if user is None else {"runAsUser": user}
    spec = made(pod(securityContext=context))["spec"]
    security = spec["initContainers"][0]["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"]["type"] == "RuntimeDefault"
    assert security.get("runAsUser", user) != 0
    # Elsewhere the pod's own user goes, or that of the image.
    assert ("runAsUser" in security) == (user == 0)
    assert [set(volume) - {"name"} for volume in spec["volumes"]] == [{"emptyDir"}]


def test_it_stays_guaranteed() -> None:
    """The quality of service of a pod whose containers' requests are limits."""
    resources = made(pod())["spec"]["initContainers"][0]["resources"]
    assert resources["limits"] == resources["requests"]
    assert set(resources["limits"]) == {"cpu", "memory"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", LIBRARY),
        (" ", LIBRARY),
        ("/a.so", f"/a.so:{LIBRARY}"),
        ("/a.so /b.so", f"/a.so /b.so:{LIBRARY}"),
        ("/a.so  ", f"/a.so  :{LIBRARY}"),
        (LIBRARY, LIBRARY),
        (f"{LIBRARY}:/a.so", f"{LIBRARY}:/a.so"),
        (f"/x{LIBRARY}", f"/x{LIBRARY}:{LIBRARY}"),
    ],
)
def test_preload_lists(before: str, after: str) -> None:
    env = [{"name": "LD_PRELOAD", "value": before}]
    done = made(pod({"name": "a", "env": env}))
    # What is there already by hand moves to the end.
    assert sorted(preloads(done)[0].split(":")) == sorted(after.split(":"))
    assert made(done) == done


def test_of_two_variables_the_last_counts() -> None:
    """As for the program."""
    env = [{"name": "LD_PRELOAD", "value": v} for v in ("/a.so", "/b.so")]
    done = made(pod({"name": "a", "env": env}))
    assert preloads(done) == ["/a.so", f"/b.so:{LIBRARY}"]


def test_a_variable_with_something_else() -> None:
    """It stays where it is, and as it is."""
    given = pod({"name": "a", "env": [{"name": "LD_PRELOAD", "other": 1}]})
    done = made(given)
    assert made(done) == done
    assert apply(done, uninject(done).changes) == given


def test_a_variable_without_a_value() -> None:
    done = made(pod({"name": "a", "env": [{"name": "LD_PRELOAD"}]}))
    assert preloads(done) == [LIBRARY]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (pod(os={"name": "windows"}), "spec.os.name is windows"),
        ({**pod(), "metadata": {"labels": {INJECT: "false"}}}, f'{INJECT} is "false"'),
        (
            {**pod(), "metadata": {"annotations": {"kmap.io/containers": " "}}},
            "kmap.io/containers is empty",
        ),
    ],
)
def test_left_out(given: dict[str, Any], reason: str) -> None:
    plan = inject(given, OPTIONS)
    assert (plan.steps, plan.containers, plan.reason) == ((), (), reason)


def test_false_takes_out_what_is_there() -> None:
    there = made(pod())
    there["metadata"] = {"annotations": {INJECT: "false"}}
    bare = made(there)
    assert bare["spec"] == pod()["spec"]


def test_a_users_own_settings_stay() -> None:
    """Only what was given is taken out again."""
    env = [{"name": "KMAP_SPIN_US", "value": "1"}]
    given = pod({"name": "a", "env": env}, {"name": "b"})
    options = Options(settings={"KMAP_SPIN_US": "5", "KMAP_LOG": "info"})
    done = made(given, options)
    assert apply(done, uninject(done).changes) == given
    assert {"name": "KMAP_SPIN_US", "value": "1"} in done["spec"]["containers"][0][
        "env"
    ]


def test_a_setting_that_a_container_has_already() -> None:
    """It is the container's own, although it looks like ours."""
    env = [{"name": "KMAP_LOG", "value": "info"}, {"name": "A", "value": "b"}]
    given = pod({"name": "a", "env": env}, {"name": "b"})
    options = Options(settings={"KMAP_LOG": "info"})
    done = made(given, options)
    assert inject(done, options).steps == ()
    assert apply(done, uninject(done).changes) == given
    # Also with other settings over it.
    assert made(made(done, Options(settings={"KMAP_SPIN_US": "1"})), options) == done


def test_what_is_given_stays_as_it_is() -> None:
    """Functions are pure."""
    given = pod()
    inject(given, OPTIONS)
    made(given)
    assert given == pod()
