"""Readers of caption files: Karpathy's JSON, CSV with a header, or one JSON object per line.

The format of Karpathy and Fei-Fei (CVPR 2015, arXiv:1412.2306) has a list ``images``. Each entry
has ``filename``, ``split`` and ``sentences`` (with the text ``raw``), and in MS-COCO ``filepath``.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fimaq_core.documents import shown
from fimaq_core.errors import DataError
from tasks.common.data.files import composed, image_id, parse_json, read_text, state_of

#: Pairs (image id, captions) in order, by split.
Splits = Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]]
#: Splits that a file may name; fimaq uses train and test.
_SPLITS = ("train", "restval", "val", "test")
#: Bound on the characters of a caption. Tokenizers need time by the square of a word's length.
_MOST_TEXT = 5000


class _Row(NamedTuple):
    """One image in a file, with one or more of its captions."""

    number: int  # of the line or entry
    where: str  # file and number, for messages
    image: object
    captions: list[Any]
    split: object


def read_captions(path: Path, own: str | None = None) -> Splits:
    """Read a .json, .csv or .jsonl file of captions; a file is read again only after a change.

    ``own`` is the split of a file that has one split only. Otherwise each row names its split.
    Raises DataError: the file has another form, an image is in two splits, or a pair appears twice.
    """
    return _read(path, own, state_of(path))


@lru_cache(maxsize=4)
def _read(path: Path, own: str | None, state: tuple[int, int]) -> Splits:
    splits: dict[str, dict[object, tuple[str, list[str]]]] = {}
    first: dict[tuple[str, str], int] = {}
    split_of: dict[str, str] = {}
    kind, table = path.suffix, path.suffix != ".json"  # table: several rows may have one image
    for number, where, name, texts, named in _ROWS[kind](path):
        if named is None and own is None and table:
            files = f"name it, or make two files, train{kind} and test{kind}"
            raise DataError(f"{where}: there is no split; {files}.")
        split = own if named is None else named
        if not isinstance(split, str) or split not in _SPLITS:
            known = ", ".join(_SPLITS)
            raise DataError(f"{where}: there is no split {shown(split)}; known are {known}.")
        if own is not None and split != own:
            raise DataError(f"{where}: the split {split!r} does not belong in this file.")
        image = image_id(name, where, path.parent if table else None)
        if (other := split_of.setdefault(composed(image), split)) != split:
            raise DataError(f"{where}: {image!r} is in the splits {other!r} and {split!r}.")
        key = image if table else number
        _, captions = splits.setdefault(split, {}).setdefault(key, (image, []))
        for text in texts:
            check_text(text, f"{where}: the caption")
            if table:
                if (before := first.get((image, text))) is not None:
                    pair = f"repeats image and caption of line {before}"
                    raise DataError(f"{where} {pair}: remove one.")
                first[image, text] = number
            captions.append(text)
    return {
        split: tuple((image, tuple(own)) for image, own in found.values())
        for split, found in splits.items()
    }


def check_text(text: object, what: str) -> None:
    """Check a caption or a class name, named ``what`` in messages. Raises DataError."""
    if not isinstance(text, str):
        raise DataError(f"{what} {shown(text)} is not text.")
    if len(text) > _MOST_TEXT:
        long = f"has {len(text):,} characters; at most {_MOST_TEXT:,} are read: shorten it"
        raise DataError(f"{what} {shown(text)} {long}.")


def _karpathy_rows(path: Path) -> Iterator[_Row]:
    content = parse_json(read_text(path), str(path), _without_tokens)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path} has no list 'images': it is not a file of Karpathy's format.")
    for number, entry in enumerate(entries):
        where = f"{path}, image {number} (counted from 0)"
        try:
            folder, file, split = entry.get("filepath", ""), entry["filename"], entry["split"]
            captions = [sentence["raw"] for sentence in entry["sentences"]]
        except (KeyError, TypeError, AttributeError) as error:
            wanted = f"filename, split and sentences with raw are expected ({error!r})"
            raise DataError(f"{where}: {wanted}.") from error
        if not all(isinstance(text, str) for text in (folder, file, *captions)):
            raise DataError(f"{where}: names and captions must be text.")
        yield _Row(number, where, f"{folder}/{file}" if folder else file, captions, split)


def _without_tokens(item: dict[str, Any]) -> dict[str, Any]:
    # The captions as lists of words are not used, but take more memory than everything else.
    item.pop("tokens", None)
    return item


def _csv_rows(path: Path) -> Iterator[_Row]:
    # Line ends are kept, since a caption in quotes may have several lines.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        if not {"image", "caption"} <= set(header) or len(set(header)) < len(header):
            wanted = "needs the columns image and caption, once each"
            raise DataError(f"{path} {wanted}; its first line is {shown(','.join(header))}.")
        for cells in filter(None, reader):
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                columns = f"{len(cells)} columns instead of {len(header)}"
                raise DataError(f"{where}: {columns}; a caption with commas needs quotes.")
            row = dict(zip(header, cells, strict=True))
            yield _Row(reader.line_num, where, row["image"], [row["caption"]], row.get("split"))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    # str.splitlines() would also split at other characters, which JSON text may contain.
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        where = f"{path}, line {line}"
        row = parse_json(text, where)
        sound = isinstance(row, dict) and "image" in row
        if not sound or ("caption" in row) == ("captions" in row):
            wanted = "an object with image and either caption or captions is expected"
            raise DataError(f"{where}: {wanted}.")
        captions = row["captions"] if "captions" in row else [row["caption"]]
        if not isinstance(captions, list):
            raise DataError(f"{where}: captions must be a list.")
        yield _Row(line, where, row["image"], captions, row.get("split"))


_ROWS = {".json": _karpathy_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}
