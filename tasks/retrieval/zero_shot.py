"""Zero-shot classification by class names (Radford et al., ICML 2021, arXiv:2103.00020).

The text of a class is its name in several templates. The class is represented by the mean of the
unit embeddings of these texts. An image gets the class with the highest cosine similarity.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn

from fimaq_core.documents import MOST_BYTES
from fimaq_core.errors import DataError
from fimaq_core.progress import OnProgress, Progress
from tasks.common.data.files import read_text
from tasks.common.data.imagenet import IMAGENET, is_imagenet, wordnet_ids
from tasks.common.record import Dataset
from tasks.retrieval.caption_files import check_text
from tasks.retrieval.evaluate import Encode, Encoders, embed_texts, normalised

CLASSNAMES_FILE = "classnames.txt"
#: Words for the order of classes in messages: the weights of CLIP have no classes.
LINES = f"of the lines in {CLASSNAMES_FILE}"
#: Functions from a class name to a text.
TEMPLATES: tuple[Callable[[str], str], ...] = tuple(OPENAI_IMAGENET_TEMPLATES)
_FORM = "one name per line, in the order of the labels"
#: Number of classes whose texts are in memory at the same time.
_CLASSES = 50


def imagenet_names(folders: Sequence[str]) -> tuple[str, ...]:
    """Return the names that the authors of CLIP gave to the classes with these WordNet ids."""
    names = dict(zip(wordnet_ids(), IMAGENET_CLASSNAMES, strict=True))
    return tuple(names[folder] for folder in folders)


def class_names(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes ``folders`` from ``classnames.txt`` in ``root``.

    Without this file, ImageNet's classes have the names of the authors of CLIP.
    Raises DataError: there are no names, or the file does not have one name per class.
    """
    path, classes = root / CLASSNAMES_FILE, len(folders)
    if not path.is_file():
        if is_imagenet(folders):
            return imagenet_names(folders)
        raise DataError(
            f"Zero-shot classification needs names of the {classes} classes: write them into "
            f"{path}, one name per line (UTF-8), in the order of their labels, from "
            f"{folders[0]!r} to {folders[-1]!r}."
        )
    names = tuple(line.strip() for line in read_text(path, MOST_BYTES).splitlines())
    if len(names) != classes:
        raise DataError(f"{path} has {len(names)} lines for {classes} classes: {_FORM}.")
    if "" in names:
        raise DataError(f"Line {names.index('') + 1} of {path} is empty: {_FORM}.")
    for number, name in enumerate(names, 1):
        check_text(name, f"{path}, line {number}: the class name")
    return names


def named_classes(dataset: Dataset, names: Sequence[str], folders: Sequence[str]) -> Dataset:
    """Return the entry for the record; its fingerprint includes class names and templates."""
    texts = [template(name) for name in names for template in TEMPLATES]
    fingerprint = hashlib.sha256("\n".join([dataset.fingerprint, *texts]).encode()).hexdigest()
    usual = dataset.name != IMAGENET or tuple(names) == imagenet_names(folders)
    name = dataset.name if usual else f"{dataset.name}, other class names"
    return dataset.model_copy(update={"fingerprint": fingerprint, "name": name})


def class_embeddings(
    encoders: Encoders,
    names: Sequence[str],
    batch_size: int,
    on_progress: OnProgress,
    templates: Sequence[Callable[[str], str]] = TEMPLATES,
) -> Tensor:
    """Return unit embeddings (classes, d), the means over ``templates``. Raises ModelError."""
    total = len(names) * len(templates)
    found = []
    for start in range(0, len(names), _CLASSES):
        chunk = names[start : start + _CLASSES]
        texts = [template(name) for name in chunk for template in templates]

        def advance(done: int, before: int = start * len(templates)) -> None:
            on_progress(Progress("embed classes", before + done, total))

        embeddings = embed_texts(encoders, texts, batch_size, advance)
        found.append(normalised(embeddings.view(-1, len(templates), embeddings.shape[1]).mean(1)))
    return torch.cat(found)


class ZeroShotClassifier(nn.Module):
    """Images (B, C, H, W) to logits (B, classes): cosine similarities times exp(``logit_scale``).

    The factor does not change ranks. With it, softmax gives the probabilities of the training.
    """

    def __init__(self, encode_image: Encode, embeddings: Tensor, logit_scale: Tensor) -> None:
        super().__init__()
        self.encode_image = encode_image
        # Classes with equal embeddings share a column, so they tie: a matrix product may round
        # equal columns differently.
        distinct, place = torch.unique(embeddings, dim=0, return_inverse=True)
        scale = logit_scale.detach().float().exp().to(embeddings.device)
        self.register_buffer("weight", scale * distinct.T)
        self.register_buffer("place", place)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits. Raises NumericsError: an embedding is NaN, infinite or zero."""
        return (normalised(self.encode_image(images)) @ self.weight)[:, self.place]
