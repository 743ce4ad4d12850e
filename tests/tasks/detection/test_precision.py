"""Average precision and its jackknife, against pycocotools and slow versions."""

from typing import Any

import numpy as np
import pytest
from coco_fakes import guesses, in_memory, random_coco
from pycocotools.cocoeval import COCOeval

from tasks.detection.annotations import Detections
from tasks.detection.coco import DetectionSource
from tasks.detection.evaluate import _found, _objects, coco_results, match
from tasks.detection.precision import (
    Averages,
    Level,
    Matches,
    area,
    area_without_each,
    average_precision,
    averages,
    contributions,
    standard_error,
)

IMAGES = 14


def setting(seed: int, **changes: Any) -> tuple[DetectionSource, Detections]:
    """Ellipses with crowds, images without objects or detections, and equal scores."""
    content = random_coco(IMAGES, seed, **changes)
    source = in_memory(content)
    categories = [entry["id"] for entry in source.coco["categories"]]
    results = []
    for index, entry in enumerate(source.images):
        results += coco_results(
            guesses(source.coco, index, seed, wrong=3.0 if index % 5 else 0.0),
            entry,
            categories,
            "x",
        )
    return source, Detections(results, list(range(IMAGES)))


def accumulated(source: DetectionSource, detections: Detections, kind: str) -> np.ndarray:
    """pycocotools' precisions (T, R, categories, sizes), -1 where there is none."""
    evaluation = COCOeval(_objects(source, detections), _found(source, detections, kind), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"][..., -1])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools(kind: str, seed: int) -> None:
    source, detections = setting(seed, categories=4)
    assert any(entry["iscrowd"] for entry in source.coco["annotations"])
    scores = [entry["score"] for entry in detections.results]
    assert len(set(scores)) < len(scores) / 3
    expected = accumulated(source, detections, kind)
    found = match(source, detections, kind)
    assert list(found) == ["all", "small", "medium", "large"]
    for number, categories in enumerate(found.values()):
        for category, matches in enumerate(categories):
            theirs = expected[:, :, category, number]
            if (theirs == -1).all():
                assert np.isnan(average_precision(matches)).all()
            else:
                assert np.abs(average_precision(matches) - theirs.mean(1)).max() < 1e-12
    whole = averages(found["all"]).whole
    assert 0.01 < whole.mean() < 0.99
    theirs = expected[..., 0]
    assert abs(whole.mean() - theirs[theirs > -1].mean()) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_left_out_images_are_as_if_they_were_not_there(seed: int) -> None:
    source, detections = setting(seed)
    matches = match(source, detections, "bbox")["all"]
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.choice(IMAGES, IMAGES - 4, replace=False)).tolist()
    ids = {source.images[index]["id"] for index in kept}
    fewer = Detections([entry for entry in detections.results if entry["image_id"] in ids], kept)
    expected = accumulated(source, fewer, "bbox")[..., 0]
    weights = np.isin(np.arange(IMAGES), kept).astype(int)
    for category, found in enumerate(matches):
        assert (
            np.abs(
                average_precision(drawn_out(found, weights)) - expected[:, :, category].mean(1)
            ).max()
            < 1e-12
        )


def drawn_out(matches: Matches, weights: np.ndarray) -> Matches:
    """A resample with every copy written out as an image of its own."""
    copies = np.repeat(np.arange(len(weights)), weights)
    levels = []
    for hits, misses, before in matches.levels:
        order = [(position, True, image) for position, image in enumerate(hits)]
        order += [(place - 0.5, False, image) for place, image in zip(before, misses, strict=True)]
        order.sort(key=lambda item: item[0])
        rows = [
            (right, copy) for _, right, image in order for copy in np.flatnonzero(copies == image)
        ]
        right = np.array([row[0] for row in rows], dtype=bool)
        owner = np.array([row[1] for row in rows], dtype=np.int64)
        levels.append(Level(owner[right], owner[~right], np.cumsum(right)[~right]))
    return Matches(matches.truths[copies], tuple(levels))


def slow_area(matches: Matches, weights: np.ndarray, level: int) -> float:
    """Area under the curve by walking along all detections."""
    hits, misses, before = matches.levels[level]
    order = sorted(
        [(k, 1, i) for k, i in enumerate(hits)]
        + [(k - 0.5, 0, i) for k, i in zip(before, misses, strict=True)]
    )
    right = wrong = 0.0
    curve = []
    for _, hit, image in order:
        right, wrong = right + hit * weights[image], wrong + (1 - hit) * weights[image]
        curve.append((right / float(weights @ matches.truths), right / max(right + wrong, 1e-9)))
    total = last = 0.0
    for number, (recall, _) in enumerate(curve):
        total += (recall - last) * max(precision for _, precision in curve[number:])
        last = recall
    return total


@pytest.mark.parametrize("size", ["all", "small"])
def test_area_without_each_image(size: str) -> None:
    source, detections = setting(5, categories=8)
    lost = 0
    for matches in match(source, detections, "segm")[size]:
        images, values = area_without_each(matches)
        for image in range(IMAGES):
            weights = (np.arange(IMAGES) != image).astype(int)
            expected = area(drawn_out(matches, weights))
            own = values[images == image] if image in images else area(matches)[None]
            assert np.allclose(own, expected, atol=1e-12, equal_nan=True)
            if np.isnan(expected).any():
                lost += 1
            else:
                assert np.allclose(
                    expected[[0, 5]],
                    [slow_area(matches, weights, level) for level in (0, 5)],
                    atol=1e-12,
                )
    assert size == "all" or lost


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    source, detections = setting(6)
    matches = match(source, detections, "bbox")["all"][0]
    whole = area_without_each(matches)
    monkeypatch.setattr("tasks.detection.precision._CELLS", 3 * (len(matches.levels[0].hits) + 1))
    parts = area_without_each(matches)
    assert np.array_equal(whole[0], parts[0])
    assert np.array_equal(whole[1], parts[1])


def test_averages_leave_out_absent_categories() -> None:
    source, detections = setting(7, categories=20)
    categories = match(source, detections, "bbox")["small"]
    owners = [np.count_nonzero(matches.truths) for matches in categories]
    assert 0 in owners
    assert 1 in owners
    found = averages(categories)
    for image in range(IMAGES):
        weights = (np.arange(IMAGES) != image).astype(int)
        each = np.array([area(drawn_out(matches, weights)) for matches in categories])
        assert np.allclose(found.without[image], np.nanmean(each, axis=0), atol=1e-12)
    nothing = Matches(np.zeros(IMAGES, dtype=int), categories[0].levels)
    assert np.isnan(averages([nothing]).whole).all()
    alone = next(matches for matches, count in zip(categories, owners, strict=True) if count == 1)
    single = averages([alone])
    assert (
        np.flatnonzero(np.isnan(single.without).all(1)).tolist()
        == np.flatnonzero(alone.truths).tolist()
    )


def by_hand(hits: list[int], misses: list[int], before: list[int], truths: list[int]) -> Matches:
    level = Level(
        np.array(hits, dtype=int), np.array(misses, dtype=int), np.array(before, dtype=int)
    )
    return Matches(np.array(truths), (level,))


def test_values_by_hand() -> None:
    # Right, wrong, right, of four objects: precision 1 up to recall 1/4, 2/3 up to 1/2.
    matches = by_hand([0, 1], [1], [1], [1, 3])
    assert area(matches)[0] == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    assert average_precision(matches)[0] == pytest.approx((26 * 1 + 25 * 2 / 3) / 101)
    images, values = area_without_each(matches)
    assert images.tolist() == [0, 1]
    assert values[:, 0].tolist() == pytest.approx([1 / 3 * 1 / 2, 1])
    assert area(by_hand([], [0], [0], [1, 0]))[0] == 0
    assert average_precision(by_hand([], [0], [0], [1, 0]))[0] == 0


def test_contributions_of_a_mean() -> None:
    # For a plain mean, each contribution is the sample itself; the standard error is the usual.
    values = np.random.default_rng(0).normal(size=50)
    without = (values.sum() - values) / 49
    assert np.allclose(contributions(values.mean(), without), values)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert contributions(3.0, without).mean() == pytest.approx(3.0)


def simulated(seed: int, images: int = 60) -> Matches:
    """Hits and misses with scores drawn anew; images differ in how hard they are."""
    rng = np.random.default_rng(seed)
    owner, scores, right, truths = [], [], [], np.zeros(images, dtype=int)
    for image in range(images):
        ease = rng.beta(2, 1)
        truths[image] = 1 + rng.poisson(2)
        for _ in range(truths[image]):
            if rng.random() < ease:
                owner.append(image), scores.append(rng.beta(4, 2)), right.append(True)
        for _ in range(rng.poisson(2)):
            owner.append(image), scores.append(rng.beta(2, 3)), right.append(False)
    flags = np.array(right)[None]
    return Matches.of(np.array(owner), np.array(scores), flags, np.zeros_like(flags), truths)


def test_standard_error_is_the_spread_over_samples() -> None:
    drawn = [simulated(seed) for seed in range(400)]
    spread = np.std([average_precision(matches)[0] for matches in drawn], ddof=1)
    errors = []
    for matches in drawn[:60]:
        found: Averages = averages([matches])
        errors.append(standard_error(contributions(found.whole[0], found.without[:, 0])))
    # The spread is known to one part in 28; jackknife variances tend to be too large.
    assert 0.9 < np.mean(errors) / spread < 1.2
