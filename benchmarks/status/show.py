"""What ``python -m benchmarks status`` prints of the runners on a results folder."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from benchmarks.rows import counts_line, running_table
from benchmarks.status.reader import Seen
from benchmarks.terminal import plain
from benchmarks.units import duration

#: Failed and ended cells that are shown of a runner, the latest.
_FAILED, _ENDED = 10, 5


def page(seen: Sequence[Seen], problems: Sequence[str], results: Path, width: int, lines: int | None = None) -> RenderableType:
    """Return every runner that is at work and, of the others, the one that started last.

    Args:
        seen: the runners, the one that started last first.
        problems: state files that say nothing.
        results: their folder.
        width: of the terminal.
        lines: for the running cells of each runner; None: for all.
    """
    parts: list[RenderableType] = [Text(f"warning: {plain(problem)}", style="yellow") for problem in problems]
    alive, over = [item for item in seen if item.alive], [item for item in seen if not item.alive]
    if not seen:
        parts.append(Text(f"Nothing has run on {plain(str(results))} yet."))
    elif not alive:
        parts.append(Text(f"Nothing runs on {plain(str(results))} now."))
    for item in [*alive, *over[:1]]:
        if len(parts) > len(problems):
            parts.append(Text())
        parts += _runner(item, width, lines)
    return Group(*parts)


def _runner(seen: Seen, width: int, lines: int | None) -> list[RenderableType]:
    state, runner = seen.state, seen.state.runner
    elapsed = max(runner.heartbeat - runner.started, 0.0)
    parts: list[RenderableType] = [Text(_headline(seen), style="bold"), counts_line(state.counts, elapsed, state.left, width)]
    if seen.alive and state.running:
        parts.append(running_table(state.running, width, lines))
    if state.failed:
        hidden = state.counts.failed - len(state.failed[-_FAILED:])
        parts.append(Text(f"Failed{f' (the last {_FAILED})' if hidden > 0 else ''}:"))
        for cell in state.failed[-_FAILED:]:
            log = f" (details: {plain(cell.log)})" if cell.log else ""
            parts.append(Text(f"  {plain(cell.label)}: {plain(cell.message)}{log}", style="red"))
    if state.ended:
        parts.append(Text("Last ended:"))
        parts += [Text(f"  {plain(cell.label)}: {cell.kind}: {plain(cell.text)}") for cell in state.ended[-_ENDED:]]
    return parts


def _headline(seen: Seen) -> str:
    runner, now = seen.state.runner, time.time()
    engine = f", engine {plain(runner.engine)}" if runner.engine else ""
    who = f"{plain(runner.host)}, process {runner.pid}{engine}"
    heard = duration(max(now - runner.heartbeat, 0.0))
    if seen.alive:
        return f"Running on {who}; last heard of {heard} ago"
    if runner.finished:
        return f"Last run on {who}: ended {heard} ago"
    return f"Last run on {who}: it did not end by itself (killed, or its machine is gone); last heard of {heard} ago"


def as_json(seen: Sequence[Seen], problems: Sequence[str], results: Path) -> str:
    """Return the same as one JSON object in one line: ``results``, ``runners`` (state, ``alive`` and ``file``), ``warnings``."""
    alive, over = [item for item in seen if item.alive], [item for item in seen if not item.alive]
    content: dict[str, Any] = {
        "results": str(results),
        "runners": [
            {"alive": item.alive, "file": item.path.name, **item.state.model_dump(mode="json")} for item in [*alive, *over[:1]]
        ],
        "warnings": list(problems),
    }
    return json.dumps(content)
