"""Class folders: missing or damaged files are named, and calibration samples repeat."""

import hashlib
import json
import os
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from timm.data import create_transform
from torch import nn

from fimaq_core.errors import DataError
from fimaq_core.progress import silent
from fimaq_core.recipe import Recipe, make_recipe
from tasks.classification.data import calibration_set, open_source
from tasks.classification.tags import missing_data
from tasks.classification.task import TASK
from tasks.common.data.images import Images
from tasks.common.request import DataRequest, describe_missing
from tasks.common.task import Evaluation, LoadedModel

CPU = torch.device("cpu")


def loaded(classes: int = 3) -> LoadedModel:
    """A classifier on 24 x 24 images with timm's transforms, colour jitter included."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))
    size = (3, 24, 24)
    evaluation = create_transform(size, is_training=False, crop_pct=0.9)
    training = create_transform(size, is_training=True, color_jitter=0.4)
    return LoadedModel(
        model.eval(), "some_model.tag", "file", "0" * 64, classes, evaluation, training
    )


def missing(data: DataRequest, brings_data: bool) -> str | None:
    """Message about missing data."""
    found = missing_data(data, brings_data)
    return describe_missing([] if found is None else [found])


def recipe(count: int = 6, **changes: object) -> Recipe:
    return make_recipe("fimaq", {"calibration_images": count, **changes})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of 4 train and 2 val images, PNG and JPEG, grey, colour and transparent."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                mode = ("RGB", "L", "RGBA", "RGB")[number]
                shape = (30 + number, 40) if mode == "L" else (30 + number, 40, len(mode))
                pixels = generator.integers(0, 255, shape, dtype=np.uint8)
                suffix = "jpg" if mode == "RGB" else "png"
                Image.fromarray(pixels, mode).save(folder / f"{number}.{suffix}")
    return tmp_path


def evaluate(root: Path, **changes: object) -> Evaluation:
    model = loaded()
    return TASK.evaluate(model.model, model, DataRequest(root, **changes), CPU, 4, 0, silent)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_classes_and_order_are_those_of_the_folders(root: Path) -> None:
    source = open_source(loaded(), DataRequest(root), "val")
    assert source.ids == [
        f"val/{name}/{file}" for name in ("ant", "bee", "cat") for file in ("0.jpg", "1.png")
    ]
    assert source.targets == [0, 0, 1, 1, 2, 2]
    described = source.describe()
    assert (described.split, described.count, described.classes) == ("val", 6, 3)
    assert "ImageNet" not in described.name
    head = source.head(2)
    assert (head.ids, head.split) == (source.ids[:2], "val[:2]")
    assert head.fingerprint != source.fingerprint
    assert source.head(6) is source


def test_fingerprint_knows_names_and_labels(root: Path) -> None:
    before = open_source(loaded(), DataRequest(root), "val").fingerprint
    assert open_source(loaded(), DataRequest(root), "val").fingerprint == before
    shutil.move(root / "val" / "ant" / "0.jpg", root / "val" / "bee" / "9.jpg")
    assert open_source(loaded(), DataRequest(root), "val").fingerprint != before


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_parts_are_named(root: Path, part: str) -> None:
    shutil.rmtree(root / part)
    with pytest.raises(DataError, match=rf"There is no folder .*{part}. ImageFolder layout"):
        open_source(loaded(), DataRequest(root), part)
    message = missing(DataRequest(root), brings_data=False)
    assert message is not None
    assert str(root / part) in message
    assert str(root / ("val" if part == "train" else "train")) not in message


def test_missing_root_and_no_path(tmp_path: Path) -> None:
    message = missing(DataRequest(tmp_path / "none"), brings_data=False)
    assert message is not None
    assert str(tmp_path / "none" / "train") in message
    message = missing(DataRequest(), brings_data=False)
    assert message is not None
    assert "--data" in message
    assert missing(DataRequest(), brings_data=True) is None
    with pytest.raises(DataError, match="give --data"):
        open_source(loaded(), DataRequest(), "val")


def test_complete_data_has_nothing_missing(root: Path) -> None:
    assert missing(DataRequest(root), brings_data=False) is None
    shutil.rmtree(root / "train")
    some_list = root / "list.txt"
    assert missing(DataRequest(root, calibration_list=some_list), brings_data=False) is None


@pytest.mark.parametrize("kind", ["no classes", "no images", "one class without images"])
def test_empty_folders_are_named(root: Path, kind: str) -> None:
    if kind == "no classes":
        shutil.rmtree(root / "val")
        (root / "val").mkdir()
    else:
        for name in ("ant", "bee", "cat") if kind == "no images" else ("bee",):
            for file in (root / "val" / name).iterdir():
                file.unlink()
    with pytest.raises(DataError, match=r"val holds no images in class folders"):
        open_source(loaded(), DataRequest(root), "val")


def test_class_counts_must_fit(root: Path) -> None:
    with pytest.raises(DataError, match=r"val has 3 classes, but some_model.tag has 1000"):
        open_source(loaded(1000), DataRequest(root), "val")


def test_fewer_images_than_asked_for(root: Path) -> None:
    assert len(calibration_set(loaded(), DataRequest(root), recipe(12)).ids) == 12
    with pytest.raises(DataError, match=r"13 calibration images are asked for, but there are 12"):
        calibration_set(loaded(), DataRequest(root), recipe(13))


@pytest.mark.parametrize("name", ["ant/0.jpg", "ant/1.png"])
def test_a_truncated_image_is_named(root: Path, name: str) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    cut(root / "val" / name)
    with pytest.raises(DataError, match=rf"The image val/{name} is damaged .*--skip-corrupt"):
        evaluate(root)
    result = evaluate(root, skip_corrupt=True)
    assert result.skipped == [f"val/{name}"]
    assert result.n == 5
    assert f"val/{name}" not in result.outcomes["sample"]
    assert result.dataset.count == 6


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 broken"])
def test_files_that_are_no_images_are_named(root: Path, content: bytes) -> None:
    (root / "val" / "cat" / "0.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"The image val/cat/0.jpg is damaged"):
        evaluate(root)
    assert evaluate(root, skip_corrupt=True).skipped == ["val/cat/0.jpg"]


def test_no_readable_image_at_all(root: Path) -> None:
    for path in (root / "val").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="No image"):
        evaluate(root, skip_corrupt=True)


def test_damaged_images_in_worker_processes_read_the_same(root: Path) -> None:
    cut(root / "val" / "bee" / "0.jpg")
    model = loaded()
    with pytest.raises(DataError) as caught:
        TASK.evaluate(model.model, model, DataRequest(root), CPU, 4, 1, silent)
    assert str(caught.value).startswith("The image val/bee/0.jpg is damaged")
    assert "Traceback" not in str(caught.value)


def test_truncated_calibration_images(root: Path) -> None:
    everything = calibration_set(loaded(), DataRequest(root), recipe(12))
    cut(root / "train" / "bee" / "0.jpg")
    with pytest.raises(DataError, match=r"The image train/bee/0.jpg is damaged"):
        calibration_set(loaded(), DataRequest(root), recipe(11))
    found = calibration_set(loaded(), DataRequest(root, skip_corrupt=True), recipe(11))
    assert found.skipped == ["train/bee/0.jpg"]
    assert found.ids == [name for name in everything.ids if name != "train/bee/0.jpg"]
    with pytest.raises(
        DataError, match=r"Only 11 of 12 calibration images could be read; 1 are damaged"
    ):
        calibration_set(loaded(), DataRequest(root, skip_corrupt=True), recipe(12))


@pytest.mark.parametrize("transform", ["train", "eval"])
def test_same_seed_same_sample(root: Path, transform: str) -> None:
    settings = recipe(calibration_transform=transform)
    first = calibration_set(loaded(), DataRequest(root), settings)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    second = calibration_set(loaded(), DataRequest(root), settings)
    assert first.images.shape == (6, 3, 24, 24)
    assert first.images.dtype == torch.float32
    assert torch.equal(first.images, second.images)
    assert first.ids == second.ids
    assert first.fingerprint == second.fingerprint
    assert first.transform == transform
    assert len(set(first.ids)) == 6
    assert all(name.startswith("train/") for name in first.ids)


def test_another_seed_another_sample(root: Path) -> None:
    samples = [calibration_set(loaded(), DataRequest(root), recipe(seed=seed)) for seed in range(4)]
    assert len({tuple(sample.ids) for sample in samples}) == 4
    assert len({sample.fingerprint for sample in samples}) == 4
    other_order = calibration_set(loaded(), DataRequest(root), recipe(12, seed=0)).ids
    assert other_order[:6] == samples[0].ids  # a larger sample begins with the smaller one


def test_transform_is_seeded_per_image(root: Path) -> None:
    """The training transform differs between seeds and not with what else is in the sample."""
    first = calibration_set(loaded(), DataRequest(root), recipe(12, seed=0))
    second = calibration_set(loaded(), DataRequest(root), recipe(12, seed=1))
    same = [
        torch.equal(first.images[first.ids.index(name)], second.images[second.ids.index(name)])
        for name in first.ids
    ]
    assert sum(same) <= 1
    plain = [
        calibration_set(
            loaded(), DataRequest(root), recipe(12, seed=s, calibration_transform="eval")
        )
        for s in (0, 1)
    ]
    for name in first.ids:
        assert torch.equal(*(sample.images[sample.ids.index(name)] for sample in plain))
    assert plain[0].fingerprint != first.fingerprint
    few = calibration_set(loaded(), DataRequest(root), recipe(3, seed=0))
    assert torch.equal(few.images, first.images[:3])


def test_drawing_leaves_the_global_generators_alone(root: Path) -> None:
    model = loaded()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    calibration_set(model, DataRequest(root), recipe())
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_fingerprint_sees_pixels(root: Path) -> None:
    settings = recipe(12, calibration_transform="eval")
    before = calibration_set(loaded(), DataRequest(root), settings).fingerprint
    with Image.open(root / "train" / "cat" / "1.png") as image:
        changed = image.point(lambda value: 255 - value)
    changed.save(root / "train" / "cat" / "1.png")
    assert calibration_set(loaded(), DataRequest(root), settings).fingerprint != before


@pytest.mark.parametrize("kind", ["relative paths", "absolute paths", "record"])
def test_a_list_gives_the_very_same_tensors(root: Path, tmp_path: Path, kind: str) -> None:
    drawn = calibration_set(loaded(), DataRequest(root), recipe(5))
    path = tmp_path / ("result.json" if kind == "record" else "list.txt")
    if kind == "record":
        path.write_text(
            json.dumps(
                {"schema_version": 1, "calibration": {"ids": drawn.ids, "transform": "train"}}
            )
        )
    elif kind == "relative paths":
        path.write_text("\n".join(drawn.ids) + "\n\n")
    else:
        path.write_text("\n".join(str(root / name) for name in drawn.ids))
    listed = calibration_set(loaded(), DataRequest(root, calibration_list=path), recipe(5))
    assert torch.equal(listed.images, drawn.images)
    assert listed.ids == drawn.ids
    assert listed.fingerprint == drawn.fingerprint


def test_ids_of_files_elsewhere_tell_no_folders(root: Path, tmp_path: Path) -> None:
    """Records are shared. Ids below the data folder, however they are written, stay as they are."""
    other, data = tmp_path / "private" / "cat.png", tmp_path / "data"
    shutil.copytree(root / "train", data / "train")
    other.parent.mkdir()
    shutil.copy(root / "train" / "cat" / "1.png", other)
    path, inside = tmp_path / "list.txt", "train/cat/1.png"
    names = [str(other), os.path.relpath(other, data), str(data / inside), inside]
    path.write_text("\n".join(names))
    found = calibration_set(loaded(), DataRequest(data, calibration_list=path), recipe(4))
    name = f"cat.png#{hashlib.sha256(other.read_bytes()).hexdigest()[:16]}"
    assert found.ids == [name, name, inside, inside]
    assert "private" not in repr(found)


def test_bad_lists_are_explained(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"

    def draw(count: int = 1) -> None:
        calibration_set(loaded(), DataRequest(root, calibration_list=path), recipe(count))

    with pytest.raises(DataError, match="Cannot read the calibration list"):
        draw()
    path.write_text("train/ant/0.jpg\ntrain/ant/77.jpg\ntrain/dog/1.jpg\n")
    with pytest.raises(DataError, match=r"names 2 files that are not there, such as .*77.jpg"):
        draw()
    path.write_text("train/ant/0.jpg\n")
    with pytest.raises(DataError, match="2 calibration images are asked for, but there are 1"):
        draw(2)
    for text in ("{broken", "{" * 10**5, '{"a": ' + "9" * 5000 + "}"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"The calibration list .* is not valid JSON"):
            draw()
    for text in ('{"calibration": null}', '{"metrics": 3}'):
        path.write_text(text)
        with pytest.raises(DataError, match="is not a result record with calibration ids"):
            draw()
    path.write_text("")
    with pytest.raises(DataError, match="there are 0"):
        draw()
    for name in ("x" * 5000, "a/" * 5000, "a\0b"):
        path.write_text(f"{name}\n")
        with pytest.raises(DataError, match="names 1 files that are not there"):
            draw()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"The calibration list .* is not UTF-8 text"):
        draw()


def test_items_carry_label_and_position(root: Path) -> None:
    source = open_source(loaded(), DataRequest(root), "val")
    images = Images(source.ids, source.targets, source.read, loaded().eval_transform, False)
    item = images[3]
    assert isinstance(item, tuple)
    pixels, label, position = item
    assert (label, position) == (1, 3)
    assert pixels.shape == (3, 24, 24)


def test_images_are_told_by_content_and_other_files_are_named(root: Path) -> None:
    """All 15 images of a class are found under any name; hidden files make no class."""
    folder = root / "val" / "ant"
    for path in folder.iterdir():
        path.unlink()
    kinds = {"gif": "GIF", "jfif": "JPEG", "avif": "AVIF", "webp": "WEBP", "JPG": "JPEG"}
    names = [f"{number}.{ending}" for ending in kinds for number in range(2)]
    for name in names:
        Image.new("RGB", (30, 30)).save(folder / name, format=kinds[name.partition(".")[2]])
    for number in range(5):
        Image.new("RGB", (30, 30)).save(folder / f"plain{number}", format="PNG")
    before = open_source(loaded(), DataRequest(root), "val")
    assert len(before.ids) == 15 + 4
    for name in (".DS_Store", "._0.gif", "Thumbs.db"):
        (folder / name).write_bytes(b"x")
        (root / "val" / name).write_bytes(b"x")
    for part in ("train", "val"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            hidden = root / part / name
            (hidden if part == "val" else root / part / "bee" / name).mkdir()
            (folder / name).mkdir(exist_ok=True)
            shutil.copy(folder / "0.gif", folder / name / "0.gif")
    clean = open_source(loaded(), DataRequest(root), "val")
    assert (clean.ids, clean.targets, clean.notes()) == (before.ids, before.targets, [])
    (folder / "notes.txt").write_text("some notes")
    (folder / "labels.csv").write_text("a,b")
    (root / "val" / "readme").write_text("loose")
    found = evaluate(root)
    assert found.n == 19
    assert found.dataset.left_out == 3
    named = "val/readme, val/ant/labels.csv, val/ant/notes.txt"
    assert found.notes == [f"3 files that Pillow cannot open as an image, left out: {named}"]
    (root / "train" / "bee" / "list.txt").write_text("x")
    assert calibration_set(loaded(), DataRequest(root), recipe()).notes == [
        "1 file that Pillow cannot open as an image, left out: train/bee/list.txt"
    ]


def test_a_wide_image_is_refused_or_skipped_by_name(root: Path) -> None:
    Image.fromarray(np.zeros((30, 30), np.float32)).save(root / "val" / "cat" / "9.tif")
    with pytest.raises(
        DataError, match=r"val/cat/9\.tif has float values .*mode F.*convert it to 8 bits"
    ):
        evaluate(root)
    found = evaluate(root, skip_corrupt=True)
    assert (found.n, found.skipped) == (6, ["val/cat/9.tif"])


def test_a_list_finds_names_in_the_other_unicode_form(root: Path, tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é")
        (root / "train" / "ant" / "0.jpg").rename(root / "train" / "ant" / f"{name}.jpg")
        other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", name)
        path = tmp_path / "list.txt"
        drawn = calibration_set(loaded(), DataRequest(root), recipe(12))
        path.write_text("\n".join(drawn.ids).replace(name, other), encoding="utf-8")
        listed = calibration_set(loaded(), DataRequest(root, calibration_list=path), recipe(12))
        assert listed.ids == drawn.ids
        assert torch.equal(listed.images, drawn.images)
        (root / "train" / "ant" / f"{name}.jpg").rename(root / "train" / "ant" / "0.jpg")
