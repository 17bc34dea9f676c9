# SPDX-License-Identifier: Apache-2.0
"""An ASGI application: serves the files of a directory and digests what is sent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

CHUNK = 50_000


async def application(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    way, name = scope["path"].strip("/").split("/")
    if scope["method"] == "POST":
        digest = hashlib.sha256()
        more = True
        while more:
            message = await receive()
            digest.update(message.get("body", b""))
            more = message.get("more_body", False)
        content = digest.hexdigest().encode()
    else:
        path = os.path.join(os.environ["BODIES"], os.path.basename(name))
        with open(path, "rb") as file:
            content = file.read()
    length = str(len(content)).encode()
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", length)],
        }
    )
    step = len(content) + 1 if way == "file" else CHUNK
    for start in range(0, len(content), step):
        await send(
            {
                "type": "http.response.body",
                "body": content[start : start + step],
                "more_body": True,
            }
        )
    await send({"type": "http.response.body"})
