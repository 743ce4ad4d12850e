"""The command ``python -m benchmarks status``: what runs on a results folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, Group, RenderableType
from rich.text import Text

from benchmarks.console import duration, plain
from benchmarks.grid.options import results_option
from benchmarks.watch.events import left
from fimaq_core.errors import FimaqError

if TYPE_CHECKING:
    from benchmarks.watch.log import Run

#: Failed and ended cells of a run that are shown, the latest.
_FAILED, _ENDED = 10, 5


@click.command()
@results_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.option("--watch", is_flag=True, help="Go on showing it, every second, until Ctrl-C.")
def status(results: Path, as_json: bool, watch: bool) -> None:
    """Show what runs on a results folder, here or elsewhere, and the last run that ended."""
    # Imported here: all commands import this module.
    from rich.live import Live

    from benchmarks.watch.log import read_runs

    console = Console(highlight=False)
    if watch and as_json:
        raise FimaqError("--json prints one object: leave --watch out.")
    if watch and not console.is_terminal:
        raise FimaqError("--watch needs a terminal: leave it out.")
    folder = results / "runs" / ".state"
    if as_json:
        click.echo(json_text(*read_runs(folder), results))
        return
    if not watch:
        text = page(*read_runs(folder), results, console.width)
        console.print(text, soft_wrap=not console.is_terminal)
        return
    known: dict[Path, Run] = {}
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                lines = max(console.size.height - 10, 1)
                now = page(*read_runs(folder, known), results, console.width, lines)
                live.update(now, refresh=True)
                time.sleep(1.0)
        except KeyboardInterrupt:
            return  # the way to end it


def _chosen(runs: Sequence[Run]) -> list[tuple[Run, bool]]:
    """Return each run that goes on and, of the others, the one that started last."""
    alive = [(run, run.is_alive) for run in runs]
    over = [item for item in alive if not item[1]]
    return [*(item for item in alive if item[1]), *over[:1]]


def page(
    runs: Sequence[Run], problems: Sequence[str], results: Path, width: int,
    lines: int | None = None,
) -> RenderableType:  # fmt: skip
    """Return each run that goes on and, of the others, the one that started last.

    Args:
        runs, problems: see `benchmarks.watch.log.read_runs`.
        results: the folder of the runs.
        width, lines: of the terminal; None: lines for all running cells.
    """
    parts: list[RenderableType] = []
    chosen = _chosen(runs)
    for problem in problems:
        parts.append(Text(f"warning: {plain(problem)}", style="yellow"))
    if not chosen:
        parts.append(Text(f"Nothing has run on {plain(str(results))} yet."))
    elif not chosen[0][1]:
        parts.append(Text(f"Nothing runs on {plain(str(results))} now."))
    for run, alive in chosen:
        if len(parts) > len(problems):
            parts.append(Text())
        parts += _run(run, alive, width, lines)
    return Group(*parts)


def _run(run: Run, alive: bool, width: int, lines: int | None) -> list[RenderableType]:
    from benchmarks.watch.live import counts_line, running_table

    state, now = run.state, time.time() if alive else run.heartbeat
    parts: list[RenderableType] = [Text(_headline(run, alive), style="bold")]
    parts.append(counts_line(state, now, width))
    if alive and state.running:
        parts.append(running_table(state.running.values(), now, width, lines))
    if state.failed:
        last = f" (the last {_FAILED})" if state.failures > _FAILED else ""
        parts.append(Text(f"Failed{last}:"))
        for event in list(state.failed)[-_FAILED:]:
            log = f" (details: {event.log})" if event.log else ""
            parts.append(Text(f"  {event.label}: {event.text}{log}", style="red"))
    if state.ended:
        parts.append(Text("Last ended:"))
        for event in list(state.ended)[-_ENDED:]:
            parts.append(Text(f"  {event.label}: {event.outcome}: {event.text}"))
    return parts


def _headline(run: Run, alive: bool) -> str:
    begin, heard = run.state.begin, duration(max(time.time() - run.heartbeat, 0.0))
    assert begin is not None
    engine = f", engine {begin.engine}" if begin.engine else ""
    who = f"{begin.host}, process {begin.pid}{engine}"
    if alive:
        return f"Running on {who}; last heard of {heard} ago"
    if run.state.finished:
        return f"Last run on {who}: ended {heard} ago"
    reason = "it did not end by itself (killed, or its machine is gone)"
    return f"Last run on {who}: {reason}; last heard of {heard} ago"


def json_text(runs: Sequence[Run], problems: Sequence[str], results: Path) -> str:
    """Return the same as one JSON object in one line: ``results``, ``runners``, ``warnings``."""
    runners = [_facts(run, alive) for run, alive in _chosen(runs)]
    content = {"results": str(results), "runners": runners, "warnings": list(problems)}
    return json.dumps(content)


def _facts(run: Run, alive: bool) -> dict[str, Any]:
    state, begin, now = run.state, run.state.begin, time.time() if alive else run.heartbeat
    assert begin is not None
    runner = begin.model_dump(include={"host", "pid", "process_started", "engine"})
    running = [
        {
            "label": cell.started.label,
            "key": cell.started.key,
            "where": cell.started.where,
            **cell.progress.model_dump(include={"stage", "block", "done", "total", "loss"}),
            "seconds": max(now - cell.started.time, 0.0),
            "left": left(cell, now),
            "attempts": cell.attempts,
        }
        for cell in state.running.values()
    ]
    return {
        "alive": alive,
        "file": run.path.name,
        "schema_version": 1,
        "runner": {
            **runner, "started": begin.time, "heartbeat": run.heartbeat, "finished": state.finished
        },
        "counts": {
            "done": state.done, "running": len(running), "failed": state.failures,
            "total": state.total,
        },
        "left": left(state, now),
        "running": running,
        "failed": [{"label": e.label, "message": e.text, "log": e.log} for e in state.failed],
        "ended": [{"label": e.label, "kind": e.outcome, "text": e.text} for e in state.ended],
    }  # fmt: skip
