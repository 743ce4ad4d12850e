"""Calibration pairs: images of the training part, each with one of its captions."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fimaq_core.errors import DataError, ModelError
from fimaq_core.recipe import Recipe
from tasks.common.data.calibration import draw, positions_of, read_list
from tasks.common.data.files import id_below
from tasks.common.data.folders import open_folder
from tasks.common.data.images import Images
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet, LoadedModel
from tasks.retrieval.captions import imagenet_pairs, open_pairs, pairs_root
from tasks.retrieval.evaluate import truncated, truncation_notes
from tasks.retrieval.pairs import PairSource
from tasks.retrieval.zero_shot import LINES, class_names


def calibration_set(loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
    """Draw the calibration pairs, or take those of a list or a result record.

    The images come in a seeded permutation, with a caption drawn by seed and image id alone: a
    smaller sample is the beginning of a larger one. An image with the caption of an earlier one
    waits (:func:`in_rounds`): equal texts in a batch would make the contrastive target ambiguous.
    Raises DataError, and ModelError without a tokenizer.
    """
    if loaded.tokenizer is None:
        raise ModelError(
            f"{loaded.tag} has no tokenizer, so it cannot be calibrated on image-caption pairs."
        )
    pairs = training_pairs(loaded, data)
    captions: Sequence[str]
    order: Sequence[int]
    if data.calibration_list is not None:
        chosen, given = _listed(data.calibration_list, pairs, pairs_root(data, "train"))
        captions = (
            [drawn_caption(pairs, index, recipe.seed) for index in chosen]
            if given is None
            else given
        )
        order = in_rounds(captions) if given is None else range(len(chosen))
    else:
        chosen = np.random.default_rng(recipe.seed).permutation(len(pairs.image_ids)).tolist()
        captions = [drawn_caption(pairs, index, recipe.seed) for index in chosen]
        order = in_rounds(captions)
    transform = (
        loaded.train_transform if recipe.calibration_transform == "train" else loaded.eval_transform
    )
    ids = [pairs.image_ids[index] for index in chosen]
    images = Images(
        ids,
        [0] * len(ids),
        lambda position: pairs.read(chosen[position]),
        transform,
        data.skip_corrupt,
    )
    drawn = draw(images, order, recipe.calibration_images, recipe.seed)
    ids, texts = (
        [ids[position] for position in drawn.positions],
        [captions[position] for position in drawn.positions],
    )
    tokens = loaded.tokenizer(texts)
    digest = hashlib.sha256(json.dumps([recipe.calibration_transform, ids, texts]).encode())
    digest.update(drawn.images.numpy().tobytes())
    digest.update(tokens.numpy().tobytes())
    cut = truncated(loaded.tokenizer, tuple(texts), loaded.context_length)
    longer = truncation_notes(cut, len(texts), "calibration captions")
    return CalibrationSet(
        drawn.images,
        ids,
        recipe.calibration_transform,
        digest.hexdigest(),
        drawn.skipped,
        {"vision": drawn.images, "text": tokens},
        texts,
        cut,
        notes=[*pairs.notes, *drawn.notes, *longer],
    )


def training_pairs(loaded: LoadedModel, data: DataRequest) -> PairSource:
    """The pairs to calibrate on, for zero-shot made from labelled images. Raises DataError."""
    if data.evaluation == "zero-shot" and data.calibration_data is None and data.path is not None:
        labelled = open_folder(data.path, "train", data.class_order, wanted=LINES)
        return imagenet_pairs(labelled, class_names(data.path, labelled.class_names))
    return open_pairs(loaded, data, "train")


def drawn_caption(pairs: PairSource, image: int, seed: int) -> str:
    """The caption that stands for an image: a function of seed, image id and captions."""
    start, end = (int(pairs.starts[position]) for position in (image, image + 1))
    value = int.from_bytes(
        hashlib.sha256(f"caption/{seed}/{pairs.image_ids[image]}".encode()).digest()[:8], "big"
    )
    return pairs.captions[start + value % (end - start)]


def in_rounds(captions: Sequence[str]) -> list[int]:
    """Order of positions in which a text comes again only after all others that are left.

    Texts are equal where they differ in case and white space only.
    """
    seen: Counter[str] = Counter()
    rank: dict[str, int] = {}
    keys = []
    for position, caption in enumerate(captions):
        text = " ".join(caption.casefold().split())
        keys.append((seen[text], rank.setdefault(text, len(rank)), position))
        seen[text] += 1
    return [position for *_, position in sorted(keys)]


def _listed(path: Path, pairs: PairSource, root: Path | None) -> tuple[list[int], list[str] | None]:
    """Image indices of a calibration list, and their captions where it is a record."""
    found = read_list(path)
    ids = [id_below(name, root) for name in found.ids]
    what = f"{pairs.name} {pairs.split}"
    chosen = positions_of(ids, pairs.image_ids, path, what)
    if found.calibration is None:
        return chosen, None
    captions = found.calibration.get("captions")
    if not isinstance(captions, list) or len(captions) != len(ids):
        raise DataError(
            f"{path} is a result record without a caption for each calibration image: it is not one of retrieval."
        )
    foreign = [
        position
        for position, index in enumerate(chosen)
        if captions[position] not in pairs.captions[pairs.starts[index] : pairs.starts[index + 1]]
    ]
    if foreign:
        first = foreign[0]
        raise DataError(
            f"{path} pairs {len(foreign)} images with captions that they do not have in {what}, such as {ids[first]!r} with "
            f"{captions[first]!r}."
        )
    return chosen, captions
