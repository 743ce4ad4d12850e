"""Ranks in image-caption retrieval, both directions, by cosine similarity.

Papers call "recall@k" the share of queries with at least one correct item among the first k: a hit
rate (rank < k). The textbook's recall@k is the share of a query's relevant items among the first k,
which differs with five captions per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fimaq_core.errors import DataError, NumericsError
from fimaq_core.numerics import tf32_allowed
from tasks.common.cell.prediction_samples import leaders

#: Scores at a time: 64 MiB of float32.
_SCORES = 2**24


@dataclass(frozen=True)
class Ranks:
    """Ranks from 0, int32, of the best own caption (n,) and of the caption's image (m,).

    ``best_caption`` and ``best_image`` are the top-scoring items, among equals any; ``leading`` has
    index and score of the best captions of images asked for, among equals wrong ones first.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray
    best_caption: np.ndarray
    best_image: np.ndarray
    leading: list[list[tuple[int, float]]] = field(default_factory=list)


def pair_ranks(
    images: Tensor, captions: Tensor, image_of: np.ndarray, shown: Sequence[int] = ()
) -> Ranks:
    """Rank each image's captions and each caption's image by unit embeddings (n, d), (m, d).

    A rank is the number of wrong items that score at least as high as the best correct one. Ties
    count against the model, or a constant embedding would score; so do equal captions of different
    images, which no model can tell apart. Leading captions are given of the images ``shown``
    (rising). Raises DataError for an image without a caption, and NumericsError for NaN or
    infinity.
    """
    bare = np.setdiff1d(np.arange(len(images)), image_of)
    if len(bare):
        raise DataError(
            f"{len(bare)} of {len(images)} images have no caption; the first is number {bare[0]}."
        )
    image = torch.as_tensor(image_of, dtype=torch.long, device=images.device)
    caption = torch.arange(len(captions), device=images.device)
    with tf32_allowed(False):
        image_to_text, best_caption, leading = _ranks(images, captions, image, caption, shown)
        text_to_image, best_image, _ = _ranks(captions, images, caption, image)
    return Ranks(image_to_text, text_to_image, best_caption, best_image, leading)


def _ranks(
    queries: Tensor, candidates: Tensor, query: Tensor, item: Tensor, shown: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray, list[list[tuple[int, float]]]]:
    """Rank of the best correct candidate, best candidate, and leading ones.

    Candidate ``item[j]`` is correct for ``query[j]``. A matrix product rounds an entry by its place
    and by the shape of the product: scores are compared within one product only, and equal
    candidates are one column of it, or rounding would break their ties.
    """
    distinct, place = torch.unique(candidates, dim=0, return_inverse=True)
    ranks, best, leading = [], [], []
    rows = max(1, _SCORES // len(candidates))
    for start in range(0, len(queries), rows):
        chunk = queries[start : start + rows]
        scores = (
            (chunk @ distinct.T)[:, place]
            if len(distinct) < len(candidates)
            else chunk @ candidates.T
        )
        if not bool(torch.isfinite(scores).all()):
            raise NumericsError(
                "The embeddings have NaN or infinite values: check the weights and the recipe."
            )
        own = ((query >= start) & (query < start + rows)).nonzero()[:, 0]
        row = query[own] - start
        own_scores = scores[row, item[own]]
        top = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce(0, row, own_scores, "amax")
        own_at_top = torch.zeros_like(scores[:, 0], dtype=torch.long).index_add(
            0, row, (own_scores >= top[row]).long()
        )
        ranks.append((scores >= top[:, None]).sum(1) - own_at_top)
        best.append(scores.argmax(1))
        for one in [one for one in shown if start <= one < start + rows]:
            values, correct = (
                scores[one - start].cpu().numpy(),
                np.zeros(len(candidates), dtype=bool),
            )
            correct[item[query == one].cpu().numpy()] = True
            leading.append([(index, float(values[index])) for index in leaders(values, correct)])
    return (
        torch.cat(ranks).cpu().numpy().astype(np.int32),
        torch.cat(best).cpu().numpy().astype(np.int32),
        leading,
    )
