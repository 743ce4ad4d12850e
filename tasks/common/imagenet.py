"""Names of ImageNet, of its classes and of its layout. Imports nothing heavy: plans need it too."""

from collections.abc import Iterable
from functools import cache

IMAGENET = "ImageNet-1k val"
LAYOUT = "ImageFolder layout is expected: <folder>/train/<class>/<image> and <folder>/val/<class>/<image>"


@cache
def wordnet_ids() -> tuple[str, ...]:
    """WordNet ids of the 1000 classes of ImageNet-1k by label (timm's list)."""
    from timm.data import ImageNetInfo  # heavy, and needed for ImageNet only

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def is_imagenet(classes: Iterable[str]) -> bool:
    """True for class names that are ImageNet-1k's 1000 WordNet ids, in any order."""
    names = set(classes)
    return len(names) == 1000 and names == set(wordnet_ids())
