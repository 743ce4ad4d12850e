"""Estimates: costs grow with the work, and the most similar measured cells tell the time."""

import benchmark_fakes as fakes
import pytest
from grid_fakes import AXES_GRID, SECTIONS_GRID, cells_of

from benchmarks.costs.estimate import Estimator, expected_cost
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand


def test_costs_grow_with_fisher_passes():
    costs = {
        cell.point: expected_cost(cell)
        for cell in cells_of(AXES_GRID, models="demo_vit", seeds="1", methods="fimaq")
    }
    # 250 steps of 32 images, and 1024 images per pass; 640 images cost as much as full precision.
    assert costs[""] == pytest.approx(3 + (250 * 32 + 5 * 1024) / 640)
    assert costs["k=15"] - costs["k=1"] == pytest.approx(14 * 1024 / 640)
    assert costs["loss=mse"] == pytest.approx(3 + 250 * 32 / 640)


def test_costs_grow_with_the_batches_of_mlps():
    def cost(batch: int) -> float:
        grid = fakes.plain_demo(methods=("mlp-recon",), overrides={"mlp_batch": batch})
        return expected_cost(expand(grid, Filters(), RunOptions())[0])

    # 3 for calibration and evaluation.
    assert cost(32) - 3.0 == pytest.approx(2 * (cost(16) - 3.0))


def test_the_time_of_an_axis_point_is_scaled_until_it_is_measured():
    found = cells_of(AXES_GRID, methods="fimaq")
    cells = {(cell.point, cell.model, cell.seed): cell for cell in found}
    estimator = Estimator()
    base, many = cells["", "demo_vit", 1], cells["k=15", "demo_vit", 1]
    estimator.add(base, 50.0)
    assert estimator.seconds(cells["", "demo_vit", 2]) == pytest.approx(50.0)
    scaled = 50.0 * expected_cost(many) / expected_cost(base)
    assert estimator.seconds(many) == pytest.approx(scaled)
    assert estimator.seconds(cells["k=15", "demo_swin", 1]) == pytest.approx(scaled)
    estimator.add(many, 80.0)
    assert estimator.seconds(cells["k=15", "demo_vit", 2]) == pytest.approx(80.0)
    assert estimator.seconds(cells["", "demo_vit", 2]) == pytest.approx(50.0)


def test_sections_and_scopes_have_times_of_their_own():
    found = cells_of(SECTIONS_GRID, methods="fp,rtn,brecq", bits="w4a4", seeds="1,2")
    cells = {cell.label: cell for cell in found}
    estimator = Estimator()
    for label, seconds in (
        ("coco clip_b [vision] rtn w4a4 seed 1", 10.0),
        ("coco clip_b [both] rtn w4a4 seed 1", 3.0),
        ("zero-shot clip_b [vision] rtn w4a4 seed 1", 50.0),
    ):
        estimator.add(cells[label], seconds)
    for label, seconds in (
        ("coco clip_b [vision] rtn w4a4 seed 2", 10.0),
        ("coco clip_b [both] rtn w4a4 seed 2", 3.0),
        ("zero-shot clip_b [vision] rtn w4a4 seed 2", 50.0),
        ("demo_vit rtn w4a4 seed 1", 21.0),
    ):
        assert estimator.seconds(cells[label]) == pytest.approx(seconds)
    assert estimator.seconds(cells["demo_vit brecq w4a4 seed 1"]) is None
