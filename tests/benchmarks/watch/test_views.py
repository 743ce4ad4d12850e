"""The view of a running grid, in terminals of several sizes and without a terminal."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import replace

import benchmark_fakes as fakes
import pytest
from engine_fakes import HANG
from rich.cells import cell_len
from rich.console import Console

from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.watch.live import Watch, state_view
from fimaq_core.progress import Progress
from fimaq_core.terminal import one_line

NASTY = "模型[bold]red[/] \x1b[2J\x1b]0;title\x07 [/nothing] \u202eabc\ud800\nline"


def cells(count: int = 40) -> list[Cell]:
    found = expand(fakes.plain_demo(), Filters(), RunOptions())[1:]
    return found[:count]


def drawn(watch: Watch, width: int, height: int) -> list[str]:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None
    )
    console.print(watch)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n").split("\n")


def busy(chosen: list[Cell], where: str = "node-17 cuda:3") -> Watch:
    watch = Watch(Console(file=io.StringIO(), width=80))
    watch.tell("begin", over=5, total=len(chosen) + 10)
    for cell in chosen:
        watch.tell("started", cell, where=where)
        watch.progress(cell, Progress("reconstruct vision", 120, 1500, "blocks.11", 0.012345))
    watch.tell("tick", left=7500.0, cells={cell.label: 360.0 for cell in chosen})
    return watch


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_rows_fit_the_terminal_and_keep_their_numbers(width: int):
    view = busy(cells(3))
    lines = drawn(view, width, 24)
    assert all(cell_len(line) <= width for line in lines)
    rows = [line for line in lines if "demo_" in line]
    assert len(rows) == 3
    if width >= 80:
        assert all(part in rows[0] for part in ("120/1500", "0.01235", "6 min"))
        assert any(
            "5 done, 3 running, 0 failed of 13 cells" in line and "about 2 h 05 min left" in line
            for line in lines
        )
    if width == 200:
        assert all(
            part in rows[0]
            for part in (
                "demo_vit rtn w4a4 seed 1",
                "node-17 cuda:3",
                "reconstruct vision blocks.11",
            )
        )


@pytest.mark.parametrize("height", [6, 24])
def test_rows_beyond_the_terminal_are_counted(height: int):
    lines = drawn(busy(cells(40)), 80, height)
    assert len(lines) <= height
    shown = [line for line in lines if "demo_" in line]
    assert shown
    assert lines[-1].strip() == f"… and {40 - len(shown)} more"


@pytest.mark.parametrize(
    ("lines", "shown", "rest"),
    [(1, 0, 7), (3, 2, 5), (6, 5, 2), (7, 7, 0), (9, 7, 0), (None, 7, 0)],
)
def test_no_more_lines_than_there_is_room_for(lines: int | None, shown: int, rest: int):
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(state_view(busy(cells(7)).state, time.time(), 80, lines))
    assert isinstance(console.file, io.StringIO)
    found = console.file.getvalue().rstrip("\n").split("\n")
    assert sum("demo_" in line for line in found) == shown
    assert [line for line in found if "more" in line] == ([f"… and {rest} more"] if rest else [])


@pytest.mark.parametrize("width", [60, 80, 200])
def test_wide_characters_markup_and_escapes_are_text(width: int):
    cell = replace(cells(1)[0], model=NASTY)
    view = busy([cell], where=NASTY)
    view.progress(cell, Progress(NASTY, 1, 2, NASTY, float("nan")))
    lines = drawn(view, width, 24)
    assert all(cell_len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "模型[bold]" in text
    assert all(character not in text for character in "\x1b\x07\u202e\ud800")
    assert len([line for line in lines if "模" in line]) == 1


def test_ended_and_retried_cells_are_counted_and_said():
    out = io.StringIO()
    watch = Watch(Console(file=out, force_terminal=True, width=100, height=20, color_system=None))
    first, second, third = cells(3)
    watch.tell("begin", over=0, total=3)
    watch.tell("started", first, where="worker 1")
    watch.tell("retried", first, text="its machine is gone [/]")
    watch.tell("started", first, where="worker 2")
    assert watch.state.attempts[first.label] == 2
    watch.tell("ended", first, outcome="failed", text="no [memory]", over=1, left=10.0)
    watch.tell(
        "ended", second, outcome="elsewhere", text="measured by another runner", over=2, left=5.0
    )
    watch.tell("started", third, where="worker 1")
    watch.tell("ended", third, outcome="finished", text="top1 80.0", over=3)
    assert (watch.state.done, watch.state.failures, watch.state.running) == (2, 1, {})
    watch.close()
    text = out.getvalue()
    assert "[0/3] demo_vit rtn w4a4 seed 1: waits again: its machine is gone [/]" in text
    assert "[1/3] demo_vit rtn w4a4 seed 1: FAILED: no [memory]" in text
    assert "[3/3]" in text
    assert "2 done, 0 running, 1 failed of 3 cells" in text


def test_where_there_is_no_terminal_there_are_lines():
    out = io.StringIO()
    watch = Watch(Console(file=out, width=80), every=0.0)
    cell = replace(cells(1)[0], model=NASTY)
    watch.tell("begin", over=0, total=10)
    watch.tell("started", cell, where="cuda:1")
    watch.progress(cell, Progress("reconstruct", 3, 9, "blocks.0", 0.5))
    watch.tell("retried", cell, text="its worker died\nagain")
    watch.tell("ended", cell, outcome="failed", text="it broke " + "x" * 300, over=1, left=60.0)
    watch.tell("ended", cell, outcome="finished", text="top1 1.0", over=10)
    watch.close()
    lines = out.getvalue().splitlines()
    label = one_line(cell.label)
    assert [line.removeprefix(f"[ 0/10] {label}: ") for line in lines[:3]] == [
        "started (cuda:1)", "reconstruct blocks.0 3/9, loss 0.5",
        "waits again: its worker died again",
    ]  # fmt: skip
    assert lines[3].startswith(f"[ 1/10] {label}: FAILED: it broke x")
    assert lines[3].endswith("x, about 60 s left")
    assert lines[4:] == [f"[10/10] {label}: top1 1.0"]


def test_lines_come_once_a_minute_only():
    out = io.StringIO()
    watch = Watch(Console(file=out, width=80))
    cell = cells(1)[0]
    watch.tell("begin", over=0, total=10)
    watch.tell("started", cell)
    for step in range(50):
        watch.progress(cell, Progress("reconstruct", step, 50))
    assert out.getvalue() == "[ 0/10] demo_vit rtn w4a4 seed 1: started\n"


SCRIPT = """
import sys, time
from rich.console import Console
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.watch.live import Watch
from fimaq_core.progress import Progress
import benchmark_fakes as fakes
cells = expand(fakes.plain_demo(), Filters(), RunOptions())
watch = Watch(Console(highlight=False))
watch.tell("begin", over=0, total=2)
watch.tell("started", cells[4], where="worker 1")
for step in range(20):
    watch.progress(cells[4], Progress("reconstruct", step, 20, "blocks.1", 0.25))
    watch.tell("tick", left=12.0, cells={cells[4].label: 12.0})
    time.sleep(0.06)
watch.tell("ended", cells[4], outcome="finished", text="top1 77.0", over=2)
watch.close()
print("after")
"""


def test_a_real_terminal_shows_rows_and_is_left_clean():
    primary, secondary = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    environment |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=secondary, stderr=secondary, env=environment
    ) as process:
        os.close(secondary)
        content, end = b"", time.monotonic() + HANG
        while time.monotonic() < end:
            ready, _, _ = select.select([primary], [], [], 0.5)
            if ready:
                try:
                    part = os.read(primary, 65536)
                except OSError:  # its other end is closed
                    break
                content += part
    os.close(primary)
    text = content.decode()
    assert process.returncode == 0, text
    assert "reconstruct" in text
    assert "blocks.1" in text
    assert "[2/2] demo_vit" in text
    assert text.rstrip().endswith("after")
    assert "\x1b[?25h" in text  # the cursor is back
