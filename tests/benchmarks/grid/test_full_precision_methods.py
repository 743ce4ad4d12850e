"""Methods that quantize nothing: one cell per seed, the same value at all bits, never ``fp``."""

from dataclasses import replace

import benchmark_fakes as fakes
import numpy as np
import pytest
from diff_fakes import published_record

from benchmarks.compare import alike, diff, reference
from benchmarks.compare.agreement import compared, observations
from benchmarks.costs.estimate import expected_cost, kind
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand, parse_filters
from benchmarks.grid.schema import parse_grid
from benchmarks.results import scores
from benchmarks.run.options import RunRequest
from benchmarks.run.order import make_chains
from benchmarks.run.plan import make_plan
from benchmarks.tables import summary
from fimaq_core.recipe import METHODS, make_recipe, register_method

SETTINGS = {
    "w_bits": 32,
    "a_bits": 32,
    "reconstruct": False,
    "reconstruct_mlp": True,
    "per_token": False,
}
SCORES = {"fp": 95.0, "relu-fp": 94.0, "rtn": 50.0, "brecq": 80.0, "qdrop": 85.0, "fimaq": 90.0}
GRID = {
    "name": "t",
    "tasks": {"classification": {"dataset": "d", "models": ["a", "b"]}},
    "variant": "x",
    "methods": list(SCORES),
    "bits": ["w4a4", "w3a3"],
    "seeds": [1, 2],
}


@pytest.fixture(autouse=True)
def _method():
    register_method("relu-fp", SETTINGS)
    yield
    del METHODS["relu-fp"]


def value(cell) -> float:
    lost = {"w3a3": 10.0}.get(cell.bits, 0.0)
    return (
        SCORES[cell.method]
        - lost
        + (0 if cell.seed is None else 0.5 * cell.seed)
        + (1.0 if cell.model == "b" else 0.0)
    )


def measure(tmp_path, **changes):
    grid = parse_grid({**GRID, **changes})
    cells = expand(grid, Filters(), RunOptions(results=tmp_path))
    return grid, cells, fakes.write_cells(cells, value)


def test_they_are_one_cell_a_seed_whatever_the_bits():
    grid = parse_grid(GRID)
    cells = expand(grid, Filters(), RunOptions())
    assert len(cells) == 2 * (1 + 2 * (4 * 2 + 1))
    mine = [cell for cell in cells if cell.method == "relu-fp"]
    assert [cell.label for cell in mine if cell.model == "a"] == [
        "a relu-fp fp seed 1",
        "a relu-fp fp seed 2",
    ]
    assert {
        (cell.w_bit, cell.a_bit, cell.request.recipe.w_bits, cell.request.recipe.a_bits)
        for cell in mine
    } == {(32,) * 4}


def test_filters_on_bits_do_not_drop_them():
    extra = {
        "task": "classification",
        "models": ["a"],
        "methods": ["relu-fp"],
        "bits": ["w8a8"],
        "seeds": [3],
    }
    grid = parse_grid({**GRID, "extra": [extra]})
    found = expand(
        grid, parse_filters(grid, models="a", methods="relu-fp,rtn", bits="w3a3"), RunOptions()
    )
    assert [cell.label for cell in found] == [
        "a relu-fp fp seed 1",
        "a rtn w3a3 seed 1",
        "a relu-fp fp seed 2",
        "a rtn w3a3 seed 2",
        "a relu-fp fp seed 3",
    ]


def test_tables_show_their_value_under_all_bits(tmp_path):
    _, cells, measured = measure(tmp_path)
    wide = summary.wide(scores.scores(measured), cells)
    assert list(wide.columns) == ["a w4a4", "a w3a3", "b w4a4", "b w3a3"]
    text = f"94.75 ± {np.std([94.5, 95.0], ddof=1):.2f}"
    assert wide.at["relu-fp", "a w4a4"] == wide.at["relu-fp", "a w3a3"] == text
    assert wide.at["fp", "a w3a3"] == "95.00"
    alone = [cell for cell in cells if cell.method in ("fp", "relu-fp")]
    assert list(summary.wide(scores.scores(measured), alone).columns) == ["a", "b"]


def test_means_orders_and_spreads_do_not_take_them_for_quantized(tmp_path):
    _, cells, measured = measure(tmp_path)
    text = summary.grid_markdown("T", measured, cells)
    means = text[text.index("Mean over models:") :]
    assert "relu-fp" not in means
    assert "w3a3 (2 models)" in means
    assert "| fimaq " in means
    assert "Expected order at w3a3" in text
    assert "yes (rtn worst: yes; fimaq not below: yes)" in text
    assert f"full precision: relu-fp {np.std([0.5, 1.0], ddof=1):.2f}; w4a4: rtn" in text
    (settings,) = [line for line in text.splitlines() if "Settings of" in line]
    assert "relu-fp, where a method has them: steps" in settings
    assert "mlp_steps" in settings
    alone = [item for item in measured if item.cell.method in ("fp", "relu-fp")]
    text = summary.grid_markdown("T", alone, [item.cell for item in alone])
    assert "Mean over models" not in text
    assert "Expected order" not in text


def test_chains_measure_them_by_themselves_after_full_precision():
    chains = make_chains(expand(parse_grid(GRID), Filters(), RunOptions()))
    assert [[cell.method for cell in chain] for chain in chains[:2]] == [["fp"], ["fp"]]
    own = [chain for chain in chains if any(cell.method == "relu-fp" for cell in chain)]
    assert [len(chain) for chain in own] == [1] * 4
    assert kind(own[0][0]) == "mlp"
    costs = {cell.method: expected_cost(cell) for chain in chains for cell in chain}
    assert costs["fp"] < costs["rtn"] < costs["relu-fp"]


def test_the_reference_gives_them_the_spread_of_seeds(tmp_path):
    grid, _, measured = measure(tmp_path)
    table = observations(measured)
    both = compared(table, table).set_index(["model", "method", "bits", "seed"])
    assert both.loc[("a", "relu-fp", "fp"), "variance"].tolist() == pytest.approx(
        [np.var([0.5, 1.0], ddof=1)] * 2
    )
    assert both.loc[("a", "fp", "fp"), "variance"].isna().all()
    reference.write_reference(grid, measured, "# T\n\nx", tmp_path / "reference")
    off = [
        replace(
            item,
            record=item.record.model_copy(
                update={"metrics": {"top1": fakes.Metric(value=0.0, stderr=0.1)}}
            ),
        )
        if item.cell.method == "relu-fp"
        else item
        for item in measured
    ]
    lines = reference.compare(grid, off, tmp_path / "reference")
    assert lines[0].startswith("DIFFERS from the reference in 4 of ")
    assert all(" relu-fp top1: 0.00 here, 9" in line for line in lines[1:])


@pytest.mark.parametrize(("offset", "verdict"), [(0.1, "reproduced"), (-2.0, "below")])
def test_diff_sets_them_against_their_own_published_row(
    monkeypatch: pytest.MonkeyPatch, offset: float, verdict: str
):
    monkeypatch.setitem(METHODS, "mlp-recon", SETTINGS)
    recipe, tag = make_recipe("mlp-recon"), "deit_tiny_patch16_224.fb_in1k"
    record = published_record(recipe, tag, value=71.07 + offset, stderr=0.2)
    row, context = diff.diff([record]).to_dict("records")
    assert (context["model"], context["verdict"]) == ("unstated", "not comparable")
    assert (row["method"], row["published"], row["verdict"]) == ("mlp-recon", 71.07, verdict)
    assert "one seed" in row["reason"]


def test_settings_of_mlps_bear_where_mlps_are_reconstructed():
    def changed(method: str, **settings: object) -> dict[str, object]:
        return alike.changed_settings(make_recipe(method, settings), "classification")

    assert changed("relu-fp", mlp_steps=7, mlp_batch=4, perturbation=1e-5) == {
        "mlp_steps": 7,
        "mlp_batch": 4,
        "perturbation": 1e-5,
    }
    # Batches of MLPs are their own.
    assert changed("relu-fp", steps=3, batch_size=4) == {}
    assert changed("rtn", mlp_steps=7, steps=3) == {}
    assert changed("fimaq", mlp_steps=7, steps=3) == {"steps": 3}
    assert changed("rtn", refit=True, range_search="percentile") == {
        "refit": True,
        "range_search": "percentile",
    }


def test_the_plan_lists_steps_of_mlps(tmp_path):
    def lines_of(**overrides: int) -> list[str]:
        grid = parse_grid({**GRID, "overrides": overrides})
        request = RunRequest(grid, options=RunOptions(results=tmp_path), adapter=fakes.ADAPTER)
        return make_plan(request, reference=tmp_path).text.splitlines()

    common, _, headers, _, *lines = lines_of(mlp_steps=77)
    assert common == "All cells: task classification."
    (row, *_) = [line.split() for line in lines if " relu-fp " in line]
    assert row[1:] == ["a", "relu-fp", "fp", "1", "-", "77", "-", "1024", "32", "train", "no"]
    assert "MLP steps" in headers
    rows = [line.split() for line in lines_of(mlp_batch=8)[4:]]
    batches = {row[2]: row[-3] for row in rows if len(row) > 10}
    assert (batches["relu-fp"], batches["fimaq"], batches["rtn"]) == ("8", "32", "-")
