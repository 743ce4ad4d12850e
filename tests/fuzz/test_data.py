"""Fuzzing of data: one clear error or a valid result, in a gigabyte and ten seconds."""

import io
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.cocoeval
import timm.utils.misc
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import VALUES, as_json, contents, documents, few, tried
from PIL import Image
from pycocotools import mask as run_lengths

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import GRIDS, load_grid
from benchmarks.published.table import TABLES, load_table
from fimaq_core.documents import parse_json, read_yaml
from fimaq_core.errors import DataError
from fimaq_core.recipe import make_recipe, read_recipe_file
from tasks.common.arrays import read_arrays
from tasks.common.data.calibration import read_list
from tasks.common.data.class_order import read_class_order
from tasks.common.data.folders import open_folder
from tasks.common.data.images import DamagedImage, open_rgb
from tasks.common.data.walk import files_by_class
from tasks.common.record import read_record
from tasks.detection.annotations import Detections
from tasks.detection.coco import ImageFiles, open_file
from tasks.detection.evaluate import match
from tasks.detection.example_objects import detection_examples
from tasks.retrieval.captions import open_captions

#: Imported before any child process starts, so that not each of them has to: it counts as a use.
IMPORTED = (cv2, pycocotools.cocoeval, timm.utils.misc, Image.init())
OLD_FILES = Path(__file__).parents[1] / "tasks" / "common" / "old_files"


# Documents


@given(documents([{"a": [1, {"b": "c"}], "d": 0.5}]) | st.recursive(VALUES, st.lists))
def test_json(document: Any) -> None:
    tried(read_and_dump, json.dumps(document))


def read_and_dump(text: str) -> None:
    content = parse_json(text, "It", DataError)
    assert json.loads(json.dumps(content, allow_nan=False).encode()) == content


SMALL_GRID = {
    "name": "t",
    "tasks": {"classification": {"dataset": "d", "models": ["m"], "scopes": ["attention"]}},
    "methods": ["fp", "rtn", "qdrop"],
    "bits": ["w3a3", "w4a4"],
    "seeds": [1, 2],
    "overrides": {"steps": 3},
    "axes": {"loss": {"mse": {"loss": "mse"}}},
}


def texts_in(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.yaml"))]


def as_yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")


@given(contents(texts_in(GRIDS)) | documents([SMALL_GRID]).map(as_yaml))
def test_grids(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    tried(expand_grid, path)


def expand_grid(path: Path) -> None:
    expand(load_grid(str(path)), Filters(), RunOptions())


@few
@given(contents(texts_in(TABLES)))
def test_published_tables(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    tried(load_table, str(path))


ALIASES = b"a: &a [1,1,1]\nb: &b [*a,*a]\nc: &c {<<: {x: *b}, y: !!str 3, z: 2024-01-01}\n"


@given(contents([b"w_bits: 3\nloss: mse\nsteps: 10\n", ALIASES]))
def test_recipes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    tried(make_recipes, path)


def make_recipes(path: Path) -> None:
    json.dumps(read_yaml(path, "recipe", DataError)).encode()
    make_recipe("qdrop", read_recipe_file(path))


# Records and arrays

RECORDS = [json.loads(path.read_text()) for path in sorted(OLD_FILES.rglob("re*.json"))]


@given(contents([*map(as_json, RECORDS)]) | documents(RECORDS).map(as_json))
def test_records(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    tried(read_records, path)


def read_records(path: Path) -> None:
    with suppress(DataError):
        read_list(path)
    read_record(path).model_dump_json().encode()


def archives() -> list[bytes]:
    arrays = {"sample": np.array(["a", "bc"]), "right": np.array([True, False]), "x": np.zeros(2)}
    files = io.BytesIO(), io.BytesIO()
    np.savez(files[0], **arrays)  # type: ignore[arg-type]
    np.savez_compressed(files[1], **arrays)  # type: ignore[arg-type]
    return [file.getvalue() for file in files]


@given(contents(archives()))
def test_arrays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    tried(read_and_list, path, good=(OSError, ValueError))


def read_and_list(path: Path) -> None:
    for array in read_arrays(path, 2**28).values():
        json.dumps(array.tolist() if array.dtype.kind != "S" else 0).encode()


# Images

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("AVIF", {}), ("BMP", {}), ("DIB", {}), ("GIF", {}), ("JPEG", {}),
    ("JPEG", {"progressive": True}), ("JPEG2000", {}), ("PCX", {}), ("PNG", {}), ("PPM", {}),
    ("QOI", {}), ("TGA", {"compression": "tga_rle"}), ("WEBP", {}), ("WEBP", {"lossless": True}),
    ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "packbits"}),
    ("TIFF", {"compression": "jpeg"}), ("TIFF", {"compression": "tiff_adobe_deflate"}),
]  # fmt: skip


def images() -> list[bytes]:
    """Return an image of 16 x 16 pixels in each format, in 24 bits, and in 8, 4 and 16."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    colours, wide = Image.fromarray(pixels), Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    exif = Image.Exif()
    exif[274] = 6
    made = [(colours, kind, options) for kind, options in KINDS]
    made += [(colours.quantize(16), kind, {}) for kind in ("PNG", "GIF", "BMP", "TIFF")]
    made += [(colours.convert("CMYK"), "JPEG", {}), (colours.convert("L"), "PNG", {})]
    made += [(wide, kind, {}) for kind in ("PNG", "TIFF", "JPEG2000")]
    found = []
    for image, kind, options in made:
        file = io.BytesIO()
        own = {"exif": exif} if kind in ("JPEG", "PNG", "TIFF", "WEBP") else {}
        image.save(file, format=kind, **options, **own)
        found.append(file.getvalue())
    return found


@given(contents(images()))
def test_images(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    tried(read_and_resize, path, good=(DamagedImage,))


def read_and_resize(path: Path) -> None:
    with suppress(DamagedImage, DataError):
        read = ImageFiles([path], [(16, 16)], Path("x.json"), "apply").read
        assert read(0).shape == (16, 16, 3)
    image = open_rgb(path)
    assert image.mode == "RGB"
    short = min(image.size)
    image.resize((256 * image.width // short, 256 * image.height // short))


# Annotations


def annotations() -> dict[str, Any]:
    """Return two images with a polygon, run lengths of both kinds, and an object without mask."""
    mask = np.zeros((12, 16), np.uint8, order="F")
    mask[2:9, 3:11] = 1
    mask[4, 4] = 0
    shapes = [
        [[1, 1, 9.5, 1, 9.5, 8, 1, 8], [2, 2, 3, 2, 3, 3]],
        {"size": [12, 16], "counts": run_lengths.encode(mask)["counts"].decode()},
        {"size": [12, 16], "counts": [20, 30, 142]},
        [],
    ]
    objects = [
        {
            "id": 5 + number, "image_id": 1 + number % 2, "category_id": 2 + number % 2,
            "bbox": [1.0, 1, 8.5, 7], "area": 40.5, "iscrowd": number == 2, "segmentation": shape,
        }
        for number, shape in enumerate(shapes)
    ]  # fmt: skip
    images = [{"id": n, "file_name": f"{n}.png", "width": 16, "height": 12} for n in (1, 2)]
    categories = [{"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    return {"images": images, "annotations": objects, "categories": categories}


WITH_MASKS = {**annotations(), "annotations": annotations()["annotations"][:3]}


def evaluate(path: Path) -> None:
    """Read annotations and their images, and evaluate one detection per image."""
    source = open_file(path)
    found = []
    for entry in source.images:
        height, width = entry["height"], entry["width"]
        mask = {"size": [height, width], "counts": [0, height * width]}
        shape = {"bbox": [0.0, 0.0, float(width), float(height)], "score": 0.5}
        shape["segmentation"] = run_lengths.frPyObjects(mask, height, width)
        found.append({"image_id": entry["id"], "category_id": 2, **shape})
    detections = Detections(found, list(range(len(source.images))))
    json.dumps(detection_examples(source, detections), allow_nan=False).encode()
    match(source, detections, "bbox")
    if all("segmentation" in entry for entry in source.coco["annotations"]):
        match(source, detections, "segm")
    assert len(source.fingerprint) == 64
    for index in range(len(source.images)):
        assert source.read(index).ndim == 3


@given(contents([as_json(WITH_MASKS)]) | documents([WITH_MASKS, annotations()]).map(as_json))
def test_annotations(tmp_path: Path, content: bytes) -> None:
    for number in (1, 2):
        Image.new("RGB", (16, 12)).save(tmp_path / f"{number}.png")
    path = tmp_path / "x.json"
    path.write_bytes(content)
    tried(evaluate, path)


# Captions and lists

ROWS = [
    {"image": f"{number}.png", "caption": f"a {number}", "split": split}
    for number, split in enumerate(("train", "test", "test"))
]
KARPATHY = {
    "images": [
        {"filename": row["image"], "split": row["split"], "sentences": [{"raw": "a", "tokens": []}]}
        for row in ROWS
    ]
}
CSV = b'image,caption,split\r\n0.png,"a, 0",train\r\n1.png,"a ""b""\nc",test\r\n2.png,x,test\r\n'


def as_lines(rows: Any) -> bytes:
    return b"\n".join(map(as_json, rows if isinstance(rows, list) else [rows]))


FILES = {
    "captions.json": contents([as_json(KARPATHY)]) | documents([KARPATHY]).map(as_json),
    "captions.jsonl": contents([as_lines(ROWS)]) | documents([ROWS]).map(as_lines),
    "captions.csv": contents([CSV]),
}


@given(st.one_of(*(st.tuples(st.just(name), content) for name, content in FILES.items())))
def test_captions(tmp_path: Path, file: tuple[str, bytes]) -> None:
    for old in tmp_path.glob("captions.*"):
        old.unlink()
    for number in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    (tmp_path / file[0]).write_bytes(file[1])
    tried(read_captions, tmp_path)


def read_captions(tmp_path: Path) -> None:
    source = open_captions(tmp_path, "test")
    json.dumps([source.image_ids, source.captions, source.fingerprint]).encode()
    assert all(source.read(index).size == (4, 4) for index in range(len(source.image_ids)))


ORDERS = [{"ant": 0, "bee": 1}, {"0": "ant", "1": "bee"}, ["ant", "bee"]]


@given(contents([*map(as_json, ORDERS)]) | documents(ORDERS).map(as_json))
def test_class_orders_and_lists(tmp_path: Path, content: bytes) -> None:
    for name in ("x.json", "x.txt"):
        (tmp_path / name).write_bytes(content)
    tried(read_names, tmp_path)


def read_names(folder: Path) -> None:
    for read in (read_list, read_class_order):
        with suppress(DataError):
            read(folder / "x.txt")
    read_class_order(folder / "x.json")


# Folders

PARTS = st.lists(st.sampled_from(["a", "b", "c.png", "d.png", "e.txt"]), min_size=1, max_size=3)
TARGETS = [".", "..", "../..", "a", "b", "c.png", "../a", "../b/c.png", "gone", "../../store"]
ENTRIES = st.tuples(
    PARTS, st.sampled_from(["file", "folder", "pipe", "link"]), st.sampled_from(TARGETS)
)


def make_entry(path: Path, kind: str, target: str) -> None:
    """Make a file of a kind, unless another entry is in its way."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file":
            path.touch()
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(target)


@given(st.lists(ENTRIES, max_size=14))
def test_folders(entries: list[tuple[list[str], str, str]]) -> None:
    """The walk ends, and finds no file twice."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for top in ("val/ant", "val/bee", "store"):
            (root / top).mkdir(parents=True, exist_ok=True)
            for parts, kind, target in entries:
                make_entry(root.joinpath(top, *parts), kind, target)
        tried(walk, root)


def walk(root: Path) -> None:
    found = files_by_class(root / "val", ["ant", "bee"], lambda path: path.endswith("png"))
    real = [os.path.realpath(path) for path, _ in found.samples]
    assert len({*real}) == len(real)
    assert not any(map(os.path.isdir, real))
    open_folder(root, "val", "text").fingerprint.encode()
