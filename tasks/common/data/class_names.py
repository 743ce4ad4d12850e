"""Names of classes for people, from the names of their image folders."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from unicodedata import normalize

#: Form of the names of ImageNet's class folders, such as n01440764.
WORDNET_ID = re.compile(r"n\d{8}")


def readable_names(folders: Sequence[str]) -> tuple[str, ...]:
    """Return a name per class: timm's first word for ImageNet-1k, else the name of the folder."""
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
    """Return ``names``, with the folder added to equal names: ImageNet has two cranes."""
    count = Counter(names)
    pairs = zip(names, folders, strict=True)
    return tuple(f"{name} ({folder})" if count[name] > 1 else name for name, folder in pairs)


def by_name(classes: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Return the label in ``classes`` by position in ``others``: of the same name, else of the only
    name left that differs in case, spaces and underscores alone.
    """
    found: dict[int, int] = {}
    ways: tuple[Callable[[str], str], ...] = (str, _simplified)
    for way in ways:
        taken = set(found.values())
        left = {label: way(name) for label, name in enumerate(classes) if label not in taken}
        rest = {spot: way(name) for spot, name in enumerate(others) if spot not in found}
        counts = Counter(left.values()), Counter(rest.values())
        labels = {text: label for label, text in left.items()}
        for spot, text in rest.items():
            if all(count[text] == 1 for count in counts):
                found[spot] = labels[text]
    return found


def _simplified(name: str) -> str:
    return re.sub(r"[\s_]+", " ", normalize("NFKC", name)).strip().casefold()
