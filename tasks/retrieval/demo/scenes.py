"""Scenes of two to four real handwritten digits with captions: image-text data without a download.

A scene has 2 x 2 cells, numbered row by row, with small and large digits. Scenes come in groups of
four. Within a group, a scene differs from the first scene in one digit, one size or one place.
Without such near misses, a model could find the caption after reading half of a scene.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from tasks.common.data.augment import RandomDigitWarp
from tasks.common.demo.digits import (
    PARTS,
    SEED,
    DigitDealer,
    DigitSamples,
    check_part,
    load_digits,
    resize,
    to_tensor,
)

CELL_SIZE = 24
CELLS = 4
CANVAS_SIZE = (2 * CELL_SIZE, 2 * CELL_SIZE)
#: Smallest and largest side in pixels of a small digit, and of a large digit.
SIZES = ((14, 16), (22, 24))
GROUP = 4

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE_WORDS = ("small", "large")
PLACE_WORDS = ("top left", "top right", "bottom left", "bottom right")
NUM_FACTS = 1 + 2 * 10

#: Forms of captions: the text of one digit, the text between two digits, and before the last one.
_FORMS = (
    ("a {size} {digit} {place}", ", ", " and "),
    ("{place} a {size} {digit}", ", ", " and "),
    ("{size} {digit} at {place}", ", ", ", "),
    ("{place}: {size} {digit}", "; ", "; "),
)
NUM_FORMS = len(_FORMS)

#: Mean and standard deviation of the pixels of `train` in [0, 1]; they never change.
PIXEL_MEAN = 0.0657
PIXEL_STD = 0.2103

_DATA = "digit scenes"
_SCENES = {"train": 4096, "val": 500, "test": 1000}


@dataclass(frozen=True)
class ScenePlan:
    """Digits and captions of n scenes; arrays are int64 (n, 4), one column per cell."""

    facts: np.ndarray  # digit and size, or empty: see :func:`fact_of`
    sources: np.ndarray  # indices of the digits; -1 for an empty cell
    sizes: np.ndarray  # sides of their images in pixels
    offsets: np.ndarray  # (n, 4, 2): top and left in the cell
    captions: tuple[str, ...]


def fact_of(digit: int, large: int) -> int:
    """Return the number (1 to 20) of a digit and its size; an empty cell has the fact 0."""
    return 1 + 2 * digit + large


def write_caption(facts: Sequence[int], order: Sequence[int], form: int) -> str:
    """Write the caption of a scene; ``order`` is the order of its four cells, empty ones left out.

    Different facts give different captions, for every order and form.
    """
    item, separator, last = _FORMS[form]
    items = []
    for cell in order:
        if facts[cell]:
            digit, size = divmod(facts[cell] - 1, 2)
            words = {"size": SIZE_WORDS[size], "digit": DIGIT_WORDS[digit]}
            items.append(item.format(**words, place=PLACE_WORDS[cell]))
    return last.join([separator.join(items[:-1]), items[-1]] if items[1:] else items)


def draw_facts(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the facts (count, 4) of different scenes in groups of near misses."""
    rows: list[np.ndarray] = []
    seen: set[tuple[int, ...]] = set()
    while len(rows) < count:
        first = len(rows) // GROUP * GROUP
        row = _change_one(rows[first], rng) if first < len(rows) else _draw_scene(rng)
        key = tuple(row.tolist())
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return np.stack(rows)


def draw_scenes(part: str, count: int, rng: np.random.Generator) -> ScenePlan:
    """Draw ``count`` scenes from the digits of one part, with different captions."""
    check_part(part, _DATA)
    facts = draw_facts(count, rng)
    dealer = DigitDealer(part, rng)
    sources = np.full(facts.shape, -1, dtype=np.int64)
    for i, cell in np.argwhere(facts > 0).tolist():
        sources[i, cell] = dealer.deal((int(facts[i, cell]) - 1) // 2)
    ranges = np.asarray(SIZES)[(facts - 1) % 2]  # (n, 4, 2): first and last size
    sizes = rng.integers(ranges[..., 0], ranges[..., 1], endpoint=True)
    offsets = rng.integers(0, CELL_SIZE - sizes[..., None], size=(*sizes.shape, 2), endpoint=True)
    orders = rng.random(facts.shape).argsort(axis=1)
    forms = rng.integers(0, NUM_FORMS, size=count)
    captions = tuple(map(write_caption, facts.tolist(), orders.tolist(), forms.tolist()))
    return ScenePlan(facts, sources, sizes, offsets, captions)


def compose_scenes(plan: ScenePlan) -> np.ndarray:
    """Render the scenes of a plan, uint8 (n, 48, 48)."""
    images, _ = load_digits()
    canvases = np.zeros((len(plan.captions), *CANVAS_SIZE), dtype=np.uint8)
    for size in range(SIZES[0][0], SIZES[1][1] + 1):
        places = np.argwhere((plan.sources >= 0) & (plan.sizes == size))
        digits = resize(images[plan.sources[places[:, 0], places[:, 1]]], size)
        for digit, (i, cell) in zip(digits, places.tolist(), strict=True):
            y = cell // 2 * CELL_SIZE + plan.offsets[i, cell, 0]
            x = cell % 2 * CELL_SIZE + plan.offsets[i, cell, 1]
            canvases[i, y : y + size, x : x + size] = digit
    return canvases


class DigitScenes(DigitSamples):
    """Scenes of one part: 4,096 in `train`, 500 in `val`, 1,000 in `test`.

    An id such as ``test/00017-1234+____+0456+____`` gives the position of the scene and the index
    of the digit in each cell. Raises ValueError: there is no such part.
    """

    def __init__(self, part: str, transform: Callable[[Image.Image], Any] | None = None) -> None:
        check_part(part, _DATA)
        self.part, self.transform = part, transform
        # Each part has its own random numbers. The last 1 makes them differ from the digit pairs.
        rng = np.random.default_rng([SEED, PARTS.index(part), 1])
        self.plan = draw_scenes(part, _SCENES[part], rng)
        self.pixels = compose_scenes(self.plan)
        self.captions = self.targets = list(self.plan.captions)
        names = ["____" if source < 0 else f"{source:04d}" for source in self.plan.sources.flat]
        rows = ["+".join(names[start : start + CELLS]) for start in range(0, len(names), CELLS)]
        self.ids = [f"{part}/{i:05d}-{row}" for i, row in enumerate(rows)]

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of ids, captions and pixels."""
        digest = hashlib.sha256("\n".join([*self.ids, *self.captions]).encode())
        digest.update(self.pixels.tobytes())
        return digest.hexdigest()


def scene_warp() -> RandomDigitWarp:
    """Return the warp of training scenes; it cannot change the size or place of a digit."""
    return RandomDigitWarp(
        degrees=10.0, scale=0.1, shear=0.15, shift=1.0, elastic=1.0, contrast=0.3, rows=2, columns=2
    )


def eval_transform() -> v2.Compose:
    """Return the preprocessing: PIL image of mode ``L`` to normalised float32 (3, 48, 48)."""
    return v2.Compose([*to_tensor(), *_normalize()])


def train_transform() -> v2.Compose:
    """Return `eval_transform` with a random warp of each cell, without flips."""
    return v2.Compose([*to_tensor(), scene_warp(), *_normalize()])


def _draw_scene(rng: np.random.Generator) -> np.ndarray:
    row = np.zeros(CELLS, dtype=np.int64)
    for cell in rng.permutation(CELLS)[: rng.integers(2, CELLS, endpoint=True)]:
        row[cell] = fact_of(int(rng.integers(10)), int(rng.integers(2)))
    return row


def _change_one(row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change one digit or one size, or exchange the contents of two cells."""
    row = row.copy()
    cell = int(rng.choice(np.flatnonzero(row)))
    kind = int(rng.integers(3))
    digit, large = divmod(int(row[cell]) - 1, 2)
    if kind == 0:
        row[cell] = fact_of((digit + int(rng.integers(1, 10))) % 10, large)
    elif kind == 1:
        row[cell] = fact_of(digit, 1 - large)
    else:
        other = (cell + int(rng.integers(1, CELLS))) % CELLS
        row[[cell, other]] = row[[other, cell]]
    return row


def _normalize() -> list[torch.nn.Module]:
    # Grey is repeated, because open_clip's patch embedding takes three channels.
    return [v2.RGB(), v2.Normalize(mean=[PIXEL_MEAN] * 3, std=[PIXEL_STD] * 3)]
