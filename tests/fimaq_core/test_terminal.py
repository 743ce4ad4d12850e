"""Output streams: what reaches them, and what happens when they cannot be written."""

import io
import os
import sys
from typing import Any

import pytest
from rich.table import Table

from fimaq_core import terminal
from fimaq_core.progress import PrintableConsole
from fimaq_core.terminal import Guarded, guarded, one_line, printable

#: Escape sequences, C1 controls, a hyperlink, and marks of direction and without width.
NASTY = "\x1b[2J\x1b]8;;http://x\x07a\x9b31m\rb\x7f\u202e\u2066\u200b\u3164\ufe0f\U000e0041\udcff"
#: All that may stand in front of a terminal as it is.
SHOWN = "±é模型 \u3000|[red]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", r"\x1b[31m"),
        ("a\rb\tc\x07", r"a\rb\tc\x07"),
        ("\x9b\x85", r"\x9b\x85"),
        ("\u202e\u200b\ufeff", r"\u202e\u200b\ufeff"),
        ("\u3164\ufe0f\u034f", r"\u3164\ufe0f\u034f"),
        ("\udcff\U000e0041", r"\udcff\U000e0041"),
        ("two\nlines\n", "two\nlines\n"),
        (SHOWN, SHOWN),
    ],
)
def test_invisible_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert one_line(shown).count("\n") == 0


def is_safe(text: str) -> bool:
    return all(sign == "\n" or printable(sign) == sign for sign in text)


def test_no_text_reaches_a_guarded_stream_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with guarded():
        print(NASTY)
        sys.stderr.writelines([NASTY, "\n"])
        PrintableConsole().print(NASTY, SHOWN, soft_wrap=True)
        table = Table("[b]" + NASTY)
        table.add_row("[/nothing]" + NASTY)
        PrintableConsole(width=200).print(table)
    assert is_safe(out.getvalue())
    assert is_safe(err.getvalue())
    assert SHOWN in out.getvalue()
    assert "[/nothing]" in out.getvalue()
    assert (sys.stdout, sys.stderr) == (out, err)


def test_colours_of_a_console_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with guarded():
        PrintableConsole().print("a\x1b[2J", style="bold")
    assert out.getvalue() == "\x1b[1ma\\x1b[2J\x1b[0m\n"


def test_progress_bars_of_libraries_begin_with_a_carriage_return() -> None:
    bars, plain = io.StringIO(), io.StringIO()
    for stream, has_bars in ((bars, True), (plain, False)):
        Guarded(stream, has_bars).write("\r 5%\r")
    assert bars.getvalue() == "\r 5%\\r"
    assert plain.getvalue() == r"\r 5%\r"


def test_a_character_that_the_encoding_lacks_is_replaced() -> None:
    bytes_ = io.BytesIO()
    stream = Guarded(io.TextIOWrapper(bytes_, encoding="ascii"), has_bars=False)
    stream.write("45.40 ± 56.57")
    assert stream.problem() is None
    assert bytes_.getvalue() == b"45.40 ? 56.57"


def test_a_full_disk_is_noted_once_and_the_text_is_dropped() -> None:
    stream: Any = Guarded(open("/dev/full", "w"), has_bars=False)  # noqa: SIM115
    for _ in range(3):
        stream.write("x" * 100_000)
    assert stream.problem().strerror == os.strerror(28)
    stream.write("more")
    stream.close()


def test_the_reader_of_a_pipe_may_go() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    stream: Any = Guarded(os.fdopen(theirs, "w"), has_bars=False)
    stream.write("x" * 100_000)
    assert stream.problem() is None
    stream.close()


def test_guarding_twice_changes_nothing() -> None:
    with guarded():
        before = sys.stdout, sys.stderr
        with guarded():
            assert (sys.stdout, sys.stderr) == before
        assert isinstance(sys.stdout, terminal.Guarded)
