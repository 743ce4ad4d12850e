"""Metrics of retrieval from ranks, and their standard errors by bootstrap over images.

The captions of one image succeed or fail together, so captions drawn independently would give too
small standard errors. The bootstrap therefore draws images with all their captions (cluster
bootstrap: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
"""

from collections.abc import Iterator

import numpy as np

#: Cut-offs k of R@k, and those that ``mean_recall`` is the mean of, as in papers.
CUTS, MEAN_CUTS = (1, 5, 10), (1, 5, 10)
#: Bootstrap draws per standard error.
RESAMPLES = 1000
_SEED = 0
#: Largest number of (resample, caption) counts in memory.
_MAX_COUNTS = 2**22


def measures(
    image_to_text: np.ndarray, text_to_image: np.ndarray, image_of: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Return every measure (b,) by name, for b resamples of the n images.

    ``i2t_R@k`` and ``t2i_R@k`` are percentages of queries with rank < k, for each k of :data:`CUTS`
    up to the number of candidates. ``R@1`` is the mean over both directions. ``mean_recall`` is the
    mean of the six recalls at :data:`MEAN_CUTS`, if all exist. ``*_median_rank`` counts ranks from
    1, as papers do.

    Args:
        image_to_text, text_to_image: ranks (n,) and (m,), counted from 0.
        image_of: (m,) index of the image of each caption.
        counts: (b, n) integers: resample b contains image i ``counts[b, i]`` times.
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
    recalls = [found.get(f"{way}_R@{cut}") for cut in MEAN_CUTS for way in ("i2t", "t2i")]
    if all(recall is not None for recall in recalls):
        result["mean_recall"] = np.mean(recalls, axis=0)
    result |= dict(sorted(found.items(), key=lambda item: item[0][:3]))
    result["i2t_median_rank"] = 1 + _weighted_median(image_to_text, counts)
    result["t2i_median_rank"] = 1 + _weighted_median(text_to_image, counts[:, image_of])
    return result


def standard_errors(
    image_to_text: np.ndarray, text_to_image: np.ndarray, image_of: np.ndarray
) -> dict[str, float]:
    """Return the bootstrap standard error of each measure; the seed is fixed."""
    draws = _draws(len(image_to_text), len(image_of))
    parts = [measures(image_to_text, text_to_image, image_of, counts) for counts in draws]
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: float(drawn.std(ddof=1)) for name, drawn in values.items()}


def _draws(images: int, captions: int) -> Iterator[np.ndarray]:
    """Yield counts (b, images) of :data:`RESAMPLES` resamples, in parts that fit in memory."""
    generator = np.random.default_rng(_SEED)
    rows = max(1, _MAX_COUNTS // captions)
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        drawn = generator.integers(0, images, (size, images)) + images * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * images).reshape(size, images)


def _weighted_median(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return medians (b,); sample b contains ``values[j]`` as often as ``counts[b, j]``."""
    order = np.argsort(values, kind="stable")
    ordered, running = values[order].astype(np.float64), counts[:, order].cumsum(1)
    total = running[:, -1:]
    lower, upper = (running <= (total - 1) // 2).sum(1), (running <= total // 2).sum(1)
    return (ordered[lower] + ordered[upper]) / 2
