"""Exports to ONNX in the report: rows, figures, what ran in integers."""

from pathlib import Path

import benchmark_fakes as fakes
import pandas as pd
import report_fakes

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import parse_grid
from benchmarks.report.page import write_report
from benchmarks.results.scores import value_text
from tasks.common.record import write_record

PART = {"dataset": "digit-pairs", "models": ["demo_vit"]}
CONTENT = {"name": "e", "methods": ["fp", "fimaq"], "bits": ["w3a3"], "seeds": [1]}
GRID = parse_grid({**CONTENT, "tasks": {"classification": {**PART, "export": ["fimaq"]}}})


def test_the_report_says_what_an_export_is_and_what_ran_in_integers(tmp_path: Path) -> None:
    report_fakes.write_results(tmp_path, GRID)
    options = RunOptions(results=tmp_path)
    for cell in expand(GRID, Filters(seeds=(2,)), options):  # beyond the grid
        write_record(
            report_fakes.full_record(cell, examples=None), fakes.planned_folder(cell.request)
        )
    path = tmp_path / "report.html"
    gathered = write_report(GRID, options, fakes.ADAPTER, path, get=report_fakes.pictures)
    assert (len(gathered.measured), gathered.beyond, gathered.foreign) == (5, 2, 0)
    page = report_fakes.read_page(path)
    results = page.one(id="results")
    main, exports = results.all("table")[:2]
    rows = [row.one("th").text for row in main.one("tbody").all("tr")]
    assert rows == ["fp", "fimaq", "fimaq onnx"]
    (row,) = exports.one("tbody").all("tr")
    values = pd.Series(
        item.record.metrics["top1"].value for item in gathered.measured if item.cell.point
    )
    assert [cell.text for cell in row.all("td")] == [
        value_text(values.mean(), values.std()), "+0.00", "0.43", "99.9", "1.62",
    ]  # fmt: skip
    assert "Rows of onnx are different" in page.one("header").text
    (origin,) = page.one(id="provenance").all("details", css="from", data_method="fimaq onnx")
    assert "99,999 of the 100,000 multiply-adds with two quantized operands (99.9 %)" in origin.text
    assert "430 kB, 0.25 of float32" in origin.text
    assert "1.62 x float32" in origin.text
    # Times and blocks are those of simulated cells.
    for part in ("bits", "blocks", "time", "cost"):
        assert "onnx" not in page.one(id=part).text


def test_the_report_without_exports_does_not_mention_them(tmp_path: Path) -> None:
    plain = parse_grid({**CONTENT, "tasks": {"classification": PART}})
    report_fakes.write_results(tmp_path, plain)
    text = report_fakes.write_page(tmp_path, plain).read_text(encoding="utf-8")
    assert "onnx" not in text.lower()
