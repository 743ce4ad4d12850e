"""ImageNet: its name, its classes and its layout. The import is fast."""

from collections.abc import Iterable
from functools import cache

from tasks.common.request import DataRequest, Missing

IMAGENET = "ImageNet-1k val"
LAYOUT = (
    "ImageFolder layout is expected: "
    "<folder>/train/<class>/<image> and <folder>/val/<class>/<image>"
)


@cache
def wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of the 1000 classes of ImageNet-1k by label (timm's list)."""
    from timm.data import ImageNetInfo  # slow to import, needed for ImageNet only

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def is_imagenet(classes: Iterable[str]) -> bool:
    """Return True if ``classes`` are the 1000 WordNet ids of ImageNet-1k, in any order."""
    names = set(classes)
    return len(names) == 1000 and names == set(wordnet_ids())


def missing_imagenet(data: DataRequest, brings_data: bool, calibrates: bool) -> Missing | None:
    """Return the missing parts of ImageNet: ``val``, and for calibration ``train``.

    Nothing is missing without a data folder if the model brings its own data (``brings_data``).
    """
    if data.path is None:
        advice = (
            "Give its folder: IMAGENET=/path for make, --imagenet for a grid, --data for an "
            f"adapter. {LAYOUT}."
        )
        return None if brings_data else Missing("the data set ImageNet", advice)
    parts = ["train", "val"] if calibrates else ["val"]
    absent = [str(data.path / part) for part in parts if not (data.path / part).is_dir()]
    if not absent:
        return None
    source = "ImageNet-1k (ILSVRC 2012) is available at its site after registration"
    return Missing(f"the folder {' and the folder '.join(absent)}", f"{LAYOUT}; {source}.")
