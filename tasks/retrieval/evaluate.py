"""Evaluation of image-caption retrieval with two encoders, with the outcome of every query."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fimaq_core.errors import DataError, ModelError, NumericsError
from fimaq_core.progress import OnProgress, Progress
from tasks.common.cell.prediction_samples import CAPTIONS, Spread, shortened
from tasks.common.data.images import Images, image_outputs
from tasks.common.record import Metric
from tasks.common.task import Evaluation
from tasks.retrieval.captions import PairSource
from tasks.retrieval.metrics import measures, standard_errors
from tasks.retrieval.ranks import Ranks, pair_ranks

#: Images (n, C, H, W) or token ids (n, L) to embeddings (n, d) of any length.
Encode = Callable[[Tensor], Tensor]
#: Texts to token ids (n, L) int64.
Tokenize = Callable[[list[str]], Tensor]
#: Number of texts that one call tokenizes.
_TEXTS = 4096


@dataclass(frozen=True)
class Encoders:
    """Encoders of a model on ``device``, and its tokenizer."""

    image: Encode
    text: Encode
    tokenize: Tokenize
    device: torch.device
    context_length: int | None = None  # largest number of tokens of a text, if it is known


def evaluate_pairs(
    encoders: Encoders,
    images: Images,
    source: PairSource,
    batch_size: int,
    workers: int,
    on_progress: OnProgress,
) -> Evaluation:
    """Measure retrieval in both directions on all pairs of ``source``.

    ``images`` are the images of ``source`` with their transform. If an image is skipped, its
    captions are skipped too.

    Returns:
        Metrics, the number of images, and outcomes with one row per query, images first:
        ``sample``: ``image:<id>``, or ``caption:<image id>#<number of the caption of this image>``.
        ``direction``: 0 for image to text, 1 for text to image.
        ``rank``: rank of the best correct item, counted from 0. ``correct``: True for rank 0.
        ``best``: index in ``source`` of an item with the highest score.
        ``weight``: weight of the row in R@1, the weighted mean of ``correct`` over both directions.
        ``cluster``: index in ``source`` of the query's image; different images are independent.

    Raises:
        DataError: no image could be read, or an image is damaged and ``images`` does not skip it.
        ModelError: an encoder does not take its inputs.
        NumericsError: an embedding is NaN, infinite or zero.
    """
    total = len(images) + len(source.captions)
    positions, embedded = [], []
    for batch in image_outputs(encoders.image, images, encoders.device, batch_size, workers):
        positions.append(batch.positions)
        embedded.append(normalised(batch.values))
        on_progress(Progress("evaluate", batch.done, total))
    if not positions:
        raise DataError("None of the images could be read.")
    kept = torch.cat(positions).numpy()
    kept_captions = np.flatnonzero(np.isin(source.image_of, kept))
    texts = [source.captions[index] for index in kept_captions]

    def advance(done: int) -> None:
        on_progress(Progress("evaluate", total - len(texts) + done, total))

    captions = embed_texts(encoders, texts, batch_size, advance)
    image_of = np.searchsorted(kept, source.image_of[kept_captions])
    shown = Spread(len(images)).take(kept.tolist())
    embeddings = torch.cat(embedded)
    ranks = pair_ranks(embeddings, captions, image_of, shown)
    ranked = ranks.image_to_text, ranks.text_to_image, image_of
    values = measures(*ranked, counts=np.ones((1, len(kept)), dtype=np.int64))
    errors = standard_errors(*ranked)
    cut = truncated(encoders.tokenize, source.captions, encoders.context_length)
    sizes = {"captions": len(source.captions), "truncated_captions": cut}
    return Evaluation(
        metrics={
            name: Metric(value=float(value[0]), stderr=errors[name])
            for name, value in values.items()
        },
        n=len(kept),
        outcomes=_outcomes(ranks, source, kept, kept_captions),
        dataset=source.describe().model_copy(update=sizes),
        outputs={"image": embeddings.cpu().numpy(), "caption": captions.cpu().numpy()},
        skipped=[source.image_ids[index] for index in np.setdiff1d(np.arange(len(images)), kept)],
        examples=_examples(ranks, source, kept[shown], kept_captions),
        notes=[*images.notes(), *truncation_notes(cut, len(source.captions), "captions")],
    )


def truncation_notes(count: int | None, among: int, what: str) -> list[str]:
    """Return a note if ``count`` texts of ``among`` were cut off; no note if no text was."""
    if not count:
        return []
    return [f"{count:,} of {among:,} {what} are longer than the model's context and were cut off"]


def truncated(tokenize: Tokenize, texts: Sequence[str], context_length: int | None) -> int | None:
    """Return the number of texts longer than the context; None if lengths are not known."""
    lengths = getattr(tokenize, "lengths", None)
    if lengths is None or context_length is None:
        return None
    return sum(int(length) > context_length for length in lengths(list(texts)))


def _outcomes(
    ranks: Ranks, source: PairSource, kept: np.ndarray, kept_captions: np.ndarray
) -> dict[str, np.ndarray]:
    counts = [len(kept), len(kept_captions)]
    owner = source.image_of[kept_captions]
    number = kept_captions - source.starts[owner]
    rank = np.concatenate([ranks.image_to_text, ranks.text_to_image])
    ids = source.image_ids
    names = [f"image:{ids[index]}" for index in kept]
    names += [f"caption:{ids[image]}#{n}" for image, n in zip(owner, number, strict=True)]
    best = [kept_captions[ranks.best_caption], kept[ranks.best_image]]
    weights = np.array([sum(counts) / (2 * count) for count in counts], dtype=np.float32)
    return {
        "sample": np.array(names),
        "direction": np.repeat(np.array([0, 1], dtype=np.int8), counts),
        "rank": rank,
        "correct": rank < 1,
        "best": np.concatenate(best).astype(np.int32),
        "weight": np.repeat(weights, counts),
        "cluster": np.concatenate([kept, owner]).astype(np.int32),
    }


def _examples(
    ranks: Ranks, source: PairSource, images: np.ndarray, kept_captions: np.ndarray
) -> list[dict[str, Any]]:
    """Return prediction samples: the best captions of some ``images`` (indices in ``source``)."""
    found = []
    for image, leading in zip(images.tolist(), ranks.leading, strict=True):
        name, own = source.listed[image]
        top = []
        for place, score in leading:
            index = int(kept_captions[place])
            correct = int(source.image_of[index]) == image
            caption = shortened(source.captions[index])
            top.append({"caption": caption, "score": score, "correct": correct})
        found.append({"sample": name, "truth": [*map(shortened, own[:CAPTIONS])], "top": top})
    return found


def normalised(embeddings: Tensor) -> Tensor:
    """Return embeddings (n, d) divided by their lengths, float32. Raises NumericsError."""
    embeddings = embeddings.float()
    lengths = embeddings.norm(dim=-1, keepdim=True)
    advice = "check the weights and the recipe."
    if not bool(torch.isfinite(lengths).all()):
        raise NumericsError(f"The embeddings have NaN or infinite values: {advice}")
    if not bool((lengths > 0).all()):
        raise NumericsError(f"An embedding is zero, so it has no similarities: {advice}")
    return embeddings / lengths


@torch.no_grad()
def embed_texts(
    encoders: Encoders, texts: Sequence[str], batch_size: int, advance: Callable[[int], None]
) -> Tensor:
    """Return unit embeddings (n, d) of ``texts``; ``advance`` gets the number of finished texts.

    Texts with equal tokens are encoded once and get equal embeddings. Otherwise they would differ
    in the last bits, which depend on the place in the batch. Raises ModelError, NumericsError.
    """
    parts = [list(texts[start : start + _TEXTS]) for start in range(0, len(texts), _TEXTS)]
    rows = torch.cat([encoders.tokenize(part) for part in parts])
    distinct, place = torch.unique(rows, dim=0, return_inverse=True)
    embeddings = []
    for tokens in torch.split(distinct, batch_size):
        try:
            values = encoders.text(tokens.to(encoders.device))
        except (RuntimeError, AssertionError, IndexError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            shape = tuple(tokens.shape[1:])
            raise ModelError(f"The model does not take tokens of shape {shape}: {error}") from error
        embeddings.append(normalised(values))
        advance(len(texts) - len(distinct) + sum(len(part) for part in embeddings))
    return torch.cat(embeddings)[place.to(encoders.device)]
