"""Order of class folders: which label each class has. Imports nothing heavy: plans need it too."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fimaq_core.errors import DataError, suggest
from tasks.common.files import composed, parse_json, read_text
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
    known: Sequence[str] = (),
    labels: bool = True,
) -> tuple[list[str], str]:
    """Sort class folders by label; return the names and the name of the order.

    Args:
        classes: names of the folders.
        where: the folder that holds them.
        order: ``text``, ``natural`` or the path of a file; None where the user said nothing.
        known: class names by label that the checkpoint gives; used where the folders have them.
        labels: False where labels are not used, so that no order needs to be chosen.

    Raises:
        DataError: text and natural order differ and none was chosen, or a file that does not fit.
    """
    text = sorted(classes, key=composed)
    twice = _first_twice(map(composed, text))
    if twice is not None:
        folders = f"several class folders called {twice!r} in different Unicode forms"
        raise DataError(f"{where} holds {folders}: merge them or rename all but one.")
    if order not in (None, TEXT, NATURAL):
        path = _file(order)
        return _matched(read_class_order(path), text, where, path), FILE
    if order is None and known and sorted(map(composed, known)) == [*map(composed, text)]:
        return _matched(known, text, where), CHECKPOINT
    natural = sorted(text, key=_natural_key(text))
    if order == NATURAL:
        return natural, NATURAL
    # Names with decomposed accents sort elsewhere than their composed forms.
    stored = "as the names are stored (decomposed Unicode)"
    for words, other in {"in natural order": natural, stored: sorted(classes)}.items():
        if order is None and labels and other != text:
            place = [mine == theirs for mine, theirs in zip(text, other, strict=True)].index(False)
            raise DataError(
                f"The labels of the classes in {where} are not clear: "
                f"label {place} is {text[place]!r} in text order and {other[place]!r} {words}. "
                "Give the order that the weights were trained with: "
                "--class-order text (torchvision), --class-order natural (timm), or "
                f"--class-order FILE with one class name per line. {where.parent / STANDING} is such "
                "a file for all commands."
            )
    return text, TEXT


def read_class_order(path: Path) -> list[str]:
    """Class names by label from a file.

    Text has one name per line. JSON is a list of names, or an object ``{name: label}`` or
    ``{label: name}``.

    Raises:
        DataError: the file cannot be read, or labels are not 0, 1, 2, ... once each.
    """
    text = read_text(path)
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    content = parse_json(text, str(path))
    if isinstance(content, dict):
        content = _by_label(content, path)
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        form = "a JSON list of names or an object {name: label} is expected"
        raise DataError(f"{path} is no class order: {form}.")
    return content


def _by_label(content: dict[str, Any], path: Path) -> list[Any]:
    pairs = [(label, name) for name, label in content.items()]
    if all(isinstance(name, str) and key.isdecimal() for key, name in content.items()):
        pairs = [(int(key), name) for key, name in content.items()]
    labels = [label for label, _ in pairs]
    if any(type(label) is not int for label in labels) or {*labels} != {*range(len(pairs))}:
        wanted = f"one label from 0 to {len(pairs) - 1}"
        raise DataError(f"{path} does not give each of its {len(pairs)} classes {wanted}.")
    return [name for _, name in sorted(pairs)]


def _matched(names: Sequence[str], classes: Sequence[str], where: Path, path: Path | None = None) -> list[str]:
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
            problems.append(f"{len(surplus)} are not folders, such as {surplus[0]!r}{near}")
        if missing:
            problems.append(f"{len(missing)} folders are not in it, such as {missing[0]!r}")
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
