"""Captions in tables: CSV with a header, or one JSON object a line."""

import csv
import io
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fimaq_core.errors import DataError
from tasks.common.files import composed, image_id, parse_json, read_text, state_of
from tasks.retrieval.files import check_split

_Splits = Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]]


class _Row(NamedTuple):
    line: int
    image: object
    captions: list[object]
    split: object


def read_table(path: Path, own: str | None) -> _Splits:
    """(Image id, captions) of each split; read once while the file stays as it is.

    Rows of one image need not stand together: images are in the order of their first row, captions in that of their rows.

    Args:
        path: a .csv or .jsonl file.
        own: split of a file that holds one split only; None where each row must name its own.

    Raises:
        DataError: not UTF-8, not of the format, a row without a split or of an unknown one, an image in two splits, the same
            image and caption twice (a caption that counts twice would weigh double in the metrics).
    """
    return _read(path, own, state_of(path))


@lru_cache(maxsize=4)
def _read(path: Path, own: str | None, state: tuple[int, int]) -> _Splits:
    splits: dict[str, dict[str, list[str]]] = {}
    first: dict[tuple[str, str], int] = {}
    split_of: dict[str, str] = {}
    for row in (_csv_rows if path.suffix == ".csv" else _jsonl_rows)(path):
        where = f"{path}, line {row.line}"
        if row.split is None and own is None:
            raise DataError(f"{where}: there is no split; name it, or make two files, train{path.suffix} and test{path.suffix}.")
        split = check_split(own if row.split is None else row.split, where)
        if own is not None and split != own:
            raise DataError(f"{where}: the split {split!r} does not belong into this file.")
        image = image_id(row.image, where, path.parent)
        if (other := split_of.setdefault(composed(image), split)) != split:
            raise DataError(f"{where}: {image!r} is in the splits {other!r} and {split!r}.")
        captions = splits.setdefault(split, {}).setdefault(image, [])
        for caption in row.captions:
            if not isinstance(caption, str):
                raise DataError(f"{where}: the caption {caption!r} is not text.")
            if (before := first.setdefault((image, caption), row.line)) != row.line or caption in captions:
                raise DataError(f"{where} repeats image and caption of line {before}: remove one.")
            captions.append(caption)
    return {split: tuple((image, tuple(own)) for image, own in images.items()) for split, images in splits.items()}


def _csv_rows(path: Path) -> Iterator[_Row]:
    # The text as it is, line ends included: captions in quotes may go over several lines.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        if not {"image", "caption"} <= set(header) or len(set(header)) < len(header):
            raise DataError(f"{path} needs the columns image and caption, once each; its first line is {','.join(header)!r}.")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} columns instead of {len(header)}; a caption with commas needs "
                    "quotes."
                )
            row = dict(zip(header, cells, strict=True))
            yield _Row(reader.line_num, row["image"], [row["caption"]], row.get("split"))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    # Not splitlines(): JSON text may hold other characters that it takes for line ends.
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        where = f"{path}, line {line}"
        row = parse_json(text, where)
        if not isinstance(row, dict) or "image" not in row or ("caption" in row) == ("captions" in row):
            raise DataError(f"{where}: an object with image and either caption or captions is expected.")
        captions = row["captions"] if "captions" in row else [row["caption"]]
        if not isinstance(captions, list):
            raise DataError(f"{where}: captions must be a list.")
        yield _Row(line, row["image"], captions, row.get("split"))
