"""Ranks in image-caption retrieval, in both directions, by cosine similarity.

In papers on retrieval, "recall@k" is a hit rate: the share of queries with at least one correct
item among the first k (rank < k). In textbooks, it is the share of a query's correct items that are
among the first k. Both differ if an image has several captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fimaq_core.errors import DataError, NumericsError
from fimaq_core.numerics import tf32_allowed
from tasks.common.cell.prediction_samples import leaders

#: Number of scores in memory at the same time: 64 MiB of float32.
_SCORES = 2**24

#: (index, score) of the best candidates, for each of some queries.
Leading = list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Ranks:
    """Ranks (int32, counted from 0) and best items of n images and m captions."""

    image_to_text: np.ndarray  # (n,) rank of the best own caption
    text_to_image: np.ndarray  # (m,) rank of the caption's image
    best_caption: np.ndarray  # (n,) a caption with the highest score
    best_image: np.ndarray  # (m,) an image with the highest score
    leading: Leading = field(default_factory=list)  # of some images; in ties wrong captions first


def pair_ranks(
    images: Tensor, captions: Tensor, image_of: np.ndarray, shown: Sequence[int] = ()
) -> Ranks:
    """Rank each image's captions and each caption's image by unit embeddings (n, d), (m, d).

    A rank is the number of wrong items that score at least as high as the best correct item. Ties
    count as wrong, so that constant embeddings get bad ranks. Equal captions of different images
    count as wrong too. ``shown`` are the images, in ascending order, with leading captions.
    Raises DataError: an image has no caption. Raises NumericsError: a score is NaN or infinite.
    """
    bare = np.setdiff1d(np.arange(len(images)), image_of)
    if len(bare):
        first = f"the first is number {bare[0]}"
        raise DataError(f"{len(bare)} of {len(images)} images have no caption; {first}.")
    image = torch.as_tensor(image_of, dtype=torch.long, device=images.device)
    caption = torch.arange(len(captions), device=images.device)
    with tf32_allowed(False):
        image_to_text, best_caption, leading = _ranks(images, captions, image, caption, shown)
        text_to_image, best_image, _ = _ranks(captions, images, caption, image)
    return Ranks(image_to_text, text_to_image, best_caption, best_image, leading)


def _ranks(
    queries: Tensor, candidates: Tensor, query: Tensor, item: Tensor, shown: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray, Leading]:
    """Return ranks of best correct candidates, best candidates, and leading candidates.

    Candidate ``item[j]`` is correct for ``query[j]``. In a matrix product, the rounding of an entry
    depends on its place and on the shape of the product. So only scores of one product are
    compared, and equal candidates share one column; otherwise rounding could break their ties.
    """
    distinct, place = torch.unique(candidates, dim=0, return_inverse=True)
    ranks, best, leading = [], [], []
    rows = max(1, _SCORES // len(candidates))
    for start in range(0, len(queries), rows):
        chunk = queries[start : start + rows]
        equal = len(distinct) < len(candidates)
        scores = (chunk @ distinct.T)[:, place] if equal else chunk @ candidates.T
        if not bool(torch.isfinite(scores).all()):
            raise NumericsError(
                "The embeddings have NaN or infinite values: check the weights and the recipe."
            )
        own = ((query >= start) & (query < start + rows)).nonzero()[:, 0]
        row = query[own] - start
        own_scores = scores[row, item[own]]
        top = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce(0, row, own_scores, "amax")
        own_at_top = torch.zeros_like(scores[:, 0], dtype=torch.long)
        own_at_top.index_add_(0, row, (own_scores >= top[row]).long())
        ranks.append((scores >= top[:, None]).sum(1) - own_at_top)
        best.append(scores.argmax(1))
        for one in (one for one in shown if start <= one < start + rows):
            values = scores[one - start].cpu().numpy()
            correct = np.isin(np.arange(len(candidates)), item[query == one].cpu().numpy())
            leading.append([(index, float(values[index])) for index in leaders(values, correct)])
    found = [torch.cat(parts).cpu().numpy().astype(np.int32) for parts in (ranks, best)]
    return found[0], found[1], leading
