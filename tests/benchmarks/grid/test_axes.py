"""Axes of ablations: their cells, shared cells, errors, tables and expected times."""

import math
from dataclasses import replace

import benchmark_fakes as fakes
import grid_fakes
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from grid_fakes import AXES, AXES_GRID

from benchmarks.cli import cli
from benchmarks.compare import reference
from benchmarks.costs.estimate import expected_cost
from benchmarks.grid.cell import Places, RunOptions, default_adapter
from benchmarks.grid.expand import Filters, expand, parse_filters
from benchmarks.grid.schema import GridError, load_grid, parse_grid
from benchmarks.results import scores
from benchmarks.run.order import make_chains
from benchmarks.tables import summary
from benchmarks.tables.ablation import axis_table
from fimaq_core.errors import FimaqError
from tasks.common.record import SignedMetric

GRID = AXES_GRID
POINTS = ["", "loss=mse", "k=1", "k=15"]


def cells_of(grid=GRID, **more):
    return grid_fakes.cells_of(grid, **more)


def test_one_axis_at_a_time_varies_around_the_grids_settings():
    cells = cells_of(models="demo_vit", seeds="1")
    assert [cell.label for cell in cells] == [
        "demo_vit fp",
        "demo_vit fimaq w3a3 seed 1",
        "demo_vit fimaq w3a3 loss=mse seed 1",
        "demo_vit fimaq w3a3 k=1 seed 1",
        "demo_vit fimaq w3a3 k=15 seed 1",
    ]
    full, base, mse, one, many = cells
    assert [cell.point for cell in cells] == ["", *POINTS]
    assert base.axis_points == (("loss", "dplr"), ("k", "5"))
    assert (mse.axis_points, full.axis_points) == ((("loss", "mse"),), ())
    settings = [
        (cell.request.recipe.loss, cell.request.recipe.fisher_k, cell.request.recipe.steps)
        for cell in cells[1:]
    ]
    assert settings == [
        ("fisher_dplr", 5, 250),
        ("mse", 5, 250),
        ("fisher_dplr", 1, 250),
        ("fisher_dplr", 15, 250),
    ]
    assert [cell.request.variant for cell in cells] == [
        None,
        "demo",
        "demo loss=mse",
        "demo k=1",
        "demo k=15",
    ]
    assert len({cell.key for cell in cells_of()}) == len(cells_of()) == 2 * (1 + 2 * 4)
    assert one.request.recipe.seed == many.request.recipe.seed == 1


def test_what_equals_the_base_depends_on_the_method():
    cells = cells_of({**GRID, "methods": ["qdrop"]}, models="demo_vit", seeds="1", axes="loss")
    # QDrop's own loss is the squared error; the point without changes is its base too.
    assert [cell.point for cell in cells] == [""]
    assert cells[0].axis_points == (("loss", "mse"), ("loss", "dplr"))


def test_points_around_released_settings_are_named_after_them():
    released = {key: value for key, value in GRID.items() if key not in ("variant", "overrides")}
    variants = [
        cell.request.variant for cell in cells_of(released, models="demo_vit", seeds="1", axes="k")
    ]
    assert variants == [None, None, "released k=1", "released k=15"]
    changed = cells_of(
        {**released, "overrides": {"steps": 3}}, models="demo_vit", seeds="1", axes="k"
    )
    assert changed[2].request.variant == "steps=3 k=1"


def test_filters_choose_axes():
    assert {cell.point for cell in cells_of(axes="k")} == {"", "k=1", "k=15"}
    assert {cell.point for cell in cells_of(axes="loss")} == {"", "loss=mse"}
    assert parse_filters(parse_grid(GRID), axes="k") != Filters()
    with pytest.raises(
        GridError, match=r"Unknown axis 'los' in profile 'ab'. Did you mean 'loss'\?"
    ):
        cells_of(axes="los")
    with pytest.raises(GridError, match="Profile 'demo' has no axes: leave the filter 'k' out"):
        parse_filters(load_grid("demo"), axes="k")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{ratio: {1:0: {fisher_p2: 0.0}}}", "axes.ratio.60: write it in quotes"),
        (
            "{per_token: {on: {}}}",
            "write it in quotes, since YAML does not read it as text (given: True)",
        ),
        ("{'a b': {c: {}}}", "'a b' cannot name an axis or point"),
        ("{a: {'c,d': {}}}", "'c,d' cannot name an axis or point"),
        ("{k: {}}", "axes.k: Dictionary should have at least 1 item"),
        ("{k: {'1': {fisher_kk: 1}}}", "Did you mean 'fisher_k'?"),
        ("{k: {'1': {fisher_k: 0}}}", "fisher_k"),
        ("{bits: {'3': {w_bits: 3}}}", "axes.bits.3: 'w_bits' cannot be an override"),
        ("{k: {'1': 1}}", "axes.k.1"),
        ("[k]", "axes"),
    ],
)
def test_bad_axes_say_what_was_meant(text: str, words: str):
    with pytest.raises(FimaqError) as caught:
        parse_grid({**GRID, "axes": yaml.safe_load(text)})
    assert words in str(caught.value)


def test_extra_cells_have_no_points():
    extra = {
        "task": "classification",
        "models": ["demo_vit"],
        "methods": ["fimaq"],
        "bits": ["w8a8"],
        "seeds": [1],
    }
    cells = cells_of({**GRID, "extra": [extra]})
    assert [(cell.point, cell.axis_points) for cell in cells if cell.bits == "w8a8"] == [("", ())]


def test_points_are_chains_of_their_own_with_the_dearest_first():
    chains = make_chains(cells_of(seeds="1"))
    assert [[cell.label for cell in chain] for chain in chains[:4]] == [
        ["demo_vit fp"],
        ["demo_swin fp"],
        ["demo_vit fimaq w3a3 k=15 seed 1"],
        ["demo_swin fimaq w3a3 k=15 seed 1"],
    ]
    assert all(len(chain) == 1 for chain in chains)


def value(cell) -> float:
    if cell.method == "fp":
        return 95.0
    gain = {"": 0.0, "loss=mse": -3.0, "k=1": -1.0, "k=15": 0.5}[cell.point]
    noise = np.random.default_rng([cell.seed, len(cell.model), *map(ord, cell.point)]).normal(
        0, 0.3
    )
    return round(80.0 + gain + noise + (2.0 if cell.model == "demo_vit" else 0.0), 2)


def correct(cell) -> np.ndarray:
    rng = np.random.default_rng([cell.seed or 0, len(cell.model), *map(ord, cell.point)])
    return rng.permutation(10_000) < round(100 * value(cell))


def test_tables_of_axes_have_means_and_paired_differences(tmp_path):
    cells = cells_of(options=RunOptions(results=tmp_path))
    measured = fakes.write_cells(cells, value, correct)
    mine = [cell for cell in cells if cell.method == "fimaq"]
    table = axis_table("k", ["1", "5", "15"], "top1", measured, mine)
    assert list(table.index) == ["1", "5", "15"]
    assert list(table.columns) == [
        "demo_vit w3a3",
        "demo_swin w3a3",
        "w3a3 - base",
        "w3a3 se (samples)",
    ]
    by = {(cell.point, cell.model, cell.seed): cell for cell in mine}
    values = [value(by["k=15", "demo_swin", seed]) for seed in (1, 2)]
    assert (
        table.at["15", "demo_swin w3a3"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    )
    pairs = [(model, seed) for model in ("demo_vit", "demo_swin") for seed in (1, 2)]
    gaps = [value(by["k=15", *pair]) - value(by["", *pair]) for pair in pairs]
    assert (
        table.at["15", "w3a3 - base"]
        == f"{np.mean(gaps):+.2f} ± {np.std(gaps, ddof=1) / 2:.2f} (4)"
    )
    assert table.loc["5", ["w3a3 - base", "w3a3 se (samples)"]].tolist() == ["base", "-"]
    variances = []
    for model in ("demo_vit", "demo_swin"):
        sample = np.mean(
            [1.0 * correct(by["k=15", model, s]) - correct(by["", model, s]) for s in (1, 2)],
            axis=0,
        )
        variances.append(100**2 * sample.var(ddof=1) / 10_000)
    assert table.at["15", "w3a3 se (samples)"] == f"{math.sqrt(sum(variances)) / 2:.2f}"
    figures = {"": 0.0123, "k=15": 0.0456}
    faithful = [
        replace(
            one,
            record=one.record.model_copy(
                update={"fidelity": {"kl": SignedMetric(value=figures[one.cell.point], stderr=0)}}
            ),
        )
        for one in measured
        if one.cell.method == "fimaq" and one.cell.point in figures
    ]
    table = axis_table("k", ["1", "5", "15"], "kl", faithful, mine)
    assert table.loc["5"].tolist() == ["0.0123 ± 0", "0.0123 ± 0", "base", "-"]
    assert table.loc["15"].tolist() == ["0.0456 ± 0", "0.0456 ± 0", "+0.0333 ± 0 (4)", "-"]


def test_tables_of_axes_say_what_is_missing(tmp_path):
    cells = cells_of(options=RunOptions(results=tmp_path), seeds="1")
    some = [
        cell
        for cell in cells
        if cell.point != "k=1" and (cell.model == "demo_vit" or cell.point != "k=15")
    ]
    measured = fakes.write_cells(some, value)
    table = axis_table(
        "k", ["1", "5", "15"], "top1", measured, [cell for cell in cells if cell.method == "fimaq"]
    )
    assert table.loc["1"].tolist() == ["-"] * 4
    gap = value(next(c for c in some if c.point == "k=15")) - value(
        next(c for c in some if c.method == "fimaq" and not c.point)
    )
    assert table.loc["15"].tolist()[1:] == ["-", f"{gap:+.2f} (1)", "- (outcomes missing)"]
    text = summary.grid_markdown("T", measured, cells, axes=AXES)
    assert "3 of 10 cells are not measured" in text


def test_the_report_keeps_points_out_of_the_main_table(tmp_path):
    cells = cells_of(options=RunOptions(results=tmp_path))
    measured = fakes.write_cells(cells, value, correct)
    text = summary.grid_markdown("T", measured, cells, axes=AXES)
    main, axes = text[: text.index("### ")], text[text.index("### ") :]
    own = [
        value(cell)
        for cell in cells
        if cell.model == "demo_vit" and cell.method == "fimaq" and not cell.point
    ]
    assert f"{np.mean(own):.2f} ± {np.std(own, ddof=1):.2f}" in main
    assert "fisher_k" not in main
    assert [line for line in axes.splitlines() if line.startswith("### ")] == [
        "### loss: fimaq, one setting at a time",
        "### k: fimaq, one setting at a time",
    ]
    assert axes.count("`- base`: difference") == 1
    narrow = summary.grid_markdown("T", measured, cells, 60, AXES)
    assert max(len(line) for line in narrow.splitlines() if line.startswith("|")) <= 60


def test_a_run_without_its_base_still_has_a_table(tmp_path):
    cells = cells_of(options=RunOptions(results=tmp_path), seeds="1")
    measured = fakes.write_cells([cell for cell in cells if cell.point == "k=1"], value)
    text = summary.grid_markdown("T", measured, cells, axes=AXES)
    assert "nan" not in text
    assert "8 of 10 cells are not measured" in text


def test_variants_are_apart_in_spreads_and_references(tmp_path):
    grid = parse_grid(GRID)
    cells = cells_of(options=RunOptions(results=tmp_path))
    measured = fakes.write_cells(cells, value)
    table = scores.scores(measured)
    assert len(table) == len(cells)
    stats = scores.over_seeds(table)
    assert len(stats) == 2 * (1 + 4)
    assert set(stats.loc[stats["method"] == "fimaq", "seeds"]) == {2}
    reference.write_reference(grid, measured, "# T\n\nx", tmp_path / "reference")
    (line,) = reference.compare(grid, measured, tmp_path / "reference")
    assert line.startswith("Agrees with the reference (18 comparisons,")
    other = fakes.write_cells(
        cells_of(options=RunOptions(results=tmp_path / "b")),
        lambda cell: value(cell) - (20 if cell.point == "k=15" else 0),
    )
    lines = reference.compare(grid, other, tmp_path / "reference")
    assert lines[0].startswith("DIFFERS from the reference in 4 of 18 comparisons")
    assert all("fimaq w3a3 (demo k=15) top1" in line for line in lines[1:])
    fewer = parse_grid({**GRID, "axes": {"k": {"1": {"fisher_k": 2}}}})
    assert "other settings" in reference.compare(fewer, measured, tmp_path / "reference")[0]


def test_the_commands_run_plan_and_filter_axes(tmp_path):
    path = tmp_path / "ab.yaml"
    path.write_text(yaml.safe_dump({**GRID, "seeds": [1]}, sort_keys=False))

    def run(*args: str):
        command = ["run", "--profile", str(path), "--results", str(tmp_path), *args]
        return CliRunner().invoke(cli, command, obj=fakes.ADAPTER)

    plan = run("--plan")
    (row,) = [
        line.split() for line in plan.output.splitlines() if "demo_swin" in line and "k=15" in line
    ]
    assert row[1:5] == ["demo_swin", "fimaq", "w3a3", "k=15"]
    part = run("--axes", "k", "--jobs", "2")
    assert part.exit_code == 0, part.output
    assert "### k: fimaq" in part.output
    assert "### loss" not in part.output
    assert len((tmp_path / "tables/ab.csv").read_text().splitlines()) == 1 + 2 * 4
    # The file has all axes, whatever the run was narrowed to; the base stands on each.
    text = (tmp_path / "tables/ab.md").read_text()
    assert "### loss: fimaq" in text
    assert "| dplr " in text
    assert run().exit_code == 0
    rows = (tmp_path / "tables/ab.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 5
    assert sum(",demo k=15," in row for row in rows) == 2
    assert "All 10 cells are done already." in run().output

    (tmp_path / "faults.json").write_text('{"fimaq": "error"}')
    failed = run("--axes", "k", "--force", "--models", "demo_vit", "--jobs", "1")
    assert failed.exit_code == 1
    assert "demo_vit fimaq w3a3 k=15 seed 1: ValueError" in failed.output
    assert "To run the failed cells again, repeat the command" in failed.output


def test_the_ablation_profile_shares_the_demos_settings_cells_and_time():
    demo, grid = load_grid("demo"), load_grid("ablation")
    assert (grid.overrides, grid.variant) == (demo.overrides, demo.variant)
    cells = expand(grid, Filters(), RunOptions())
    folder = default_adapter().planned_folder
    base = [cell for cell in cells if not cell.point]
    assert {folder(cell.request) for cell in base} <= {
        folder(c.request) for c in expand(demo, Filters(tasks=("classification",)), RunOptions())
    }
    assert len({folder(cell.request) for cell in cells}) == len(cells)
    assert {cell.point.split("=")[0] for cell in cells if cell.point} == {
        "loss",
        "k",
        "p1:p2",
        "drop",
        "temperature",
        "per_token",
    }
    for cell in cells:
        if cell.point.startswith("p1:p2"):
            first, second = (float(part) for part in cell.point.split("=")[1].split(":"))
            recipe = cell.request.recipe
            assert recipe.fisher_p1 + recipe.fisher_p2 == pytest.approx(2)
            assert recipe.fisher_p1 * second == pytest.approx(recipe.fisher_p2 * first, abs=1e-6)
    # 54 s a base cell on one core, two at a time.
    seconds = 54 * sum(expected_cost(cell) for cell in cells) / expected_cost(base[1]) / 2
    assert 10 * 60 < seconds < 24 * 60


def test_the_papers_ablation_varies_released_settings(tmp_path):
    grid = load_grid("paper-ablation")
    options = RunOptions(data=Places(imagenet=tmp_path))
    cells = expand(grid, Filters(), options)
    assert {cell.model for cell in cells} == {"vit_small", "deit_tiny", "swin_small"}
    assert {cell.bits for cell in cells if cell.seed is not None} == {"w3a3", "w4a4"}
    assert all(
        cell.request.recipe.changes() == {}
        for cell in cells
        if cell.seed is not None and not cell.point
    )
    assert list(grid.axes) == list(load_grid("ablation").axes)
    folder = default_adapter().planned_folder
    theirs = {
        folder(cell.request)
        for cell in expand(load_grid("paper"), Filters(tasks=("classification",)), options)
    }
    assert {folder(cell.request) for cell in cells if not cell.point} <= theirs


def test_a_point_may_name_other_data_to_calibrate_on():
    points = {"own": {}, "noise": {"calibration_data": "demo:noise"}}
    grid = {**GRID, "axes": {"calibration_source": points}}
    _, base, noise = cells_of(grid, models="demo_vit", seeds="1")
    assert base.axis_points == (("calibration_source", "own"),)
    assert base.request.data.calibration_data is None
    assert str(noise.request.data.calibration_data) == "demo:noise"
    assert noise.request.recipe == base.request.recipe
    assert noise.request.variant == "demo calibration_source=noise"
    with pytest.raises(GridError, match="calibration_data is 3: name a folder"):
        parse_grid({**GRID, "axes": {"calibration_source": {"x": {"calibration_data": 3}}}})
    with pytest.raises(GridError, match="calibration_data"):
        parse_grid({**GRID, "overrides": {"calibration_data": "demo:noise"}})
