# SPDX-License-Identifier: Apache-2.0
"""Answers to the API server's AdmissionReview, version admission.k8s.io/v1.

A pod is never refused: what cannot be done is a warning, which the API server shows to
whoever created the pod, and the pod is created without Kmap.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from kmap.kubernetes.changes import to_patch
from kmap.kubernetes.pods import Options, Plan, Refused, inject
from kmap.kubernetes.workloads import name_of
from kmap.results import CannotRun

API_VERSION = "admission.k8s.io/v1"
# Longer ones are cut by the API server.
WARNING_CHARACTERS = 256


class BadRequest(Exception):
    """What came is no review that can be answered."""


@dataclass(frozen=True)
class Answer:
    """A review's answer, and what the log says of it."""

    document: dict[str, Any]
    subject: str
    plan: Plan
    warning: str

    def line(self) -> str:
        """What became of it, in one line."""
        if self.warning:
            return f"{self.subject}: {self.warning}"
        if self.plan.containers:
            already = "" if self.plan.steps else "already "
            return f"{self.subject}: {already}in {', '.join(self.plan.containers)}"
        return f"{self.subject}: left out: {self.plan.reason}"


def _request(review: Any) -> dict[str, Any]:
    if not isinstance(review, dict) or review.get("kind") != "AdmissionReview":
        raise BadRequest("it is not an AdmissionReview")
    version = review.get("apiVersion")
    if version != API_VERSION:
        raise BadRequest(
            f"its apiVersion is {version}: this answers {API_VERSION}, so write "
            'admissionReviewVersions: ["v1"]'
        )
    request = review.get("request")
    if not isinstance(request, dict):
        raise BadRequest("it has no request")
    uid = request.get("uid")
    if not isinstance(uid, str) or not uid:
        raise BadRequest("its request has no uid")
    return request


def _decide(request: dict[str, Any], options: Options) -> Plan:
    kind = request.get("kind")
    kind = kind if isinstance(kind, dict) else {}
    if (kind.get("group"), kind.get("kind")) != ("", "Pod"):
        return Plan(reason=f"it is no pod but {kind.get('kind')}")
    if request.get("operation") != "CREATE":
        return Plan(reason=f"the operation is {request.get('operation')}")
    if request.get("subResource"):
        return Plan(reason=f"it is about {request['subResource']}")
    if not isinstance(request.get("object"), dict):
        raise Refused("there is no object in it")
    return inject(request["object"], options)


def answer(body: bytes, options: Options) -> Answer:
    """The answer to a review; raises BadRequest when there is nothing to answer."""
    try:
        review = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"it is not JSON: {error}") from error
    request = _request(review)
    plan, warning = Plan(), ""
    try:
        plan = _decide(request, options)
        patch = json.dumps(to_patch(plan.changes)).encode()
    except (Refused, CannotRun) as error:
        warning = f"kmap: not injected: {error}"
    except Exception as error:
        # A fault of ours must not keep a pod from being created.
        warning = f"kmap: not injected, by a fault of the webhook: {error!r}"
    response: dict[str, Any] = {"uid": request["uid"], "allowed": True}
    if warning:
        response["warnings"] = [warning[:WARNING_CHARACTERS]]
    elif plan.steps:
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(patch).decode()
    document = {
        "apiVersion": API_VERSION,
        "kind": "AdmissionReview",
        "response": response,
    }
    given = request.get("object")
    name = request.get("name") or (name_of(given) if isinstance(given, dict) else "")
    subject = f"{request.get('namespace') or '-'}/{name or '-'}"
    return Answer(document, subject, plan, warning)
