"""Paired comparisons: McNemar's closed form, means over seeds, pairs that do not compare."""

import math
from dataclasses import replace

import benchmark_fakes as fakes
import numpy as np
import pytest

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.results.outcomes import (
    CompareError,
    MetricPart,
    Outcomes,
    Paired,
    compare,
    mean_difference,
    paired,
    read_outcomes,
)
from tasks.common.hashing import file_sha256
from tasks.common.outcome_files import OutcomesError
from tasks.common.record import Metric


def outcomes(score, ids=None, cluster=None, parts=None) -> Outcomes:
    """Outcomes with one part, or the parts of these samples, in the order of ids."""
    score = np.asarray(score)
    n = len(score)
    ids = np.array([f"s{i:03}" for i in range(n)]) if ids is None else np.asarray(ids)
    order = np.argsort(ids)
    cluster = np.arange(n) if cluster is None else cluster[order]
    found = []
    for part in [np.arange(n)] if parts is None else parts:
        rows = np.flatnonzero(np.isin(order, part))
        found.append(MetricPart(rows, score[order][rows]))
    return Outcomes(ids[order], cluster, {"m": tuple(found)})


def right(*correct) -> Outcomes:
    return outcomes(np.array(correct, dtype=bool))


@pytest.mark.parametrize(
    ("only_first", "only_second", "both", "neither"), [(7, 3, 80, 10), (0, 5, 1, 1), (4, 4, 0, 2)]
)
def test_one_seed_is_mcnemars_closed_form(
    only_first: int, only_second: int, both: int, neither: int
):
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    n, b, c = len(first), only_first, only_second
    result = paired({1: right(*first)}, {1: right(*second)})
    assert result is not None
    assert result.difference == pytest.approx(100 * (b - c) / n)
    variance = (b + c - (b - c) ** 2 / n) / (n - 1)
    assert result.se == pytest.approx(100 * math.sqrt(variance / n))


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


def test_contributions_to_a_metric_give_its_difference_and_the_error_of_a_mean():
    rng = np.random.default_rng(2)
    # Jackknife pseudo-values: beyond 0..1, and their mean is the metric.
    first, second = rng.normal(0.5, 0.8, (2, 40)), rng.normal(0.4, 0.8, (2, 40))
    result = paired(*({seed: outcomes(own[seed]) for seed in (0, 1)} for own in (first, second)))
    gaps = [100 * (first[0][i] + first[1][i] - second[0][i] - second[1][i]) / 2 for i in range(40)]
    mean = sum(gaps) / 40
    assert result is not None
    assert result.difference == pytest.approx(100 * (first.mean() - second.mean()))
    assert result.se == pytest.approx(math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 39 / 40))


def test_samples_are_matched_by_id():
    ids = ["c", "a", "b", "d"]
    first, second = (
        outcomes([True, False, True, True], ids),
        outcomes([False, True, True, True], list("abcd")),
    )
    result = paired({1: first}, {1: second})
    assert result is not None
    # By id nothing differs; by position two samples would.
    assert (result.difference, result.se) == (0.0, 0.0)


def test_what_does_not_compare_gives_nothing():
    four = right(1, 0, 1, 1)
    other = outcomes(np.array([1, 0, 1, 1], dtype=bool), list("abcd"))
    for first, second, why in (
        ({1: four}, {2: four}, "no common seed"),
        ({}, {}, "no common seed"),
        ({1: four}, {1: right(1, 0, 1)}, "Different samples"),
        ({1: four}, {1: other}, "do not share all samples"),
        ({1: right(1)}, {1: right(0)}, "a single sample"),
    ):
        with pytest.raises(CompareError, match=why):
            paired(first, second)


def test_errors_of_independent_models_add_in_squares():
    parts = [Paired(1.0, 0.3), Paired(3.0, 0.4)]
    assert mean_difference(parts) == (pytest.approx(2.0), pytest.approx(0.25))


def test_records_on_disk_are_compared_and_damaged_ones_are_not(tmp_path):
    cells = [
        cell
        for cell in expand(
            fakes.plain_demo(),
            Filters(models=("demo_vit",), bits=("w4a4",)),
            RunOptions(results=tmp_path),
        )
        if cell.method in ("rtn", "fimaq")
    ]
    rng = np.random.default_rng(1)
    hits = {cell.key: rng.random(40) < 0.7 for cell in cells}
    measured = fakes.write_cells(
        cells, lambda cell: 100 * hits[cell.key].mean(), lambda cell: hits[cell.key]
    )
    mine, base = (
        [item for item in measured if item.cell.method == method] for method in ("fimaq", "rtn")
    )
    result = compare(mine, base)
    assert result is not None
    means = {
        m: np.mean([hits[item.cell.key].mean() for item in items])
        for m, items in (("fimaq", mine), ("rtn", base))
    }
    assert result.difference == pytest.approx(100 * (means["fimaq"] - means["rtn"]))

    assert base[0].folder is not None
    (base[0].folder / "outcomes.npz").write_text("no archive")
    read_outcomes.cache_clear()
    with pytest.raises(OutcomesError, match="are damaged"):
        read_outcomes(base[0])
    again = compare(mine, base)
    assert again.left_out == ("outcomes damaged",)
    assert again.difference == pytest.approx(
        100 * (hits[mine[1].cell.key].mean() - hits[base[1].cell.key].mean())
    )
    assert base[1].folder is not None
    (base[1].folder / "outcomes.npz").unlink()
    read_outcomes.cache_clear()
    with pytest.raises(CompareError, match=r"^outcomes damaged, outcomes missing$"):
        compare(mine, base)


def test_outcomes_of_another_record_are_not_used_and_a_warning_says_so(tmp_path, caplog):
    cells = expand(
        fakes.plain_demo(),
        Filters(models=("demo_vit",), bits=("w4a4",)),
        RunOptions(results=tmp_path),
    )
    (cell,) = (cell for cell in cells if cell.method == "rtn" and cell.seed == 1)
    (item,) = fakes.write_cells(
        [cell], lambda cell: 75.0, lambda cell: np.array([True, True, True, False])
    )
    assert item.folder is not None
    own = replace(
        item,
        record=item.record.model_copy(
            update={"outcomes_sha256": file_sha256(item.folder / "outcomes.npz")}
        ),
    )
    assert read_outcomes(own) is not None
    path, samples = item.folder / "outcomes.npz", np.array(list("abcd"))
    np.savez(path, sample=samples, correct=np.array([False, True, True, True]))
    assert read_outcomes(item) is not None  # a record of schema 1 cannot tell equal shares apart
    read_outcomes.cache_clear()
    for _ in range(2):
        with pytest.raises(CompareError, match=r"^outcomes of another record$"):
            compare([own], [own])
    (warning,) = caplog.records
    assert f"{path} does not belong to the record beside it" in warning.getMessage()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"sample": list("abcd"), "correct": [1, 1, 1, 1]}, "give top1 100.00, but .* has 75.00"),
        ({"sample": list("abc"), "correct": [1, 1, 1]}, "have 3 samples, but the record has 4"),
        ({"sample": list("aacd"), "correct": [1, 1, 1, 0]}, "name a sample twice"),
        ({"sample": list("abcd"), "found": [1, 1, 1, 0]}, "nothing that can be compared"),
        ({"sample": list("abcd"), "top1": [np.nan, 1, 1, 1]}, "or it is not finite"),
        ({"sample": [], "correct": []}, "have 0 samples, but the record has 4"),
    ],
)
def test_outcomes_are_checked_against_their_record(tmp_path, content, words):
    (cell, *_) = expand(
        fakes.plain_demo(), Filters(models=("demo_vit",)), RunOptions(results=tmp_path)
    )
    (item,) = fakes.write_cells([cell], lambda _: 75.0, lambda _: np.arange(4) < 3)
    assert read_outcomes(item).value("top1") == 75.0
    read_outcomes.cache_clear()
    arrays = {name: np.array(values) for name, values in content.items()}
    arrays["sample"] = arrays["sample"].astype(str)
    np.savez(item.folder / "outcomes.npz", **arrays)
    with pytest.raises(OutcomesError, match=words):
        read_outcomes(item)


def clustered(
    rng: np.random.Generator, images: int = 60
) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """Outcomes of two methods: per image one query and one to four dependent captions."""
    captions = rng.integers(1, 5, images)
    cluster = np.concatenate([np.arange(images), np.repeat(np.arange(images), captions)])
    hard = rng.random(images)
    found = [rng.random(len(cluster)) < shift + 0.5 * hard[cluster] for shift in (0.4, 0.3)]
    return found, cluster, [np.arange(images), np.arange(images, len(cluster))]


def test_parts_count_the_same_and_clusters_are_the_unit_of_the_error():
    (first, second), cluster, parts = clustered(np.random.default_rng(3))
    result = paired(
        {1: outcomes(first, None, cluster, parts)}, {1: outcomes(second, None, cluster, parts)}
    )
    gaps = 100 * (first.astype(float) - second)
    images, n = int(cluster.max()) + 1, len(cluster)
    weight = np.concatenate([np.full(len(part), n / (2 * len(part))) for part in parts])
    # R@1 is the mean of both directions, whatever the number of queries in each.
    assert result is not None
    assert result.difference == pytest.approx(np.mean([gaps[part].mean() for part in parts]))
    squares = 0.0
    for image in range(images):
        own = [i for i in range(n) if cluster[i] == image]
        squares += sum(weight[i] * (gaps[i] - result.difference) for i in own) ** 2
    assert result.se == pytest.approx(math.sqrt(images / (images - 1) * squares) / n)


def test_the_error_of_clusters_is_that_of_a_bootstrap_over_them():
    (first, second), cluster, parts = clustered(np.random.default_rng(4), images=300)
    result = paired(
        {1: outcomes(first, None, cluster, parts)}, {1: outcomes(second, None, cluster, parts)}
    )
    gaps = 100 * (first.astype(float) - second)
    counts = np.random.default_rng(5).multinomial(300, np.full(300, 1 / 300), size=4000)
    drawn = np.mean(
        [
            (counts @ np.bincount(cluster[part], gaps[part]))
            / (counts @ np.bincount(cluster[part]))
            for part in parts
        ],
        axis=0,
    )
    assert result is not None
    assert result.se == pytest.approx(drawn.std(), rel=0.05)
    # Taken as independent, the queries of one image would look surer than they are.
    alone = paired({1: outcomes(first)}, {1: outcomes(second)})
    assert alone is not None
    assert alone.se < 0.9 * result.se


def test_whole_clusters_of_a_constant_difference_leave_no_error():
    # Three queries of one image and one of another: first always right, second never.
    cluster = np.array([0, 0, 0, 1])
    first, second = (outcomes(np.full(4, hit), list("abcd"), cluster) for hit in (True, False))
    result = paired({1: first}, {1: second})
    assert result is not None
    assert (result.difference, result.se) == (100.0, 0.0)


def test_clusters_follow_their_samples_and_must_agree():
    (first, second), cluster, parts = clustered(np.random.default_rng(7))
    n = len(cluster)
    ids = np.array([f"q{i:03}" for i in range(n)])
    order = np.random.default_rng(8).permutation(n)
    moved = [np.flatnonzero(np.isin(order, part)) for part in parts]
    one = outcomes(first, ids, cluster, parts)
    other, shuffled = (
        outcomes(second, ids, cluster, parts),
        outcomes(second[order], ids[order], cluster[order], moved),
    )
    assert paired({1: one}, {1: shuffled}) == paired({1: one}, {1: other})
    with pytest.raises(CompareError, match="group them differently"):
        paired({1: one}, {1: outcomes(second, ids, cluster[order], parts)})
    lone = np.zeros(n, dtype=int)
    with pytest.raises(CompareError, match="a single sample"):
        paired({1: outcomes(first, ids, lone)}, {1: outcomes(second, ids, lone)})


def test_clusters_and_directions_are_read_from_outcomes(tmp_path):
    (cell, *_) = expand(
        fakes.plain_demo(), Filters(models=("demo_vit",)), RunOptions(results=tmp_path)
    )
    (item,) = fakes.write_cells([cell], lambda cell: 50.0, lambda cell: np.array([True, False]))
    plain = read_outcomes(item)
    assert plain is not None
    assert plain.cluster.tolist() == [0, 1]
    assert [part.score.tolist() for part in plain.metrics["top1"]] == [[True, False]]
    assert item.folder is not None
    recall = {"R@1": Metric(value=50.0, stderr=1.0)}
    retrieval = replace(
        item, record=item.record.model_copy(update={"task": "retrieval", "metrics": recall})
    )
    content = {
        "sample": np.array(["b", "a", "c", "d"]),
        "cluster": np.array([4, 4, 7, 7]),
        "direction": np.array([1, 0, 0, 1]),
        "rank": np.array([0, 1, 0, 3]),
    }
    np.savez(item.folder / item.record.outcomes, **content)
    found = read_outcomes(retrieval)
    assert found is not None
    assert found.cluster.tolist() == [0, 0, 1, 1]
    parts = [(part.rows.tolist(), part.score.tolist()) for part in found.metrics["R@1"]]
    assert parts == [([0, 2], [False, True]), ([1, 3], [True, False])]
