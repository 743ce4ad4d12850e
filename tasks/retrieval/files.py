"""What caption files have in common: names of splits, and images that must be there."""

from collections.abc import Sequence
from pathlib import Path

from fimaq_core.errors import DataError
from tasks.common.files import found_files
from tasks.common.images import file_reader
from tasks.retrieval.pairs import PairSource

#: Parts of a data set that a run uses.
PARTS = ("train", "test")
#: Splits that a caption file may name; of restval and val nothing is used.
SPLITS = ("train", "restval", "val", "test")


def check_split(split: object, where: str) -> str:
    """The split, if it is one of the known. Raises DataError."""
    if split not in SPLITS:
        raise DataError(f"{where}: there is no split {split!r}; known are {', '.join(SPLITS)}.")
    return str(split)


def file_pairs(
    name: str, split: str, folder: Path, listed: Sequence[tuple[str, Sequence[str]]], captions_file: Path
) -> PairSource:
    """Pairs whose image ids are paths below ``folder``.

    Args:
        listed: (image id, its captions) in order.
        captions_file: where they come from.

    Raises:
        DataError: an image that is not there or has two names, or what :class:`PairSource` refuses.
    """
    paths, absent = found_files(folder, (image for image, _ in listed))
    if absent:
        raise DataError(
            f"{captions_file} names {len(absent)} images of the split {split!r} that are not in {folder}, such as {absent[0]!r}."
        )
    return PairSource.of(name, split, listed, file_reader(paths))
