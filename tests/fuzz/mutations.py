"""Mutations of small valid files, and a child process with limits that tries the result."""

import copy
import json
import multiprocessing
import resource
import struct
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from fimaq_core.errors import FimaqError

#: Memory that a case may take beyond what the tests themselves have, and its time on a processor.
GIGABYTE, SECONDS = 2**30, 10
#: Settings of tests whose cases take tenths of a second.
few = settings(max_examples=max(5, settings.default.max_examples // 5))

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 0.5, -0.0, 1e-300, 1e8, -1e8, 1e300, float("nan"), float("inf"), 2**31, 2**33,
    2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400,
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", " ", "0", "9" * 5000, "x" * 10**5, "a\0b", "\ud800", "\u202e", "\x1b[31m", "../a", "/a",
    "a/" * 3000, "\U0001f600", "=1+1", "a\nb", "n01440764", "None", "é", "e\u0301",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [{}], [None] * 300, [0] * 3000)


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


VALUES = st.sampled_from([*NUMBERS, *NUMBERS, *TEXTS, *OTHERS, nested(50), nested(120)])


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of each value in a document."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    else:
        keys = list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [x for key in keys for x in _places(value[key])]


_WAYS = st.sampled_from(["value", "value", "value", "remove", "repeat", "other", "near"])


@st.composite
def documents(draw: st.DrawFn, seeds: list[Any]) -> Any:
    """Draw a document with up to four changes: values replaced, removed, repeated or copied."""
    found = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        if not (places := _places(found)):
            break
        (container, key), way = draw(st.sampled_from(places)), draw(_WAYS)
        if way == "value":
            container[key] = copy.deepcopy(draw(VALUES))
        elif way == "remove":
            del container[key]
        elif way == "repeat" and isinstance(container, list):
            container[key:key] = [container[key]] * draw(st.sampled_from([1, 2, 500]))
        elif way == "other":
            other, name = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[name])
        elif way == "near" and isinstance(container[key], int | float):
            container[key] += draw(st.sampled_from([-1, 1, 0.5, 10**6, -(10**6)]))
    return found


@st.composite
def contents(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draw bytes of a real file with up to six changes near its start, its end or anywhere."""
    found = bytearray(draw(st.sampled_from(seeds)))
    numbers = st.sampled_from([0, 1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1])
    parts = st.one_of(
        st.binary(max_size=8),
        numbers.map(lambda value: struct.pack("<I", value)),
        numbers.map(lambda value: struct.pack(">I", value)),
        numbers.map(lambda value: struct.pack("<H", value % 2**16)),
        st.sampled_from(
            [b"\0" * 64, b"[" * 200, b'"', b"{", b"}", b",", b"\n", b"- ", b": ", b"*a"]
        ),
    )
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.one_of(st.integers(0, 100), st.integers(-60, -1), st.integers(0, 10**6)))
        at %= max(1, len(found))
        part, removed = draw(parts), draw(st.integers(0, 30))
        found[at : at + (len(part) if draw(st.booleans()) else removed)] = part
    return bytes(found)


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def tried(
    check: Callable[..., object], *arguments: Any, good: tuple[type[Exception], ...] = (FimaqError,)
) -> None:
    """Run a check in a child process with limits; a short error of a ``good`` class may end it.

    A child serves many cases, since each fork of these tests takes a hundredth of a second.
    """
    if check not in _CHILDREN:
        _CHILDREN[check] = _Child(check, good)
    child = _CHILDREN[check]
    try:
        said = child.answer(arguments)
    except BaseException:
        del _CHILDREN[check]
        child.end()
        raise
    if child.cases >= _CASES:
        del _CHILDREN[check]
        child.end()
    assert said == "", said


class _Child:
    """A child process that runs one check for many arguments."""

    def __init__(self, check: Callable[..., object], good: tuple[type[Exception], ...]) -> None:
        fork = multiprocessing.get_context("fork")
        self.cases, (self._pipe, other) = 0, fork.Pipe()
        self._process = fork.Process(target=_serve, args=(other, check, good), daemon=True)
        self._process.start()
        other.close()

    def answer(self, arguments: tuple[Any, ...]) -> str:
        """Return an empty text, or what went wrong."""
        self.cases += 1
        self._pipe.send(arguments)
        try:
            return str(self._pipe.recv())
        except EOFError:
            self._process.join()
            raise AssertionError(f"The child ended with {self._process.exitcode}") from None

    def end(self) -> None:
        self._process.kill()  # other children hold its pipe open, so it would wait for ever
        self._process.join()
        self._pipe.close()


_CHILDREN: dict[Callable[..., object], _Child] = {}
#: Number of cases of a child, which may keep some memory of each.
_CASES = 100


def _serve(pipe: Connection, check: Callable[..., object], good: Any) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + GIGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(EOFError):
        while True:
            arguments = pipe.recv()
            spent = resource.getrusage(resource.RUSAGE_SELF)
            seconds = int(spent.ru_utime + spent.ru_stime) + SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
            pipe.send(_said(check, arguments, good))


def _said(check: Callable[..., object], arguments: Any, good: Any) -> str:
    try:
        check(*arguments)
    except good as error:
        said = str(error)
        if not 0 < len(said) < 3000 or "\n" in said or "MemoryError" in said:
            return f"not one short line: {said[:300]!r}"
    except Exception:  # noqa: BLE001 (the parent reports it)
        return traceback.format_exc()[-60_000:]
    return ""
