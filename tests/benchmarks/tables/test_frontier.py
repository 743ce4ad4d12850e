"""The table of methods with and without parts: means, paired differences, times, missing cells."""

import math

import benchmark_fakes as fakes
import numpy as np
import pytest
import yaml

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import parse_grid
from benchmarks.tables import frontier
from benchmarks.tables.write import make_reference, remake
from fimaq_core.errors import FimaqError

GRID = parse_grid(
    yaml.safe_load(
        """
name: small-frontier
description: Each row is a method.
table: frontier
tasks:
  classification: {dataset: digit-pairs, models: [demo_vit, demo_swin]}
  retrieval: {dataset: digit-scenes, models: [demo_clip], scopes: [vision]}
methods: [fp, qdrop, fimaq, fimaq-mlp]
bits: [w3a3]
seeds: [1, 2]
variant: x
axes: {finish: {"9": {finish_steps: 9}}}
"""
    )
)
#: Right samples of eight, by row and model; a second seed loses the last right one.
RIGHT = {
    ("fp", "demo_vit"): "11111111",
    ("fp", "demo_swin"): "11111110",
    ("qdrop", "demo_vit"): "11000000",
    ("qdrop", "demo_swin"): "11111100",
    ("fimaq", "demo_vit"): "11110000",
    ("fimaq", "demo_swin"): "11101000",
    ("fimaq finish=9", "demo_vit"): "11111001",
    ("fimaq finish=9", "demo_swin"): "11101100",
    ("fimaq-mlp", "demo_vit"): "11111111",
}


def right(cell):
    found = np.array([int(digit) for digit in RIGHT[cell.row, cell.model]])
    if cell.seed == 2:
        found[np.flatnonzero(found)[-1]] = 0
    return found


@pytest.fixture
def cells(tmp_path):
    return expand(GRID, Filters(), RunOptions(results=tmp_path))


@pytest.fixture
def measured(cells):
    mine = [cell for cell in cells if (cell.row, cell.model) in RIGHT]
    return fakes.write_cells(mine, lambda cell: 12.5 * right(cell).sum(), right)


def test_rows_have_means_and_differences(measured, cells):
    table, best = frontier.frontier_table(measured, cells)
    assert list(table.index) == ["fp", "qdrop", "fimaq", "fimaq finish=9", "fimaq-mlp"]
    assert list(table.columns) == [
        *("demo_vit", "demo_swin", "demo_clip [vision]"), "mean", "- base", "- best", "time",
    ]  # fmt: skip
    assert table.loc["fimaq", "demo_vit"] == "43.75 ± 8.84"
    assert table.loc["fp", "demo_swin"] == "87.50"
    assert table.loc["fimaq", "mean"] == "43.75 (2)"  # demo_clip is not measured
    assert table.loc["fimaq-mlp", "mean"] == "93.75 (1)"
    assert set(table["demo_clip [vision]"]) == {"-"}
    # fimaq-mlp has no published numbers, and the row with a part is no published method.
    assert best == "qdrop"
    assert (table.loc["qdrop", "- best"], table.loc["fp", "- best"]) == ("-", "-")
    assert (table.loc["fimaq", "- base"], table.loc["qdrop", "- base"]) == ("-", "-")


def test_bits_without_a_quantized_cell_have_no_table(measured, cells):
    full = [item for item in measured if item.cell.method == "fp"]
    text = frontier.frontier_markdown("Profile p", full, cells)
    assert "## w3a3\n\nNothing is measured yet.\n\nScores" in text


def test_errors_are_those_of_paired_samples_and_of_seeds(measured, cells):
    table, _ = frontier.frontier_table(measured, cells)
    means, squares = [], []
    for model in ("demo_vit", "demo_swin"):
        own = {
            (item.cell.row, item.cell.seed): right(item.cell)
            for item in measured
            if item.cell.model == model
        }
        gaps = [100.0 * (own["fimaq finish=9", seed] - own["fimaq", seed]) for seed in (1, 2)]
        mean = np.mean(gaps, axis=0)
        sampling = mean.std(ddof=1) / math.sqrt(8)
        seeds = np.std([gap.mean() for gap in gaps], ddof=1) / math.sqrt(2)
        means.append(mean.mean())
        squares.append(sampling**2 + seeds**2)
    expected = f"{np.mean(means):+.2f} ± {math.sqrt(sum(squares)) / 2:.2f} (2)"
    assert table.loc["fimaq finish=9", "- base"] == expected


def test_shared_stages_count_for_every_cell(measured, cells):
    def timed(item, **seconds):
        record = item.record.model_copy(update={"seconds": seconds})
        return type(item)(item.cell, record, item.folder)

    mine = {(it.cell.row, it.cell.model, it.cell.seed): it for it in measured}
    base = timed(mine["fimaq", "demo_vit", 1], load=1.0, calibrate=5.0, reconstruct=14.0)
    reused = {
        "load": 1.0,
        "calibrate (reused)": 0.1,
        "reconstruct": 14.0,
        "wait": 99.0,
        "end": 20.0,
    }
    part = timed(mine["fimaq finish=9", "demo_vit", 1], **reused)
    other = timed(mine["fimaq", "demo_vit", 2], **{"calibrate (reused)": 0.5})
    seconds = frontier.whole_seconds([base, part, other])
    assert seconds == {base: 20.0, part: 40.0, other: 0.5}
    table, _ = frontier.frontier_table([base, part], cells)
    assert list(table["time"]) == ["1.00", "2.00"]


def test_page_says_what_is_missing_and_reference_takes_a_part(
    measured, cells, tmp_path, monkeypatch
):
    text = frontier.frontier_markdown("Profile p: Each row is a method.", measured, cells)
    assert text.startswith("# Profile p: Each row is a method.\n\n## w3a3\n\n| method ")
    assert "Best published method at w3a3: qdrop." in text
    assert "- classification: 10 of 26 cells are not measured." in text
    assert "- retrieval: 13 of 13 cells are not measured." in text
    written = []

    def write(grid, items, words):
        written.append((len(items), words.splitlines()[2]))
        return []

    monkeypatch.setattr("benchmarks.compare.reference.write_reference", write)
    make_reference(GRID, RunOptions(results=tmp_path), fakes.ADAPTER, add=False)
    assert written == [(16, "## w3a3")]


def test_its_table_has_no_choice_of_metric(measured, tmp_path):
    with pytest.raises(FimaqError, match="columns of its own: leave --metric out"):
        remake(GRID, RunOptions(results=tmp_path), fakes.ADAPTER, "md", None, "top1")
