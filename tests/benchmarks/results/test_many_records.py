"""Thousands of records: what they have in common is kept once, and no page is full of charts."""

import subprocess
import sys
from pathlib import Path

import benchmark_fakes as fakes
import numpy as np
import report_fakes

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.report import charts, figures
from benchmarks.report.groups import make_groups
from benchmarks.results.outcomes import read_outcomes
from benchmarks.results.scores import collect
from tasks.common.record import write_record


def test_equal_parts_of_records_and_outcomes_are_kept_once(tmp_path: Path) -> None:
    grid = fakes.plain_demo(methods=("rtn", "qdrop"), seeds=(1, 2, 3))
    cells = expand(grid, Filters(models=("demo_vit",)), RunOptions(results=tmp_path))
    right = np.arange(50) < 40
    fakes.write_cells(cells, lambda _: 80.0, lambda _: right)
    for cell in cells:
        record = report_fakes.full_record(cell, n=50, dataset=fakes.DIGITS)
        record = record.model_copy(
            update={
                "metrics": {"top1": record.metrics["top1"].model_copy(update={"value": 80.0})},
                "dataset": fakes.DIGITS.model_copy(update={"count": 50}),
            }
        )
        write_record(record, fakes.planned_folder(cell.request))
    measured = collect(cells, fakes.ADAPTER).measured
    assert len(measured) == len(cells) == 12
    records = [item.record for item in measured]
    assert len({id(record.calibration) for record in records}) == 1
    assert len({id(record.dataset) for record in records}) == 1
    assert len({id(record.modules) for record in records}) == 2  # one for each bit-width
    outcomes = [read_outcomes(item) for item in measured]
    assert len({id(found.sample) for found in outcomes}) == 1
    assert len({id(found.cluster) for found in outcomes}) == 1
    assert read_outcomes(measured[0]) is outcomes[0]


def test_charts_of_a_kind_are_limited_and_their_tables_are_not(tmp_path: Path, monkeypatch) -> None:
    grid = fakes.plain_demo(methods=("fp", "rtn", "qdrop"), seeds=(1,))
    cells = expand(grid, Filters(), RunOptions(results=tmp_path))
    for cell in cells:
        write_record(report_fakes.full_record(cell), fakes.planned_folder(cell.request))
    groups = make_groups(collect(cells, fakes.ADAPTER).measured)
    looks = charts.looks(["rtn", "qdrop"]) | {"fp": "fp"}
    monkeypatch.setattr(figures, "MOST_CHARTS", 2)
    found = list(figures.cost_figures(groups, "top1", looks))
    assert [figure.chart.startswith("<svg") for figure in found] == [True] * 2 + [False] * 4
    assert all("The table has the numbers." in figure.chart for figure in found[2:])
    assert all(list(figure.data.index) == ["rtn", "qdrop"] for figure in found)


def test_tables_and_reports_do_not_import_pytorch() -> None:
    code = "import sys, benchmarks.tables.write, benchmarks.report.page; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "timm", "torchvision"}.isdisjoint(done.stdout.split())
