"""Names of classes for people, by what the folders of their images are called."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from unicodedata import normalize

#: ImageNet's class folders are called such as n01440764.
WORDNET_ID = re.compile(r"n\d{8}")


def readable_names(folders: Sequence[str]) -> tuple[str, ...]:
    """A name for each class: of ImageNet-1k's WordNet ids the first English word (timm's list), else the folder's name."""
    if not any(WORDNET_ID.fullmatch(folder) for folder in folders):
        return tuple(folders)
    from timm.data import ImageNetInfo  # heavy, and needed for ImageNet only

    info = ImageNetInfo("imagenet-1k")
    known = set(info.label_names())
    words = [
        info.label_name_to_description(folder).split(",")[0] if folder in known else folder
        for folder in folders
    ]
    return told_apart(words, folders)


def told_apart(names: Sequence[str], folders: Sequence[str]) -> tuple[str, ...]:
    """``names``, with the folder's name behind each that several classes have: ImageNet has two cranes."""
    shared = {name for name, count in Counter(names).items() if count > 1}
    return tuple(
        f"{name} ({folder})" if name in shared else name
        for name, folder in zip(names, folders, strict=True)
    )


def by_name(classes: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Label by position in ``others``: of the same name, else of the one left that is alike."""
    found: dict[int, int] = {}
    ways: tuple[Callable[[str], str], ...] = (str, _simplified)
    for way in ways:
        left = {
            label: way(name) for label, name in enumerate(classes) if label not in found.values()
        }
        rest = {spot: way(name) for spot, name in enumerate(others) if spot not in found}
        twice = {
            text for texts in (left, rest) for text, n in Counter(texts.values()).items() if n > 1
        }
        labels = {text: label for label, text in left.items()}
        for spot, text in rest.items():
            if text in labels and text not in twice:
                found[spot] = labels[text]
    return found


def _simplified(name: str) -> str:
    return re.sub(r"[\s_]+", " ", normalize("NFKC", name)).strip().casefold()
