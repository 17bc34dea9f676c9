# SPDX-License-Identifier: Apache-2.0
"""Manifests as text: what is not Kmap's stays byte for byte, and data is right."""

from __future__ import annotations

import difflib
import io
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from kmap.kubernetes import yaml_nodes
from kmap.kubernetes.pods import IMAGE, INIT_CONTAINER, Options
from tests.kubernetes.corpus import (
    FILES,
    SETTINGS,
    containers,
    data_of,
    has_library,
    injected,
    pods_of,
    uninjected,
    validate,
    variables,
)

BY_NAME = {file.name: file for file in FILES}
# These have empty lists that get items; the lists go with the items.
NOT_RESTORED = {"native-sidecar.yaml", "pod.json", "empty.yaml"}
LINE_ENDS = pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
EVERY_FILE = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def read(file: Path, newline: str = "\n") -> str:
    text = file.read_bytes().decode()
    assert "\r" not in text
    return text.replace("\n", newline)


@EVERY_FILE
def test_the_corpus_is_valid(file: Path) -> None:
    """Otherwise the next test would prove little."""
    for data in data_of(read(file)):
        if file.name != "several.yaml" or (data or {}).get("kind") != "Job":
            validate(data)


@EVERY_FILE
@LINE_ENDS
def test_injected(file: Path, newline: str) -> None:
    text = read(file, newline)
    done = injected(text, Options(settings=SETTINGS))
    assert done.problems == ()
    assert ("\r" in done.text) == (newline == "\r\n")
    assert done.text.count("\n") == done.text.count(newline)
    reports = iter(done.reports)
    for pod in pods_of(done.text):
        report = next(reports)
        for name, container in containers(pod).items():
            assert has_library(container) == (name in report.containers)
        if not report.containers:
            continue
        assert report.outcome == "changed"
        first = pod["spec"]["initContainers"][0]
        assert (first["name"], first["image"]) == (INIT_CONTAINER, IMAGE)
        for name in report.containers:
            assert variables(containers(pod)[name])["KMAP_UPGRADE_AFTER"] == "4"
    assert next(reports, None) is None
    for data in data_of(done.text):
        if file.name != "several.yaml" or (data or {}).get("kind") != "Job":
            validate(data)


@EVERY_FILE
@LINE_ENDS
def test_only_lines_with_kmap_differ(file: Path, newline: str) -> None:
    """What it does not add stays: no line goes, but those with a value appended."""
    text = read(file, newline)
    before, after = text.splitlines(True), injected(text).text.splitlines(True)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for op, i, j, k, n in matcher.get_opcodes():
        if op == "equal" or op == "insert":
            continue
        assert op == "replace"
        for old, new in zip(before[i:j], after[k:n], strict=False):
            # A value that was appended to, a flow list that got an item, or the last
            # line getting its end.
            assert "kmap" in new or new.rstrip() == old.rstrip()


@EVERY_FILE
@LINE_ENDS
def test_twice_is_once(file: Path, newline: str) -> None:
    options = Options(settings=SETTINGS)
    once = injected(read(file, newline), options)
    twice = injected(once.text, options)
    assert twice.text == once.text
    assert {report.outcome for report in twice.reports} == {"unchanged"}
    assert [r.containers for r in twice.reports] == [r.containers for r in once.reports]


@EVERY_FILE
@LINE_ENDS
def test_there_and_back(file: Path, newline: str) -> None:
    text = read(file, newline)
    back = uninjected(injected(text, Options(settings=SETTINGS)).text).text
    if file.name in NOT_RESTORED:
        text = text.replace(', "env": [], "volumeMounts": []', "")
        text = text.replace(f"      env: []{newline}", "")
        for line in (
            "    env:            # none yet",
            "    volumeMounts: null",
            "  volumes:",
        ):
            text = text.replace(line + newline, "")
    assert back == text


@EVERY_FILE
def test_nothing_to_take_out(file: Path) -> None:
    done = uninjected(read(file))
    assert (done.text, done.problems) == (read(file), ())
    assert {report.outcome for report in done.reports} == {"unchanged"}


@EVERY_FILE
def test_another_image_or_setting_replaces(file: Path) -> None:
    """A newer version of Kmap, over a manifest that has an older one."""
    old = injected(read(file), Options("old:1", {"KMAP_SPIN_US": "5"}))
    new = injected(old.text, Options("new:2", SETTINGS))
    assert new.problems == ()
    assert "old:1" not in new.text
    assert "KMAP_SPIN_US" not in new.text
    fresh = injected(read(file), Options("new:2", SETTINGS))
    if file.name not in NOT_RESTORED:
        assert new.text == fresh.text
    assert list(pods_of(new.text)) == list(pods_of(fresh.text))


def test_values_are_appended_in_place() -> None:
    text = injected(read(BY_NAME["pod.yaml"])).text
    line = (
        "          value: '/usr/lib/libjemalloc.so.2:/kmap/$LIB/libkmap_preload.so'"
        "  # stays in its quotes\n"
    )
    assert line in text
    text = injected(read(BY_NAME["several.yaml"])).text
    assert '"/a.so /b.so:/kmap/$LIB/libkmap_preload.so"' in text


def test_the_pods_own_word_goes_before_options() -> None:
    """Settings: a container's variable, then the annotation, then the options."""
    options = Options(settings={"KMAP_RING_SIZE": "1M", "KMAP_SPIN_US": "0"})
    text = injected(read(BY_NAME["deployment-istio.yaml"]), options).text
    (pod,) = pods_of(text)
    proxy = variables(containers(pod)["istio-proxy"])
    assert proxy["KMAP_RING_SIZE"] == "64K"
    assert proxy["KMAP_SPIN_US"] == "0"
    assert proxy["KMAP_LOG"] == "info"
    assert variables(containers(pod)["reviews"])["KMAP_LOG"] == "debug"
    assert not has_library(containers(pod)["istio-init"])


def test_native_sidecars_start_after_the_copy() -> None:
    (pod,) = pods_of(injected(read(BY_NAME["native-sidecar.yaml"])).text)
    names = [container["name"] for container in pod["spec"]["initContainers"]]
    assert names == [INIT_CONTAINER, "migrate", "proxy"]
    assert [name for name, c in containers(pod).items() if has_library(c)] == [
        "proxy",
        "app",
    ]
    # The pod's user id is root's, which its own container may not have.
    assert pod["spec"]["initContainers"][0]["securityContext"]["runAsUser"] == 65532


def test_an_anchor_may_be_used_again(recwarn: pytest.WarningsRecorder) -> None:
    text = read(BY_NAME["anchors.yaml"])
    twice = text.replace("    - name: envoy", "    - &app\n      name: envoy")
    assert injected(twice).problems == ()
    assert list(recwarn) == []


def test_a_byte_order_mark_stays() -> None:
    text = "\ufeff" + read(BY_NAME["pod.yaml"])
    assert injected(text).text == "\ufeff" + injected(text[1:]).text


PROBLEMS = {
    "value from elsewhere": (
        "containers: [{name: a, env: [{name: LD_PRELOAD, valueFrom: {}}]}]",
        1,
        "container a takes LD_PRELOAD from elsewhere",
    ),
    "unknown annotation": (
        "containers: [{name: a}]}, metadata: {annotations: {kmap.io/sidecar: x}",
        1,
        "there is no annotation kmap.io/sidecar; there are kmap.io/inject",
    ),
    "annotation of another type": (
        "containers: [{name: a}]}, metadata: {annotations: {kmap.io/inject: true}",
        1,
        "kmap.io/inject is not a string: put its value in quotes",
    ),
    "annotation of another value": (
        'containers: [{name: a}]}, metadata: {annotations: {kmap.io/inject: "on"}',
        1,
        'kmap.io/inject is "on": it is "true" or "false"',
    ),
    "label and annotation": (
        'containers: [{name: a}]}, metadata: {labels: {kmap.io/inject: "true"}, '
        'annotations: {kmap.io/inject: "false"}',
        1,
        "kmap.io/inject is true as a label and false as an annotation",
    ),
    "unknown container": (
        "containers: [{name: a}]}, metadata: {annotations: {kmap.io/containers: 'a,b'}",
        1,
        "kmap.io/containers names b, which is not a container of the pod: it has a",
    ),
    "unknown setting": (
        "containers: [{name: a}]}, "
        "metadata: {annotations: {kmap.io/settings: KMAP_X=1}",
        1,
        "KMAP_X is not a setting of this version; it has KMAP_DISABLE",
    ),
    "bad setting": (
        "containers: [{name: a}]}, "
        "metadata: {annotations: {kmap.io/settings: KMAP_RING_SIZE=1}",
        1,
        "KMAP_RING_SIZE=1: it is a number from 4096 to 16777216",
    ),
    "no containers": ("containers: []", 1, "spec.containers is empty"),
    "containers of another type": ("containers: x", 1, "spec.containers is not a list"),
    "a container without a name": ("containers: [{}]", 1, "an item without a name"),
    "volume of the same name": (
        "volumes: [{name: kmap-library, hostPath: {}}], containers: [{name: a}]",
        1,
        "the pod has a volume kmap-library of its own",
    ),
    "mount at the same place": (
        "containers: [{name: a, volumeMounts: [{name: x, mountPath: /kmap}]}]",
        1,
        "container a mounts x at /kmap",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_cannot_be_done_is_refused(case: str) -> None:
    spec, line, message = PROBLEMS[case]
    text = f"{{apiVersion: v1, kind: Pod, spec: {{{spec}}}}}\n"
    done = injected(text)
    assert done.text == text
    (problem,) = done.problems
    assert (problem.file, problem.line) == ("file", line)
    assert message in str(problem)


BROKEN = {
    "not closed": ("a: [1\nb: 2\n", 2, "',' or ']'"),
    "twice": ("a: 1\nb: 2\na: 3\n", 3, "twice"),
    "tab": ("a:\n\tb: 1\n", 2, "cannot start any token"),
    "tag": ("a: 1\nb: !Ref x\n", 2, "the tag !Ref is not known"),
    "no anchor": ("a: *b\n", 1, "undefined alias"),
    "itself": ("a: &a [*a]\n", 1, "an alias stands for something that it is in"),
    "deep": ("[" * 50_000, None, "nested too deeply"),
    "list as a key": ("? [a]\n: b\n", 1, "a key is a mapping or a list"),
    "merged scalar": ("a: 1\n<<: 2\n", 2, "no mapping"),
    "control character": ("a: \x01\n", None, "not allowed"),
    "laughs": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in ("ab", "bc"))
        + "".join(f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in ("cd", "de"))
        + "".join(f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in ("ef", "fg")),
        None,
        "more than",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_yaml_names_its_line(case: str) -> None:
    text, line, message = BROKEN[case]
    done = injected(text)
    (problem,) = done.problems
    assert message in str(problem)
    if line is not None:
        assert (problem.line, str(problem)[:7]) == (line, f"file:{line}:")
    assert done.text == text


def test_shared_by_an_alias_and_not_chosen() -> None:
    """One of two containers that share a list; text cannot say that."""
    text = read(BY_NAME["anchors.yaml"]).replace(
        "name: anchors", 'name: anchors\n  annotations: {kmap.io/containers: "app"}'
    )
    done = injected(text)
    assert done.text == text
    (problem,) = done.problems
    assert "anchors" in problem.message


def test_merged_keys_that_would_have_to_change() -> None:
    text = (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n"
        "  - &base\n    name: a\n    env: [{name: X, value: y}]\n"
        "  - <<: *base\n    name: b\n"
    )
    done = injected(text)
    # The first container's env reaches the second one by the merge.
    if done.problems:
        assert "merge key" in done.problems[0].message
    else:
        (pod,) = pods_of(done.text)
        assert all(has_library(c) for c in pod["spec"]["containers"])


NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
TEXTS = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["C"]),
    max_size=12,
)
ENV = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("ABCD"), "value": TEXTS}), max_size=2
)
PRELOAD = st.sampled_from(["", "/a.so", "/a.so:/b.so", " /a.so", "/a.so /b.so"])


@st.composite
def some_pods(draw: st.DrawFn) -> dict[str, Any]:
    """Pods of any shape."""
    names = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    split = draw(st.integers(1, len(names)))
    found: list[dict[str, Any]] = []
    for name in names:
        container: dict[str, Any] = {"name": name, "image": draw(TEXTS)}
        if env := draw(ENV):
            container["env"] = env
        if preload := draw(PRELOAD):
            entry = {"name": "LD_PRELOAD", "value": preload}
            container.setdefault("env", []).append(entry)
        if draw(st.booleans()):
            container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        if draw(st.booleans()):
            container["args"] = draw(st.lists(TEXTS, min_size=1, max_size=3))
        found.append(dict(draw(st.permutations(list(container.items())))))
    spec: dict[str, Any] = {"containers": found[:split]}
    if found[split:]:
        spec["initContainers"] = found[split:]
        for container in found[split:]:
            if draw(st.booleans()):
                container["restartPolicy"] = "Always"
    if draw(st.booleans()):
        spec["volumes"] = [{"name": "data", "emptyDir": {"medium": draw(TEXTS)}}]
    spec = dict(draw(st.permutations(list(spec.items()))))
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}


@settings(
    max_examples=60,
    # Not shrink: with a parser that takes milliseconds it goes on for minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(
    pod=some_pods(),
    flow=st.sampled_from([True, False, None]),
    offset=st.sampled_from([0, 2]),
    count=st.integers(1, 2),
    end=st.booleans(),
)
def test_any_pod(
    pod: dict[str, Any], flow: bool | None, offset: int, count: int, end: bool
) -> None:
    """Any layout that the emitter knows: there, twice, and back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = flow
    yaml.indent(mapping=2, sequence=offset + 2, offset=offset)
    stream = io.StringIO()
    yaml.dump_all([pod] * count, stream)
    text = stream.getvalue()
    if not end:
        text = text.removesuffix("\n").removesuffix("\n...")
    # The emitter writes some strings so that its own parser takes them for something
    # else, such as "?x" without quotes inside braces.
    try:
        assume(data_of(text) == [pod] * count)
    except yaml_nodes.BadYaml:
        assume(False)
    done = injected(text)
    assert done.problems == ()
    for after in pods_of(done.text):
        for name, container in containers(after).items():
            assert has_library(container) == (name in done.reports[0].containers)
    assert injected(done.text).text == done.text
    assert uninjected(done.text).text == text


BITS = (
    *("kmap-library", "LD_PRELOAD", "kmap.io/inject: ", "env:", "name: ", "null"),
    *("- ", "  ", "\n", "\r\n", "\t", "#", "*a", "&a ", "<<: ", "!x ", "|", "? ", ": "),
    *("{", "}", "[", "]", '"', "'", "---\n", "restartPolicy: Always\n"),
)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_manifests(seed: int) -> None:
    """Whatever is left of a manifest: refused with a message, or done right."""
    chance = random.Random(seed)
    texts = [read(file) for file in FILES]
    texts += [injected(text).text for text in texts]
    done = 0
    for _ in range(60):
        text = chance.choice(texts)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(text))
            if chance.random() < 0.5:
                text = text[:at] + chance.choice(BITS) + text[at:]
            else:
                text = text[:at] + text[at + chance.randint(1, 12) :]
        for change in (injected, uninjected):
            changed = change(text)
            if changed.problems:
                assert changed.text == text
                assert all(problem.message for problem in changed.problems)
            else:
                done += 1
                assert change(changed.text).text == changed.text
    assert done > 10


def test_what_an_alias_may_stand_for_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(yaml_nodes, "MOST_NODES", 10)
    with pytest.raises(yaml_nodes.BadYaml, match="more than 10"):
        yaml_nodes.parse("[1,2,3,4,5,6,7,8,9,10]")
