"""The command ``python -m benchmarks status``, which shows the runs on a results folder.

The table of running cells is :func:`benchmarks.watch.live.state_view`, as in a run's own terminal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from benchmarks.console import duration
from benchmarks.grid.options import results_option
from fimaq_core.errors import FimaqError
from fimaq_core.progress import PrintableConsole
from fimaq_core.terminal import one_line

if TYPE_CHECKING:
    from benchmarks.watch.events import Run

#: Largest number of failed cells, and of ended cells, that are shown per run.
_SHOWN = 5


@click.command()
@results_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--watch", is_flag=True, help="Update the text every second, until Ctrl-C.")
def status(results: Path, as_json: bool, watch: bool) -> None:
    """Show all running runs on a results folder, of any machine, and the latest ended run."""
    from rich.live import Live  # slow to import, and all commands import this module

    from benchmarks.watch.events import read_runs

    console = PrintableConsole()
    if watch and as_json:
        raise FimaqError("--json prints one object and ends: leave --watch out.")
    if watch and not console.is_terminal:
        raise FimaqError("--watch needs a terminal: leave --watch out.")
    folder = results / "runs" / ".state"
    if as_json:
        click.echo(json_text(*read_runs(folder), results))
    elif not watch:
        text = page(*read_runs(folder), results, console.width)
        console.print(text, soft_wrap=not console.is_terminal)
    else:
        known: dict[Path, Run] = {}
        try:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    lines = max(console.size.height - 10, 1)
                    text = page(*read_runs(folder, known), results, console.width, lines)
                    live.update(text, refresh=True)
                    time.sleep(1.0)
        except KeyboardInterrupt:
            pass  # Ctrl-C ends the command


def _chosen(runs: Sequence[Run]) -> list[tuple[Run, bool]]:
    """Return all running runs (with True), and the latest other run (with False)."""
    pairs = [(run, run.is_alive) for run in runs]
    return [pair for pair in pairs if pair[1]] + [pair for pair in pairs if not pair[1]][:1]


def page(
    runs: Sequence[Run], problems: Sequence[str], results: Path, width: int,
    lines: int | None = None,
) -> RenderableType:  # fmt: skip
    """Return the text of `status`. `width` and `lines`: see `live.state_view`.

    `runs` and `problems` are the result of `read_runs`.
    """
    from benchmarks.watch.live import state_view

    chosen = _chosen(runs)
    parts: list[RenderableType] = [
        Text(f"warning: {one_line(problem)}", style="yellow") for problem in problems
    ]
    if not chosen:
        parts.append(Text(f"Nothing has run on {one_line(str(results))} yet."))
    elif not chosen[0][1]:
        parts.append(Text(f"Nothing runs on {one_line(str(results))} now."))
    for run, alive in chosen:
        state, now = run.state, time.time() if alive else run.heartbeat
        parts += [Text(_headline(run, alive), style="bold"), state_view(state, now, width, lines)]
        for title, events, style in (("failed", state.failed, "red"), ("ended", state.ended, "")):
            parts += [Text(f"Last {title}:")] if events else []
            for event in list(events)[-_SHOWN:]:
                log = f" (details: {event.log})" if event.log else ""
                text = f"  {event.label}: {event.outcome}: {event.text}{log}"
                parts.append(Text(text, style=style))
    return Group(*parts)


def _headline(run: Run, alive: bool) -> str:
    """Return a line with the machine, the process and the state of a run."""
    begin, silence = run.state.begin, duration(max(time.time() - run.heartbeat, 0.0))
    assert begin is not None
    engine = f", engine {begin.engine}" if begin.engine else ""
    who = f" on {begin.host}, process {begin.pid}{engine}" if begin.host else ""
    if alive:
        return f"Running{who}; last event {silence} ago"
    if run.state.is_finished:
        return f"Last run{who}: ended {silence} ago"
    reason = "it was killed, or its machine does not answer"
    return f"Last run{who}: {reason}; last event {silence} ago"


def json_text(runs: Sequence[Run], problems: Sequence[str], results: Path) -> str:
    """Return the facts of `page` as one line with a JSON object."""
    runners = [_facts(run, alive) for run, alive in _chosen(runs)]
    return json.dumps({"results": str(results), "runners": runners, "warnings": list(problems)})


def _facts(run: Run, alive: bool) -> dict[str, Any]:
    """Return a run as an object of ``runners`` in `json_text`. Times are in seconds."""
    state, begin, now = run.state, run.state.begin, time.time() if alive else run.heartbeat
    assert begin is not None
    running = [
        {
            **started.model_dump(include={"label", "key", "where"}),
            **state.progress[label].model_dump(include={"stage", "block", "done", "total", "loss"}),
            "seconds": max(now - started.time, 0.0),
            "left": state.left(now, label),
            "attempts": state.attempts[label],
        }
        for label, started in state.running.items()
    ]
    times = {"started": begin.time, "heartbeat": run.heartbeat, "finished": state.is_finished}
    counts = {"done": state.done, "running": len(running), "failed": state.failures}
    return {
        "alive": alive,
        "file": run.path.name,
        "schema_version": 1,
        "runner": begin.model_dump(include={"host", "pid", "process_started", "engine"}) | times,
        "counts": counts | {"total": state.total},
        "left": state.left(now),
        "running": running,
        "failed": [{"label": e.label, "message": e.text, "log": e.log} for e in state.failed],
        "ended": [{"label": e.label, "kind": e.outcome, "text": e.text} for e in state.ended],
    }
