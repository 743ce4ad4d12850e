"""Class names to show, from the names of image folders, and matching of class names."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from unicodedata import normalize

#: Pattern of the names of ImageNet's class folders, such as n01440764.
WORDNET_ID = re.compile(r"n\d{8}")


def readable_names(folders: Sequence[str]) -> tuple[str, ...]:
    """Return one name per class: timm's first name for ImageNet-1k, else the folder's name."""
    if not any(WORDNET_ID.fullmatch(folder) for folder in folders):
        return tuple(folders)
    from timm.data import ImageNetInfo  # slow to import, needed for ImageNet only

    info = ImageNetInfo("imagenet-1k")
    known = set(info.label_names())
    words = [
        info.label_name_to_description(folder).split(",")[0] if folder in known else folder
        for folder in folders
    ]
    return distinct_names(words, folders)


def distinct_names(names: Sequence[str], folders: Sequence[str]) -> tuple[str, ...]:
    """Return ``names`` with the folder added to equal names: ImageNet has two classes "crane"."""
    count = Counter(names)
    pairs = zip(names, folders, strict=True)
    return tuple(f"{name} ({folder})" if count[name] > 1 else name for name, folder in pairs)


def by_name(classes: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Match two lists of names: return {position in ``others``: position in ``classes``}.

    Equal names match first. Then names match that differ in case, spaces and underscores only.
    A name that appears twice among the names left does not match.
    """
    found: dict[int, int] = {}
    forms: tuple[Callable[[str], str], ...] = (str, _simplified)
    for form in forms:
        taken = set(found.values())
        left = {label: form(name) for label, name in enumerate(classes) if label not in taken}
        rest = {spot: form(name) for spot, name in enumerate(others) if spot not in found}
        counts = Counter(left.values()), Counter(rest.values())
        labels = {text: label for label, text in left.items()}
        for spot, text in rest.items():
            if all(count[text] == 1 for count in counts):
                found[spot] = labels[text]
    return found


def _simplified(name: str) -> str:
    return re.sub(r"[\s_]+", " ", normalize("NFKC", name)).strip().casefold()
