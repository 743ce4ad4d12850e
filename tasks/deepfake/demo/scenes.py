"""Scenes of digits as short videos, real and tampered, in the layout of DeepfakeBench.

A video shows four digits on a grey texture, from frame to frame shifted by a pixel or two and with
new noise. In a tampered video one square of each frame comes from another scene: pasted, blended
into the frame, or resampled, more or less strongly. So the digits tell nothing; the traces at and
within the square do.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import v2

from tasks.common.demo.digits import (
    PARTS,
    SEED,
    check_part,
    load_digits,
    resize,
    split_digits,
    to_tensor,
)
from tasks.deepfake.index import Frames, as_frames, parse_index
from tasks.deepfake.tags import COMPRESSION, TRAINED_ON

SIDE, MARGIN, SQUARE = 48, 2, 24
#: Frames of a video, and videos of each of the two classes by part.
FRAMES = 4
VIDEOS = {"train": 900, "val": 100, "test": 200}
#: Labels of the index with the kind of tampering; None: untouched.
KINDS = {"FF-real": None, "FF-DF": "pasted", "FF-F2F": "blended", "FF-NT": "resampled"}
PIXEL_MEAN, PIXEL_STD = 0.394, 0.141


def index(part: str) -> dict[str, Any]:
    """Return the index of a part, as an index file of the published set has it."""
    labels: dict[str, Any] = {}
    for number in range(2 * VIDEOS[part]):
        kinds = [*KINDS][1:]
        label = "FF-real" if number % 2 == 0 else kinds[number // 2 % len(kinds)]
        key = f"{number:03d}"
        place = f"{part}\\{label}\\{COMPRESSION}\\{key}"
        names = [f"{place}\\{frame:03d}.png" for frame in range(FRAMES)]
        videos = labels.setdefault(label, {}).setdefault(part, {}).setdefault(COMPRESSION, {})
        videos[key] = {"label": label, "frames": names}
    return {TRAINED_ON: labels}


@lru_cache(maxsize=4)
def demo_frames(part: str) -> Frames:
    """Return the frames of a part: 7,200 in `train`, 800 in `val`, 1,600 in `test`."""
    check_part(part, "scenes with tampered squares")
    videos = parse_index(index(part), TRAINED_ON, part, "the demo's index")
    ids = [frame for video in videos for frame in video.frames]
    return as_frames("digit-fakes", part, videos, lambda place: draw_frame(ids[place]))


@lru_cache(maxsize=8192)
def draw_frame(name: str) -> Image.Image:
    """Draw the frame of an id such as ``test/FF-DF/c23/003/007.png``: grey, 48 x 48."""
    part, label, _, video, file = name.split("/")
    own = [SEED, 3, PARTS.index(part), int(video)]
    scene, frame = np.random.default_rng(own), np.random.default_rng([*own, 1 + int(file[:3])])
    picture = _scene(part, scene)
    kind, other = KINDS[label], _scene(part, scene)
    top, left = scene.integers(MARGIN, SIDE - SQUARE - MARGIN, size=2, endpoint=True)
    shift = frame.integers(-MARGIN, MARGIN, size=2, endpoint=True)
    picture, other = (np.roll(one, shift, axis=(0, 1)) for one in (picture, other))
    picture = picture + frame.normal(0, 12, picture.shape)
    if kind is not None:
        square = slice(top, top + SQUARE), slice(left, left + SQUARE)
        strength = scene.uniform(0.1, 1)
        change = _tampered(kind, picture[square], other[square]) - picture[square]
        picture[square] += strength * change
    return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))


def _tampered(kind: str, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return a square (24, 24) that is not the scene's own."""
    if kind == "pasted":  # brighter, and without the noise of this frame
        return other + 15
    if kind == "blended":  # a soft border, and a third of the noise
        ramp = np.minimum(np.arange(SQUARE), np.arange(SQUARE)[::-1]) / 6
        mask = np.minimum(1, np.minimum(ramp[:, None], ramp))
        return (1 - mask) * own + mask * (own + 2 * other) / 3
    small = resize(own.clip(0, 255).astype(np.uint8)[None], SQUARE // 3)[0]
    return small.repeat(3, axis=0).repeat(3, axis=1).astype(float)


def _scene(part: str, rng: np.random.Generator) -> np.ndarray:
    """Return a scene (48, 48) float64: a smooth texture, and four bright digits."""
    coarse = rng.normal(90, 35, (7, 7))
    texture = np.kron(coarse, np.ones((7, 7)))[:SIDE, :SIDE]
    for axis in (0, 1):
        texture = sum(np.roll(texture, step, axis) for step in range(-3, 4)) / 7
    digits, _ = load_digits()
    for place in range(4):
        chosen = rng.choice(split_digits()[part])
        digit = resize(digits[chosen][None], SIDE // 2)[0]
        row, column = divmod(place, 2)
        cell = slice(24 * row, 24 * row + 24), slice(24 * column, 24 * column + 24)
        texture[cell] = np.maximum(texture[cell], 0.8 * digit)
    return texture


def eval_transform() -> v2.Compose:
    """Return the preprocessing: PIL image ``L`` to normalized float32 (1, 48, 48)."""
    return v2.Compose([*to_tensor(), v2.Normalize(mean=[PIXEL_MEAN], std=[PIXEL_STD])])
