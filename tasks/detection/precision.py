"""COCO's average precision from matched detections, on all images and without each image.

COCO averages the precision over 101 recalls; the precision at a recall is interpolated to the
highest one at that recall or beyond (Lin et al., ECCV 2014, arXiv:1405.0312; Everingham et al.,
IJCV 88, 2010). The sum needs precisions at true positives only, since a false positive only lowers
the precisions after it. So leaving out each image in turn is cheap. The jackknife (Efron and Stein,
Annals of Statistics 9, 1981) makes of these values the contribution of each image.

The jackknife uses the area under the interpolated curve, which the mean over 101 recalls
approximates. With many objects, one image moves the curve by less than the distance between two
recalls: the precision at a recall would stay or jump, by chance in the same direction for all
images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: Recalls at which precisions are averaged.
RECALLS = np.linspace(0.0, 1.0, 101)
#: Highest number of array elements that are computed at once.
_CELLS = 2**21

#: From running sums of true and of false positives at each true positive (B, n) and numbers of
#: objects (B,) to mean precisions (B,).
_Mean = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Level(NamedTuple):
    """Detections that count at one IoU threshold, highest score first."""

    hits: np.ndarray  # (n,) images of the true positives
    misses: np.ndarray  # (m,) images of the false positives
    before: np.ndarray  # (m,) number of true positives before each false positive


@dataclass(frozen=True)
class Matches:
    """Matched detections of one category and range of sizes."""

    truths: np.ndarray  # (I,) number of objects by image
    levels: tuple[Level, ...]  # by IoU threshold

    @classmethod
    def of(
        cls,
        images: np.ndarray,
        scores: np.ndarray,
        matched: np.ndarray,
        ignored: np.ndarray,
        truths: np.ndarray,
    ) -> "Matches":
        """Sort D detections with flags (T, D) by score; equal scores keep their order.

        ``images`` and ``scores`` are (D,), ``matched`` and ``ignored`` (T, D), ``truths`` (I,).
        """
        order = np.argsort(-scores, kind="stable")
        owner, levels = images[order].astype(np.int64), []
        for right, skipped in zip(matched[:, order], ignored[:, order], strict=True):
            hit, miss = right & ~skipped, ~right & ~skipped
            levels.append(Level(owner[hit], owner[miss], np.cumsum(hit)[miss]))
        return cls(truths, tuple(levels))


def average_precision(matches: Matches) -> np.ndarray:
    """Compute COCO's average precision by IoU threshold (T,), in 0..1; NaN without objects."""
    return _by_level(matches, _sampled)


def area(matches: Matches) -> np.ndarray:
    """Compute the area under the interpolated curve by IoU threshold (T,); NaN without objects."""
    return _by_level(matches, _area)


def _by_level(matches: Matches, mean: _Mean) -> np.ndarray:
    total = np.array([matches.truths.sum()], dtype=np.float64)
    values = []
    for hits, _, before in matches.levels:
        n = len(hits)
        wrong = np.bincount(before, minlength=n + 1).cumsum()[:n].astype(np.float64)
        values.append(mean(np.arange(1.0, n + 1)[None], wrong[None], total)[0])
    return np.array(values)


def area_without_each(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (B,) that change the :func:`area`, and areas (B, T) without each image."""
    involved = [matches.truths.nonzero()[0]]
    for level in matches.levels:
        involved += [level.hits, level.misses]
    images = np.unique(np.concatenate(involved))
    total = (matches.truths.sum() - matches.truths[images]).astype(np.float64)
    values = np.empty((len(images), len(matches.levels)))
    for column, level in enumerate(matches.levels):
        rows = max(1, _CELLS // (len(level.hits) + 1))
        for start in range(0, len(images), rows):
            part = slice(start, start + rows)
            values[part, column] = _without(level, images[part], total[part], len(matches.truths))
    return images, values


def _without(level: Level, images: np.ndarray, total: np.ndarray, count: int) -> np.ndarray:
    """Compute the areas (B,) without each of ``images`` (B,), of ``count`` images in total."""
    hits, misses, before = level
    n, rows = len(hits), len(images)
    row_of = np.full(count, -1)
    row_of[images] = np.arange(rows)

    def running(owner: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Count each image's detections up to each place, (rows, n + 1)."""
        kept = row_of[owner] >= 0
        cells = row_of[owner[kept]] * (n + 1) + place[kept]
        return np.bincount(cells, minlength=rows * (n + 1)).reshape(rows, n + 1).cumsum(axis=1)

    right = np.arange(1, n + 1) - running(hits, np.arange(n))[:, :n]
    wrong = np.bincount(before, minlength=n + 1).cumsum()[:n] - running(misses, before)[:, :n]
    return _area(right.astype(np.float64), wrong.astype(np.float64), total)


def _interpolated(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Compute the highest precision (B, n) at each true positive or beyond."""
    precision = right / (right + wrong + np.spacing(1))
    return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def _sampled(right: np.ndarray, wrong: np.ndarray, total: np.ndarray) -> np.ndarray:
    objects = np.where(total > 0, total, np.nan)
    reached = np.searchsorted(RECALLS, right / objects[:, None], side="right")
    weights = np.diff(reached, axis=1, prepend=0)  # number of recalls that each precision serves
    mean = (_interpolated(right, wrong) * weights).sum(axis=1) / len(RECALLS)
    return np.where(total > 0, mean, np.nan)


def _area(right: np.ndarray, wrong: np.ndarray, total: np.ndarray) -> np.ndarray:
    objects = np.where(total > 0, total, np.nan)
    return (_interpolated(right, wrong) * np.diff(right, axis=1, prepend=0)).sum(axis=1) / objects


class Averages(NamedTuple):
    """Averages over categories."""

    whole: np.ndarray  # (T,) average precision on all images
    without: np.ndarray  # (I, T) area without each image


def averages(categories: Sequence[Matches]) -> Averages:
    """Average over the ``categories`` (at least one) that have objects."""
    images, levels = len(categories[0].truths), len(categories[0].levels)
    present = [matches for matches in categories if matches.truths.any()]
    if not present:
        return Averages(np.full(levels, np.nan), np.full((images, levels), np.nan))
    whole = np.mean([average_precision(matches) for matches in present], axis=0)
    total, change, lost = np.zeros(levels), np.zeros((images, levels)), np.zeros((images, 1))
    for matches in present:
        everything = area(matches)
        involved, values = area_without_each(matches)
        gone = np.isnan(values[:, :1])
        total += everything
        change[involved] += np.where(gone, 0.0, values) - everything
        lost[involved] += gone
    left = np.where(lost < len(present), len(present) - lost, np.nan)
    return Averages(whole, (total + change) / left)


def contributions(whole: float, without: np.ndarray) -> np.ndarray:
    """Compute the jackknife's pseudo-values (I,) from areas without each image (I,).

    Their mean is ``whole``. So the difference of two methods on the same images is the mean
    difference of their contributions, and has the standard error of that mean.
    """
    return whole + (len(without) - 1) * (without.mean() - without)


def standard_error(shares: np.ndarray) -> float:
    """Compute the jackknife's standard error from :func:`contributions`."""
    return float(shares.std(ddof=1) / math.sqrt(len(shares)))
