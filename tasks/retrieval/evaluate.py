"""Image-caption retrieval of a model with two encoders, with the outcome of every query."""

from collections.abc import Callable, Sequence
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
from tasks.retrieval.bootstrap import measures, standard_errors
from tasks.retrieval.pairs import PairSource
from tasks.retrieval.ranks import Ranks, pair_ranks

#: Images (n, C, H, W) or token ids (n, L) to embeddings (n, d) of any length.
Encode = Callable[[Tensor], Tensor]
#: Texts to token ids (n, L) int64.
Tokenizer = Callable[[list[str]], Tensor]
#: Texts that are tokenized at a time.
_TEXTS = 4096


def evaluate_pairs(
    encode_image: Encode,
    encode_text: Encode,
    images: Images,
    source: PairSource,
    tokenizer: Tokenizer,
    device: torch.device,
    batch_size: int,
    workers: int,
    on_progress: OnProgress,
    truncated_captions: int | None = None,
) -> Evaluation:
    """Measure two encoders on all pairs of ``source``.

    The encoders map (B, C, H, W), and token ids (B, L), on ``device`` to embeddings (B, d) of any
    length. ``images`` are those of ``source`` with their transform; one that was skipped takes its
    captions along.

    Returns the number of images, and outcomes with one row per query, images first: ``sample``
    (``image:<id>`` or ``caption:<image id>#<number within the image>``); ``direction`` (0 image to
    text, 1 text to image); ``rank`` of the best correct item, from 0, and ``correct`` if it is 0;
    ``best``, index of the top-scoring item in ``source``, among equals any; ``weight``, with which
    the mean of ``correct`` is R@1 (both directions count the same); ``cluster``, index of the
    query's image in ``source`` (different images are independent). Raises DataError, ModelError,
    NumericsError.
    """
    total = len(images) + len(source.captions)
    positions, embedded = [], []
    for batch in image_outputs(encode_image, images, device, batch_size, workers):
        positions.append(batch.positions)
        embedded.append(normalised(batch.values))
        on_progress(Progress("evaluate", batch.done, total))
    if not positions:
        raise DataError("None of the images could be read.")
    kept, image_embeddings = torch.cat(positions).numpy(), torch.cat(embedded)
    kept_captions = np.flatnonzero(np.isin(source.image_of, kept))
    texts = [source.captions[index] for index in kept_captions]
    before = total - len(texts)
    caption_embeddings = embed_texts(
        encode_text,
        tokenizer,
        texts,
        device,
        batch_size,
        lambda done: on_progress(Progress("evaluate", before + done, total)),
    )
    image_of = np.searchsorted(kept, source.image_of[kept_captions])
    shown = Spread(len(images)).take(kept.tolist())
    ranks = pair_ranks(image_embeddings, caption_embeddings, image_of, shown)
    dataset = source.describe().model_copy(
        update={"captions": len(source.captions), "truncated_captions": truncated_captions}
    )
    skipped = [source.image_ids[index] for index in np.setdiff1d(np.arange(len(images)), kept)]
    examples = _examples(ranks, source, kept[shown], kept_captions)
    outcomes = _outcomes(ranks, source, kept, kept_captions)
    longer = truncation_notes(truncated_captions, len(source.captions), "captions")
    measured = _metrics(ranks, image_of), len(kept), outcomes, dataset, skipped
    return Evaluation(*measured, examples=examples, notes=[*images.notes(), *longer])


def truncation_notes(count: int | None, among: int, what: str) -> list[str]:
    if not count:
        return []
    return [f"{count:,} of {among:,} {what} are longer than the model's context and were cut off"]


def truncated(
    tokenizer: Tokenizer, captions: tuple[str, ...], context_length: int | None
) -> int | None:
    """Number of captions longer than the model's context; None if the tokenizer cannot tell."""
    lengths = getattr(tokenizer, "lengths", None)
    if lengths is None or context_length is None:
        return None
    return sum(int(length) > context_length for length in lengths(list(captions)))


def _metrics(ranks: Ranks, image_of: np.ndarray) -> dict[str, Metric]:
    once = np.ones((1, len(ranks.image_to_text)), dtype=np.int64)
    values = measures(ranks.image_to_text, ranks.text_to_image, image_of, once)
    errors = standard_errors(ranks.image_to_text, ranks.text_to_image, image_of)
    return {
        name: Metric(value=float(value[0]), stderr=errors[name]) for name, value in values.items()
    }


def _outcomes(
    ranks: Ranks, source: PairSource, kept: np.ndarray, kept_captions: np.ndarray
) -> dict[str, np.ndarray]:
    images, captions = len(kept), len(kept_captions)
    owner = source.image_of[kept_captions]
    number = kept_captions - np.searchsorted(source.image_of, owner)
    rank = np.concatenate([ranks.image_to_text, ranks.text_to_image])
    names = [f"image:{source.image_ids[index]}" for index in kept]
    names += [
        f"caption:{source.image_ids[image]}#{index}"
        for image, index in zip(owner, number, strict=True)
    ]
    queries = images + captions
    return {
        "sample": np.array(names),
        "direction": np.repeat(np.array([0, 1], dtype=np.int8), [images, captions]),
        "rank": rank,
        "correct": rank < 1,
        "best": np.concatenate([kept_captions[ranks.best_caption], kept[ranks.best_image]]).astype(
            np.int32
        ),
        "weight": np.repeat(
            np.array([queries / (2 * images), queries / (2 * captions)], dtype=np.float32),
            [images, captions],
        ),
        "cluster": np.concatenate([kept, owner]).astype(np.int32),
    }


def _examples(
    ranks: Ranks, source: PairSource, images: np.ndarray, kept_captions: np.ndarray
) -> list[dict[str, Any]]:
    """The best captions of some images, which are given as indices in ``source``."""
    found = []
    for image, leading in zip(images.tolist(), ranks.leading, strict=True):
        answers = [(int(kept_captions[index]), score) for index, score in leading]
        own = np.flatnonzero(source.image_of == image)[:CAPTIONS]
        top = [
            {
                "caption": shortened(source.captions[index]),
                "score": score,
                "correct": int(source.image_of[index]) == image,
            }
            for index, score in answers
        ]
        found.append(
            {
                "sample": source.image_ids[image],
                "truth": [shortened(source.captions[index]) for index in own],
                "top": top,
            }
        )
    return found


def normalised(embeddings: Tensor) -> Tensor:
    """Embeddings (n, d) at unit length, in float32. Raises NumericsError."""
    embeddings = embeddings.float()
    lengths = embeddings.norm(dim=-1, keepdim=True)
    if not bool(torch.isfinite(lengths).all()):
        raise NumericsError(
            "The embeddings have NaN or infinite values: check the weights and the recipe."
        )
    if not bool((lengths > 0).all()):
        raise NumericsError(
            "An embedding is zero, so that it is similar to nothing: check the weights and the recipe."
        )
    return embeddings / lengths


@torch.no_grad()
def embed_texts(
    encode_text: Encode,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    device: torch.device,
    batch_size: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Embed ``texts`` as (n, d) on ``device``; ``advance`` gets the number of those done.

    Texts of equal tokens are encoded once: the last bits of an embedding depend on its place in the
    batch, and these shall tie. Raises ModelError, NumericsError.
    """
    rows = torch.cat(
        [tokenizer(list(texts[start : start + _TEXTS])) for start in range(0, len(texts), _TEXTS)]
    )
    distinct, place = torch.unique(rows, dim=0, return_inverse=True)
    embeddings = []
    for tokens in torch.split(distinct, batch_size):
        try:
            values = encode_text(tokens.to(device))
        except (RuntimeError, AssertionError, IndexError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise ModelError(
                f"The model does not take tokens of shape {tuple(tokens.shape[1:])}: {error}"
            ) from error
        embeddings.append(normalised(values))
        advance(len(texts) - len(distinct) + sum(len(part) for part in embeddings))
    return torch.cat(embeddings)[place.to(device)]
