"""Scenes of real handwritten digits with their masks: detection data without a download.

Digits of many sizes stand anywhere on a grainy background. A digit may hide parts of those drawn
before it. All arithmetic uses integers, so the scenes are the same on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tasks.common.demo.digits import DigitDealer, check_part, load_digits, resize

DATA = "digit scenes for detection"
# Lowest and highest values:
SCENE_SIZES = (64, 128)  # height and width of a scene
DIGIT_SIDES = (22, 52)  # side of a digit's image
DIGITS = (2, 6)  # number of digits in a scene
GROUNDS, INKS = (0, 80), (130, 255)  # grey levels of the background and of a digit's ink
GRAINS = (0, 24)  # largest change of a pixel by the grain of its scene
#: Lowest value (of 255) of a pixel that belongs to its digit.
INK_THRESHOLD = 80
#: Largest overlap of two digits' boxes, as a share (numerator, denominator) of the smaller box.
MAX_OVERLAP = (1, 2)
#: Smallest visible share (numerator, denominator) of the pixels of an annotated digit.
MIN_VISIBLE = (1, 2)
_TRIES = 20

_Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Placed:
    """Digit in a scene."""

    source: int  # index among all digits
    side: int  # side of its resized image
    top: int  # first row and column of its ink
    left: int
    ink: int  # grey level of a full pixel


@dataclass(frozen=True)
class Scene:
    """Composed scene with n annotated digits."""

    pixels: np.ndarray  # (height, width) uint8
    ground: int  # grey level without digits
    grain: int  # largest change of a pixel
    placed: tuple[Placed, ...]
    shown: tuple[int, ...]  # positions of the annotated digits among all those placed
    labels: np.ndarray  # (n,) int64
    masks: np.ndarray  # (n, height, width) bool, visible pixels; no pixel belongs to two digits
    boxes: np.ndarray  # (n, 4) int64: x1, y1, x2, y2


def draw_scenes(
    part: str, count: int, rng: np.random.Generator, images: np.ndarray | None = None
) -> Iterator[Scene]:
    """Draw ``count`` scenes of the digits of one part. Raises ValueError for an unknown part.

    Numbers of uses of two digits differ by at most one. Training gives ``images`` (5000, 28, 28) in
    place of the digits' own.
    """
    check_part(part, DATA)
    images = load_digits()[0] if images is None else images
    dealer = DigitDealer(part, rng)
    for _ in range(count):
        yield _draw_scene(images, dealer, rng)


def ink_of(image: np.ndarray, side: int) -> np.ndarray:
    """Compute the opacity (h, w) uint8 of a resized digit, without margins below the threshold."""
    resized = resize(image[None], side)[0]
    x1, y1, x2, y2 = box_of(resized >= INK_THRESHOLD)
    return resized[y1:y2, x1:x2]


def box_of(mask: np.ndarray) -> _Box:
    """Compute the tight box (x1, y1, x2, y2) of a mask; x2 and y2 are one past the last pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _draw_scene(images: np.ndarray, dealer: DigitDealer, rng: np.random.Generator) -> Scene:
    _, labels = load_digits()
    height, width = _between(SCENE_SIZES, rng), _between(SCENE_SIZES, rng)
    ground, grain = _between(GROUNDS, rng), _between(GRAINS, rng)
    canvas = np.full((height, width), ground, dtype=np.int64)
    owner = np.full_like(canvas, -1)  # position of the digit that each pixel belongs to
    placed: list[Placed] = []
    boxes: list[_Box] = []
    areas: list[int] = []
    for _ in range(_between(DIGITS, rng)):
        source = dealer.deal(int(rng.integers(10)))
        # A digit's side is at most half of the scene's, so the first two always find a place.
        side = _between((DIGIT_SIDES[0], min(DIGIT_SIDES[1], min(height, width) // 2)), rng)
        ink = ink_of(images[source], side)
        place = _find_place(ink.shape, (height, width), boxes, rng)
        level = _between(INKS, rng)
        if place is None:
            continue
        top, left = place
        bottom, right = top + ink.shape[0], left + ink.shape[1]
        window = np.s_[top:bottom, left:right]
        opacity = ink.astype(np.int64)
        canvas[window] = (2 * (opacity * level + (255 - opacity) * canvas[window]) + 255) // 510
        own = ink >= INK_THRESHOLD
        owner[window][own] = len(placed)
        placed.append(Placed(source, side, top, left, level))
        boxes.append((left, top, right, bottom))
        areas.append(int(own.sum()))
    canvas += rng.integers(-grain, grain, size=canvas.shape, endpoint=True)
    seen = np.bincount(owner[owner >= 0], minlength=len(placed))
    least, of = MIN_VISIBLE
    shown = tuple(i for i, area in enumerate(areas) if seen[i] * of >= area * least)
    masks = owner == np.asarray(shown)[:, None, None]
    tight = np.array([box_of(mask) for mask in masks], dtype=np.int64).reshape(-1, 4)
    found, pixels = labels[[placed[i].source for i in shown]], canvas.clip(0, 255).astype(np.uint8)
    return Scene(pixels, ground, grain, tuple(placed), shown, found, masks, tight)


def _between(ends: tuple[int, int], rng: np.random.Generator) -> int:
    return int(rng.integers(ends[0], ends[1], endpoint=True))


def _find_place(
    shape: tuple[int, ...], canvas: tuple[int, int], boxes: list[_Box], rng: np.random.Generator
) -> tuple[int, int] | None:
    """Draw the place of a box that overlaps no other box too much; None if all tries fail."""
    height, width = shape
    most, of = MAX_OVERLAP
    for _ in range(_TRIES):
        top = int(rng.integers(0, canvas[0] - height, endpoint=True))
        left = int(rng.integers(0, canvas[1] - width, endpoint=True))
        for x1, y1, x2, y2 in boxes:
            across = max(0, min(x2, left + width) - max(x1, left))
            down = max(0, min(y2, top + height) - max(y1, top))
            smaller = min(height * width, (x2 - x1) * (y2 - y1))
            if across * down * of > smaller * most:
                break
        else:
            return top, left
    return None
