# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: the pages that a page names become links.

In the sources pages are named by their path, as ``docs/limits.md``, so that they can be
found in a checkout and from ``kmap help``.  As links they are checked: one to a page
that is not there is an error of the build.
"""

from __future__ import annotations

import re
from posixpath import dirname, relpath
from typing import Any

# A path, in backquotes or not, that is no part of a link or of a longer path.
_NAMED = re.compile(
    r"(?<![\w/\[`])(?<!\]\()(`?)docs/((?:[\w-]+/)*[\w-]+\.md)\1(?![\w/\]`])"
)
_FENCE = re.compile(r"^(```.*?^```|(?: {4}|\t).*?$)", re.MULTILINE | re.DOTALL)


def linked(markdown: str, page: str) -> str:
    """The text of a page, such as ``decisions/0001-bells.md``, with links."""

    def link(match: re.Match[str]) -> str:
        target = relpath(match[2], dirname(page) or ".")
        return f"[{match[0]}]({target})"

    # What is indented or fenced is shown as it is.
    parts = _FENCE.split(markdown)
    return "".join(
        part if index % 2 else _NAMED.sub(link, part)
        for index, part in enumerate(parts)
    )


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return linked(markdown, page.file.src_uri)
