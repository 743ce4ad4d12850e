"""Paired comparisons: McNemar's closed form, seeds averaged first, and what does not compare."""

import math

import benchmark_fakes as fakes
import numpy as np
import pytest

from benchmarks.cells import RunOptions
from benchmarks.grid import Filters, expand
from benchmarks.paired import Outcomes, Paired, compare, mean_difference, paired, read_outcomes


def outcomes(correct, ids=None) -> Outcomes:
    right = np.asarray(correct, dtype=bool)
    return Outcomes(np.array([f"s{i}" for i in range(len(right))]) if ids is None else np.asarray(ids), right)


@pytest.mark.parametrize(("only_first", "only_second", "both", "neither"), [(7, 3, 80, 10), (0, 5, 1, 1), (4, 4, 0, 2)])
def test_one_seed_is_mcnemars_closed_form(only_first: int, only_second: int, both: int, neither: int):
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    n, b, c = len(first), only_first, only_second
    result = paired({1: outcomes(first)}, {1: outcomes(second)})
    assert result is not None
    assert result.difference == pytest.approx(100 * (b - c) / n)
    variance = (b + c - (b - c) ** 2 / n) / (n - 1)
    assert result.se == pytest.approx(100 * math.sqrt(variance / n))
    assert (result.samples, result.seeds) == (n, 1)


def test_seeds_are_averaged_before_samples_are_counted():
    rng = np.random.default_rng(0)
    first, second = rng.random((3, 50)) < 0.8, rng.random((3, 50)) < 0.6
    result = paired(
        {seed: outcomes(first[seed]) for seed in (0, 1, 2)},
        {seed: outcomes(second[seed]) for seed in (1, 2)} | {9: outcomes(first[0])},
    )
    gaps = [100 * sum(int(first[s][i]) - int(second[s][i]) for s in (1, 2)) / 2 for i in range(50)]
    mean = sum(gaps) / 50
    assert result is not None
    assert result.difference == pytest.approx(mean)
    assert result.se == pytest.approx(math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 49 / 50))
    assert (result.samples, result.seeds) == (50, 2)


def test_samples_are_matched_by_id():
    ids = ["c", "a", "b", "d"]
    first, second = outcomes([1, 0, 1, 1], ids), outcomes([0, 1, 1, 1], ["a", "b", "c", "d"])
    result = paired({1: first}, {1: second})
    assert result is not None
    # By id nothing differs; by position two samples would.
    assert (result.difference, result.se) == (0.0, 0.0)


def test_what_does_not_compare_gives_nothing():
    four = outcomes([1, 0, 1, 1])
    assert paired({1: four}, {2: four}) is None
    assert paired({}, {}) is None
    assert paired({1: four}, {1: outcomes([1, 0, 1])}) is None
    assert paired({1: four}, {1: outcomes([1, 0, 1, 1], ["a", "b", "c", "d"])}) is None
    assert paired({1: outcomes([1])}, {1: outcomes([0])}) is None


def test_errors_of_independent_models_add_in_squares():
    parts = [Paired(1.0, 0.3, 10, 1), Paired(3.0, 0.4, 10, 1)]
    assert mean_difference(parts) == (pytest.approx(2.0), pytest.approx(0.25))


def test_records_on_disk_are_compared_and_damaged_ones_are_not(tmp_path):
    cells = [
        cell for cell in expand(fakes.plain_demo(), Filters(models=("demo_vit",), bits=("w4a4",)), RunOptions(results=tmp_path))
        if cell.method in ("rtn", "fimaq")
    ]  # fmt: skip
    rng = np.random.default_rng(1)
    right = {cell.key: rng.random(40) < 0.7 for cell in cells}
    measured = fakes.write_cells(cells, lambda cell: 100 * right[cell.key].mean(), lambda cell: right[cell.key])
    mine, base = ([item for item in measured if item.cell.method == method] for method in ("fimaq", "rtn"))
    result = compare(mine, base)
    assert result is not None
    means = {m: np.mean([right[item.cell.key].mean() for item in items]) for m, items in (("fimaq", mine), ("rtn", base))}
    assert result.difference == pytest.approx(100 * (means["fimaq"] - means["rtn"]))
    assert (result.samples, result.seeds) == (40, 2)

    assert base[0].folder is not None
    (base[0].folder / "outcomes.npz").write_text("no archive")
    assert read_outcomes(base[0]) is None
    again = compare(mine, base)
    assert again is not None
    assert again.seeds == 1
    assert base[1].folder is not None
    (base[1].folder / "outcomes.npz").unlink()
    assert compare(mine, base) is None
