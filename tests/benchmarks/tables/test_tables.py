"""Tables: columns and formats, means and spreads, the lines below, and the reference."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import benchmark_fakes as fakes
import numpy as np
import pandas as pd
import pytest

from benchmarks.compare import reference
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import Grid
from benchmarks.results import scores
from benchmarks.tables import summary
from tasks.common.record import write_record

GRID = fakes.plain_demo()


def measure(
    tmp_path: Path, grid: Grid = GRID, shift: float = 0.0, keep=lambda cell: True
) -> tuple[list[Cell], list[scores.Measured]]:
    cells = expand(grid, Filters(), RunOptions(results=tmp_path))
    for cell in filter(keep, cells):
        record = fakes.make_record(
            recipe=cell.request.recipe,
            model=cell.model,
            value=fakes.fake_value(cell.request) + shift,
            variant=cell.request.variant or "fp",
        )
        write_record(record, fakes.planned_folder(cell.request))
    return cells, scores.collect(cells, fakes.ADAPTER).measured


def test_csv_has_exactly_the_columns_and_formats(tmp_path: Path):
    _, measured = measure(tmp_path)
    lines = scores.csv_text(scores.scores(measured)[scores.COLUMNS]).splitlines()
    assert (
        lines[0]
        == "task,dataset,model,method,variant,w_bit,a_bit,seed,metric,value,stderr,n,fp_value"
    )
    assert (
        lines[1]
        == "classification,digit-pairs,demo_vit,fp,fp,32,32,,top1,95.0000,0.5000,2000,95.0000"
    )
    assert re.fullmatch(
        r"classification,digit-pairs,demo_vit,rtn,demo,4,4,1,top1,"
        r"\d\d\.\d{4},0\.5000,2000,95\.0000",
        lines[2],
    )
    assert len(lines) == 1 + 51


def test_csv_can_be_read_back(tmp_path: Path):
    table = scores.scores(measure(tmp_path)[1])
    path = tmp_path / "t.csv"
    scores.write_text(path, scores.csv_text(table[scores.COLUMNS]))
    pd.testing.assert_frame_equal(
        reference.read_csv(path)[scores.COLUMNS],
        table[scores.COLUMNS],
        check_exact=False,
        atol=1e-4,
        check_dtype=False,
    )


def test_means_and_spreads_are_numpys(tmp_path: Path):
    cells, measured = measure(tmp_path)
    table = scores.scores(measured)
    values = [
        fakes.fake_value(cell.request)
        for cell in cells
        if cell.label.startswith("demo_deit qdrop w3a3")
    ]
    assert len(values) == 2
    wide = summary.wide(table, cells)
    assert list(wide.index) == ["fp", "rtn", "brecq", "qdrop", "fimaq"]
    assert list(wide.columns) == [
        f"{model} {bits}"
        for model in ("demo_vit", "demo_deit", "demo_swin")
        for bits in ("w4a4", "w3a3")
    ]
    assert (
        wide.at["qdrop", "demo_deit w3a3"]
        == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    )
    assert wide.at["fp", "demo_deit w3a3"] == "95.00"


def test_missing_cells_show_as_dashes(tmp_path: Path):
    cells, measured = measure(
        tmp_path, keep=lambda cell: cell.method != "qdrop" or cell.bits == "w4a4"
    )
    text = summary.grid_markdown("Demo", measured, cells)
    row = next(line for line in text.splitlines() if line.startswith("| qdrop"))
    assert [part.strip() for part in row.split("|")[1:4]] == ["qdrop", "-", "blocks"]
    assert row.split("|")[5].strip() == "-"
    assert row.split("|")[4].strip() != "-"
    assert "6 of 51 cells are not measured" in text
    assert "not judged, since no model has all four; not fully measured: qdrop." in text


def test_the_text_below_states_settings_spread_and_order(tmp_path: Path):
    cells, measured = measure(tmp_path)
    text = summary.grid_markdown("Demo", measured, cells)
    assert "Settings of brecq, qdrop, fimaq, where a method has them: steps" in text
    assert "mlp_steps" not in text
    assert f"steps {GRID.overrides['steps']} (released: 20000)" in text
    assert "calibration_images 1024," in text
    assert "Seeds: 1, 2. A number without ± has one seed." in text
    assert "Data: digit-pairs, split test, n = 2000 samples." in text
    assert "Standard error of one cell from its finite number of samples: 0.50" in text
    values = {
        method: np.mean(
            [
                fakes.fake_value(cell.request)
                for cell in cells
                if cell.method == method and cell.bits == "w3a3"
            ]
        )
        for method in ("rtn", "brecq", "qdrop", "fimaq")
    }
    numbers = ", ".join(f"{method} {value:.2f}" for method, value in values.items())
    assert f"yes (rtn worst: yes; fimaq not below: yes): {numbers}." in text
    spreads = [
        np.var(
            [
                fakes.fake_value(cell.request)
                for cell in cells
                if cell.label.startswith(f"{model} fimaq w3a3")
            ],
            ddof=1,
        )
        for model in ("demo_vit", "demo_deit", "demo_swin")
    ]
    assert re.search(rf"w3a3: .*fimaq {np.sqrt(np.mean(spreads)):.2f}", text)


def test_a_narrow_terminal_gets_the_table_in_parts(tmp_path: Path):
    cells, measured = measure(tmp_path)
    text = summary.grid_markdown("Demo", measured, cells, width=60)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, rows)) <= 60
    # The marks, then two columns at a time.
    assert sum(line.startswith("| fp") for line in rows) == 1 + 3
    assert sum("special quantizers" in line for line in rows) == 1


def test_an_order_that_did_not_come_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(fakes.LEVELS, "fimaq", 60.0)
    cells, measured = measure(tmp_path)
    assert "NO (rtn worst: yes; fimaq not below: no)" in summary.grid_markdown(
        "Demo", measured, cells
    )


def test_reference_agrees_with_itself_and_names_its_origin(tmp_path: Path):
    cells, measured = measure(tmp_path / "a")
    folder = tmp_path / "reference"
    files = reference.write_reference(
        GRID, measured, summary.grid_markdown("Demo", measured, cells), folder
    )
    assert sorted(path.name for path in files) == [
        "demo.costs.csv",
        "demo.csv",
        "demo.json",
        "demo.md",
    ]
    assert set(json.loads((folder / "demo.json").read_text())) == {
        "machine",
        "versions",
        "date",
        "settings",
        "data",
        "weights",
        "calibration",
    }
    assert "Reference: measured 2024-01-01 on" in (folder / "demo.md").read_text()
    (line,) = reference.compare(GRID, measured, folder)
    assert line.startswith(
        "Agrees with the reference (51 comparisons, family-wise error 1%, 1 processor in the "
        "reference)"
    )
    assert "Largest difference of a score: " in line
    assert "timm 2" in line


def test_reference_flags_cells_beyond_the_spread(tmp_path: Path):
    _, measured = measure(tmp_path / "a")
    folder = tmp_path / "reference"
    reference.write_reference(GRID, measured, "# Demo\n\nx", folder)
    _, other = measure(tmp_path / "b", shift=-4.0)
    lines = reference.compare(GRID, other, folder)
    assert lines[0].startswith("DIFFERS from the reference in 39 of 51 comparisons")
    assert any(
        line.startswith("  demo_vit fp top1: 91.00 here, 95.00 in the reference (p = ")
        for line in lines
    )


def test_reference_of_other_settings_or_data_is_not_compared(tmp_path: Path):
    _, measured = measure(tmp_path)
    folder = tmp_path / "reference"
    assert reference.compare(GRID, measured, folder) == []
    reference.write_reference(GRID, measured, "# Demo\n\nx", folder)
    other = GRID.model_copy(update={"overrides": {**GRID.overrides, "steps": 7}})
    assert "other settings" in reference.compare(other, measured, folder)[0]
    changed = [
        replace(
            item,
            record=item.record.model_copy(
                update={"dataset": fakes.DIGITS.model_copy(update={"fingerprint": "e" * 64})}
            ),
        )
        for item in measured
    ]
    assert "other data" in reference.compare(GRID, changed, folder)[0]
    weights = measured[0].record.weights.model_copy(update={"sha256": "a" * 64})
    first = measured[0].record.model_copy(update={"weights": weights})
    changed = [replace(measured[0], record=first), *measured[1:]]
    assert "it has other weights, demo" in reference.compare(GRID, changed, folder)[0]


def test_several_metrics_are_rows_of_the_csv_but_not_of_the_table(tmp_path: Path):
    cells, measured = measure(tmp_path)
    both = [
        replace(
            item,
            record=item.record.model_copy(
                update={"metrics": {**item.record.metrics, "top5": item.record.metrics["top1"]}}
            ),
        )
        for item in measured
    ]
    rows = list(csv.DictReader(io.StringIO(scores.csv_text(scores.scores(both)[scores.COLUMNS]))))
    assert len(rows) == 102
    assert {row["metric"] for row in rows} == {"top1", "top5"}
    assert summary.grid_markdown("Demo", both, cells) == summary.grid_markdown(
        "Demo", measured, cells
    )


def test_the_scope_of_a_score_is_the_grids_not_the_default_of_the_task(tmp_path: Path):
    _, measured = measure(tmp_path)
    item = measured[1]
    stated = item.record.model_copy(
        update={"recipe": {**(item.record.recipe or {}), "scope": "backbone"}}
    )
    assert scores.scope_of(stated) == "backbone"
    assert scores.scores([replace(item, record=stated)])["mark"].tolist() == [""]
