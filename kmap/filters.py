# SPDX-License-Identifier: Apache-2.0
"""Which connections to show: a small part of the expressions of ss(8).

    expression = term { "or" term }
    term       = factor { ["and"] factor }
    factor     = "not" factor | "(" expression ")" | predicate
    predicate  = "state" NAME[,NAME]...
               | ("comm" | "reason") [OP] NAME[,NAME]...
               | ("sport" | "dport" | "port" | "pid") [OP] NUMBER
               | ("src" | "dst") [OP] ADDRESS[/PREFIX][:PORT]
    OP         = "=" "==" "!=" "<" ">" "<=" ">=" or eq ne lt gt le ge

Ports may be written with a colon before them, as in ss.  "port" is either end's.
"""

from __future__ import annotations

import ipaddress
import operator
import re
from collections.abc import Callable, Sequence

from kmap.results import UsageError
from kmap.snapshot import Connection

Filter = Callable[[Connection], bool]

STATES = ("ring", "kernel", "pending")
_KEYS = "state, comm, reason, sport, dport, port, pid, src, dst"
_WORD = re.compile(r"[()]|[=!<>]=|[=!<>]|&&?|\|\|?|[^\s()=!<>&|]+")
_AND, _OR, _NOT = {"and", "&", "&&"}, {"or", "|", "||"}, {"not", "!"}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "eq": operator.eq,
    "!=": operator.ne,
    "ne": operator.ne,
    "<": operator.lt,
    "lt": operator.lt,
    ">": operator.gt,
    "gt": operator.gt,
    "<=": operator.le,
    "le": operator.le,
    ">=": operator.ge,
    "ge": operator.ge,
}


def port_of(endpoint: str) -> int:
    """The port of an address as the rows have it."""
    return int(endpoint.rpartition(":")[2])


def _address_of(endpoint: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(endpoint.rpartition(":")[0].strip("[]"))


def _states(text: str) -> Filter:
    names = frozenset(text.split(","))
    if unknown := names.difference(STATES):
        raise UsageError(
            f"no state is called {', '.join(sorted(unknown))}: there are "
            + ", ".join(STATES)
        )
    return lambda row: row.state in names


def _names(key: str, sign: str, text: str) -> Filter:
    names = frozenset(text.split(","))
    if sign not in ("=", "==", "eq", "!=", "ne"):
        raise UsageError(f"{key} {sign} {text}: names are compared with = or !=")
    wanted = sign in ("=", "==", "eq")
    return lambda row: (getattr(row, key) in names) == wanted


def _number(key: str, text: str) -> int:
    text = text.removeprefix(":")
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{key} {text}: a number should follow, as in {key} = 8080")
    return int(text)


def _numbers(key: str, sign: str, text: str) -> Filter:
    compare, number = _COMPARE[sign], _number(key, text)
    if key == "pid":
        return lambda row: compare(row.pid, number)
    if key == "sport":
        return lambda row: compare(port_of(row.local), number)
    if key == "dport":
        return lambda row: compare(port_of(row.peer), number)
    # Not equal means that neither end has it.
    both = all if compare is operator.ne else any
    return lambda row: both(
        compare(port_of(end), number) for end in (row.local, row.peer)
    )


def _hosts(key: str, sign: str, text: str) -> Filter:
    if sign not in ("=", "==", "eq", "!=", "ne"):
        raise UsageError(f"{key} {sign} {text}: addresses are compared with = or !=")
    host, port = text, ""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    try:
        network = ipaddress.ip_network(host, strict=False)
    except ValueError as error:
        raise UsageError(
            f"{key} {text}: {error}; write 127.0.0.1, 10.0.0.0/8 or [::1]:80"
        ) from error
    number = _number(key, port) if port else None
    wanted = sign in ("=", "==", "eq")

    def matches(row: Connection) -> bool:
        end = row.local if key == "src" else row.peer
        same = _address_of(end) in network and number in (None, port_of(end))
        return same == wanted

    return matches


class _Parser:
    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._at = 0

    def _peek(self) -> str | None:
        return self._words[self._at] if self._at < len(self._words) else None

    def _next(self, after: str) -> str:
        word = self._peek()
        if word is None:
            raise UsageError(f"something should follow {after!r} in the filter")
        self._at += 1
        return word

    def whole(self) -> Filter:
        found = self._either()
        if (word := self._peek()) is not None:
            raise UsageError(f"{word!r} in the filter closes nothing")
        return found

    def _either(self) -> Filter:
        found = [self._both()]
        while self._peek() in _OR:
            self._at += 1
            found.append(self._both())
        return found[0] if len(found) == 1 else lambda row: any(f(row) for f in found)

    def _both(self) -> Filter:
        found = [self._factor("the filter")]
        while (word := self._peek()) is not None and word not in _OR | {")"}:
            if word in _AND:
                self._at += 1
            found.append(self._factor(word))
        return found[0] if len(found) == 1 else lambda row: all(f(row) for f in found)

    def _factor(self, after: str) -> Filter:
        word = self._next(after)
        if word in _NOT:
            inner = self._factor(word)
            return lambda row: not inner(row)
        if word == "(":
            found = self._either()
            if self._next(word) != ")":
                raise UsageError("a parenthesis of the filter is not closed")
            return found
        return self._predicate(word)

    def _predicate(self, key: str) -> Filter:
        if key == "state":
            return _states(self._next(key))
        if key not in _KEYS.split(", "):
            raise UsageError(f"{key!r} is no word of a filter: there are {_KEYS}")
        sign = self._next(key)
        if sign in _COMPARE:
            text = self._next(f"{key} {sign}")
        else:
            sign, text = "=", sign
        if key in ("comm", "reason"):
            return _names(key, sign, text)
        if key in ("src", "dst"):
            return _hosts(key, sign, text)
        return _numbers(key, sign, text)


def parse(words: Sequence[str]) -> Filter:
    """The filter that the words describe; none lets everything pass."""
    # A quoted filter comes as one word, and blanks around operators may be left out.
    found = _WORD.findall(" ".join(words))
    if not found:
        return lambda row: True
    try:
        return _Parser(found).whole()
    except RecursionError:
        raise UsageError("the filter has too many parentheses in each other") from None


def every(filters: Sequence[Filter]) -> Filter:
    """Passes what all of them let pass."""
    return lambda row: all(one(row) for one in filters)
