# SPDX-License-Identifier: Apache-2.0
"""What two processes share is touched in the ways that core/base/sync.def allows."""

from __future__ import annotations

import re

from tests.builds import ROOT
from tests.mutants.sync import entries

CORE = ROOT / "core"
_USE = re.compile(r"\bkm_(load|store|cas|fence|look)_sync\(\s*(\w+)")
_KIND = {
    "load": "ORDER",
    "store": "ORDER",
    "cas": "ORDER",
    "fence": "FENCE",
    "look": "LOOK",
}
_SEQ = {"load_seq", "or_seq", "swap_seq", "add_seq"}
_WORD = {"load_relaxed", "store_relaxed", "load_seq", "or_seq", "swap_seq"}
# Field: how it may be accessed.  A relaxed load is a hint, or of what this end writes.
ALLOWED = {
    "wpos": {"load_sync OBSERVE", "store_sync PUBLISH", "load_relaxed"},
    "rpos": {"load_sync SEE_SPACE", "store_sync RELEASE_SPACE"},
    "pflags": {
        "load_sync FLAGS_SEE",
        "store_sync FLAGS_SET",
        "load_relaxed",
        "or_seq",
    },
    "grow_at": {"load_relaxed", "store_relaxed"},
    "cut": {"load_ordered", "store_ordered"},
    "end": {"load_ordered", "store_ordered"},
    "pcpu": {"load_relaxed", "store_relaxed"},
    "torn": {"load_relaxed", "store_relaxed"},
    "ccpu": {"load_relaxed", "store_relaxed"},
    "stop": {"store_relaxed", "or_seq", "cas_seq"},
    "left": {"cas_sync LEFT", "load_relaxed"},
    "state": {"load_sync ATTACH_SEE", "store_sync ATTACH_SET", "cas_seq", "store_seq"},
    "cons_wait": _WORD,
    "prod_wait": _WORD,
    "sleep": _SEQ,
    "summary": _SEQ | {"load_relaxed"},
    "news": _SEQ,
}
# Functions that get the address of a word; what they do with it is named there.
_PASSED = {
    "km_sys_futex_wake",
    "note_cpu",
    "nap_on_futex",
    "leave",
    "wake",
    "nap",
    "KM_COUNT",
}
# Objects that are shared memory, by the names that they go by.
_SHARED = r"(?:\bwire|\bring|\bin)(?:\[\w+\])?->(?:ring\[\w+\]\.)?"
_ACCESS = re.compile(_SHARED + r"(" + "|".join(ALLOWED) + r")\b")
_CALL = re.compile(r"(\w+)\((?:\s*([A-Z_]+),)?[^();]*$")


def _sources() -> dict[str, str]:
    return {
        str(path.relative_to(CORE)): path.read_text()
        for path in sorted(CORE.rglob("*.[ch]"))
        if path.name not in ("atomic.h", "wire.h") and path.parent.name != "fuzz"
    }


def _accesses(text: str) -> list[tuple[str, str]]:
    """Each access to shared memory: the field, and how."""
    found = []
    for access in _ACCESS.finditer(text):
        call = _CALL.search(text[: access.start()])
        how = call.group(1).removeprefix("km_") if call else "nothing"
        if call and call.group(1) in _PASSED:
            continue
        if call and call.group(2):
            how += " " + call.group(2)
        found.append((access.group(1), how))
    return found


def test_the_table_and_the_code_have_the_same_orderings() -> None:
    used = {
        (_KIND[found.group(1)], found.group(2))
        for text in _sources().values()
        for found in _USE.finditer(text)
    }
    assert used == {(entry.kind, entry.name) for entry in entries()}


def test_every_access_is_an_allowed_one() -> None:
    bad = []
    seen = set()
    for name, text in _sources().items():
        for fieldname, how in _accesses(text):
            seen.add(fieldname)
            if how not in ALLOWED[fieldname]:
                bad.append(f"core/{name}: {fieldname}: {how}")
    assert not bad
    assert seen == set(ALLOWED)


def test_the_check_finds_what_is_not_allowed() -> None:
    assert _accesses("x = km_load_relaxed(&c->rx.wire->rpos);") == [
        ("rpos", "load_relaxed")
    ]
    assert _accesses("wire->pflags = 1;") == [("pflags", "nothing")]
    assert _accesses("f(km_store_sync(PUBLISH, &p->wire->rpos, 1));") == [
        ("rpos", "store_sync PUBLISH")
    ]
