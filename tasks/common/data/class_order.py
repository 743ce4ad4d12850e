"""Order of class folders: which label each class has. Imports nothing heavy: plans need it too."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fimaq_core.errors import DataError, suggest
from tasks.common.data.class_names import WORDNET_ID, by_name
from tasks.common.data.files import composed, counted, parse_json, read_text
from tasks.common.hashing import file_sha256

#: Orders with a name: by characters as torchvision sorts, by numbers within names as timm sorts.
TEXT, NATURAL = "text", "natural"
#: Recorded for the orders of a class-order file and of a checkpoint.
FILE, CHECKPOINT = "file", "checkpoint"

#: File in a data folder that gives the order where the user gives none; grids have no option for it.
STANDING = "class_order.txt"

HELP = (
    "Order of the class folders: text (torchvision's: 0, 1, 10, 2), natural (timm's: 0, 1, 2, 10), "
    "or a file with one class name per line or a JSON object {name: label}. Needed only where text "
    f"and natural order differ, and {STANDING} in the data folder does not tell."
)


def chosen(order: str | None, root: Path | None) -> str | None:
    """The order that the user gave, else that of the file in the data folder ``root``; None for none."""
    standing = None if root is None else root / STANDING
    return str(standing) if order is None and standing is not None and standing.is_file() else order


def order_identity(order: str) -> str:
    """Identity of an order: its name, or the sha256 of its file. Raises DataError."""
    return order if order in (TEXT, NATURAL) else file_sha256(_file(order))


def ordered(
    classes: Sequence[str],
    where: Path,
    order: str | None,
    known: Sequence[str] | None = None,
    labels: bool = True,
    wanted: str = "that the weights were trained with",
) -> tuple[list[str], str]:
    """Sort class folders by label; return the names and the name of the order.

    Args:
        classes: names of the folders.
        where: the folder that holds them.
        order: ``text``, ``natural`` or the path of a file; None where the user said nothing.
        known: class names by label in the checkpoint. None: it has none; empty: they cannot be read.
        labels: False where labels are not used, so that no order needs to be chosen.
        wanted: which order the user is asked for.

    Raises:
        DataError: no order was chosen and none is clear, or a file that does not fit.
    """
    text = sorted(classes, key=composed)
    twice = _first_twice(map(composed, text))
    if twice is not None:
        folders = f"several class folders called {twice!r} in different Unicode forms"
        raise DataError(f"{where} holds {folders}: merge them or rename all but one.")
    if order not in (None, TEXT, NATURAL):
        path = _file(order)
        return _matched(read_class_order(path), text, where, path), FILE
    if order is None and (by_checkpoint := _by_known(known, text)):
        return by_checkpoint, CHECKPOINT
    natural = sorted(text, key=_natural_key(text))
    if order == NATURAL:
        return natural, NATURAL
    choices = (
        f"Give the order {wanted}: --class-order text (torchvision), --class-order natural (timm), or "
        "--class-order FILE with one class name per line, or write it to "
        f"{where.parent / STANDING}, which all commands read."
    )
    if order is None and labels and known and _same_kind(known, text):
        own = by_name([*map(composed, known)], [*map(composed, text)])
        odd = next(name for spot, name in enumerate(text) if spot not in own)
        raise DataError(
            f"The labels of the classes in {where} are not clear: the class names in the weights file "
            f"({', '.join(known[:3])}{', ...' if len(known) > 3 else ''}) do not match the folders, such as {odd!r}. {choices}"
        )
    # Names with decomposed accents sort elsewhere than their composed forms.
    stored = "as the names are stored (decomposed Unicode)"
    for words, other in {"in natural order": natural, stored: sorted(classes)}.items():
        if order is None and labels and other != text:
            place = [mine == theirs for mine, theirs in zip(text, other, strict=True)].index(False)
            raise DataError(
                f"The labels of the classes in {where} are not clear: "
                f"label {place} is {text[place]!r} in text order and {other[place]!r} {words}. "
                f"{choices}"
            )
    return text, TEXT


def known_notes(names: Sequence[str], order: str, known: Sequence[str] | None) -> list[str]:
    """Say what the class names of a checkpoint (``known``) did for labels; ``names`` and ``order`` as of :func:`ordered`."""
    if known is None:
        return []
    matched = _by_known(known, names)
    if order == CHECKPOINT:
        pairs = [
            (own, name)
            for own, name in zip(names, known, strict=True)
            if composed(own) != composed(name)
        ]
        alike = (
            f", alike but for case, spaces and underscores, such as {pairs[0][0]!r} for {pairs[0][1]!r}"
            if pairs
            else ""
        )
        return [f"labels follow the class names in the weights file{alike}"]
    if matched and matched != [*names]:
        place = [own == other for own, other in zip(names, matched, strict=True)].index(False)
        return [
            f"labels follow the class order given ({order}), against the class names in the weights file: "
            f"label {place} is {names[place]!r}, in the weights file {known[place]!r}"
        ]
    if matched or order == FILE:
        return []
    why = "do not match the folders" if known else "cannot be read"
    return [f"the class names in the weights file {why}: labels follow {order} order"]


def _by_known(known: Sequence[str] | None, folders: Sequence[str]) -> list[str]:
    """Folders in the order of the class names of a checkpoint; empty where these are others."""
    found = by_name([*map(composed, known or ())], [*map(composed, folders)])
    fits = known is not None and len(found) == len(folders) == len(known)
    return [folders[spot] for spot in sorted(found, key=found.__getitem__)] if fits else []


def _same_kind(known: Sequence[str], folders: Sequence[str]) -> bool:
    """True for names that should match: as many, and not WordNet ids on one side only."""
    ids = [all(map(WORDNET_ID.fullmatch, names)) for names in (known, folders)]
    return len(known) == len(folders) and ids[0] == ids[1]


def read_class_order(path: Path) -> list[str]:
    """Read class names by label: text with one name per line, or JSON (a list, ``{name: label}`` or ``{label: name}``).

    Raises:
        DataError: the file cannot be read, or labels are not 0, 1, 2, ... once each.
    """
    text = read_text(path)
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    content = parse_json(text, str(path))
    if isinstance(content, dict):
        content = by_label(content.items()) or by_label(
            (label, name) for name, label in content.items()
        )
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        form = '["ant", "bee"], or an object with the labels 0, 1, 2, ... once each, {"ant": 0, "bee": 1}'
        raise DataError(f"{path} is no class order: give a JSON list of names, such as {form}.")
    return content


def by_label(pairs: Iterable[tuple[Any, Any]]) -> list[str] | None:
    """Names of pairs (label, name) by label, a number or its digits; None unless labels are 0, 1, 2, ... once each."""
    listed = [
        (int(label) if isinstance(label, str) and label.isdecimal() else label, name)
        for label, name in pairs
    ]
    sound = all(type(label) is int and isinstance(name, str) for label, name in listed)
    if not listed or not sound or {label for label, _ in listed} != {*range(len(listed))}:
        return None
    return [name for _, name in sorted(listed)]


def _matched(names: Sequence[str], classes: Sequence[str], where: Path, path: Path) -> list[str]:
    """Folders in the order of ``names``, equal up to their Unicode form. Raises DataError."""
    folders = {composed(name): name for name in classes}
    listed = [composed(name) for name in names]
    twice = _first_twice(listed)
    if twice is not None:
        raise DataError(f"{path} lists the class {twice!r} twice.")
    surplus = [name for name in listed if name not in folders]
    missing = sorted(folders.keys() - set(listed))
    if surplus or missing:
        problems = []
        if surplus:
            near = suggest(surplus[0], missing) if missing else ""
            near = f" ({near.strip()})" if 0 < len(near) < 100 else ""
            problems.append(
                f"{counted(len(surplus), 'name')} without a folder, such as {surplus[0]!r}{near}"
            )
        if missing:
            problems.append(
                f"{counted(len(missing), 'folder')} without a name in it, such as {missing[0]!r}"
            )
        raise DataError(f"{path} does not list the classes of {where}: {'; '.join(problems)}.")
    return [folders[name] for name in listed]


def _first_twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _natural_key(names: Sequence[str]) -> Callable[[str], Any]:
    """Key of timm's natural order, which ignores case; of text where timm cannot sort the names."""
    from timm.utils.misc import natural_key  # heavy, and not needed by plans

    try:
        keys = {name: natural_key(composed(name)) for name in names}
    except ValueError:  # a superscript digit is a digit for timm, but no number
        return composed
    return keys.__getitem__


def _file(order: str) -> Path:
    path = Path(order)
    if not path.is_file():
        hint = suggest(order, (TEXT, NATURAL))
        wanted = "--class-order takes text, natural or a file"
        raise DataError(f"{wanted}, and there is no file {order}.{hint}")
    return path
