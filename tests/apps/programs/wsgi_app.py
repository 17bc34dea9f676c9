# SPDX-License-Identifier: Apache-2.0
"""A WSGI application: serves the files of a directory and digests what is sent.

A number as the query serves the file so many times in one answer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

CHUNK = 16 * 1024


def chunks(file: BinaryIO, times: int) -> Iterator[bytes]:
    with file:
        for _ in range(times):
            file.seek(0)
            while chunk := file.read(CHUNK):
                yield chunk


def application(
    environ: dict[str, Any], start_response: Callable[..., Any]
) -> Iterable[bytes]:
    way, name = environ["PATH_INFO"].strip("/").split("/")
    if environ["REQUEST_METHOD"] == "POST":
        content = environ["wsgi.input"].read()
        answer = hashlib.sha256(content).hexdigest().encode()
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]
    path = os.path.join(os.environ["BODIES"], os.path.basename(name))
    times = int(environ["QUERY_STRING"] or 1)
    headers = [("Content-Length", str(times * os.path.getsize(path)))]
    start_response("200 OK", headers)
    file = open(path, "rb")  # noqa: SIM115 - closed by who iterates
    if way == "file":
        # gunicorn makes a sendfile() of this.
        answer_file: Iterable[bytes] = environ["wsgi.file_wrapper"](file)
        return answer_file
    return chunks(file, times)
