"""Calibration pairs of the retrieval task: training images, each with one of its captions."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fimaq_core.errors import DataError, ModelError
from fimaq_core.recipe import Recipe
from tasks.common.data.calibration import positions_of, read_list, take
from tasks.common.data.files import id_below
from tasks.common.data.folders import open_folder
from tasks.common.data.images import Images
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet, LoadedModel
from tasks.retrieval.captions import PairSource, imagenet_pairs, open_pairs, pairs_root
from tasks.retrieval.evaluate import truncated, truncation_notes
from tasks.retrieval.zero_shot import LINES, class_names


def calibration_set(loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
    """Draw the calibration pairs, or take the pairs of a calibration list or result record.

    The seed gives the order of images, and with the image id the caption. So a small sample is the
    beginning of a larger one. Images with equal captions are far apart (:func:`in_rounds`), since
    equal captions in a batch make the target ambiguous.
    Raises DataError: the data do not fit. Raises ModelError: the model has no tokenizer.
    """
    if loaded.tokenizer is None:
        raise ModelError(f"{loaded.tag} has no tokenizer, so captions cannot calibrate it.")
    pairs, seed, given = training_pairs(loaded, data), recipe.seed, None
    if data.calibration_list is not None:
        chosen, given = _listed(data.calibration_list, pairs, pairs_root(data, "train"))
    else:
        chosen = np.random.default_rng(seed).permutation(len(pairs.image_ids)).tolist()
    captions = given or [drawn_caption(pairs, index, seed) for index in chosen]
    order = in_rounds(captions) if given is None else range(len(chosen))
    kind = recipe.calibration_transform
    transform = loaded.train_transform if kind == "train" else loaded.eval_transform
    ids = [pairs.image_ids[index] for index in chosen]

    def read(position: int) -> object:
        return pairs.read(chosen[position])

    images = Images(ids, [0] * len(ids), read, transform, data.skip_corrupt)
    drawn = take(images, order, recipe.calibration_images, seed)
    pixels = torch.stack(drawn.images)
    ids = [ids[position] for position in drawn.positions]
    texts = [captions[position] for position in drawn.positions]
    tokens = loaded.tokenizer(texts)
    digest = hashlib.sha256(json.dumps([kind, ids, texts]).encode())
    digest.update(pixels.numpy().tobytes())
    digest.update(tokens.numpy().tobytes())
    cut = truncated(loaded.tokenizer, texts, loaded.context_length)
    longer = truncation_notes(cut, len(texts), "calibration captions")
    return CalibrationSet(
        images=pixels,
        ids=ids,
        transform=kind,
        fingerprint=digest.hexdigest(),
        skipped=drawn.skipped,
        inputs={"vision": pixels, "text": tokens},
        captions=texts,
        truncated_captions=cut,
        notes=[*pairs.notes, *images.notes(), *longer],
        dataset=pairs.name,
        split=pairs.split,
        listed=data.calibration_list is not None,
    )


def training_pairs(loaded: LoadedModel, data: DataRequest) -> PairSource:
    """Return the training pairs; for zero-shot, labelled images with captions. Raises DataError."""
    if data.evaluation == "zero-shot" and data.calibration_data is None and data.path is not None:
        labelled = open_folder(data.path, "train", data.class_order, wanted=LINES)
        return imagenet_pairs(labelled, class_names(data.path, labelled.class_names))
    return open_pairs(loaded, data, "train")


def drawn_caption(pairs: PairSource, image: int, seed: int) -> str:
    """Return one caption of an image; only seed, image id and captions decide which one."""
    name, own = pairs.listed[image]
    digest = hashlib.sha256(f"caption/{seed}/{name}".encode()).digest()
    return own[int.from_bytes(digest[:8], "big") % len(own)]


def in_rounds(captions: Sequence[str]) -> list[int]:
    """Return positions in rounds: each round has every text at most once, in the given order.

    Texts count as equal if they differ in case and white space only.
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
    """Return the image indices of a calibration list, and their captions if it is a record."""
    names, calibration = read_list(path)
    ids = [id_below(name, root) for name in names]
    what = f"{pairs.name} {pairs.split}"
    chosen = positions_of(ids, pairs.image_ids, path, what)
    if calibration is None:
        return chosen, None
    captions = calibration.get("captions")
    if not isinstance(captions, list) or len(captions) != len(ids):
        raise DataError(
            f"{path} is a result record without one caption per calibration image: give a record "
            "of the retrieval task."
        )
    used = zip(ids, captions, chosen, strict=True)
    foreign = [(name, text) for name, text, index in used if text not in pairs.listed[index][1]]
    if foreign:
        name, text = foreign[0]
        raise DataError(
            f"{path} pairs {len(foreign)} images with captions that they do not have in {what}, "
            f"such as {name!r} with {text!r}."
        )
    return chosen, captions
