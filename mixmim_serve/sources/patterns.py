"""Patterns of places: braces are counted out, then wildcards are matched. Both lazily and within limits."""

from __future__ import annotations

import fnmatch
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mixmim_serve.errors import DataError
from mixmim_serve.sources import local

MAX_NAMES = 100_000  # that the braces of a pattern may mean
SLICE, PAUSE = 0.001, 0.002  # seconds that a search in the background works and lets others work, in turns
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d{1,1000})\.\.(\d{1,1000})")
_MAGIC = re.compile(r"[*?\[]")


@dataclass
class SearchLimit:
    """Ends a search that takes too long, or whose result nobody waits for."""

    seconds: float = math.inf
    names: int = MAX_NAMES
    stopped: Callable[[], bool] = lambda: False
    in_background: bool = False  # beside requests, whose thread would wait for the interpreter's lock
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.resumed = time.monotonic()
        self.deadline = self.resumed + self.seconds

    def check(self) -> None:
        """Call this at each step.

        Raises:
            DataError: the search must end.
        """
        if self.stopped():
            raise DataError("the search for the source was stopped.")
        now = time.monotonic()
        if self.in_background and now > self.resumed + SLICE:
            time.sleep(PAUSE)
            self.resumed = time.monotonic()
        if now > self.deadline:
            raise DataError(
                f"the search for the source took longer than {self.seconds:g} s: name a folder, or a pattern with "
                "fewer folders to look in."
            )


def braces(pattern: str, limit: SearchLimit) -> Iterator[str]:
    """`{000..127}` counted out with as many digits, `{a,b}` chosen from, any number of them.

    Raises:
        DataError: more names than the limit allows; raised before the first one.
    """
    if _more_than(pattern, limit):
        raise DataError(f"{pattern[:200]} means more than {limit.names:,} names: use * or a folder instead.")
    return _expanded(pattern, limit)


def has_magic(name: str) -> bool:
    """Whether a name without braces is a pattern."""
    return _MAGIC.search(name) is not None


def fixed_part(pattern: str) -> str:
    """The folders before the first wildcard, with the last slash."""
    before = _MAGIC.split(pattern, maxsplit=1)[0]
    return before[: before.rfind("/") + 1]


def glob(pattern: str, limit: SearchLimit) -> Iterator[str]:
    """The local files and folders that a pattern without braces means, in no order; as `glob.iglob`, recursive.

    The tree is walked once, whatever the number of `**`: each folder is read for all parts of the pattern that may
    match in it.
    """
    parts = _parts(pattern)
    start = "/" if pattern.startswith("/") else ""
    above = frozenset({local.identity(start or ".")} if parts[0] == "**" else ())
    pending = [_Folder(start, frozenset(_closed({0}, parts)), above)]
    while pending:
        limit.check()
        folder = pending.pop()
        if any(parts[state] == "" for state in folder.states):  # the pattern ends with a slash
            yield folder.path
        for name, states, entry in _children(folder, parts, limit):
            if len(parts) in states:
                yield folder.path + name
            if inner := states - {len(parts)}:
                pending += _descend(folder, name, inner, parts, entry)


@dataclass(frozen=True)
class _Folder:
    """A folder to match in; a state is the index of the part that its entries are compared with."""

    path: str  # ends with a slash, or is empty
    states: frozenset[int]
    above: frozenset[tuple[int, int] | None]  # device and inode of the folders that `**` came through


def _parts(pattern: str) -> list[str]:
    parts = re.sub("/+", "/", pattern.lstrip("/")).split("/")
    return [part for index, part in enumerate(parts) if part != "**" or parts[index - 1 : index] != ["**"]]


def _closed(states: set[int], parts: Sequence[str]) -> set[int]:
    """`**` also stands for no folder at all."""
    return states | {state + 1 for state in states if state + 1 < len(parts) and parts[state] == "**"}


def _children(
    folder: _Folder, parts: Sequence[str], limit: SearchLimit
) -> Iterator[tuple[str, set[int], local.Entry | None]]:
    """Names in a folder with the states that they lead to; `len(parts)` is a match."""
    plain = {parts[state] for state in folder.states if parts[state] and not has_magic(parts[state])}
    patterns = {state: _matcher(parts[state]) for state in folder.states if has_magic(parts[state])}
    if patterns:
        for entry in local.entries(folder.path or "."):
            limit.check()
            states = _after(patterns, entry.name, parts)
            if entry.name not in plain and states:
                yield entry.name, states, entry
    for name in plain:
        states = {state + 1 for state in folder.states if parts[state] == name}
        states |= _after(patterns, name, parts)
        if local.exists(folder.path + name):
            yield name, states, None


def _after(patterns: Mapping[int, Callable[[str], bool]], name: str, parts: Sequence[str]) -> set[int]:
    """The states after a name; `**` stays where it is, and the last one also matches."""
    fitting = {state for state, fits in patterns.items() if fits(name)}
    many = {state for state in fitting if parts[state] == "**"}
    return many | {state + 1 for state in fitting - many} | ({len(parts)} if len(parts) - 1 in many else set())


def _descend(
    folder: _Folder, name: str, states: set[int], parts: Sequence[str], entry: local.Entry | None
) -> list[_Folder]:
    """The folder of this name, if it is one; `**` does not follow a link to a folder that it came through."""
    path = folder.path + name
    if not (local.is_folder(path) if entry is None or entry.is_link else entry.is_folder):
        return []
    above = folder.above
    if any(parts[state] == "**" for state in states):
        identity = local.identity(path)
        if identity in above and (entry is None or entry.is_link):
            states -= folder.states
        above |= {identity}
    return [_Folder(f"{path}/", frozenset(_closed(states, parts)), above)] if states else []


def _matcher(part: str) -> Callable[[str], bool]:
    """Whether a name fits a part; wildcards do not match a leading dot."""
    if part == "**":
        return lambda name: not name.startswith(".")
    fits = re.compile(fnmatch.translate(part)).match
    return lambda name: (part.startswith(".") or not name.startswith(".")) and fits(name) is not None


def _more_than(pattern: str, limit: SearchLimit) -> bool:
    """Whether the braces mean too many names; by multiplication where no braces lie within others."""
    groups = _BRACES.findall(pattern)
    if not re.search(r"[{}]", _BRACES.sub("", pattern)):
        return math.prod(map(_count, groups)) > limit.names
    return any(number >= limit.names for number, _ in enumerate(_expanded(pattern, limit)))


def _count(group: str) -> int:
    if numbers := _NUMBERS.fullmatch(group):
        return max(0, int(numbers[2]) - int(numbers[1]) + 1)
    return group.count(",") + 1


def _choices(group: str) -> Iterator[str]:
    if numbers := _NUMBERS.fullmatch(group):
        return (f"{n:0{len(numbers[1])}}" for n in range(int(numbers[1]), int(numbers[2]) + 1))
    return iter(group.split(","))


def _expanded(pattern: str, limit: SearchLimit) -> Iterator[str]:
    stack: list[tuple[str, Iterator[str], str]] = [("", iter([pattern]), "")]
    while stack:
        limit.check()
        before, choices, after = stack[-1]
        choice = next(choices, None)
        if choice is None:
            stack.pop()
            continue
        name = before + choice + after
        if group := _BRACES.search(name):
            stack.append((name[: group.start()], _choices(group[1]), name[group.end() :]))
        else:
            yield name
