"""Scenes of several real handwritten digits with their masks: detection data without a download.

Digits of many sizes stand anywhere on a grainy ground, and a later one may hide parts of an earlier
one. All of it is computed in integers, so the scenes are the same on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tasks.common.demo.digits import DigitDealer, check_part, load_digits, resize

DATA = "digit scenes for detection"
# First and last, both included: height and width of a scene, side of a digit's image, number of digits.
SCENE_SIZES = (64, 128)
DIGIT_SIDES = (22, 52)
DIGITS = (2, 6)
# Grey levels, first and last: of the ground, of the ink, and what the grain adds or takes at most.
GROUNDS = (0, 80)
INKS = (130, 255)
GRAINS = (0, 24)

# From this value of its image on, out of 255, a pixel belongs to a digit.
INK_THRESHOLD = 80
# Of two digits' boxes, at most this share of the smaller one may overlap, as numerator and denominator.
MAX_OVERLAP = (1, 2)
# A digit is annotated if at least this share of its pixels is seen.
MIN_VISIBLE = (1, 2)
_TRIES = 20


@dataclass(frozen=True)
class Placed:
    """A digit: source index, side, place of its image's ink, level of a full pixel."""

    source: int
    side: int
    top: int
    left: int
    ink: int


@dataclass(frozen=True)
class Scene:
    """A composed scene with n annotated digits, the positions ``shown`` among all those ``placed``.

    ``ground`` is the grey level without digits, which ``grain`` changes at most. ``masks`` (n,
    height, width) are visible pixels, of which none belongs to two; ``boxes`` (n, 4) are x1, y1,
    x2, y2.
    """

    pixels: np.ndarray
    ground: int
    grain: int
    placed: tuple[Placed, ...]
    shown: tuple[int, ...]
    labels: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


def draw_scenes(
    part: str, count: int, rng: np.random.Generator, images: np.ndarray | None = None
) -> Iterator[Scene]:
    """Draw ``count`` scenes of the digits of one part, used as evenly as the count allows.

    ``images`` (5000, 28, 28) are composed instead of the digits, as in training. Raises ValueError.
    """
    check_part(part, DATA)
    images = load_digits()[0] if images is None else images
    dealer = DigitDealer(part, rng)
    for _ in range(count):
        yield _draw_scene(images, dealer, rng)


def ink_of(image: np.ndarray, side: int) -> np.ndarray:
    """Resize a digit and cut off the margins below the threshold: opacity, uint8 (h, w)."""
    resized = resize(image[None], side)[0]
    x1, y1, x2, y2 = box_of(resized >= INK_THRESHOLD)
    return resized[y1:y2, x1:x2]


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Tight box (x1, y1, x2, y2) of a mask; x2 and y2 are one past the last pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _draw_scene(images: np.ndarray, dealer: DigitDealer, rng: np.random.Generator) -> Scene:
    _, labels = load_digits()
    height, width = _between(SCENE_SIZES, rng), _between(SCENE_SIZES, rng)
    ground, grain = _between(GROUNDS, rng), _between(GRAINS, rng)
    canvas = np.full((height, width), ground, dtype=np.int64)
    owner = np.full(
        (height, width), -1, dtype=np.int64
    )  # Whose pixel it is: position of the last digit put there.
    placed: list[Placed] = []
    boxes: list[tuple[int, int, int, int]] = []
    areas: list[int] = []
    for _ in range(_between(DIGITS, rng)):
        source = dealer.deal(int(rng.integers(10)))
        # A digit may fill half of the shorter side: the first two always find a place.
        side = _between((DIGIT_SIDES[0], min(DIGIT_SIDES[1], min(height, width) // 2)), rng)
        ink = ink_of(images[source], side)
        place = _find_place(ink.shape, (height, width), boxes, rng)
        level = _between(INKS, rng)
        if place is None:
            continue
        top, left = place
        window = np.s_[top : top + ink.shape[0], left : left + ink.shape[1]]
        opacity = ink.astype(np.int64)
        canvas[window] = (2 * (opacity * level + (255 - opacity) * canvas[window]) + 255) // 510
        own = ink >= INK_THRESHOLD
        owner[window][own] = len(placed)
        placed.append(Placed(source, side, top, left, level))
        boxes.append((left, top, left + ink.shape[1], top + ink.shape[0]))
        areas.append(int(own.sum()))
    canvas += rng.integers(-grain, grain, size=canvas.shape, endpoint=True)
    seen = np.bincount(owner[owner >= 0], minlength=len(placed))
    shown = tuple(
        i for i, area in enumerate(areas) if seen[i] * MIN_VISIBLE[1] >= area * MIN_VISIBLE[0]
    )
    masks = owner == np.asarray(shown)[:, None, None]
    return Scene(
        pixels=canvas.clip(0, 255).astype(np.uint8),
        ground=ground,
        grain=grain,
        placed=tuple(placed),
        shown=shown,
        labels=labels[[placed[i].source for i in shown]],
        masks=masks,
        boxes=np.array([box_of(mask) for mask in masks], dtype=np.int64).reshape(-1, 4),
    )


def _between(ends: tuple[int, int], rng: np.random.Generator) -> int:
    return int(rng.integers(ends[0], ends[1], endpoint=True))


def _find_place(
    shape: tuple[int, ...],
    canvas: tuple[int, int],
    boxes: list[tuple[int, int, int, int]],
    rng: np.random.Generator,
) -> tuple[int, int] | None:
    """Draw row and column of a box that overlaps no other too much; None if all tries fail."""
    height, width = shape
    for _ in range(_TRIES):
        top = int(rng.integers(0, canvas[0] - height, endpoint=True))
        left = int(rng.integers(0, canvas[1] - width, endpoint=True))
        for x1, y1, x2, y2 in boxes:
            common = max(0, min(x2, left + width) - max(x1, left)) * max(
                0, min(y2, top + height) - max(y1, top)
            )
            smaller = min(height * width, (x2 - x1) * (y2 - y1))
            if common * MAX_OVERLAP[1] > smaller * MAX_OVERLAP[0]:
                break
        else:
            return top, left
    return None
