"""Files of COCO 2017 (Lin et al., ECCV 2014, arXiv:1405.0312), and where the images of another file
may be.

Imports nothing heavy: checks ahead of a run need it.
"""

from pathlib import Path

#: Splits of COCO 2017 by part: the published numbers are on ``val2017``.
SPLITS = {"train": "train2017", "val": "val2017"}

LAYOUT = (
    "The folder of COCO 2017 is expected, with annotations/instances_val2017.json and val2017/ (5,000 images), and "
    "annotations/instances_train2017.json and train2017/ to calibrate on; or a file of annotations in COCO's format, whose name "
    "ends in .json, with the images beside it"
)


def annotation_file(root: Path, part: str) -> Path:
    """The annotations of a part (``train`` or ``val``) of COCO 2017."""
    return root / "annotations" / f"instances_{SPLITS[part]}.json"


def is_file_of_annotations(path: Path) -> bool:
    """True for the path of one file of annotations, not of a folder."""
    return path.suffix == ".json"


def image_folders(path: Path) -> list[Path]:
    """Folders in which the images of a file of annotations are looked for, in order.

    For ``data/annotations/instances_val2017_small.json`` these are, in ``data/annotations``, the
    folder with the file's name; in ``data``, ``val2017_small`` and ``val2017``; then
    ``data/annotations/images`` and ``data/annotations``.
    """
    parent, split = path.parent, path.stem.removeprefix("instances_")
    found = [parent / path.stem, parent.parent / split, parent.parent / split.partition("_")[0], parent / "images", parent]
    return list(dict.fromkeys(found))


def data_root(path: Path) -> Path:
    """Folder of the data of a file of annotations: its own, or the one above ``annotations``."""
    return path.parent.parent if path.parent.name == "annotations" else path.parent


def absent(path: Path, part: str) -> list[str]:
    """Missing pieces of a part at a path, each as ``the folder ...`` or ``the file ...``."""
    if is_file_of_annotations(path):
        return [] if path.is_file() else [f"the file {path}"]
    if not path.is_dir():
        return [f"the folder {path}"]
    wanted = annotation_file(path, part)
    found = [] if wanted.is_file() else [f"the file {wanted}"]
    return found + ([] if (path / SPLITS[part]).is_dir() else [f"the folder {path / SPLITS[part]}"])
