"""Index files in DeepfakeBench's layout: sets, labels, splits, videos and their frames.

``{set: {label: {split: {video: {"label": label, "frames": [path, ...]}}}}}``. Compressed sets have
one level more below the split: ``c23``, ``c40`` or ``raw``. Paths of frames are relative to the
data folder, and may have backslashes (Yan et al., NeurIPS 2023, arXiv:2307.01426).
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fimaq_core.documents import shown
from fimaq_core.errors import DataError, suggest
from tasks.common.data.files import found_files, image_id, parse_json, read_text
from tasks.common.data.folders import Source
from tasks.common.data.images import file_reader
from tasks.deepfake.tags import COMPRESSION, index_file

#: Labels of the published indices that are of untouched videos, and of tampered ones.
REAL = (
    "FF-real", "DFD_real", "DFDC_Real", "DFDCP_Real", "CelebDFv1_real", "CelebDFv2_real",
    "UADFV_Real",
)  # fmt: skip
FAKE = (
    "FF-DF", "FF-F2F", "FF-FS", "FF-NT", "FF-FH", "FF-SH", "DFD_fake", "DFDC_Fake", "DFDCP_FakeA",
    "DFDCP_FakeB", "CelebDFv1_fake", "CelebDFv2_fake", "UADFV_Fake",
)  # fmt: skip
CLASSES = ("real", "fake")
#: Frames that are taken of a video, evenly spaced.
FRAMES = 32
_COMPRESSIONS = ("raw", "c23", "c40")


class Video(NamedTuple):
    """A video of one split."""

    key: str  # label, compression and name: equal names of different labels are different videos
    label: int  # index in CLASSES
    frames: list[str]  # paths below the data folder, at most FRAMES


class Frames(NamedTuple):
    """Frames of all videos as samples, each with the number of its video."""

    source: Source
    video: list[int]


def parse_index(content: Any, name: str, split: str, where: str) -> list[Video]:
    """Return the videos of a split of the set ``name``; ``where`` is the file, for messages.

    Raises DataError: the content has another form, an unknown label, or no video of the split.
    """
    labels = content.get(name) if isinstance(content, dict) else None
    if not isinstance(labels, dict):
        raise DataError(f"{where} has no set '{name}': take the index file of this set.")
    videos = []
    for label, splits in labels.items():
        if label not in (*REAL, *FAKE):
            hint = suggest(str(label), [*REAL, *FAKE])
            raise DataError(f"{where} has the unknown label {shown(label)}.{hint}")
        found = _object(_object(splits, where, label).get(split, {}), where, f"{label} {split}")
        middle = ""
        if found and set(found) <= set(_COMPRESSIONS):
            if COMPRESSION not in found:
                raise DataError(f"{where}: {label} {split} has no compression {COMPRESSION}.")
            middle = f"{COMPRESSION}/"
            found = _object(found[COMPRESSION], where, f"{label} {split} {COMPRESSION}")
        for key, video in found.items():
            frames = _frames(video, f"{where}: the video {label}/{middle}{key}")
            videos.append(Video(f"{label}/{middle}{key}", int(label in FAKE), frames))
    if {video.label for video in videos} != {0, 1}:
        raise DataError(f"{where} has no real and tampered videos in the split '{split}'.")
    return videos


def _object(value: object, where: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {what} is no object of videos.")
    return value


def _frames(video: object, where: str) -> list[str]:
    """Return the paths of up to FRAMES frames of a video, evenly spaced."""
    listed = video.get("frames") if isinstance(video, dict) else None
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{where} has no frames: remove it from the index.")
    count = min(FRAMES, len(listed))
    chosen = [listed[place * len(listed) // count] for place in range(count)]
    names = (one.replace("\\", "/") if isinstance(one, str) else one for one in chosen)
    return [image_id(name, where) for name in names]


def as_frames(
    name: str, split: str, videos: list[Video], read: Callable[[int], Image.Image]
) -> Frames:
    """Return the frames of ``videos``; ``read`` takes a position. Raises DataError for repeats."""
    ids = [frame for video in videos for frame in video.frames]
    twice = [frame for frame, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{name} {split} lists {len(twice)} frames twice, such as {twice[0]!r}.")
    number = [index for index, video in enumerate(videos) for _ in video.frames]
    targets = [videos[index].label for index in number]
    return Frames(Source(name, split, ids, targets, len(CLASSES), read, CLASSES), number)


def open_frames(root: Path, name: str, split: str) -> Frames:
    """Open the frames of a split. Raises DataError: the index or some frames are missing."""
    path = index_file(root, name)
    videos = parse_index(parse_json(read_text(path), str(path)), name, split, str(path))
    frames = [frame for video in videos for frame in video.frames]
    paths, absent = found_files(root, frames)
    if absent:
        missing = f"{len(absent)} of {len(frames)} frames that are not below {root}"
        raise DataError(f"{path} names {missing}, such as {absent[0]!r}: extract them first.")
    return as_frames(name, split, videos, file_reader(paths))
