"""Order of class folders, which gives each class its label. The import is fast."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fimaq_core.documents import shown
from fimaq_core.errors import DataError, suggest
from tasks.common.data.class_names import WORDNET_ID, by_name
from tasks.common.data.files import composed, counted, parse_json, read_text
from tasks.common.hashing import file_sha256

#: Named orders: text order (torchvision: by characters), natural order (timm: by numbers in names).
TEXT, NATURAL = "text", "natural"
#: Names in records for the order of a file, and for the order of class names in a checkpoint.
FILE, CHECKPOINT = "file", "checkpoint"
#: File in the data folder that gives the order if the user gives none, such as for a whole grid.
DEFAULT_FILE = "class_order.txt"

HELP = (
    "Order of the class folders: text (torchvision's: 0, 1, 10, 2), natural (timm's: 0, 1, 2, 10), "
    "or a file with one class name per line or a JSON object {name: label}. Needed only where text "
    f"and natural order differ, and the data folder has no file {DEFAULT_FILE}."
)


def chosen(order: str | None, root: Path | None) -> str | None:
    """Return the user's ``order``, or else the path of the file in the data folder ``root``."""
    if order is None and root is not None and (root / DEFAULT_FILE).is_file():
        return str(root / DEFAULT_FILE)
    return order


def order_identity(order: str) -> str:
    """Return the name of an order, or the sha256 of its file. Raises DataError."""
    return order if order in (TEXT, NATURAL) else file_sha256(_file(order))


def ordered(
    classes: Sequence[str],
    where: Path,
    order: str | None,
    known: Sequence[str] | None = None,
    labels: bool = True,
    wanted: str = "that the weights were trained with",
) -> tuple[list[str], str]:
    """Return the class folders by label, and the name of their order.

    Args:
        classes: names of the folders.
        where: the folder that holds them.
        order: ``text``, ``natural`` or the path of a file; None if the user gave no order.
        known: class names by label in the checkpoint; None for no names, empty for unreadable ones.
        labels: False if labels are not used, so that the order does not matter.
        wanted: description of the right order, for the message.

    Raises:
        DataError: no order is given and the order is not clear, or a file does not fit.
    """
    text = sorted(classes, key=composed)
    if (twice := _first_twice(map(composed, text))) is not None:
        raise DataError(
            f"{where} holds several class folders called {twice!r} in different Unicode forms: "
            "merge them or rename all but one."
        )
    if order not in (None, TEXT, NATURAL):
        path = _file(order)
        return _matched(read_class_order(path), text, where, path), FILE
    if order is None and (by_checkpoint := _by_known(known, text)):
        return by_checkpoint, CHECKPOINT
    natural = _natural(text)
    if order == NATURAL:
        return natural, NATURAL
    problem = _unclear(text, natural, sorted(classes), known) if order is None and labels else ""
    if problem:
        raise DataError(
            f"The labels of the classes in {where} are not clear: {problem}. Give the order "
            f"{wanted}: --class-order text (torchvision), --class-order natural (timm), or "
            "--class-order FILE with one class name per line, or write it to "
            f"{where.parent / DEFAULT_FILE}, which all commands read."
        )
    return text, TEXT


def _unclear(
    text: list[str], natural: list[str], stored: list[str], known: Sequence[str] | None
) -> str:
    """Return the reason why labels are not clear without an order; empty if they are clear.

    ``text`` and ``natural`` are the folders in these orders. ``stored`` are the folders sorted as
    stored, where decomposed accents sort differently from composed accents.
    """
    are_ids = [all(map(WORDNET_ID.fullmatch, names)) for names in (known or (), text)]
    if known and len(known) == len(text) and are_ids[0] == are_ids[1]:
        own = by_name([*map(composed, known)], [*map(composed, text)])
        odd = next(name for spot, name in enumerate(text) if spot not in own)
        names = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
        mismatch = f"do not match the folders, such as {odd!r}"
        return f"the class names in the weights file ({names}) {mismatch}"
    decomposed = "as the names are stored (decomposed Unicode)"
    for words, other in {"in natural order": natural, decomposed: stored}.items():
        if other != text:
            label = _first_difference(text, other)
            return f"label {label} is {text[label]!r} in text order and {other[label]!r} {words}"
    return ""


def known_notes(names: Sequence[str], order: str, known: Sequence[str] | None) -> list[str]:
    """Describe the effect of the class names in the checkpoint (``known``) on the labels.

    ``names`` and ``order`` are the results of :func:`ordered`.
    """
    if known is None:
        return []
    matched = _by_known(known, names)
    if order == CHECKPOINT:
        alike = ", apart from case, spaces and underscores, such as {!r} for {!r}"
        pairs = zip(names, known, strict=True)
        odd = [alike.format(*pair) for pair in pairs if composed(pair[0]) != composed(pair[1])]
        return [f"labels follow the class names in the weights file{''.join(odd[:1])}"]
    if matched and matched != [*names]:
        label = _first_difference(names, matched)
        return [
            f"labels follow the given class order ({order}), not the class names in the weights "
            f"file: label {label} is {names[label]!r}, but {known[label]!r} in the weights file"
        ]
    if matched or order == FILE:
        return []
    why = "do not match the folders" if known else "cannot be read"
    return [f"the class names in the weights file {why}: labels follow {order} order"]


def _by_known(known: Sequence[str] | None, folders: Sequence[str]) -> list[str]:
    """Return the folders in the order of the class names ``known``; empty if names differ."""
    found = by_name([*map(composed, known or ())], [*map(composed, folders)])
    fits = known is not None and len(found) == len(folders) == len(known)
    return [folders[spot] for spot in sorted(found, key=found.__getitem__)] if fits else []


def read_class_order(path: Path) -> list[str]:
    """Return class names by label from a text file with one name per line, or from a JSON file.

    JSON is a list, ``{name: label}`` or ``{label: name}``.
    Raises DataError: the file cannot be read, or labels are not 0, 1, 2, ... once each.
    """
    text = read_text(path)
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    names = names_by_label(parse_json(text, str(path)))
    if names is None:
        form = '["ant", "bee"], or {"ant": 0, "bee": 1} with the labels 0, 1, 2, ... once each'
        raise DataError(f"{path} is no class order: give JSON such as {form}.")
    return names


def names_by_label(content: object, turned: bool = False) -> list[str] | None:
    """Return class names by label from a list or a mapping; None for other content.

    Labels are 0, 1, 2, ... once each, as integers or digits. If both keys and values can be labels,
    the mapping is read as ``{label: name}``, or as ``{name: label}`` if ``turned``.
    """
    if isinstance(content, list | tuple):
        return [*content] if all(isinstance(name, str) for name in content) else None
    if not isinstance(content, dict):
        return None
    swapped = {
        str(key) if type(key) is int and key.bit_length() < 64 else key: value
        for key, value in content.items()
    }
    ways = [[*content.items()], [(label, name) for name, label in swapped.items()]]
    for pairs in reversed(ways) if turned else ways:
        listed = [
            (int(label) if isinstance(label, str) and _is_number(label) else label, name)
            for label, name in pairs
        ]
        sound = all(type(label) is int and isinstance(name, str) for label, name in listed)
        if listed and sound and {label for label, _ in listed} == {*range(len(listed))}:
            return [name for _, name in sorted(listed)]
    return None


def _is_number(label: str) -> bool:
    return label.isdecimal() and len(label) < 10


def _matched(listed: Sequence[str], classes: Sequence[str], where: Path, path: Path) -> list[str]:
    """Return the folders in the order of the names that ``path`` lists. Raises DataError."""
    folders = {composed(name): name for name in classes}
    listed = [*map(composed, listed)]
    if (twice := _first_twice(listed)) is not None:
        raise DataError(f"{path} lists the class {shown(twice)} twice.")
    surplus = [name for name in listed if name not in folders]
    missing = sorted(folders.keys() - set(listed))
    problems = []
    if surplus:
        near = suggest(surplus[0], missing).strip() if missing else ""
        near = f" ({near})" if 0 < len(near) < 100 else ""
        names = counted(len(surplus), "name")
        problems.append(f"{names} without a folder, such as {shown(surplus[0])}{near}")
    if missing:
        names = counted(len(missing), "folder")
        problems.append(f"{names} without a name in it, such as {missing[0]!r}")
    if problems:
        raise DataError(f"{path} does not list the classes of {where}: {'; '.join(problems)}.")
    return [folders[name] for name in listed]


def _first_twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _first_difference(names: Sequence[str], others: Sequence[str]) -> int:
    return [own == other for own, other in zip(names, others, strict=True)].index(False)


def _natural(names: list[str]) -> list[str]:
    """Sort names in timm's natural order, which ignores case; keep the order if timm fails."""
    from timm.utils.misc import natural_key  # slow to import, and plans do not need it

    try:
        return sorted(names, key=lambda name: natural_key(composed(name)))
    except ValueError:  # timm cannot convert a superscript digit to a number
        return names


def _file(order: str) -> Path:
    if not Path(order).is_file():
        hint = suggest(order, (TEXT, NATURAL))
        wanted = "--class-order takes text, natural or a file"
        raise DataError(f"{wanted}, and there is no file {order}.{hint}")
    return Path(order)
