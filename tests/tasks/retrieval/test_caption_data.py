"""Image-caption data: pairs and order of the files, names of published splits, clear errors."""

import csv
import json
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from caption_fakes import (
    colour_of,
    karpathy_entries,
    loaded,
    write_csv,
    write_images,
    write_karpathy,
)
from PIL import Image

import tasks.retrieval.caption_files as caption_files
from fimaq_core.errors import DataError
from tasks.common.data.calibration import positions_of
from tasks.common.data.folders import open_folder
from tasks.common.request import DataRequest
from tasks.retrieval.captions import (
    COCO,
    FLICKR30K,
    Counts,
    PairSource,
    Published,
    imagenet_pairs,
    open_captions,
    open_pairs,
    open_published,
)
from tasks.retrieval.tags import KINDS

SMALL_COCO = {"train": Counts(4), "restval": Counts(1), "val": Counts(1), "test": Counts(2, 11)}
SMALL_FLICKR = {"train": Counts(5), "val": Counts(1, 5), "test": Counts(2, 11)}


def nothing(index: int) -> Image.Image:
    raise AssertionError("no image is read")


def source(
    ids: Sequence[str] = ("a", "b", "c"),
    captions: Sequence[str] = tuple("uvwxy"),
    owners: Any = (0, 0, 1, 2, 2),
) -> Any:
    listed = [
        (name, [text for text, owner in zip(captions, owners, strict=True) if owner == place])
        for place, name in enumerate(ids)
    ]
    return PairSource("data", "test", listed, nothing)


def write_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def pairs_of(found: PairSource) -> list[tuple[str, str]]:
    return [
        (found.image_ids[owner], caption)
        for owner, caption in zip(found.image_of, found.captions, strict=True)
    ]


def test_starts_and_head() -> None:
    whole = source()
    assert whole.starts.tolist() == [0, 2, 3, 5]
    head = whole.head(2)
    assert (head.image_ids, head.captions, head.image_of.tolist()) == (
        ("a", "b"),
        ("u", "v", "w"),
        [0, 0, 1],
    )
    assert head.split == "test[:2]"
    assert whole.head(3) is whole
    assert whole.head(None) is whole
    described = head.describe()
    assert (described.name, described.split, described.count, described.captions) == (
        "data",
        "test[:2]",
        2,
        3,
    )
    assert (described.classes, described.fingerprint) == (0, head.fingerprint)
    assert (
        PairSource("data", "test", [("a", "uv"), ("b", "w"), ("c", "xy")], nothing).fingerprint
        == whole.fingerprint
    )


def test_fingerprints_tell_pairings_apart() -> None:
    others = [
        source(),
        source(owners=(0, 1, 1, 2, 2)),
        source(captions="uvwyx"),
        source(ids="acb"),
        source().head(2),
        source(captions=("u", "v", "w", "x\ny", "z")),
        source(captions=("u", "v", "w", "x", "y\nz")),
    ]
    assert len({other.fingerprint for other in others}) == len(others)
    assert source().fingerprint == source().fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": (), "captions": (), "owners": ()}, "data test holds no images"),
        ({"ids": "aba"}, "has 1 images more than once, such as 'a'"),
        ({"owners": (0, 0, 0, 2, 2)}, "has 1 images without a caption, such as 'b'"),
        ({"captions": ("u", "v", " \n", "", "y")}, "has 2 empty captions, such as one of 'b'"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        source(**changes)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("published", "counts", "folder"),
    [
        (COCO, SMALL_COCO, ""),
        (FLICKR30K, SMALL_FLICKR, "flickr30k-images"),
        (FLICKR30K, SMALL_FLICKR, "images"),
        (FLICKR30K, SMALL_FLICKR, ""),
    ],
)
def test_karpathy_files_against_a_plain_reading(
    tmp_path: Path, published: Published, counts: dict[str, Counts], folder: str, part: str
) -> None:
    write_karpathy(tmp_path, published.file, folder)
    if published is FLICKR30K:  # which has no restval
        path = tmp_path / published.file
        path.write_text(path.read_text().replace("restval", "train"))
    found = open_published(tmp_path, replace(published, counts=counts), part)
    expected = []
    for entry in json.loads((tmp_path / published.file).read_text())["images"]:
        if entry["split"] == part:
            place = (
                f"{entry['filepath']}/{entry['filename']}"
                if published is COCO
                else entry["filename"]
            )
            expected += [(place, sentence["raw"]) for sentence in entry["sentences"]]
    assert pairs_of(found) == expected
    assert found.split == f"Karpathy {part}"
    for index, name in enumerate(found.image_ids):
        assert found.read(index).getpixel((3, 3)) == colour_of(Path(name).name)
        assert found.read(index).mode == "RGB"


@pytest.mark.parametrize(
    ("file", "name"), [("dataset_coco.json", "MS-COCO"), ("dataset_flickr30k.json", "Flickr30k")]
)
def test_small_data_are_refused_under_published_names(tmp_path: Path, file: str, name: str) -> None:
    write_karpathy(tmp_path, file)
    images = "82,783" if name == "MS-COCO" else "29,000"
    test = "5,000" if name == "MS-COCO" else "1,000"
    wrong = rf"train has 4 images instead of {images}; .*test has 2 images instead of {test}[;.]"
    with pytest.raises(
        DataError, match=rf"{file} does not hold the splits of {name}: {wrong}.*captions.json"
    ):
        open_pairs(loaded(), DataRequest(tmp_path), "test")


def test_captions_and_unexpected_splits_are_counted_too(tmp_path: Path) -> None:
    write_karpathy(tmp_path, COCO.file)
    with pytest.raises(DataError, match="test has 11 captions instead of 10"):
        open_published(
            tmp_path, replace(COCO, counts={**SMALL_COCO, "test": Counts(2, 10)}), "test"
        )
    fewer = {name: count for name, count in SMALL_COCO.items() if name != "restval"}
    with pytest.raises(DataError, match="restval has 1 images instead of 0"):
        open_published(tmp_path, replace(COCO, counts=fewer), "test")


@pytest.mark.parametrize("published", [COCO, FLICKR30K])
def test_published_counts_get_the_published_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published
) -> None:
    splits: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for split, count in published.counts.items():
        captions = count.captions or count.images
        shares = [
            captions // count.images + (number < captions % count.images)
            for number in range(count.images)
        ]
        splits[split] = [
            (f"{split}{number}.jpg", ("text",) * share) for number, share in enumerate(shares)
        ]
    monkeypatch.setattr("tasks.retrieval.captions.read_captions", lambda path: splits)
    (tmp_path / published.file).touch()
    for number in range(published.counts["test"].images):
        (tmp_path / f"test{number}.jpg").touch()
    found = open_pairs(loaded(), DataRequest(tmp_path), "test")
    assert (found.name, found.split) == (published.name, "Karpathy test")
    assert found.describe().captions == {"MS-COCO": 25_010, "Flickr30k": 5_000}[published.name]
    assert found.describe().count == {"MS-COCO": 5_000, "Flickr30k": 1_000}[published.name]
    assert found.head(10).split == "Karpathy test[:10]"
    count = published.counts["train"].images
    absent = rf"names {count} images of the split 'Karpathy train' that are not in"
    with pytest.raises(DataError, match=absent):
        open_pairs(loaded(), DataRequest(tmp_path), "train")
    splits["test"][-1] = (splits["test"][-1][0], ("text",) * 6)
    with pytest.raises(DataError, match=r"test has \S+1 captions instead of \S+0\. "):
        open_pairs(loaded(), DataRequest(tmp_path), "test")


def test_a_file_is_parsed_once_while_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_karpathy(tmp_path, COCO.file)
    calls: list[str] = []
    parse = caption_files.parse_json
    monkeypatch.setattr(
        caption_files, "parse_json", lambda *given: calls.append(given[1]) or parse(*given)
    )
    for part in ("train", "test", "train"):
        open_published(tmp_path, replace(COCO, counts=SMALL_COCO), part)
    assert len(calls) == 1
    entries = karpathy_entries(coco=True)
    entries[6]["sentences"][0]["raw"] = "Another text altogether."
    (tmp_path / COCO.file).write_text(json.dumps({"images": entries}))
    assert (
        "Another text altogether."
        in open_published(tmp_path, replace(COCO, counts=SMALL_COCO), "test").captions
    )
    assert len(calls) == 2


def test_free_counts_of_karpathys_format(tmp_path: Path) -> None:
    entries = write_karpathy(tmp_path, "captions.json")
    for part in ("train", "test"):
        found = open_pairs(loaded(), DataRequest(tmp_path), part)
        mine = [entry for entry in entries if entry["split"] == part]
        assert found.image_ids == tuple(entry["filename"] for entry in mine)
        assert found.captions == tuple(
            sentence["raw"] for entry in mine for sentence in entry["sentences"]
        )
        assert (found.name, found.split) == (f"captions-{len(mine)}-images", part)
    (tmp_path / "captions.json").write_text(
        json.dumps({"images": [entry for entry in entries if entry["split"] != "train"]})
    )
    with pytest.raises(DataError, match=r"captions.json has no images of the split 'train'"):
        open_pairs(loaded(), DataRequest(tmp_path), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"split": "dev"},
            "image 1 .*there is no split 'dev'; known are train, restval, val, test",
        ),
        ({"filename": "../out.png"}, "image 1 .*'../out.png' is not the path of an image below"),
        ({"filename": None}, "image 1 .*must be text"),
        ({"sentences": [{"tokens": ["a"]}]}, "image 1 .*sentences with raw are expected .*'raw'"),
        ({"sentences": 3}, "image 1 .*sentences with raw are expected"),
        ({"sentences": [{"raw": 3}]}, "image 1 .*must be text"),
        (
            {"sentences": []},
            "captions-2-images test has 1 images without a caption, such as '1.png'",
        ),
        ({"sentences": [{"raw": " "}]}, "has 1 empty captions, such as one of '1.png'"),
        ({"filename": "6.png"}, "has 1 images more than once, such as '6.png'"),
        (
            {"filename": "77.png"},
            "names 1 images of the split 'test' that are not in .*, such as '77.png'",
        ),
    ],
)
def test_odd_entries_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    entries = write_karpathy(tmp_path, "captions.json")
    entries[1] |= change
    (tmp_path / "captions.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(DataError, match=message):
        open_captions(tmp_path, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "captions.json is not valid JSON"),
        ("[]", "no list 'images'"),
        ('{"images": {}}', "no list 'images'"),
    ],
)
def test_files_that_are_not_of_the_format(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(DataError, match=message):
        open_captions(tmp_path, "test")
    (tmp_path / "captions.json").write_text('{"images": ["a.png"]}')
    with pytest.raises(DataError, match=r"image 0 .*are expected"):
        open_captions(tmp_path, "test")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_with_a_split_column(tmp_path: Path, mark: str) -> None:
    names = ["b.png", "sub/a.jpg", "c.png", "val.png"]
    write_images(tmp_path, names)
    rows = [
        ["split", "caption", "image", "id"],
        ["test", "Zwei Hunde, groß", "b.png", "0"],
        ["train", "a cat", "c.png", "1"],
        ["test", 'said "no",\non two lines', "./sub/a.jpg", "2"],
        ["test", "second of b ", "b.png", "3"],
        ["val", "not used", "val.png", "4"],
    ]
    write_rows(tmp_path / "captions.csv", rows)
    (tmp_path / "captions.csv").write_bytes(
        mark.encode() + (tmp_path / "captions.csv").read_bytes()
    )
    found = open_captions(tmp_path, "test")
    assert pairs_of(found) == [
        ("b.png", "Zwei Hunde, groß"),
        ("b.png", "second of b "),
        ("sub/a.jpg", 'said "no",\non two lines'),
    ]
    assert (found.name, found.split) == ("captions-2-images", "test")
    assert found.read(0).getpixel((0, 0)) == colour_of("b.png")
    assert pairs_of(open_captions(tmp_path, "train")) == [("c.png", "a cat")]


def test_absolute_paths_below_the_data_are_taken(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write_images(root, ["a.png", "sub/b.png"])
    (tmp_path / "link").symlink_to(root)
    for place in (root, tmp_path / "link"):
        rows = [
            ["image", "caption", "split"],
            [f"{root}/a.png", "one", "test"],
            [f"{place}/./sub/b.png", "two", "test"],
        ]
        write_rows(root / "captions.csv", rows)
        assert pairs_of(open_captions(place, "test")) == [("a.png", "one"), ("sub/b.png", "two")]
    for name in (f"{tmp_path}/a.png", f"{root}/../data/a.png", str(root), f"{root}x/a.png"):
        write_rows(root / "captions.csv", [["image", "caption", "split"], [name, "one", "test"]])
        with pytest.raises(
            DataError, match=f"'{name}' is not the path of an image below the folder of the data"
        ):
            open_captions(root, "test")


def test_all_formats_of_the_same_pairs_are_equal(tmp_path: Path) -> None:
    captions = {"x.png": ["one", "two"], "y.png": ["three"]}
    rows = [(image, caption) for image, own in captions.items() for caption in own]
    made: dict[str, dict[str, str]] = {
        "csv": {
            "captions.csv": "image,caption,split\n"
            + "".join(f"{image},{text},test\n" for image, text in rows)
        },
        "csv pair": {
            "test.csv": "image,caption\n" + "".join(f"{image},{text}\n" for image, text in rows)
        },
        "jsonl": {
            "captions.jsonl": "".join(
                json.dumps({"image": i, "caption": t, "split": "test"}) + "\n" for i, t in rows
            )
        },
        "jsonl pair": {
            "test.jsonl": "\n".join(
                json.dumps({"image": i, "captions": own}) for i, own in captions.items()
            )
            + "\n\n"
        },
        "json": {
            "captions.json": json.dumps(
                {
                    "images": [
                        {"filename": i, "split": "test", "sentences": [{"raw": t} for t in own]}
                        for i, own in captions.items()
                    ]
                }
            )
        },
    }
    prints = set()
    for kind, files in made.items():
        root = tmp_path / kind
        write_images(root, list(captions))
        for name, text in files.items():
            (root / name).write_text(text)
        found = open_captions(root, "test")
        assert pairs_of(found) == rows
        prints.add((found.fingerprint, found.name, found.split))
    assert len(prints) == 1
    with pytest.raises(DataError, match=r"Cannot read .*train.csv: No such file"):
        open_captions(tmp_path / "csv pair", "train")


HEADER = "image,caption,split\n"
GOOD = "a.png,text,test\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "captions.csv",
            "file,caption\na.png,x\n",
            "needs the columns image and caption, once each; its first line is 'file,caption'",
        ),
        ("captions.csv", "", "needs the columns image and caption"),
        ("captions.csv", "image,caption,caption\na.png,x,y\n", "once each"),
        (
            "captions.csv",
            "image,caption\na.png,x\n",
            "line 2: there is no split; .*train.csv and test.csv",
        ),
        ("captions.csv", HEADER + "a.png,x,dev\n", "line 2: there is no split 'dev'; known are"),
        ("captions.csv", HEADER + "a.png,x,\n", "line 2: there is no split ''"),
        ("captions.csv", HEADER + GOOD + "b.png,one, two,test\n", "line 3: 4 columns instead of 3"),
        ("captions.csv", HEADER + GOOD + "b.png\n", "line 3: 1 columns instead of 3"),
        ("captions.csv", HEADER + GOOD + 'b.png,"open,test\n', "line 3: not valid CSV"),
        (
            "captions.csv",
            HEADER + GOOD + "b.png,  ,test\n",
            "has 1 empty captions, such as one of 'b.png'",
        ),
        (
            "captions.csv",
            HEADER + GOOD + "b.png,y,test\n" + GOOD,
            "line 4 repeats image and caption of line 2",
        ),
        (
            "captions.csv",
            HEADER + GOOD + "a.png,other,train\n",
            "line 3: 'a.png' is in the splits 'test' and 'train'",
        ),
        ("captions.csv", HEADER + GOOD + "/a.png,x,test\n", "line 3: '/a.png' is not the path"),
        ("captions.csv", HEADER + GOOD + ",x,test\n", "line 3: '' is not the path"),
        (
            "captions.csv",
            HEADER + GOOD + "sub/../b.png,x,test\n",
            "line 3: 'sub/../b.png' is not the path",
        ),
        (
            "captions.csv",
            HEADER + GOOD + "no.png,x,test\nsub/no.png,y,test\n",
            "names 2 images .* are not in .*, such as 'no.png'",
        ),
        (
            "captions.csv",
            HEADER + "a.png,x,train\n",
            "captions.csv has no images of the split 'test'",
        ),
        ("captions.csv", HEADER + f'a.png,"{"x" * 200_000}",test\n', "line 2: not valid CSV"),
        ("captions.csv", HEADER + f"a.png,{'x' * 5001},test\n", "'xx.* has 5,001 characters"),
        ("captions.csv", HEADER + "a\0.png,x,test\n", "line 2: .* is not the path of an image"),
        ("captions.csv", "x," * 10**5, r"its first line is .{100}\.$"),
        ("test.jsonl", '{"image": "a.png", "caption": ' + "9" * 5000 + "}", "more than 64 bits"),
        (
            "test.jsonl",
            '{"image": "a.png", "caption": ' + "[" * 500 + "]" * 500 + "}",
            "nested more than",
        ),
        ("test.jsonl", r'{"image": "a.png", "caption": "\ud800"}', "half a character"),
        ("test.jsonl", '{"image": "' + "a/" * 5000 + '", "caption": "x"}', "1 images .* not in"),
        ("test.jsonl", '{"image": "a.png", "captions": ["x", "x"]}', "repeats image and caption"),
        (
            "test.csv",
            HEADER + "a.png,x,train\n",
            "line 2: the split 'train' does not belong in this file",
        ),
        (
            "captions.jsonl",
            '{"image": "a.png", "caption": "x", "split": "test"}\n{\n',
            "line 2 is not valid JSON",
        ),
        (
            "test.jsonl",
            '\n{"image": "a.png", "captions": []}',
            "has 1 images without a caption, such as 'a.png'",
        ),
        (
            "test.jsonl",
            '{"image": "a.png", "captions": ["x", "x"]}',
            "line 1 repeats image and caption of line 1",
        ),
        ("test.jsonl", '{"image": "a.png", "captions": "x"}', "line 1: captions must be a list"),
        ("test.jsonl", '{"image": "a.png", "caption": ["x"]}', "line 1: the caption .*is not text"),
        ("test.jsonl", '{"image": 3, "caption": "x"}', "line 1: 3 is not the path of an image"),
        (
            "test.jsonl",
            '{"image": "a.png"}',
            "line 1: an object with image and either caption or captions",
        ),
        (
            "test.jsonl",
            '{"image": "a.png", "caption": "x", "captions": ["y"]}',
            "line 1: an object with image and either",
        ),
        ("test.jsonl", '["a.png", "x"]', "line 1: an object with image and either"),
        (
            "captions.jsonl",
            '{"image": "a.png", "caption": "x"}',
            "line 1: there is no split; .*test.jsonl",
        ),
    ],
)
def test_odd_tables_are_explained(tmp_path: Path, name: str, text: str, message: str) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        open_captions(tmp_path, "test")


@pytest.mark.parametrize("name", ["captions.csv", "captions.json", "test.jsonl"])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfimage,caption\na.png,caf\xe9\n")
    with pytest.raises(
        DataError, match=rf"{name} is not UTF-8 text: byte 26 \(counted from 0\) is 0xe9"
    ):
        open_captions(tmp_path, "test")


def test_changed_tables_are_read_again(tmp_path: Path) -> None:
    write_csv(tmp_path)
    before = open_captions(tmp_path, "test")
    path = tmp_path / "captions.csv"
    path.write_text(path.read_text().replace("second of 1,", "something else,"))
    after = open_captions(tmp_path, "test")
    assert "something else" in after.captions
    assert after.fingerprint != before.fingerprint


def test_no_or_several_kinds_of_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder") as caught:
        open_captions(tmp_path / "none", "test")
    with pytest.raises(DataError, match="holds no captions") as caught:
        open_captions(tmp_path, "test")
    for name in (name for kind in KINDS for name in kind):
        assert name in str(caught.value)
    write_csv(tmp_path)
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(
        DataError, match=r"several kinds of captions: captions.csv, test.jsonl. Leave one"
    ):
        open_captions(tmp_path, "test")
    with pytest.raises(DataError, match="give --data"):
        open_pairs(loaded(), DataRequest(), "test")


def test_calibration_data_replace_the_training_part_only(tmp_path: Path) -> None:
    write_csv(tmp_path / "one")
    write_csv(tmp_path / "two", images=5, test=1)
    data = DataRequest(tmp_path / "one", calibration_data=tmp_path / "two")
    assert len(open_pairs(loaded(), data, "test").image_ids) == 3
    assert len(open_pairs(loaded(), data, "train").image_ids) == 4
    assert len(open_pairs(loaded(data="digit-scenes"), data, "train").image_ids) == 4
    assert len(open_pairs(loaded(), DataRequest(tmp_path / "one"), "train").image_ids) == 9


def test_the_demo_brings_its_own_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class DigitScenes:
        def __init__(self, part: str) -> None:
            self.ids, self.captions = (
                [f"{part}/{number}" for number in range(3)],
                ["one", "two", "three"],
            )

        def __getitem__(self, index: int) -> tuple[Image.Image, str]:
            return Image.new("L", (48, 48), 10 * index), self.captions[index]

    module = ModuleType("tasks.retrieval.demo.scenes")
    module.DigitScenes = DigitScenes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tasks.retrieval.demo", ModuleType("tasks.retrieval.demo"))
    monkeypatch.setitem(sys.modules, "tasks.retrieval.demo.scenes", module)
    from tasks.retrieval import captions

    captions.demo_scenes.cache_clear()
    try:
        model = loaded(data="digit-scenes")
        found = open_pairs(model, DataRequest(), "test")
        assert pairs_of(found) == [("test/0", "one"), ("test/1", "two"), ("test/2", "three")]
        assert (found.name, found.split) == ("digit-scenes", "test")
        assert found.read(2).getpixel((0, 0)) == 20
        assert open_pairs(model, DataRequest(), "train").image_ids[0] == "train/0"
        write_csv(tmp_path)
        assert open_pairs(model, DataRequest(tmp_path), "test").name == "captions-3-images"
    finally:
        captions.demo_scenes.cache_clear()


def test_pairs_of_labelled_images(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part, ["n02/1.png", "n01/0.png", "n01/2.png"])
    labelled = open_folder(tmp_path, "train")
    found = imagenet_pairs(labelled, ["tench", "great white shark"])
    assert pairs_of(found) == [
        ("train/n01/0.png", "a photo of a tench."),
        ("train/n01/2.png", "a photo of a tench."),
        ("train/n02/1.png", "a photo of a great white shark."),
    ]
    assert (found.name, found.split) == (labelled.name, "train")
    assert found.read(2).getpixel((0, 0)) == colour_of("1.png")
    with pytest.raises(DataError, match="has 2 classes, but there are 3 class names"):
        imagenet_pairs(labelled, ["a", "b", "c"])


def test_absent_folders_of_images(tmp_path: Path) -> None:
    write_karpathy(tmp_path, COCO.file)
    shutil.rmtree(tmp_path / "train2014")
    with pytest.raises(
        DataError, match=r"names 4 images of the split 'Karpathy train' .*such as 'train2014/0.png'"
    ):
        open_published(tmp_path, replace(COCO, counts=SMALL_COCO), "train")
    assert len(open_published(tmp_path, replace(COCO, counts=SMALL_COCO), "test").image_ids) == 2


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_image_belongs_to_one_part_of_two_files(tmp_path: Path, suffix: str) -> None:
    for part, images in (("train", ("a.png", "b.png")), ("test", ("b.png", "c.png"))):
        rows = [f"{image},{part} {image}" for image in images]
        if suffix == ".csv":
            (tmp_path / "train.csv").with_stem(part).write_text(
                "\n".join(["image,caption", *rows]), encoding="utf-8"
            )
        else:
            lines = [json.dumps({"image": image, "caption": f"{part} {image}"}) for image in images]
            (tmp_path / "train.jsonl").with_stem(part).write_text(
                "\n".join(lines), encoding="utf-8"
            )
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for part in ("train", "test"):
        with pytest.raises(DataError, match=r"share 1 images, such as 'b\.png'"):
            open_captions(tmp_path, part)


def test_an_image_belongs_to_one_split_of_karpathys_format(tmp_path: Path) -> None:
    entries = [
        {"filename": "a.png", "split": split, "sentences": [{"raw": f"a {split} image"}]}
        for split in ("train", "test")
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": entries}), encoding="utf-8")
    with pytest.raises(DataError, match=r"image 1 .*'a\.png' is in the splits 'train' and 'test'"):
        open_captions(tmp_path, "test")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("file", ["captions.csv", "captions.json"])
def test_names_in_either_unicode_form_find_their_images(
    tmp_path: Path, form: str, file: str
) -> None:
    listed, stored = (
        unicodedata.normalize(kind, "café/Zoë.png")
        for kind in (form, "NFD" if form == "NFC" else "NFC")
    )
    write_images(tmp_path, [stored, "b.png"])
    if file == "captions.csv":
        write_rows(
            tmp_path / file,
            [["image", "caption", "split"], [listed, "a", "test"], ["b.png", "b", "test"]],
        )
    else:
        names = {listed: "a", "b.png": "b"}
        entries = [
            {"filename": n, "split": "test", "sentences": [{"raw": c}]} for n, c in names.items()
        ]
        (tmp_path / file).write_text(json.dumps({"images": entries}), encoding="utf-8")
    found = open_captions(tmp_path, "test")
    assert pairs_of(found) == [(listed, "a"), ("b.png", "b")]
    assert found.read(0).getpixel((3, 3)) == colour_of(Path(stored).name)
    assert positions_of([stored], found.image_ids, tmp_path / "list", "the data") == [0]


def test_unicode_forms_of_one_name(tmp_path: Path) -> None:
    """Exact names win; otherwise one other form must exist, and an image is listed once."""
    composed, decomposed = (unicodedata.normalize(form, "ệ.png") for form in ("NFC", "NFD"))
    third = "\u00ea\u0323.png"
    assert len({composed, decomposed, third}) == 3
    rows = [["image", "caption", "split"], [composed, "a", "test"], [decomposed, "b", "test"]]
    write_images(tmp_path, [composed])
    write_rows(tmp_path / "captions.csv", rows)
    with pytest.raises(DataError, match="same name in two Unicode forms, both lead to"):
        open_captions(tmp_path, "test")
    write_images(tmp_path, [decomposed])
    found = open_captions(tmp_path, "test")
    assert [found.read(index).getpixel((3, 3)) for index in (0, 1)] == [
        colour_of(composed),
        colour_of(decomposed),
    ]
    write_rows(tmp_path / "captions.csv", [*rows[:1], [third, "c", "test"]])
    with pytest.raises(DataError, match="2 files whose name is"):
        open_captions(tmp_path, "test")
    write_rows(tmp_path / "captions.csv", [*rows[:2], [decomposed, "b", "train"]])
    with pytest.raises(DataError, match="is in the splits 'test' and 'train'"):
        open_captions(tmp_path, "test")


def test_captions_have_no_order_of_classes(tmp_path: Path) -> None:
    write_csv(tmp_path)
    with pytest.raises(DataError, match="--class-order goes with --eval zero-shot"):
        open_pairs(loaded(), DataRequest(tmp_path, class_order="text"), "test")
