# SPDX-License-Identifier: Apache-2.0
"""Recordings and figures as such: files that are wrong, and what a figure says."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kmap import cli
from kmap.demo.syscalls import Calls
from kmap.results import EXIT_OK, EXIT_USAGE, UsageError
from kmap.trace import draw, recording, share, tables
from kmap.trace.recording import STACK
from tests.trace import samples

Document = dict[str, Any]
_REMEDY = "make the file again with kmap trace --out DIR"


def texts(svg: Path) -> dict[str, str]:
    """The label of each call in a figure, by the number of the call."""
    found = {}
    for group in ET.parse(svg).iter("{http://www.w3.org/2000/svg}g"):
        name = group.get("id", "")
        if name.startswith("call-"):
            found[name] = "".join(group.itertext()).strip()
    return found


def labels(side: recording.Side) -> dict[str, str]:
    """What texts() has to find."""
    return {f"call-{n}": draw.label(c) for n, c in enumerate(draw.shown(side), 1)}


def test_a_file_has_everything(tmp_path: Path) -> None:
    file = tmp_path / "recording.json"
    file.write_text(json.dumps(samples.RECORDING.to_json()))
    assert recording.read(recording.document(file)) == samples.RECORDING


def _set(path: str, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        *way, last = (int(p) if p.isdigit() else p for p in path.split("."))
        place: Any = document
        for step in way:
            place = place[step]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("schema", "kmap.demo/1"), "field schema is 'kmap.demo/1', none of"),
        (_set("schema", KeyError), "field schema is missing"),
        (_set("sides", {}), "field sides is no list"),
        (_set("sides", []), "field sides has other set-ups than kernel and kmap"),
        (_set("sides.0.setup", "unix"), "field sides[0].setup is 'unix', none of"),
        (_set("sides.0.processes", []), "field sides[0].processes is empty"),
        (_set("sides.1.calls.2", 7), "field sides[1].calls[2] is no object"),
        (_set("sides.1.calls.2.kind", "tcp"), "field sides[1].calls[2].kind is 'tcp'"),
        (_set("sides.1.calls.2.role", "x"), "field sides[1].calls[2].role is 'x'"),
        (_set("sides.0.calls.0.bytes", -1), "calls[0].bytes is -1, less than 0"),
        (_set("sides.0.calls.0.bytes", True), "calls[0].bytes is no whole number"),
        (_set("sides.0.calls.0.began_us", "1"), "calls[0].began_us is no number"),
        (_set("sides.0.calls.0.began_us", float("nan")), "began_us is no number of"),
        (_set("sides.0.calls.0.ended_us", 10**400), "ended_us is no number of"),
        (_set("sides.0.calls.0.name", None), "calls[0].name is no string"),
        (_set("sides.0.calls.0.way", KeyError), "calls[0].way is missing"),
        (_set("sides.0.spread.alike", 0), "sides[0].spread.alike is 0, less than 1"),
        (_set("sides.0.spread.most.waits", 0.5), "spread.most.waits is no whole"),
        (_set("sides.0.strace.calls.envoy", KeyError), "strace.calls.envoy is missing"),
        (_set("sides.1.ring_bytes.x", "1"), "sides[1].ring_bytes.x is no whole number"),
        (_set("versions", []), "field versions is no object"),
    ],
)
def test_a_wrong_field_is_named(
    change: Callable[[Document], None],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = json.loads(json.dumps(samples.RECORDING.to_json()))
    change(document)
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(document))
    assert cli.main(["trace", "--from", str(file)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"kmap trace: {file}: ")
    assert said in error
    assert _REMEDY in error
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b'{"schema": ', b"7"]
)
def test_what_is_no_document(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(content)
    assert cli.main(["trace", "--from", str(file)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert str(file) in error
    assert _REMEDY in error


def test_a_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "none.json"
    assert cli.main(["trace", "--from", str(file)]) == EXIT_USAGE
    assert f"{file}: No such file or directory" in capsys.readouterr().err


def test_a_figure_shows_each_call(tmp_path: Path) -> None:
    draw.draw_all(samples.RECORDING, tmp_path)
    for number, side in enumerate(samples.RECORDING.sides, 1):
        assert texts(tmp_path / f"figure{number}.svg") == labels(side)
        png = (tmp_path / f"figure{number}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
    assert labels(samples.RECORDING.side("kernel")) == {
        "call-1": "sendto 39 B",
        "call-2": "epoll_wait",
        "call-3": "readv 39 B",
        "call-4": "readv EAGAIN",
    }
    assert labels(samples.RECORDING.side("kmap")) == {
        "call-1": "send 39 B",
        "call-2": "shutdown (latch)",
        "call-3": "epoll_wait 0",
        "call-4": "readv 39 B",
        "call-5": "readv EAGAIN",
    }


def test_a_figure_is_the_same_again(tmp_path: Path) -> None:
    file = tmp_path / "recording.json"
    file.write_text(json.dumps(samples.RECORDING.to_json()))
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        assert cli.main(["trace", "--from", str(file), "--out", str(out)]) == EXIT_OK
    names = sorted(each.name for each in first.iterdir())
    figures = ["figure1.png", "figure1.svg", "figure2.png", "figure2.svg"]
    assert names == [*figures, "trace.md"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    odd = samples.call("client", "$\\frac{$ <&>", STACK)
    side = samples.side("kernel", (odd,))
    file = tmp_path / "odd.svg"
    draw.draw(side, [file])
    assert texts(file) == {"call-1": "$\\frac{$ <&>"}


def test_too_many_calls_for_a_figure(tmp_path: Path) -> None:
    side = samples.side("kernel", samples.KERNEL * 200)
    with pytest.raises(UsageError, match=r"made 800 calls .* at most 400.*--body"):
        draw.draw(side, [tmp_path / "large.svg"])


def test_what_strace_can_count() -> None:
    kernel, kmap = samples.RECORDING.sides
    assert kernel.count("client") == Calls(1, 0, 0, 0)
    assert kernel.count("envoy") == Calls(2, 1, 0, 0)
    assert kernel.count_all() == Calls(3, 1, 0, 0)
    assert kmap.count_all() == Calls(0, 1, 1, 0)
    assert kmap.carried == {"client-envoy": 39}
    assert [side.problems() for side in (kernel, kmap)] == [[], []]
    assert kernel.agrees("envoy") is True


def test_tables_count_what_is_recorded() -> None:
    text = tables.counts(samples.RECORDING)
    assert "| without Kmap | envoy | 2 | 1 | 0 | 0 | 0 | 2 |" in text
    assert "| **with Kmap** | **all** | **0** | **1** | **1** | **0** | 3 | 0 |" in text
    assert (
        "2 of 3 requests without Kmap made these calls; all of them: stack 3," in text
    )
    assert "both counted the same in 3." in text
    assert "as the library counts them: client-envoy 39." in text
    text = tables.calls(samples.RECORDING)
    assert "| without Kmap | envoy | readv, readv | epoll_wait | none |" in text
    assert "| with Kmap | client | none | shutdown | send |" in text
    text = tables.shares(_shares())
    assert "| **all** | **10.50** |" in text
    assert "| all, by round | 10.0-11.0 |" in text


def test_differences_are_told() -> None:
    kernel, kmap = samples.RECORDING.sides
    assert kernel.strace is not None
    seen = dataclasses.replace(kernel.strace, agree=1)
    (problem,) = dataclasses.replace(kernel, strace=seen).problems()
    assert problem == "kernel: strace counted other calls in 2 of 3 requests"
    calls = {**kernel.strace.calls, "envoy": Calls(3, 1, 0, 0)}
    other = dataclasses.replace(kernel.strace, calls=calls)
    assert dataclasses.replace(kernel, strace=other).agrees("envoy") is False
    (problem,) = dataclasses.replace(kmap, ring_bytes={"client-envoy": 40}).problems()
    assert "put 39 bytes into rings, and the library counted 40" in problem


def _shares() -> share.Shares:
    bars = [
        share.Bar(program, setup, 100, 50, dict.fromkeys(share.GROUPS, 1.5), (10.0, 11))
        for program in share.PROGRAMS
        for setup in recording.SETUPS
    ]
    return share.Shares("http-128", 1, tuple(bars))


def test_shares_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "figure2-cpu.json"
    file.write_text(json.dumps(_shares().to_json()))
    assert share.read(recording.document(file)) == _shares()
    assert cli.main(["trace", "--from", str(file)]) == EXIT_OK
    svg = (tmp_path / "figure2-cpu.svg").read_text()
    for title, _ in share.GROUPS.values():
        assert title in svg
    assert svg.count("1.50 \u2192 1.50 / 1.50 \u2192 1.50") >= len(share.GROUPS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("bars", []), "field bars are not those of envoy, nginx"),
        (_set("bars.1.groups.copy", -1), "bars[1].groups.copy is less than 0"),
        (_set("bars.1.groups.entry", KeyError), "bars[1].groups.entry is missing"),
        (_set("bars.2.rounds", []), "field bars[2].rounds is empty"),
        (_set("load", "x"), "field load is 'x', none of http-128"),
    ],
)
def test_wrong_shares_are_refused(
    change: Callable[[Document], None],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = json.loads(json.dumps(_shares().to_json()))
    change(document)
    file = tmp_path / "figure2-cpu.json"
    file.write_text(json.dumps(document))
    assert cli.main(["trace", "--from", str(file)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert said in error
    assert _REMEDY in error


DOCS = Path(__file__).parents[2] / "docs"


def test_the_documented_figures_are_of_the_documented_recording() -> None:
    figures = DOCS / "figures"
    found = recording.read(recording.document(figures / "recording.json"))
    for number, side in enumerate(found.sides, 1):
        assert texts(figures / f"figure{number}.svg") == labels(side)
    text = (DOCS / "tracing.md").read_text()
    assert tables.counts(found) in text
    assert tables.calls(found) in text
    shares = share.read(recording.document(figures / "figure2-cpu.json"))
    assert tables.shares(shares) in text
    svg = (figures / "figure2-cpu.svg").read_text()
    assert all(f">{bar.total:.1f}<" in svg for bar in shares.bars)
