"""Time of plans and tables of many cells: it grows in proportion to their number."""

import time
from collections.abc import Callable
from pathlib import Path

import benchmark_fakes as fakes
import pytest

from benchmarks.grid.cell import Places, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import Grid
from benchmarks.results import scores
from benchmarks.run.options import RunRequest
from benchmarks.run.plan import make_plan
from benchmarks.tables import summary

pytestmark = pytest.mark.slow


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of ``work``, on which other processes have little effect."""
    start = time.process_time()
    work()
    return time.process_time() - start


def grid_of(seeds: int) -> Grid:
    return fakes.plain_demo(seeds=tuple(range(seeds)))


def test_ten_thousand_cells_are_planned_in_seconds(tmp_path: Path) -> None:
    """They take 3 s on two cores of an AMD EPYC."""
    options = RunOptions(tmp_path, Places(imagenet=tmp_path))
    grid = grid_of(420)
    cells = expand(grid, Filters(), options)
    assert len(cells) > 10_000

    def plan() -> None:
        text = make_plan(RunRequest(grid, options=options)).text
        assert f"{len(cells)} cells, 0 done, {len(cells)} to run." in text

    assert seconds(lambda: expand(grid, Filters(), options)) < 10
    assert seconds(plan) < 40


def test_each_finished_cell_is_collected_once_and_tables_take_milliseconds_per_cell(
    tmp_path: Path,
) -> None:
    options = RunOptions(tmp_path)
    grid = grid_of(20)
    cells = expand(grid, Filters(), options)
    fakes.write_cells(cells, lambda cell: 50.0)
    found: list[scores.Measured] = []
    spent = seconds(lambda: found.extend(scores.collect([*cells, *cells], fakes.ADAPTER).measured))
    assert [item.cell.key for item in found] == [cell.key for cell in cells]
    spent += seconds(lambda: summary.grid_markdown(grid.name, found, cells))
    assert spent / len(cells) < 0.02
