"""Tests of the digit scenes, of their tokenizer and of the committed demo model."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fimaq_core.errors import ModelError
from tasks.common.data.augment import RandomDigitWarp
from tasks.common.demo.digits import PARTS, load_digits, split_digits
from tasks.retrieval.demo import models, scenes

COUNTS = {"train": 4096, "val": 500, "test": 1000}
FINGERPRINTS = {
    "train": "75974c60a0206bd6b0858a614b1f9e7b9a2b97ed3d3f7407dea3b101d405b1bc",
    "val": "9808096502de5ffd3155e063fb0fafaacc207c14a56089dbabc55c746c9bbb06",
    "test": "87b33181146a014e94e86154939d794b774f0f817837e66a487be5079aaaa00b",
}
PLACES = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@cache
def part_of(part: str) -> scenes.DigitScenes:
    return scenes.DigitScenes(part)


@cache
def trained() -> nn.Module:
    model = models.DEMO.build("demo_clip")
    model.load_state_dict(load_file(models.DEMO.weights_path("demo_clip")), strict=True)
    return model


def parse(caption: str) -> dict[int, tuple[int, bool]]:
    """Read a caption by its words: digit and size (True for large) by cell."""
    shown = {}
    for item in re.split(r"; |, | and ", caption):
        place = next(place for place in PLACES if place in item)
        words = set(re.findall(r"[a-z]+", item.replace(place, "")))
        (digit,) = words & set(NUMBERS)
        (size,) = words & {"small", "large"}
        assert words <= {digit, size, "a", "at"}
        assert PLACES[place] not in shown
        shown[PLACES[place]] = (NUMBERS.index(digit), size == "large")
    return shown


def test_parts_share_no_digit() -> None:
    used = {}
    for part in PARTS:
        data = part_of(part)
        assert len(data) == len(data.ids) == len(data.captions) == len(data.pixels) == COUNTS[part]
        assert data.pixels.shape == (COUNTS[part], 48, 48)
        assert data.pixels.dtype == np.uint8
        assert len(set(data.ids)) == len(data)
        used[part] = set(data.plan.sources[data.plan.sources >= 0].tolist())
        assert used[part] == set(split_digits()[part])
    for one, other in itertools.combinations(PARTS, 2):
        assert not used[one] & used[other]


@pytest.mark.parametrize("part", PARTS)
def test_data_are_those_of_the_committed_weights(part: str) -> None:
    assert part_of(part).fingerprint == FINGERPRINTS[part]
    assert models.DEMO.metadata("demo_clip")["data_fingerprints"][part] == FINGERPRINTS[part]


@pytest.mark.parametrize("change", ["pixels", "captions"])
def test_fingerprint_depends_on(change: str) -> None:
    data = scenes.DigitScenes("val")
    if change == "pixels":
        data.pixels[-1, 0, 0] ^= 1
    else:
        data.captions[0], data.captions[1] = data.captions[1], data.captions[0]
    assert data.fingerprint != FINGERPRINTS["val"]


@pytest.mark.parametrize("part", PARTS)
def test_captions_tell_the_scene(part: str) -> None:
    _, labels = load_digits()
    data = part_of(part)
    for caption, sources, sizes in zip(
        data.captions, data.plan.sources, data.plan.sizes, strict=True
    ):
        cells = np.flatnonzero(sources >= 0)
        assert parse(caption) == {
            int(cell): (int(labels[sources[cell]]), bool(sizes[cell] >= 22)) for cell in cells
        }
    assert set(np.unique(data.plan.sizes)) == {14, 15, 16, 22, 23, 24}


@pytest.mark.parametrize("part", PARTS)
def test_no_two_scenes_are_told_alike_or_show_the_same(part: str) -> None:
    data = part_of(part)
    assert len(set(data.captions)) == len(data)
    assert len({frozenset(parse(caption).items()) for caption in data.captions}) == len(data)
    numbers = [len(parse(caption)) for caption in data.captions]
    assert set(numbers) == {2, 3, 4}


def test_scenes_come_in_groups_of_near_misses() -> None:
    facts = part_of("test").plan.facts.reshape(-1, 4, 4)
    changed = facts[:, 1:] != facts[:, :1]  # (groups, other scenes, cells)
    kinds = {"one cell": 0, "two cells": 0}
    for group, other in itertools.product(range(len(facts)), range(3)):
        cells = np.flatnonzero(changed[group, other])
        first, second = facts[group, 0, cells], facts[group, 1 + other, cells]
        if len(cells) == 1:  # Another digit of the same size, or the same digit in the other size.
            same_digit = (first[0] - 1) // 2 == (second[0] - 1) // 2
            same_size = (first[0] - 1) % 2 == (second[0] - 1) % 2
            assert same_digit != same_size
            kinds["one cell"] += 1
        else:
            assert first.tolist() == second[::-1].tolist()
            kinds["two cells"] += 1
    assert min(kinds.values()) > 150


def test_pixels_show_the_digits_where_the_plan_says() -> None:
    images, _ = load_digits()
    data = part_of("test")
    for i in range(0, len(data), 53):
        name, _, sources = data.ids[i].partition("-")
        assert name == f"test/{i:05d}"
        expected = np.zeros((48, 48))
        for cell, source in enumerate(sources.split("+")):
            if source == "____":
                assert data.plan.facts[i, cell] == 0
                continue
            size, (top, left) = int(data.plan.sizes[i, cell]), data.plan.offsets[i, cell]
            # Every old pixel `size` times, and the mean of every 28: the mean of the covered area.
            fine = images[int(source)].astype(float).repeat(size, 0).repeat(size, 1)
            digit = fine.reshape(size, 28, size, 28).mean((1, 3))
            assert top + size <= 24
            assert left + size <= 24
            top, left = top + cell // 2 * 24, left + cell % 2 * 24
            expected[top : top + size, left : left + size] = digit
        assert np.abs(data.pixels[i] - expected).max() <= 0.5 + 1e-9


def test_items_and_transforms() -> None:
    plain = part_of("val")
    image, caption = plain[3]
    assert isinstance(image, Image.Image)
    assert image.mode == "L"
    assert image.size == (48, 48)
    assert caption == plain.captions[3]
    tensor, _ = scenes.DigitScenes("val", transform=scenes.eval_transform())[3]
    assert tensor.shape == (3, 48, 48)
    assert tensor.dtype == torch.float32
    for channel in tensor.numpy():
        assert np.allclose(
            channel, (plain.pixels[3] / 255 - scenes.PIXEL_MEAN) / scenes.PIXEL_STD, atol=1e-5
        )
    warped = scenes.train_transform()(image)
    assert warped.shape == tensor.shape
    assert warped.dtype == torch.float32
    assert torch.equal(warped[0], warped[2])
    assert not torch.equal(warped, tensor)


def test_normalisation_constants_are_those_of_the_train_part() -> None:
    pixels = part_of("train").pixels / np.float32(255)
    assert float(pixels.mean()) == pytest.approx(scenes.PIXEL_MEAN, abs=1e-3)
    assert float(pixels.std()) == pytest.approx(scenes.PIXEL_STD, abs=1e-3)


def test_warp_keeps_each_digit_in_its_cell() -> None:
    torch.manual_seed(0)
    pixels = torch.from_numpy(part_of("val").pixels[:64])[:, None] / 255
    full = torch.from_numpy(part_of("val").plan.facts[:64] > 0)
    warped = scenes.scene_warp()(pixels)
    ink = warped.unfold(2, 24, 24).unfold(3, 24, 24).sum((1, 4, 5)).flatten(1)  # (64, 4)
    assert torch.equal(ink > 0, full)
    still = RandomDigitWarp(
        degrees=0, scale=0, shear=0, shift=0, elastic=0, contrast=0, rows=2, columns=2
    )(pixels)
    assert torch.allclose(still, pixels, atol=1e-4)


def test_every_word_is_one_token_and_nothing_is_cut() -> None:
    tokenizer = models.demo_tokenizer()
    for part in PARTS:
        texts = part_of(part).captions
        ids = tokenizer(texts)
        assert ids.shape == (len(texts), models.CONTEXT_LENGTH)
        assert ids.dtype == torch.int64
        pieces = [len(re.findall(r"[a-z]+|[,;:]", text)) for text in texts]
        ends = ids.argmax(dim=1)  # Where the text tower reads.
        assert ends.tolist() == [1 + count for count in pieces]
        assert max(pieces) + 2 <= models.CONTEXT_LENGTH
        assert int(ids.max()) == tokenizer.eot_token_id == models.VOCAB_SIZE - 1
        for text, row, end in zip(
            texts[::50], ids[::50].tolist(), ends[::50].tolist(), strict=True
        ):
            assert tokenizer.decode(row[1:end]).split() == re.findall(r"[a-z]+|[,;:]", text)


def learn_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair of symbols until every word (of a to z) is one token."""
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text))
    words = {word: " ".join(word) + "</w>" for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in itertools.pairwise(symbols.split()):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        # The pair itself breaks ties, so the order of the texts does not matter.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        whole = re.compile(rf"(?<!\S){re.escape(' '.join(best))}(?!\S)")
        words = {word: whole.sub("".join(best), symbols) for word, symbols in words.items()}


def test_merges_are_learned_from_the_train_captions() -> None:
    """The file has a line that open_clip skips, one line per merge, and no last newline."""
    learned = learn_merges(part_of("train").captions)
    text = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in learned)])
    assert gzip.decompress(models.MERGES_PATH.read_bytes()).decode() == text
    assert len(learned) + 2 * 256 + 2 == models.VOCAB_SIZE


def test_captions_differ_where_facts_do() -> None:
    pairs = [
        (0, 0, scenes.fact_of(3, 0), scenes.fact_of(7, 1)),
        (0, 0, scenes.fact_of(3, 1), scenes.fact_of(7, 0)),
    ]
    order = (3, 0, 2, 1)
    written = [
        scenes.write_caption(facts, order, form)
        for facts in pairs
        for form in range(scenes.NUM_FORMS)
    ]
    assert written[0] == "a large seven bottom right and a small three bottom left"
    assert written[3] == "bottom right: large seven; bottom left: small three"
    assert len(set(written)) == 2 * scenes.NUM_FORMS
    assert [parse(text) for text in written[:4]] == [{3: (7, True), 2: (3, False)}] * 4


def test_unknown_names_are_explained() -> None:
    with pytest.raises(ValueError, match="of the digit scenes; possible parts: train, val, test"):
        scenes.DigitScenes("validation")
    with pytest.raises(ModelError, match="Did you mean 'demo_clip'"):
        models.DEMO.build("demo_clipp")


def test_model_takes_scenes_and_captions() -> None:
    model = models.DEMO.build("demo_clip")
    assert not model.training
    with torch.inference_mode():
        images, texts, scale = model(
            torch.zeros(2, 3, 48, 48), models.demo_tokenizer()(["a large two top left", "a"])
        )
    assert images.shape == texts.shape == (2, 64)
    assert scale.ndim == 0


def test_metadata_describe_the_committed_weights() -> None:
    metadata = models.DEMO.metadata("demo_clip")
    path = models.DEMO.weights_path("demo_clip")
    assert metadata["model"] == "demo_clip"
    assert metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size < 2_000_000
    assert all(tensor.dtype == torch.float32 for tensor in load_file(path).values())
    assert metadata["parameters"] == sum(parameter.numel() for parameter in trained().parameters())
    assert metadata["test_count"] == COUNTS["test"]
    kwargs = models.DEMO.spec("demo_clip").kwargs
    plain = {
        key: dict(v, image_size=list(v["image_size"])) if key == "vision_cfg" else v
        for key, v in kwargs.items()
    }
    assert plain == metadata["kwargs"]


def test_trained_model_finds_captions_and_scenes() -> None:
    data = scenes.DigitScenes("test", transform=scenes.eval_transform())
    with torch.inference_mode():
        pixels = torch.stack([data[i][0] for i in range(len(data))])
        images = torch.cat([trained().encode_image(batch) for batch in pixels.split(250)])
        texts = trained().encode_text(models.demo_tokenizer()(data.captions))
    products = (images / images.norm(dim=1, keepdim=True)) @ (
        texts / texts.norm(dim=1, keepdim=True)
    ).T
    own = products.diag()
    metadata = models.DEMO.metadata("demo_clip")
    for direction, others in (("i2t", products), ("t2i", products.T)):
        recall = 100 * ((others > own[:, None]).sum(dim=1) == 0).double().mean().item()
        assert recall >= 60
        assert recall == pytest.approx(metadata[f"test_{direction}_r1"], abs=0.3)
