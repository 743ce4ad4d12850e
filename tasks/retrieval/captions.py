"""Finding the image-caption pairs that go with a model: the demo's scenes, or the files of a folder."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from fimaq_core.errors import DataError
from tasks.common.files import composed
from tasks.common.folders import Source
from tasks.common.request import DataRequest
from tasks.common.task import LoadedModel
from tasks.retrieval.files import PARTS, file_pairs
from tasks.retrieval.karpathy import COCO, FLICKR30K, free_name, images_folder, open_free, open_karpathy
from tasks.retrieval.layout import COCO_FILE, FLICKR30K_FILE, FREE_FILE, LAYOUT, caption_files
from tasks.retrieval.pairs import PairSource
from tasks.retrieval.tables import read_table

#: Name of the data that the demo model brings along.
DEMO_DATA = "digit-scenes"


def open_pairs(loaded: LoadedModel, data: DataRequest, part: str) -> PairSource:
    """Open the ``train`` or the ``test`` part of the data that goes with a model.

    The training part is that of ``data.calibration_data`` where this is given.

    Raises:
        DataError: no data, a folder without caption files or with several kinds, an order of
            classes, or what the readers of captions refuse.
    """
    if data.class_order is not None and data.evaluation != "zero-shot":
        raise DataError("Captions have no classes: --class-order goes with --eval zero-shot.")
    if part not in PARTS:
        raise DataError(f"There is no part {part!r} of image-caption data: {' or '.join(PARTS)}.")
    root = pairs_root(data, part)
    if root is not None:
        return open_captions(root, part)
    if loaded.data == DEMO_DATA:
        return demo_scenes(part)
    raise DataError(f"{loaded.tag} needs data: give --data /path/to/captions. {LAYOUT}.")


def pairs_root(data: DataRequest, part: str) -> Path | None:
    """The folder that a part is read from; None where the model brings its own data."""
    return data.calibration_data if part == "train" and data.calibration_data is not None else data.path


def open_captions(root: Path, part: str) -> PairSource:
    """Open a part of an image-caption data set by the files in its folder. Raises DataError."""
    files = _caption_files(root)
    file = files[0]
    if file == COCO_FILE:
        return open_karpathy(root, COCO, part)
    if file == FLICKR30K_FILE:
        return open_karpathy(root, FLICKR30K, part)
    if file == FREE_FILE:
        return open_free(root, part)
    own = part if len(files) > 1 else None
    path = root / (file if own is None else f"{part}{Path(file).suffix}")
    listed = read_table(path, own).get(part, ())
    if not listed:
        raise DataError(f"{path} has no images of the split {part!r}.")
    if own is not None:
        _refuse_common(path, path.with_name(f"{'test' if part == 'train' else 'train'}{path.suffix}"), listed)
    return file_pairs(free_name(len(listed)), part, root, listed, path)


def images_root(root: Path) -> Path:
    """The folder that ids of images are paths below, by the files in a data set's folder. Raises DataError."""
    file = _caption_files(root)[0]
    published = next((one for one in (COCO, FLICKR30K) if one.file == file), None)
    return root if published is None else images_folder(root, published)


def _caption_files(root: Path) -> tuple[str, ...]:
    """The kind of caption files that a folder holds. Raises DataError."""
    if not root.is_dir():
        raise DataError(f"There is no folder {root}. {LAYOUT}.")
    kinds = caption_files(root)
    if not kinds:
        raise DataError(f"{root} holds no captions. {LAYOUT}.")
    if len(kinds) > 1:
        present = [name for kind in kinds for name in kind if (root / name).is_file()]
        raise DataError(f"{root} holds several kinds of captions: {', '.join(present)}. Leave one. {LAYOUT}.")
    return kinds[0]


def _refuse_common(path: Path, sibling: Path, listed: Sequence[tuple[str, tuple[str, ...]]]) -> None:
    """Refuse a part that shares images with the part in ``sibling``, where that is there."""
    if not sibling.is_file():
        return
    listed_there = read_table(sibling, sibling.stem).get(sibling.stem, ())
    others = {composed(image) for image, _ in listed_there}
    common = [image for image, _ in listed if composed(image) in others]
    if common:
        raise DataError(f"{path} and {sibling} share {len(common)} images, such as {common[0]!r}: each belongs into one of them.")


@lru_cache(maxsize=2)
def demo_scenes(part: str) -> PairSource:
    """A part of the demo's data, composed once a process."""
    # Only the demo model needs the demo's data.
    from tasks.retrieval.demo.scenes import DigitScenes

    scenes = DigitScenes(part)
    listed = ((name, [caption]) for name, caption in zip(scenes.ids, scenes.captions, strict=True))
    return PairSource.of(DEMO_DATA, part, listed, lambda index: scenes[index][0])


def imagenet_pairs(source: Source, classnames: Sequence[str]) -> PairSource:
    """Labelled images with the captions ``a photo of a <class name>.``, to calibrate zero-shot classifiers on.

    Args:
        source: the labelled images.
        classnames: one a class, in the order of the labels.

    Raises:
        DataError: not one name a class.
    """
    if len(classnames) != source.classes:
        raise DataError(
            f"{source.name} {source.split} has {source.classes} classes, but there are {len(classnames)} class names."
        )
    captions = [[f"a photo of a {name}."] for name in classnames]
    listed = ((name, captions[label]) for name, label in zip(source.ids, source.targets, strict=True))
    return PairSource.of(source.name, source.split, listed, source.read, source.notes())
