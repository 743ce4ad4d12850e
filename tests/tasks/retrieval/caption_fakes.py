"""Small image-caption data of every format, and a model that takes it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from tasks.common.task import LoadedModel

#: Splits of the small data in Karpathy's format, mixed as in the published files.
SPLITS = ("train", "test", "train", "restval", "train", "val", "test", "train")


class ByteTokenizer:
    """Bytes between a start and an end token, cut at the context length."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(caption.encode()) + 2 for caption in captions]

    def __call__(self, captions: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(rows, captions, strict=True):
            tokens = [1, *(value + 3 for value in caption.encode()), 2][: self.context_length]
            row[: len(tokens)] = torch.tensor(tokens)
        return rows


def loaded(context_length: int = 16, data: str | None = None) -> LoadedModel:
    """A model on 24 x 24 images with timm's transforms, colour jitter included."""
    size = (3, 24, 24)
    evaluation = create_transform(size, is_training=False, crop_pct=0.9)
    training = create_transform(size, is_training=True, color_jitter=0.4)
    tokenizer = ByteTokenizer(context_length)
    return LoadedModel(
        nn.Identity(),
        "some_clip.tag",
        "file",
        "0" * 64,
        0,
        evaluation,
        training,
        data,
        size,
        tokenizer,
        context_length,
    )


def colour_of(name: str) -> tuple[int, int, int]:
    """The only colour of an image, which identifies it."""
    generator = np.random.default_rng(sum(name.encode()) * 1000 + len(name))
    red, green, blue = generator.integers(0, 256, 3).tolist()
    return red, green, blue


def write_images(root: Path, names: Sequence[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 26), colour_of(path.name)).save(path)


def karpathy_entries(coco: bool, suffix: str = "png") -> list[dict[str, Any]]:
    """Entries of Karpathy's format with 5 captions per image, the second with 6."""
    entries = []
    for number, split in enumerate(SPLITS):
        sentences = [
            {
                "tokens": ["caption", str(turn)],
                "raw": f"Caption {turn} of image {number}. ",
                "imgid": number,
                "sentid": turn,
            }
            for turn in range(6 if number == 1 else 5)
        ]
        entry = {
            "filename": f"{number}.{suffix}",
            "imgid": number,
            "split": split,
            "sentences": sentences,
        }
        if coco:
            entry |= {"filepath": "train2014" if split == "train" else "val2014", "cocoid": number}
        entries.append(entry)
    return entries


def write_karpathy(root: Path, file: str, folder: str = "") -> list[dict[str, Any]]:
    """Small data of Karpathy's format under the name ``file``, images below ``folder``."""
    entries = karpathy_entries(coco="coco" in file)
    write_images(
        root / folder, [f"{entry.get('filepath', '.')}/{entry['filename']}" for entry in entries]
    )
    (root / file).write_text(json.dumps({"images": entries, "dataset": "small"}))
    return entries


def write_csv(root: Path, images: int = 12, test: int = 3) -> dict[str, list[str]]:
    """captions.csv with two captions per image, by image; the first images are for test."""
    captions = {
        f"img/{number}.png": [f"first of {number}", f"second of {number}"]
        for number in range(images)
    }
    write_images(root, list(captions))
    lines = ["image,caption,split"]
    for number, (image, own) in enumerate(captions.items()):
        lines += [f"{image},{caption},{'test' if number < test else 'train'}" for caption in own]
    (root / "captions.csv").write_text("\n".join(lines) + "\n")
    return captions
