"""Exports to ONNX in grids, order of cells, tables, comparisons and the reference."""

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_fakes as fakes
import pytest

from benchmarks.compare import reference
from benchmarks.compare.agreement import observations
from benchmarks.compare.diff import NOT_COMPARABLE, diff
from benchmarks.compare.pairs import alone, pair_up, read_side
from benchmarks.costs.estimate import expected_cost
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.preflight import missing
from benchmarks.grid.schema import Grid, GridError, load_grid, parse_grid
from benchmarks.results.scores import Measured, rows_of
from benchmarks.run.options import RunRequest
from benchmarks.run.order import CellQueue, make_chains
from benchmarks.run.plan import make_plan
from benchmarks.tables import write
from benchmarks.tables.summary import grid_latex, grid_markdown
from tasks.common.record import BlockFigures

CONTENT: dict[str, Any] = {
    "name": "e",
    "tasks": {
        "classification": {
            "dataset": "digit-pairs", "models": ["demo_vit", "demo_swin"], "export": ["fimaq"],
        },
        "retrieval": {
            "dataset": "digit-scenes", "models": ["demo_clip"], "scopes": ["vision", "both"],
            "export": ["rtn"],
        },
    },
    "methods": ["fp", "rtn", "fimaq"],
    "bits": ["w4a4", "w3a3"],
    "seeds": [1, 2],
    "variant": "demo",
    "threads": 1,
}  # fmt: skip
GRID = parse_grid(CONTENT)
PLAIN = GRID.without_exports()


def cells_of(grid: Grid, tmp_path: Path, filters: Filters = Filters()) -> list[Cell]:
    return expand(grid, filters, RunOptions(results=tmp_path))


def measured_in(tmp_path: Path, grid: Grid = GRID) -> tuple[list[Cell], list[Measured]]:
    """Measure all cells; each export scores 0.25 points more than the simulated model."""
    cells = cells_of(grid, tmp_path)
    gain = {"onnx": 0.25, "": 0.0}
    return cells, fakes.write_cells(
        cells, lambda cell: fakes.fake_value(cell.request) + gain[cell.point]
    )


def test_an_export_follows_its_cell_and_has_a_folder_and_label_of_its_own(tmp_path: Path) -> None:
    cells = cells_of(GRID, tmp_path)
    exports = [cell for cell in cells if cell.request.export]
    # 2 models x 2 bits x 2 seeds; 1 model x 2 bits x 2 seeds x 2 scopes.
    assert len(exports) == 16
    assert [cell for cell in cells if not cell.request.export] == cells_of(PLAIN, tmp_path)
    for cell in exports:
        before = cells[cells.index(cell) - 1]
        assert replace(before, point="onnx", request=replace(before.request, export=True)) == cell
        assert (cell.name._replace(point=""), cell.seed) == before.key
        assert fakes.planned_folder(cell.request) != fakes.planned_folder(before.request)
    assert exports[0].label == "demo_vit fimaq w4a4 onnx seed 1"
    assert exports[0].row == "fimaq onnx"
    only = cells_of(GRID, tmp_path, Filters(models=("demo_vit",), bits=("w8a8",), seeds=(5,)))
    assert [cell.label for cell in only] == [
        "demo_vit fp", "demo_vit rtn w8a8 seed 5", "demo_vit fimaq w8a8 seed 5",
        "demo_vit fimaq w8a8 onnx seed 5",
    ]  # fmt: skip
    assert not any(
        cell.request.export for cell in cells_of(GRID, tmp_path, Filters(methods=("fp", "qdrop")))
    )


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("qdrop", "'qdrop' cannot be exported in 'classification'"),
        ("fp", "'fp' cannot be exported in 'classification'"),
        ("adalog", "The recipe of 'adalog' has no integer form"),
        ("mlp-recon", "leaves the weights in full precision"),
    ],
)
def test_methods_that_cannot_be_exported_are_refused(method: str, words: str) -> None:
    methods = ["fp", "rtn", "adalog", "mlp-recon"]
    part = {**CONTENT["tasks"]["classification"], "methods": methods, "export": [method]}
    with pytest.raises(GridError, match=words):
        parse_grid({**CONTENT, "tasks": {"classification": part}})


def test_a_missing_extra_is_named_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(GRID, tmp_path)
    assert missing(cells, fakes.ADAPTER) == []
    monkeypatch.setitem(sys.modules, "onnx", None)
    (message,) = missing(cells, fakes.ADAPTER)
    assert message.startswith("Exports need the packages onnx: install the extra")
    assert missing(cells_of(PLAIN, tmp_path), fakes.ADAPTER) == []


def test_an_export_waits_for_its_cell_in_the_same_chain_at_a_small_cost(tmp_path: Path) -> None:
    cells = cells_of(GRID, tmp_path, Filters(models=("demo_vit",), bits=("w3a3",), seeds=(1,)))
    full, rtn, fimaq, export = cells
    assert make_chains(cells) == [[full], [rtn, fimaq, export]]
    assert expected_cost(rtn) < expected_cost(export) < expected_cost(fimaq) / 2
    queue = CellQueue(cells)
    assert queue.take("a") == full
    assert queue.take("b") is None
    queue.remove(full)
    assert [queue.take("a"), queue.take("b")] == [rtn, None]
    queue.remove(rtn)
    assert [queue.take("a"), queue.take("b")] == [fimaq, None]
    queue.put_back(fimaq)
    assert [queue.take("b"), queue.take("a")] == [fimaq, None]
    queue.remove(fimaq)
    assert queue.take("a") == export
    alone = CellQueue([export])  # its cell is finished or of another runner
    assert alone.take("a") == export


def test_a_plan_lists_exports_as_points(tmp_path: Path) -> None:
    filters = Filters(models=("demo_vit",), bits=("w3a3",), seeds=(1,))
    request = RunRequest(GRID, filters, RunOptions(results=tmp_path), fakes.ADAPTER)
    cells = request.cells()
    fakes.write_cells(cells[:3], lambda cell: 80.0)
    text = make_plan(request, reference=tmp_path).text
    assert "4 cells, 3 done, 1 to run." in text
    (row,) = (line for line in text.splitlines() if "onnx" in line)
    assert row.split()[:6] == ["1", "demo_vit", "fimaq", "w3a3", "onnx", "1"]


def test_tables_have_a_row_and_figures_of_their_own_for_exports(tmp_path: Path) -> None:
    cells, measured = measured_in(tmp_path)
    text = grid_markdown("T", measured, cells)
    rows = {
        tuple(part.strip() for part in line.split("|")[1:-1])
        for line in text.splitlines()
        if line.startswith("| ")
    }
    names = [row[0] for row in rows]
    assert (names.count("fimaq onnx"), names.count("rtn onnx")) == (1, 2)
    assert rows_of(cells) == ["fp", "rtn", "rtn onnx", "fimaq", "fimaq onnx"]
    own = next(row for row in rows if row[0] == "demo_swin fimaq w3a3")
    assert own[2:] == ("+0.25", "0.43", "99.9", "1.62")
    assert ("export", "R@1", "- simulated", "size (MB)", "integer coverage (%)",
            "speed (x float32)") in rows  # fmt: skip
    assert {"demo_clip [vision] rtn w4a4", "demo_clip [both] rtn w3a3"} <= set(names)
    # Spreads, means and orders are those of simulated cells.
    _, plain = measured_in(tmp_path / "plain", PLAIN)
    alone = grid_markdown("T", plain, cells_of(PLAIN, tmp_path / "plain"))
    for line in alone.splitlines():
        assert not line.startswith("- ") or line in text
    latex = grid_latex("e", measured, cells)
    assert latex.count(r"\label{tab:e-classification-exports}") == 1
    assert "Quantization is simulated, except in rows of onnx." in latex


def test_tables_without_exports_have_no_columns_of_exports(tmp_path: Path) -> None:
    cells, _ = measured_in(tmp_path, PLAIN)
    texts = write.texts(PLAIN, write.collect(cells, fakes.ADAPTER), cells)
    assert texts["csv"].splitlines()[0].endswith("value,stderr,n,fp_value")
    assert "onnx" not in "".join(texts.values()).lower()
    assert "Quantization is simulated. " not in texts["tex"]
    cells, _ = measured_in(tmp_path / "exports")
    texts = write.texts(GRID, write.collect(cells, fakes.ADAPTER), cells)
    rows = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert len(rows) == len({tuple(row.items()) for row in rows})
    found = [row for row in rows if row["size_mb"]]
    assert {row["variant"] for row in found} == {"onnx", "onnx [vision]", "onnx [both]"}
    figures = [found[0][name] for name in ("size_mb", "integer_coverage", "speed")]
    assert figures == ["0.4300", "99.9990", "1.6250"]


def test_an_export_is_no_seed_of_the_simulated_cell_in_comparisons(tmp_path: Path) -> None:
    cells, measured = measured_in(tmp_path)
    table = diff([item.record for item in measured if item.cell.model == "demo_swin"])
    own = table[(table["metric"] == "top1") & (table["bits"] == "w3a3")].set_index("method")
    assert list(own["seeds"].loc[["fimaq", "fimaq onnx"]]) == [2, 2]
    assert own["measured"]["fimaq onnx"] == pytest.approx(own["measured"]["fimaq"] + 0.25)
    assert set(own["verdict"]) == {NOT_COMPARABLE}
    places = {cell.label: fakes.planned_folder(cell.request) for cell in cells}
    rtn, fimaq = (
        read_side(places[f"demo_swin {name} w3a3 seed 1"].parent) for name in ("rtn", "fimaq")
    )
    assert (len(rtn.files), len(fimaq.files)) == (2, 4)
    (pair,) = pair_up(rtn, fimaq)
    assert (pair.key["variant"], list(pair.a)) == ("demo", [1, 2])
    assert {file.record.variant for file in alone(fimaq, [pair])} == {"onnx"}
    names = ("demo_swin fimaq w3a3 seed 1", "demo_swin fimaq w3a3 onnx seed 1")
    (pair,) = pair_up(*(read_side(places[name]) for name in names))
    assert [file.record.variant for file in (pair.a[1], pair.b[1])] == ["demo", "onnx"]


def test_the_reference_tests_exports_as_cells_of_their_own(tmp_path: Path) -> None:
    _, measured = measured_in(tmp_path)
    reference.write_reference(GRID, measured, "# T\n\ntext\n", tmp_path)
    blocks = {"head": BlockFigures(error=0.01)}
    measured = [
        replace(item, record=item.record.model_copy(update={"blocks": blocks})) for item in measured
    ]
    table = observations(measured)
    assert set(table.loc[table["metric"] == "block_error", "variant"]) == {
        "demo", "demo [vision]", "demo [both]", "fp",
    }  # fmt: skip
    variants = set(table["variant"])
    assert {"demo", "onnx", "demo [vision]", "onnx [vision]"} <= variants
    assert reference.compare(GRID, measured, tmp_path)[0].startswith("Agrees with the reference")
    place = next(n for n, item in enumerate(measured) if item.cell.point)
    item = measured[place]
    metrics = {"top1": item.record.metrics["top1"].model_copy(update={"value": 30.0})}
    worse = replace(item, record=item.record.model_copy(update={"metrics": metrics}))
    lines = reference.compare(GRID, [*measured[:place], worse, *measured[place + 1 :]], tmp_path)
    assert lines[0].startswith("DIFFERS from the reference in 1 of")
    assert lines[1].startswith("  demo_vit fimaq w4a4 (onnx) top1 on digit-pairs: 30.00 here")
    simulated = [item for item in measured if not item.cell.point]
    reference.write_reference(PLAIN, simulated, "# T\n\ntext\n", tmp_path)
    lines = reference.compare(GRID, measured, tmp_path)
    assert lines[0] == "Not in the reference, so not compared: 8 cells."


def test_the_quickstart_exports_one_cell_of_each_task(tmp_path: Path) -> None:
    exports = [cell for cell in cells_of(load_grid("quickstart"), tmp_path) if cell.point]
    assert [(cell.task, cell.method) for cell in exports] == [
        ("classification", "fimaq"), ("retrieval", "fimaq"), ("detection", "fimaq"),
    ]  # fmt: skip
