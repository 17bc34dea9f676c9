# SPDX-License-Identifier: Apache-2.0
"""The hook that makes links of the pages a page names; scripts/lint builds the site."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.builds import ROOT


def _hook() -> Callable[[str, str], str]:
    spec = importlib.util.spec_from_file_location(
        "mkdocs_links", ROOT / "scripts/mkdocs_links.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str, str], str] = module.linked
    return found


@pytest.mark.parametrize(
    ("text", "page", "expected"),
    [
        ("see `docs/a.md`.", "b.md", "see [`docs/a.md`](a.md)."),
        ("(docs/a.md)", "b.md", "([docs/a.md](a.md))"),
        ("in docs/x/1-a.md, too", "b.md", "in [docs/x/1-a.md](x/1-a.md), too"),
        ("`docs/a.md`", "x/b.md", "[`docs/a.md`](../a.md)"),
        ("[a](docs/a.md)", "b.md", "[a](docs/a.md)"),
        ("/usr/docs/a.md", "b.md", "/usr/docs/a.md"),
        ("a\n\n    cat docs/a.md\n", "b.md", "a\n\n    cat docs/a.md\n"),
        ("```\ndocs/a.md\n```\n", "b.md", "```\ndocs/a.md\n```\n"),
    ],
)
def test_links(text: str, page: str, expected: str) -> None:
    assert _hook()(text, page) == expected


def _pages(entry: Any) -> set[str]:
    if isinstance(entry, str):
        return {entry}
    children = entry.values() if isinstance(entry, dict) else entry
    return {page for child in children for page in _pages(child)}


def test_every_page_has_its_place() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {
        str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")
    }
    parts = tuple(settings["exclude_docs"].split())
    assert all(part.endswith("/") for part in parts)
    assert _pages(settings["nav"]) == {p for p in pages if not p.startswith(parts)}
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False
