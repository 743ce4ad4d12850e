"""Measures of retrieval from ranks, and their standard errors by bootstrap over images.

One hard image fails all its captions: treated as independent samples they would give standard
errors that are too small. The unit drawn is therefore an image with its captions (the cluster
bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
"""

from collections.abc import Iterator

import numpy as np

#: Cut-offs k of R@k.
CUTS = (1, 5, 10)
RESAMPLES = 1000
_SEED = 0
#: Weights of captions at a time.
_WEIGHTS = 2**22


def measures(
    image_to_text: np.ndarray, text_to_image: np.ndarray, image_of: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Every measure (b,) by name, of samples that hold image i ``counts[b, i]`` times.

    ``i2t_R@k`` and ``t2i_R@k`` are percentages of queries with rank < k, for those k of
    :data:`CUTS` that are no more than the candidates; ``R@1`` is the mean of both directions and
    ``mean_recall`` of all six, where there are six. ``*_median_rank`` are no percentages but ranks
    counted from 1, as in papers. Ranks (n,) and (m,) count from 0; ``image_of`` (m,) is the index
    of each caption's image.
    """
    images, captions = len(image_to_text), len(text_to_image)
    drawn_images = counts.sum(1)
    drawn_captions = counts @ np.bincount(image_of, minlength=images)
    found = {}
    for cut in CUTS:
        if cut <= captions:
            found[f"i2t_R@{cut}"] = 100 * (counts @ (image_to_text < cut)) / drawn_images
        if cut <= images:
            hits = np.bincount(image_of, weights=text_to_image < cut, minlength=images)
            found[f"t2i_R@{cut}"] = 100 * (counts @ hits) / drawn_captions
    result = {"R@1": (found["i2t_R@1"] + found["t2i_R@1"]) / 2}
    if len(found) == 2 * len(CUTS):
        result["mean_recall"] = np.mean(list(found.values()), axis=0)
    result |= dict(sorted(found.items(), key=lambda item: item[0][:3]))
    result["i2t_median_rank"] = 1 + _weighted_median(image_to_text, counts)
    result["t2i_median_rank"] = 1 + _weighted_median(text_to_image, counts[:, image_of])
    return result


def standard_errors(
    image_to_text: np.ndarray, text_to_image: np.ndarray, image_of: np.ndarray
) -> dict[str, float]:
    """Bootstrap standard error of each of :func:`measures`, in its unit; the same on every call."""
    parts = [
        measures(image_to_text, text_to_image, image_of, counts)
        for counts in _draws(len(image_to_text), len(image_of))
    ]
    return {
        name: float(np.concatenate([part[name] for part in parts]).std(ddof=1)) for name in parts[0]
    }


def _draws(images: int, captions: int) -> Iterator[np.ndarray]:
    """Multinomial counts (b, images), :data:`RESAMPLES` in all, whatever fits into memory."""
    generator = np.random.default_rng(_SEED)
    rows = max(1, _WEIGHTS // captions)
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        drawn = generator.integers(0, images, (size, images)) + images * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * images).reshape(size, images)


def _weighted_median(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Medians (b,) of samples that hold ``values[j]`` ``counts[b, j]`` times."""
    order = np.argsort(values, kind="stable")
    ordered, running = values[order].astype(np.float64), counts[:, order].cumsum(1)
    total = running[:, -1:]
    lower, upper = (running <= (total - 1) // 2).sum(1), (running <= total // 2).sum(1)
    return (ordered[lower] + ordered[upper]) / 2
