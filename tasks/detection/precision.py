"""COCO's average precision from matched detections, as a function of the images that count.

Of the precisions at 101 recalls, each interpolated to the highest precision at that recall or
beyond (Lin et al., ECCV 2014, arXiv:1405.0312; Everingham et al., IJCV 88, 2010), a false positive
only lowers those behind it. Written in terms of true positives alone, it is cheap to leave out
every image in turn, for the jackknife (Efron and Stein, Annals of Statistics 9, 1981), whose
pseudo-values give each image a contribution.

With many objects, leaving out one image moves the curve by less than the distance of two recalls: a
precision at one recall then stays or jumps, by chance the same way for all images. The jackknife is
therefore taken of the area under the interpolated curve, which the mean over 101 recalls
approximates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: The recalls at which precisions are averaged.
RECALLS = np.linspace(0.0, 1.0, 101)
#: Numbers at a time.
_CELLS = 2**21

_Mean = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Level(NamedTuple):
    """Detections at one IoU threshold by falling score, without those that do not count.

    ``hits`` (n,) and ``misses`` (m,) are the images of true and false positives, ``before`` (m,)
    the number of true positives before each of the latter.
    """

    hits: np.ndarray
    misses: np.ndarray
    before: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Detections of one category and range of sizes, by IoU threshold; objects (I,) by image."""

    truths: np.ndarray
    levels: tuple[Level, ...]

    @classmethod
    def of(
        cls,
        images: np.ndarray,
        scores: np.ndarray,
        matched: np.ndarray,
        ignored: np.ndarray,
        truths: np.ndarray,
    ) -> "Matches":
        """Make one from D detections with (T, D) flags; equal scores keep their order."""
        order = np.argsort(-scores, kind="stable")
        owner, levels = images[order].astype(np.int64), []
        for right, skipped in zip(matched[:, order], ignored[:, order], strict=True):
            hit, miss = right & ~skipped, ~right & ~skipped
            levels.append(Level(owner[hit], owner[miss], np.cumsum(hit)[miss]))
        return cls(truths, tuple(levels))


def average_precision(matches: Matches) -> np.ndarray:
    """COCO's average precision at each IoU threshold (T,), in 0..1; NaN where no object counts."""
    return _by_level(matches, _sampled)


def area(matches: Matches) -> np.ndarray:
    """Area under the interpolated curve; arguments and shape as of :func:`average_precision`."""
    return _by_level(matches, _area)


def _by_level(matches: Matches, mean: _Mean) -> np.ndarray:
    total = np.array([matches.truths.sum()], dtype=np.float64)
    values = []
    for hits, _, before in matches.levels:
        wrong = (
            np.bincount(before, minlength=len(hits) + 1).cumsum()[: len(hits)].astype(np.float64)
        )
        values.append(mean(np.arange(1.0, len(hits) + 1)[None], wrong[None], total)[0])
    return np.array(values)


def area_without_each(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """Images (B,) that have a part in the :func:`area`, and the areas (B, T) without each."""
    involved = [
        matches.truths.nonzero()[0],
        *(part for level in matches.levels for part in (level.hits, level.misses)),
    ]
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
    hits, misses, before = level
    n, rows = len(hits), len(images)
    row_of = np.full(count, -1)
    row_of[images] = np.arange(rows)

    def running(owner: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(rows, n + 1): of each image, how many at a place or before."""
        kept = row_of[owner] >= 0
        cells = row_of[owner[kept]] * (n + 1) + place[kept]
        return np.bincount(cells, minlength=rows * (n + 1)).reshape(rows, n + 1).cumsum(axis=1)

    right = np.arange(1, n + 1) - running(hits, np.arange(n))[:, :n]
    wrong = np.bincount(before, minlength=n + 1).cumsum()[:n] - running(misses, before)[:, :n]
    return _area(right.astype(np.float64), wrong.astype(np.float64), total)


def _interpolated(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Highest precision at a true positive or beyond, from running sums there, (B, n) each."""
    precision = right / (right + wrong + np.spacing(1))
    return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def _sampled(right: np.ndarray, wrong: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Means (B,) over the recalls; ``total`` (B,) are the objects."""
    objects = np.where(total > 0, total, np.nan)
    reached = np.searchsorted(RECALLS, right / objects[:, None], side="right")
    mean = (_interpolated(right, wrong) * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(
        RECALLS
    )
    return np.where(total > 0, mean, np.nan)


def _area(right: np.ndarray, wrong: np.ndarray, total: np.ndarray) -> np.ndarray:
    objects = np.where(total > 0, total, np.nan)
    return (_interpolated(right, wrong) * np.diff(right, axis=1, prepend=0)).sum(axis=1) / objects


class Averages(NamedTuple):
    """Means over categories (T,) on all images, and areas (I, T) without each image."""

    whole: np.ndarray
    without: np.ndarray


def averages(categories: Sequence[Matches]) -> Averages:
    """Average over those of ``categories`` (at least one) that have objects."""
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
    """Jackknife pseudo-values (I,) from areas without each image, moved to have the mean ``whole``.

    A contribution is a linear part of the value: differences of two methods on the same images have
    the mean of the differences of contributions, and the standard error of that mean.
    """
    return whole + (len(without) - 1) * (without.mean() - without)


def standard_error(shares: np.ndarray) -> float:
    """The jackknife's standard error from :func:`contributions`."""
    return float(shares.std(ddof=1) / math.sqrt(len(shares)))
