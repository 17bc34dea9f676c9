# SPDX-License-Identifier: Apache-2.0
"""The webhook, over real TLS, asked as the API server asks it."""

from __future__ import annotations

import base64
import contextlib
import copy
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonpatch
import pytest
import trustme

from kmap.kubernetes import server
from tests.cli.peers import KMAP, Spawn, kmap
from tests.kubernetes.corpus import containers, has_library, validate, variables

REVIEW = json.loads((Path(__file__).parent / "reviews" / "create-pod.json").read_text())


def write_certificate(authority: trustme.CA, folder: Path) -> None:
    """Puts a new certificate into folder as Kubernetes does: both files at once."""
    leaf = authority.issue_cert("127.0.0.1")
    data = folder / f"..{len(list(folder.iterdir()))}"
    data.mkdir()
    leaf.cert_chain_pems[0].write_to_path(data / "tls.crt")
    leaf.private_key_pem.write_to_path(data / "tls.key")
    link = folder / "..new"
    link.symlink_to(data)
    os.replace(link, folder / "..data")
    for name in ("tls.crt", "tls.key"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data") / name)


@dataclass
class Webhook:
    """A webhook that runs."""

    process: subprocess.Popen[str]
    port: int
    folder: Path
    authority: trustme.CA

    def line(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline().rstrip("\n")

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, context=context, timeout=60
        )

    def ask(
        self,
        path: str,
        body: bytes | None,
        method: str = "POST",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        connection = self.connect()
        try:
            sent = {"Content-Type": "application/json"} if headers is None else headers
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def review(self, review: Any, path: str = "/mutate") -> dict[str, Any]:
        status, body = self.ask(f"{path}?timeout=10s", json.dumps(review).encode())
        assert status == 200, body
        document = json.loads(body)
        assert document["apiVersion"] == "admission.k8s.io/v1"
        assert document["kind"] == "AdmissionReview"
        response: dict[str, Any] = document["response"]
        assert response["uid"] == review["request"]["uid"]
        assert response["allowed"] is True
        return response

    def end(self) -> tuple[int, str]:
        """SIGTERM; the exit code and the rest of the log."""
        self.process.send_signal(signal.SIGTERM)
        _, rest = self.process.communicate(timeout=60)
        return self.process.returncode, rest


@pytest.fixture
def webhook(
    spawn: Spawn, kernel_env: dict[str, str], tmp_path: Path
) -> Iterator[Webhook]:
    authority = trustme.CA()
    folder = tmp_path / "tls"
    folder.mkdir()
    write_certificate(authority, folder)
    process = spawn(
        [
            *KMAP,
            *("webhook", "--bind", "127.0.0.1", "--port", "0"),
            *("--cert", str(folder / "tls.crt"), "--key", str(folder / "tls.key")),
            *("--image", "registry.example/kmap-init:7", "--set", "KMAP_SPIN_US=0"),
        ],
        env=kernel_env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    running = Webhook(process, 0, folder, authority)
    first = running.line()
    assert first.startswith("kmap webhook: listening on https://127.0.0.1:")
    running.port = int(first.rpartition(":")[2])
    yield running
    if process.poll() is None:
        code, rest = running.end()
        assert code == 0, rest
        assert "Traceback" not in rest


def review_of(pod: Any = None, **fields: Any) -> Any:
    review = copy.deepcopy(REVIEW)
    if pod is not None:
        review["request"]["object"] = pod
    review["request"].update(fields)
    return review


def saying(**annotations: str) -> Any:
    """The review of a pod with annotations kmap.io/NAME."""
    review = copy.deepcopy(REVIEW)
    review["request"]["object"]["metadata"]["annotations"].update(
        {f"kmap.io/{name}": value for name, value in annotations.items()}
    )
    return review


def patched(review: Any, response: dict[str, Any]) -> Any:
    """The pod as the API server makes it."""
    assert response["patchType"] == "JSONPatch"
    patch = json.loads(base64.b64decode(response["patch"], validate=True))
    return jsonpatch.apply_patch(review["request"]["object"], patch)


def test_a_pod_that_asks_for_it(webhook: Webhook) -> None:
    review = saying(inject="true")
    pod = patched(review, webhook.review(review))
    validate(pod)
    assert all(has_library(container) for container in containers(pod).values())
    assert set(containers(pod)) == {"reviews", "istio-proxy"}
    assert variables(containers(pod)["reviews"]) == {
        "LD_PRELOAD": "/usr/lib/libjemalloc.so.2:/kmap/$LIB/libkmap_preload.so",
        "KMAP_SPIN_US": "0",
    }
    assert pod["spec"]["initContainers"][0]["image"] == "registry.example/kmap-init:7"
    assert (
        webhook.line()
        == "kmap webhook: shop/reviews-7d4f8b6c5-*: in reviews, istio-proxy"
    )

    # Asked again, as after other webhooks, it has nothing to add, also when the API
    # server has put its defaults into the init container.
    init = pod["spec"]["initContainers"][0]
    init["imagePullPolicy"] = "IfNotPresent"
    init["volumeMounts"].append({"name": "kube-api-access-x7k2m", "mountPath": "/x"})
    again = webhook.review(review_of(pod))
    assert "patch" not in again
    assert "already in" in webhook.line()

    # A sidecar that another webhook has put in since, and in front.
    sidecar = {"name": "proxy", "image": "envoy", "restartPolicy": "Always"}
    pod["spec"]["initContainers"].insert(0, sidecar)
    late = review_of(pod)
    pod = patched(late, webhook.review(late))
    names = [container["name"] for container in pod["spec"]["initContainers"]]
    assert names == ["kmap-init", "proxy"]
    assert has_library(containers(pod)["proxy"])
    assert variables(containers(pod)["reviews"])["LD_PRELOAD"].count("kmap") == 2
    validate(pod)


@pytest.mark.parametrize(
    ("says", "path", "injected"),
    [
        (None, "/mutate", False),
        (None, "/mutate/namespace", True),
        ("true", "/mutate", True),
        ("true", "/mutate/namespace", True),
        ("false", "/mutate", False),
        ("false", "/mutate/namespace", False),
    ],
)
@pytest.mark.parametrize("where", ["labels", "annotations"])
def test_who_is_injected(
    webhook: Webhook, says: str | None, path: str, injected: bool, where: str
) -> None:
    review = review_of()
    if says is not None:
        review["request"]["object"]["metadata"][where]["kmap.io/inject"] = says
    response = webhook.review(review, path)
    assert ("patch" in response) == injected
    assert "warnings" not in response


def test_other_reviews_pass(webhook: Webhook) -> None:
    deployment = {"group": "apps", "version": "v1", "kind": "Deployment"}
    for review in (
        review_of(kind=deployment),
        review_of(operation="UPDATE"),
        review_of(operation="DELETE", object=None),
        review_of(subResource="ephemeralcontainers"),
    ):
        response = webhook.review(review, "/mutate/namespace")
        assert set(response) == {"uid", "allowed"}


@pytest.mark.parametrize(
    ("review", "message"),
    [
        (saying(inject="yes"), 'kmap.io/inject is "yes": it is "true" or "false"'),
        (saying(inject="true", containers="x"), "kmap.io/containers names x"),
        (saying(inject="true", settings="KMAP_X=1"), "KMAP_X is not a setting"),
        (saying(sidecar="true"), "there is no annotation kmap.io/sidecar"),
        (review_of({"spec": {"containers": 5}}), "spec.containers is not a list"),
        (review_of({}), "there is no spec"),
        (review_of(object=None), "there is no object in it"),
        (review_of({"spec": {"containers": [{"name": 5}]}}), "without a name"),
    ],
)
def test_what_cannot_be_done_is_a_warning(
    webhook: Webhook, review: Any, message: str
) -> None:
    response = webhook.review(review, "/mutate/namespace")
    assert "patch" not in response
    (warning,) = response["warnings"]
    assert warning.startswith("kmap: not injected: ")
    assert message in warning
    assert len(warning) <= 256
    assert message in webhook.line()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "it is not an AdmissionReview"),
        (b'{"kind": "Pod"}', "it is not an AdmissionReview"),
        (
            json.dumps(REVIEW).replace("k8s.io/v1", "k8s.io/v1beta1").encode(),
            "its apiVersion is admission.k8s.io/v1beta1",
        ),
        (
            b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1"}',
            "it has no request",
        ),
        (json.dumps(review_of(uid="")).encode(), "its request has no uid"),
    ],
)
def test_bad_reviews(webhook: Webhook, body: bytes, message: str) -> None:
    status, text = webhook.ask("/mutate", body)
    assert status == 400
    assert text.decode().startswith(f"kmap webhook: {message}")
    assert message in webhook.line()


def test_bad_requests(webhook: Webhook) -> None:
    json_type = {"Content-Type": "application/json"}
    huge = {**json_type, "Content-Length": str(server.LARGEST_BODY + 1)}
    for path, method, headers, wanted in (
        ("/healthz", "GET", {}, 200),
        ("/healthz", "HEAD", {}, 200),
        ("/mutate", "GET", {}, 405),
        ("/x", "GET", {}, 404),
        ("/x", "POST", json_type, 404),
        ("/mutate", "POST", {"Content-Type": "text/plain"}, 415),
        ("/mutate", "POST", huge, 413),
        ("/mutate", "POST", {**json_type, "Content-Length": "9" * 40}, 413),
        ("/mutate", "POST", {**json_type, "Content-Length": "-1"}, 411),
        ("/mutate", "POST", {**json_type, "Transfer-Encoding": "chunked"}, 411),
        ("/mutate", "PUT", json_type, 501),
    ):
        status, _ = webhook.ask(path, None, method, headers)
        assert status == wanted, (path, method, headers)


def test_connections_are_kept(webhook: Webhook) -> None:
    connection = webhook.connect()
    connection.connect()
    first = connection.sock
    for _ in range(3):
        body = json.dumps(REVIEW).encode()
        connection.request(
            "POST", "/mutate", body, {"Content-Type": "application/json"}
        )
        assert connection.getresponse().read()
        assert connection.sock is first
    connection.close()


def test_who_stalls_holds_up_nobody(webhook: Webhook) -> None:
    """No TLS, half a handshake, half a request: others are served meanwhile."""
    address = ("127.0.0.1", webhook.port)
    with socket.create_connection(address), socket.create_connection(address) as half:
        half.sendall(b"\x16\x03\x01\x02\x00\x01")
        slow = webhook.connect()
        slow.putrequest("POST", "/mutate")
        slow.putheader("Content-Type", "application/json")
        slow.putheader("Content-Length", "10")
        slow.endheaders(b"{")
        with socket.create_connection(address) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                while plain.recv(4096):
                    pass
        assert webhook.ask("/healthz", None, "GET", {})[0] == 200
        slow.close()


def test_many_at_once(webhook: Webhook) -> None:
    review = saying(inject="true")
    wrong: list[Any] = []

    def ask() -> None:
        try:
            for _ in range(5):
                patched(review, webhook.review(review))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    # The log goes through a pipe that somebody has to empty.
    lines = [webhook.line() for _ in range(40)]
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(set(lines)) == 1
    code, rest = webhook.end()
    assert code == 0
    assert "40 reviews answered, 40 pods injected, 0 warnings" in rest


def test_a_new_certificate(webhook: Webhook) -> None:
    """cert-manager renews; connections that are open go on."""
    old = webhook.connect()
    old.request("GET", "/healthz")
    assert old.getresponse().read() == b"ok\n"
    before = webhook.authority
    webhook.authority = trustme.CA()
    write_certificate(webhook.authority, webhook.folder)
    assert webhook.ask("/healthz", None, "GET", {})[0] == 200
    assert webhook.line() == "kmap webhook: the certificate was read again"
    old.request("GET", "/healthz")
    assert old.getresponse().read() == b"ok\n"
    old.close()

    # Half a change: the one that works goes on, and the log says so once.
    (webhook.folder / "..data" / "tls.key").write_text("nonsense")
    for _ in range(2):
        assert webhook.ask("/healthz", None, "GET", {})[0] == 200
    line = webhook.line()
    assert "are no certificate and its key" in line
    assert line.endswith("the certificate of before goes on")
    write_certificate(before, webhook.folder)
    webhook.authority = before
    assert webhook.ask("/healthz", None, "GET", {})[0] == 200
    assert webhook.line() == "kmap webhook: the certificate was read again"


def test_its_end_answers_what_has_come(webhook: Webhook) -> None:
    idle, begun = webhook.connect(), webhook.connect()
    idle.request("GET", "/healthz")
    assert idle.getresponse().read() == b"ok\n"
    body = json.dumps(saying(inject="true")).encode()
    begun.putrequest("POST", "/mutate")
    begun.putheader("Content-Type", "application/json")
    begun.putheader("Content-Length", str(len(body)))
    begun.putheader("Expect", "100-continue")
    begun.endheaders()
    # So it has been seen.
    assert begun.sock is not None
    seen = b""
    while not seen.endswith(b"\r\n\r\n"):
        seen += begun.sock.recv(1)
    assert seen.startswith(b"HTTP/1.1 100 ")
    begun.send(body[:100])
    webhook.process.send_signal(signal.SIGTERM)
    assert webhook.line() == "kmap webhook: ending"
    # It closes what is idle, ...
    assert idle.sock is not None
    idle.sock.settimeout(60)
    assert idle.sock.recv(1) == b""
    assert webhook.process.poll() is None
    # ... and waits for the rest of what is not.
    begun.send(body[100:])
    response = begun.getresponse()
    assert response.status == 200
    assert "patch" in json.loads(response.read())["response"]
    assert response.getheader("Connection") == "close"
    assert webhook.process.wait(60) == 0
    idle.close()
    begun.close()


def test_json(spawn: Spawn, kernel_env: dict[str, str], webhook: Webhook) -> None:
    """Its one document comes at the end."""
    words = ("--cert", webhook.folder / "tls.crt", "--key", webhook.folder / "tls.key")
    process = spawn(
        [
            *KMAP,
            "webhook",
            "--json",
            "--bind",
            "127.0.0.1",
            "--port",
            "0",
            *map(str, words),
        ],
        env=kernel_env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert "listening" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out) == {
        "schema": "kmap.webhook/1",
        "ok": True,
        "reviews": 0,
        "injected": 0,
        "warnings": 0,
    }


def test_it_says_why_it_cannot_start(
    kernel_env: dict[str, str], webhook: Webhook, tmp_path: Path
) -> None:
    cert, key = webhook.folder / "tls.crt", webhook.folder / "tls.key"
    both = ("--bind", "127.0.0.1", "--cert", cert, "--key", key)
    password = tmp_path / "locked.key"
    subprocess.run(
        [
            *("openssl", "pkey", "-aes128", "-passout", "pass:x"),
            *("-in", str(key), "-out", str(password)),
        ],
        check=True,
        capture_output=True,
    )
    for words, code, message in (
        ((), 2, "required: --cert, --key"),
        (("--cert", "/nowhere", "--key", key), 1, "/nowhere: No such file"),
        (("--cert", key, "--key", cert), 1, "are no certificate and its key"),
        (("--cert", cert, "--key", password), 1, "the key has a password"),
        (
            (*both, "--port", webhook.port),
            1,
            f"port {webhook.port}: Address already in use",
        ),
        ((*both, "--port", 70000), 2, "--port 70000: it is a number from 0 to 65535"),
        ((*both, "--port", 0, "--set", "KMAP_X=1"), 2, "KMAP_X is not a setting"),
    ):
        done = kmap("webhook", *words, env=kernel_env)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert message in done.stderr
