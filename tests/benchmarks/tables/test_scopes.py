"""Tables with scopes (quantized parts of a model): each scope has its own columns and means."""

import io
import json
from dataclasses import replace

import benchmark_fakes as fakes
import numpy as np
import pandas as pd
import pytest

from benchmarks.compare import reference
from benchmarks.compare.agreement import compared, observations
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import parse_grid
from benchmarks.results import scores
from benchmarks.tables import summary
from benchmarks.tables.ablation import axis_table
from tasks.common.record import Metric

GRID = {
    "name": "r",
    "tasks": {
        "classification": {"dataset": "digit-pairs", "models": ["demo_vit"], "seeds": [1]},
        "retrieval": {
            "dataset": "digit-scenes",
            "models": ["clip_a", "clip_b"],
            "scopes": ["vision", "both"],
        },
    },
    "methods": ["fp", "rtn", "brecq", "qdrop", "fimaq"],
    "bits": ["w4a4", "w3a3"],
    "seeds": [1, 2],
    "variant": "x",
}
SCORES = {"rtn": 50.0, "brecq": 70.0, "qdrop": 74.0, "fimaq": 80.0}


def value(cell) -> float:
    """Far apart by scope; seeds spread by 1 for the vision tower and by 3 for both."""
    if cell.method == "fp":
        return 90.0
    seeds = (cell.seed - 1) * (3.0 if cell.scope == "both" else 1.0)
    return (
        SCORES[cell.method]
        - 10 * (cell.bits == "w3a3")
        - 20 * (cell.scope == "both")
        + 2 * (cell.model == "clip_b")
        + seeds
    )


def measure(tmp_path, grid=GRID, keep=lambda cell: True, correct=None):
    parsed = parse_grid(grid)
    cells = expand(parsed, Filters(), RunOptions(results=tmp_path))
    return parsed, cells, fakes.write_cells([cell for cell in cells if keep(cell)], value, correct)


def retrieval(tmp_path, **changes):
    parsed, cells, measured = measure(
        tmp_path, {**GRID, "tasks": {"retrieval": GRID["tasks"]["retrieval"]}}, **changes
    )
    return parsed, cells, measured


def rows_of(text: str, heading: str) -> dict[str, list[str]]:
    """The first Markdown table behind a heading: fields by the first column."""
    lines = text[text.index(heading) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    fields = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        fields.append([part.strip() for part in line.strip("|").split("|")])
    return {row[0]: row[1:] for row in fields}


def test_columns_are_by_subject_and_full_precision_stands_under_each(tmp_path):
    _, cells, measured = retrieval(tmp_path)
    text = summary.grid_markdown("T", measured, cells)
    table = rows_of(text, "## retrieval: R@1 (percent), mean ± sd over seeds")
    names = [
        f"{model} [{scope}] {bits}"
        for model in ("clip_a", "clip_b")
        for scope in ("vision", "both")
        for bits in ("w4a4", "w3a3")
    ]
    assert table["method"][2:] == names
    assert table["fp"][2:] == ["90.00"] * 8
    # Seeds 1 and 2: the mean is half a spread above the first, the sd is the spread over √2.
    assert table["qdrop"][2:] == [
        "74.50 ± 0.71",
        "64.50 ± 0.71",
        "55.50 ± 2.12",
        "45.50 ± 2.12",
        "76.50 ± 0.71",
        "66.50 ± 0.71",
        "57.50 ± 2.12",
        "47.50 ± 2.12",
    ]
    assert "- Brackets name the quantized parts of a model." in text
    assert "- Data: digit-scenes, split test, n = 1000 images, 1000 captions." in text


def test_both_directions_have_a_small_table(tmp_path):
    _, cells, measured = retrieval(
        tmp_path, keep=lambda cell: (cell.method, cell.bits) != ("qdrop", "w3a3")
    )
    table = rows_of(
        summary.grid_markdown("T", measured, cells), "Image to text / text to image R@1"
    )
    assert table["fp"] == ["92.50 / 87.50"] * 8
    assert table["qdrop"][:4] == ["77.00 / 72.00", "-", "58.00 / 53.00", "-"]


def test_sections_have_their_own_headings_metrics_and_notes(tmp_path):
    _, cells, measured = measure(
        tmp_path, keep=lambda cell: cell.section == "classification" or cell.method == "rtn"
    )
    text = summary.grid_markdown("T", measured, cells)
    first, second = text[: text.index("## retrieval")], text[text.index("## retrieval") :]
    assert "## classification: top1 (percent)" in first
    assert "Brackets name" not in first
    assert "Image to text" not in first
    assert "digit-scenes" not in first
    assert "demo_vit" not in second
    none = summary.grid_markdown(
        "T", [item for item in measured if item.cell.section == "classification"], cells
    )
    assert "retrieval: nothing is measured yet." in none


def test_means_and_spreads_are_of_one_scope(tmp_path):
    _, cells, measured = retrieval(tmp_path)
    text = summary.grid_markdown("T", measured, cells)
    means = rows_of(text, "Mean over models:")
    assert means["method"] == [
        f"{bits} [{s}] (2 models)" for s in ("vision", "both") for bits in ("w4a4", "w3a3")
    ]
    assert means["qdrop"] == ["75.50", "65.50", "56.50", "46.50"]
    (spread,) = [line for line in text.splitlines() if line.startswith("- Sd over seeds")]
    each = ["rtn", "brecq", "qdrop", "fimaq"]
    for mark, sd in (("vision", "0.71"), ("both", "2.12")):
        assert f"w3a3 [{mark}]: {', '.join(f'{name} {sd}' for name in each)}" in spread


def test_orders_are_judged_for_each_scope(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def correct(cell):
        return np.arange(400) < value(cell) * 4

    _, cells, measured = retrieval(tmp_path, correct=correct)
    text = summary.grid_markdown("T", measured, cells)
    for mark, lost in (("vision", 0.0), ("both", 20.0)):
        more = 1.5 if mark == "vision" else 2.5
        numbers = ", ".join(
            f"{name} {score - 10 - lost + more:.2f}" for name, score in SCORES.items()
        )
        assert (
            f"Expected order at w3a3 [{mark}] (rtn worst, fimaq not below qdrop and brecq, "
            "mean over models): yes "
            f"(rtn worst: yes; fimaq not below: yes): {numbers}." in text
        )
        assert (
            f"fimaq - qdrop at w3a3 [{mark}]: +6.00 ± 0.00 points (mean ± se over 4 pairs of "
            "model and seed)." in text
        )
        assert (
            f"No method below rtn at w4a4 [{mark}] by more than two paired standard errors, "
            "on any model: yes: lowest is "
            f"brecq on clip_a [{mark}] +20.00" in text
        )
        assert (
            f"Calibration alone below every reconstruction at w3a3 [{mark}] (mean over models): yes"
            in text
        )


def test_full_precision_alone_has_a_table(tmp_path):
    _, cells, measured = retrieval(tmp_path, keep=lambda cell: cell.method == "fp")
    alone = [item.cell for item in measured]
    table = rows_of(summary.grid_markdown("T", measured, alone), "## retrieval: R@1")
    assert (table["method"][2:], table["fp"][2:]) == (["clip_a", "clip_b"], ["90.00", "90.00"])
    # With the rest of the grid still to come its columns are there already.
    assert (
        rows_of(summary.grid_markdown("T", measured, cells), "## retrieval: R@1")["fp"][2:]
        == ["90.00"] * 8
    )


def test_a_metric_that_is_no_percentage_is_not_called_one(tmp_path):
    _, cells, measured = retrieval(tmp_path)
    ranks = [
        with_record(item, metrics={"i2t_median_rank": Metric(value=3.0, stderr=0.5)})
        for item in measured
    ]
    assert "## retrieval: i2t_median_rank, mean ± sd over seeds" in summary.grid_markdown(
        "T", ranks, cells
    )


def test_the_csv_has_every_metric_and_the_scope_in_its_variant(tmp_path):
    _, cells, measured = retrieval(tmp_path)
    text = scores.csv_text(scores.scores(measured)[scores.COLUMNS])
    table = pd.read_csv(io.StringIO(text), keep_default_na=False)
    assert list(table.columns) == scores.COLUMNS
    assert len(table) == 4 * len(cells)
    assert set(table["variant"]) == {"fp", "x [vision]", "x [both]"}
    assert set(table["model"]) == {"clip_a", "clip_b"}
    assert set(table["metric"]) == {"R@1", "i2t_R@1", "t2i_R@1", "i2t_median_rank"}


def test_tables_of_axes_set_each_scope_against_its_own_base(tmp_path):
    grid = {
        **GRID,
        "tasks": {"retrieval": GRID["tasks"]["retrieval"]},
        "methods": ["fimaq"],
        "bits": ["w3a3"],
        "axes": {"k": {"1": {"fisher_k": 1}, "5": {}}},
    }
    cells = expand(parse_grid(grid), Filters(), RunOptions(results=tmp_path))

    def score(cell) -> float:
        return value(cell) - ({"vision": 1.0, "both": 4.0}[cell.scope] if cell.point else 0.0)

    def correct(cell) -> np.ndarray:
        rng = np.random.default_rng([len(cell.scope), len(cell.point), cell.seed])
        return rng.permutation(100) < round(score(cell))

    measured = fakes.write_cells(cells, score, correct)
    table = axis_table("k", ["1", "5"], "R@1", measured, cells)
    assert list(table.columns) == [
        "clip_a [vision] w3a3",
        "clip_a [both] w3a3",
        "clip_b [vision] w3a3",
        "clip_b [both] w3a3",
        "w3a3 [vision] - base",
        "w3a3 [vision] se (samples)",
        "w3a3 [both] - base",
        "w3a3 [both] se (samples)",
    ]
    assert table.at["1", "w3a3 [vision] - base"] == "-1.00 ± 0.00 (4)"
    assert table.at["1", "w3a3 [both] - base"] == "-4.00 ± 0.00 (4)"
    assert table.at["1", "clip_b [both] w3a3"] == "49.50 ± 2.12"
    assert table.at["5", "w3a3 [both] se (samples)"] == "-"
    assert float(table.at["1", "w3a3 [both] se (samples)"]) > 0


def with_record(item, **changes):
    return replace(item, record=item.record.model_copy(update=changes))


def write(folder, grid, measured):
    reference.write_reference(grid, measured, "# T\n\nx", folder)


def test_the_reference_covers_sections_and_names_data_with_captions(tmp_path):
    grid, _, measured = measure(
        tmp_path / "a",
        {
            **GRID,
            "tasks": {
                **GRID["tasks"],
                "retrieval": {**GRID["tasks"]["retrieval"], "overrides": {"steps": 7}},
            },
        },
    )
    folder = tmp_path / "reference"
    write(folder, grid, measured)
    origin = json.loads((folder / "r.json").read_text())
    assert origin["settings"] == {
        "variant": "x",
        "overrides": {},
        "sections": {"retrieval": {"steps": 7}},
    }
    assert origin["data"] == [
        "digit-pairs, test, 2000 samples, " + "d" * 16,
        "digit-scenes, test, 1000 images, 1000 captions, " + "e" * 16,
    ]
    # 2 models x (fp + 4 methods x 2 bits x 2 scopes) x 4 metrics, and 1 + 8 of classification
    (line,) = reference.compare(grid, measured, folder)
    assert line.startswith("Agrees with the reference (")
    part = [item for item in measured if item.cell.section == "classification"]
    (line,) = reference.compare(grid, part, folder)
    assert line.startswith("Agrees with the reference (")


def test_sections_with_other_settings_or_data_are_left_out_of_the_comparison(tmp_path):
    grid, _, measured = measure(tmp_path / "a")
    folder = tmp_path / "reference"
    write(folder, grid, measured)
    changed = parse_grid(
        {
            **GRID,
            "tasks": {
                **GRID["tasks"],
                "retrieval": {**GRID["tasks"]["retrieval"], "overrides": {"steps": 7}},
            },
        }
    )
    lines = reference.compare(changed, measured, folder)
    assert lines[0].startswith(
        "Not compared with the reference in retrieval: it has other settings"
    )
    assert lines[1].startswith("Agrees with the reference (")
    # A reference from before a section was there.
    write(folder, grid, [item for item in measured if item.cell.section == "classification"])
    lines = reference.compare(grid, measured, folder)
    assert lines[0].startswith(
        "Not compared with the reference in retrieval: it was measured on other data"
    )
    assert lines[1].startswith("Agrees with the reference (")


def test_scopes_do_not_widen_each_others_spread_and_are_named(tmp_path):
    grid, _, measured = measure(tmp_path / "a")
    table = observations(measured)
    both = compared(table, table)
    rows = both[(both["method"] == "fimaq") & (both["metric"] == "R@1")]
    spreads = [
        set(rows[rows["variant"] == f"x [{scope}]"]["variance"].round(6))
        for scope in ("vision", "both")
    ]
    assert spreads == [{0.5}, {4.5}]
    write(tmp_path / "reference", grid, measured)
    off = [
        with_record(item, metrics={**item.record.metrics, "R@1": Metric(value=0, stderr=1)})
        if item.cell.subject == "clip_b [both]" and item.cell.method == "fimaq"
        else item
        for item in measured
    ]
    lines = reference.compare(grid, off, tmp_path / "reference")
    assert lines[0].startswith("DIFFERS from the reference in 4 of ")
    assert len(lines) == 5
    assert all(
        line.startswith("  clip_b [both] fimaq w") and "R@1 on digit-scenes: 0.00 here, " in line
        for line in lines[1:]
    )


def test_data_sets_do_not_share_spreads(tmp_path):
    _, _, measured = retrieval(tmp_path)
    table = scores.scores(measured)
    noisy = table.assign(
        dataset="other", value=table["value"] + 30 * (table["seed"].fillna(0).astype(int) == 2)
    )
    both = pd.concat([table, noisy])
    both = both.assign(processor="")
    found = compared(both, both)
    mine = found[
        (found["dataset"] == "digit-scenes")
        & (found["variant"] == "x [vision]")
        & (found["metric"] == "R@1")
    ]
    assert mine["variance"].tolist() == pytest.approx([0.5] * len(mine))
    # Captions cut at another length, as another model does, are no other data.
    longer = [
        with_record(item, dataset=fakes.SCENES.model_copy(update={"truncated_captions": 3}))
        if item.cell.model == "clip_b"
        else item
        for item in measured
    ]
    assert len(reference.facts_of(parse_grid(GRID), longer)["data"]) == 1
