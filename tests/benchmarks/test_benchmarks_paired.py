"""Paired comparisons: McNemar's closed form, seeds averaged first, and what does not compare."""

import math
from dataclasses import replace

import benchmark_fakes as fakes
import numpy as np
import pytest

from benchmarks.cells import RunOptions
from benchmarks.grid import Filters, expand
from benchmarks.paired import Outcomes, Paired, compare, mean_difference, paired, read_outcomes
from tasks.common.hashing import file_sha256


def outcomes(correct, ids=None) -> Outcomes:
    """Of samples that are right or wrong."""
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


def test_contributions_to_a_metric_give_its_difference_and_the_error_of_a_mean():
    rng = np.random.default_rng(2)
    ids = np.array([f"s{i}" for i in range(40)])
    # Jackknife pseudo-values: beyond 0..1, and their mean is the metric.
    first, second = rng.normal(0.5, 0.8, (2, 40)), rng.normal(0.4, 0.8, (2, 40))
    result = paired(*({seed: Outcomes(ids, own[seed]) for seed in (0, 1)} for own in (first, second)))
    gaps = [100 * (first[0][i] + first[1][i] - second[0][i] - second[1][i]) / 2 for i in range(40)]
    mean = sum(gaps) / 40
    assert result is not None
    assert result.difference == pytest.approx(100 * (first.mean() - second.mean()))
    assert result.se == pytest.approx(math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 39 / 40))


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


def test_outcomes_of_another_record_are_not_used_and_a_warning_says_so(tmp_path, caplog):
    cells = expand(fakes.plain_demo(), Filters(models=("demo_vit",), bits=("w4a4",)), RunOptions(results=tmp_path))
    (cell,) = (cell for cell in cells if cell.method == "rtn" and cell.seed == 1)
    (item,) = fakes.write_cells([cell], lambda cell: 75.0, lambda cell: np.array([True, True, True, False]))
    assert item.folder is not None
    own = replace(item, record=item.record.model_copy(update={"outcomes_sha256": file_sha256(item.folder / "outcomes.npz")}))
    assert read_outcomes(own) is not None
    np.savez(item.folder / "outcomes.npz", sample=np.array(list("abcd")), correct=np.ones(4, dtype=bool))
    assert read_outcomes(item) is not None  # the record is of schema 1 and cannot tell
    assert not caplog.records
    assert read_outcomes(own) is None
    assert read_outcomes(own) is None
    (warning,) = caplog.records
    assert f"{item.folder / 'outcomes.npz'} does not belong to the record beside it" in warning.getMessage()


def clustered(rng: np.random.Generator, images: int = 60) -> tuple[list[Outcomes], np.ndarray]:
    """Two methods' outcomes of queries by image (one) and by caption (one to four an image), dependent within an image."""
    captions = rng.integers(1, 5, images)
    cluster = np.concatenate([np.arange(images), np.repeat(np.arange(images), captions)])
    n, m = images, len(cluster) - images
    weight = np.concatenate([np.full(n, (n + m) / (2 * n)), np.full(m, (n + m) / (2 * m))]).astype(np.float32)
    hard = rng.random(images)
    ids = np.array([f"q{i}" for i in range(n + m)])
    found = [Outcomes(ids, rng.random(n + m) < shift + 0.5 * hard[cluster], weight, cluster) for shift in (0.4, 0.3)]
    return found, cluster


def test_weights_make_the_difference_a_weighted_mean_and_clusters_its_error():
    (first, second), cluster = clustered(np.random.default_rng(3))
    result = paired({1: first}, {1: second})
    weight = first.weight.astype(np.float64)
    gaps = 100 * (first.score.astype(float) - second.score)
    images = int(cluster.max()) + 1
    # R@1 is the mean of both directions, whatever the number of queries in each.
    sides = [gaps[:images].mean(), gaps[images:].mean()]
    assert result is not None
    assert result.difference == pytest.approx(np.mean(sides), abs=1e-5)
    total = sum(weight)
    squares = 0.0
    for image in range(images):
        own = [i for i in range(len(gaps)) if cluster[i] == image]
        squares += sum(weight[i] * (gaps[i] - result.difference) for i in own) ** 2
    assert result.se == pytest.approx(math.sqrt(images / (images - 1) * squares) / total)
    assert result.samples == len(gaps)


def test_the_error_of_clusters_is_that_of_a_bootstrap_over_them():
    (first, second), cluster = clustered(np.random.default_rng(4), images=300)
    result = paired({1: first}, {1: second})
    gaps = 100 * (first.score.astype(float) - second.score)
    shares = np.bincount(cluster, first.weight)
    sums = np.bincount(cluster, first.weight * gaps)
    counts = np.random.default_rng(5).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=4000)
    drawn = (counts @ sums) / (counts @ shares)
    assert result is not None
    assert result.se == pytest.approx(drawn.std(), rel=0.05)
    # Taken as independent, the queries of one image would look surer than they are.
    alone = paired({1: Outcomes(first.sample, first.score)}, {1: Outcomes(second.sample, second.score)})
    assert alone is not None
    assert alone.se < 0.9 * result.se


def test_equal_weights_and_lone_samples_are_the_plain_error():
    rng = np.random.default_rng(6)
    ids = np.array([f"s{i}" for i in range(50)])
    plain = [Outcomes(ids, rng.random(50) < share) for share in (0.8, 0.6)]
    lone = [Outcomes(o.sample, o.score, np.full(50, 3.0), np.arange(50)[::-1]) for o in plain]
    expected, found = paired({1: plain[0]}, {1: plain[1]}), paired({1: lone[0]}, {1: lone[1]})
    assert expected is not None
    assert found is not None
    assert (found.difference, found.se) == (pytest.approx(expected.difference), pytest.approx(expected.se))


def test_whole_clusters_of_a_constant_difference_leave_no_error():
    # Three queries of one image and one of another: first always right, second never. Every resample gives 100.
    ids, cluster = np.array(["a", "b", "c", "d"]), np.array([0, 0, 0, 1])
    first, second = (Outcomes(ids, np.full(4, right), np.ones(4), cluster) for right in (True, False))
    result = paired({1: first}, {1: second})
    assert result is not None
    assert (result.difference, result.se) == (100.0, 0.0)


def test_weights_and_clusters_follow_their_samples_and_must_agree():
    (first, second), _ = clustered(np.random.default_rng(7))
    order = np.random.default_rng(8).permutation(len(first.sample))
    shuffled = Outcomes(*(part[order] for part in (second.sample, second.score, second.weight, second.cluster)))
    assert paired({1: first}, {1: shuffled}) == paired({1: first}, {1: second})
    assert paired({1: first}, {1: Outcomes(second.sample, second.score, second.weight[order], second.cluster)}) is None
    assert paired({1: first}, {1: Outcomes(second.sample, second.score, second.weight, second.cluster[order])}) is None
    one = np.zeros(len(first.sample), dtype=int)
    alike = [Outcomes(o.sample, o.score, o.weight, one) for o in (first, second)]
    assert paired({1: alike[0]}, {1: alike[1]}) is None


def test_weights_and_clusters_are_read_from_outcomes(tmp_path):
    (cell, *_) = expand(fakes.plain_demo(), Filters(models=("demo_vit",)), RunOptions(results=tmp_path))
    (item,) = fakes.write_cells([cell], lambda cell: 50.0, lambda cell: np.array([True, False]))
    plain = read_outcomes(item)
    assert plain is not None
    assert (plain.weight, plain.cluster) == (None, None)
    assert item.folder is not None
    content = {"sample": plain.sample, "correct": plain.score, "weight": np.array([1.5, 0.5]), "cluster": np.array([4, 4])}
    np.savez(item.folder / item.record.outcomes, **content)
    found = read_outcomes(item)
    assert found is not None
    assert (found.weight.tolist(), found.cluster.tolist()) == ([1.5, 0.5], [4, 4])
