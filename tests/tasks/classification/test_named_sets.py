"""Data sets by name: their layouts, and which answers are right."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fimaq_core.errors import DataError
from fimaq_core.progress import silent
from tasks.classification.named_sets import (
    Layout,
    checked,
    objectnet_classes,
    open_named,
    real_labels,
    with_real_labels,
)
from tasks.classification.originals import originals
from tasks.classification.task import TASK
from tasks.common import top_k
from tasks.common.data.folders import Source
from tasks.common.data.imagenet import wordnet_ids
from tasks.common.data.images import Images
from tasks.common.record import Dataset
from tasks.common.request import DataRequest, ModelRequest
from tasks.common.task import Evaluation, LoadedModel

WNIDS = wordnet_ids()
MODEL = LoadedModel(nn.Identity(), "vit.tag", "file", "0" * 64, 1000, *[torch.as_tensor] * 2)


def fill(folder: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8)) -> Path:
    """Make class folders with this many images each, all of them one file on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder.parent / f"{folder.name}.png"
    Image.new("RGB", size, (9, 0, 0)).save(image)
    for name, count in counts.items():
        (folder / name).mkdir()
        for number in range(count):
            os.link(image, folder / name / f"{number}.png")
    return folder


def opened(folder: Path, name: str, loaded: LoadedModel = MODEL) -> Source:
    return open_named(loaded, DataRequest(dataset=f"{name}={folder}"))


def of_timm(name: str) -> list[str]:
    return files("timm.data").joinpath("_info", name).read_text().split()


def even(names: Sequence[str], images: int) -> dict[str, int]:
    """Divide a number of images among classes."""
    rest = images % len(names)
    return {name: images // len(names) + (place < rest) for place, name in enumerate(names)}


def test_a_subset_compares_only_its_200_outputs(tmp_path: Path) -> None:
    names = of_timm("imagenet_a_synsets.txt")
    folder = fill(tmp_path / "set", even(names, 7_500))
    source = opened(folder, "imagenet-a")
    assert (source.name, source.split, source.classes) == ("ImageNet-A", "test", 200)
    assert list(source.outputs or ()) == [*map(int, of_timm("imagenet_a_indices.txt"))]
    assert [WNIDS[output] for output in source.outputs or ()] == list(source.class_names)
    first = source.ids[0]
    found = originals(ModelRequest("x"), DataRequest(dataset=f"imagenet-a={folder}"), [first])
    assert found[first].size == (8, 8)
    (folder / names[0] / "0.png").unlink()
    with pytest.raises(DataError, match="is not ImageNet-A: it has 7,499 images, and not 7,500"):
        opened(folder, "imagenet-a")
    with pytest.raises(DataError, match=r"is not ImageNet-R: it lacks \d+ class folders, such"):
        opened(folder, "imagenet-r")


def test_the_classes_of_r_are_in_the_order_of_imagenet() -> None:
    indices = [*map(int, of_timm("imagenet_r_indices.txt"))]
    names = sorted(of_timm("imagenet_r_synsets.txt"))
    assert [WNIDS.index(name) for name in names] == sorted(indices)


def test_folders_of_v2_are_labels(tmp_path: Path) -> None:
    numbers = [*map(str, range(1000))]
    folder = fill(tmp_path / "imagenetv2-top-images-format-val", dict.fromkeys(numbers, 10))
    source = opened(folder, "imagenet-v2-top-images")
    assert (source.name, source.class_order) == ("ImageNet-V2 top-images", "natural")
    assert len(source.ids) == 10_000
    places = (0, 9_999)
    assert all(source.ids[p].startswith(f"{source.targets[p]}/") for p in places)
    assert source.class_names[2] == WNIDS[2]
    with pytest.raises(DataError, match="must have 'matched-frequency' in it"):
        opened(folder, "imagenet-v2-matched-frequency")
    os.rename(folder / "0" / "0.png", folder / "1" / "more.png")
    with pytest.raises(DataError, match="class folder '0' has 9 images, and not 10"):
        opened(folder, "imagenet-v2-top-images")


def test_a_folder_is_checked_against_its_layout(tmp_path: Path) -> None:
    folder = fill(tmp_path / "fog" / "3", {"x": 2, "y": 1}).parents[1]
    layout = Layout(["x", "y"], 3, "fog/3")
    source = checked(folder, layout, "Small")
    assert source.ids == ["fog/3/x/0.png", "fog/3/x/1.png", "fog/3/y/0.png"]
    assert source.targets == [0, 0, 1]
    for other, message in (
        (replace(layout, part="fog/4"), "fog/4 is not Small: there is no such folder"),
        (replace(layout, classes=["x"]), "it also has 1 class folder, such as 'y'"),
        (replace(layout, classes=["x", "y", "z"]), "it lacks 1 class folder, such as 'z'"),
        (replace(layout, images=4), "it has 3 images, and not 4"),
        (replace(layout, each=2), "the class folder 'y' has 1 image, and not 2"),
    ):
        with pytest.raises(DataError, match=message):
            checked(folder, other, "Small")
    assert len(checked(folder, Layout(["x"], 2, "fog/3", others=True), "Small").ids) == 2


def test_a_model_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ImageNet-R is for classifiers of ImageNet-1k"):
        opened(tmp_path, "imagenet-r", replace(MODEL, classes=100))
    with pytest.raises(DataError, match="are in another order"):
        opened(tmp_path, "imagenet-r", replace(MODEL, class_names=WNIDS[::-1]))
    with pytest.raises(DataError, match="is not ImageNet-Sketch: it lacks 1,000 class folders"):
        opened(tmp_path, "imagenet-sketch", replace(MODEL, class_names=WNIDS))


def test_images_without_a_real_label_are_left_out() -> None:
    names = [f"val/n0/ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1, 2)]
    made = [Image.new("L", (1, 1), shade) for shade in range(3)]
    source = Source("s", "val", names, [0, 0, 0], 4, made.__getitem__)
    found = with_real_labels(source, [[], [2, 3], [1]])
    assert found.ids == [names[0], names[2]]
    assert (found.targets, found.answers) == ([1, 2], [[1], [2, 3]])
    assert [found.read(place).getpixel((0, 0)) for place in (0, 1)] == [0, 2]
    assert found.notes() == ["1 image without a ReaL label, left out"]
    assert found.head(1).answers == [[1]]
    assert found.fingerprint != replace(found, answers=[[1], [2]]).fingerprint
    with pytest.raises(DataError, match="belong to the file names of ImageNet's part val"):
        with_real_labels(source, [[], [2]])


def test_the_real_labels_of_timm() -> None:
    labels = real_labels()
    assert (len(labels), sum(not own for own in labels)) == (50_000, 3_163)
    assert {label for own in labels for label in own} <= set(range(1000))


def mappings(folder: Path) -> Path:
    """Write mappings of the form that comes with ObjectNet."""
    folder.mkdir(parents=True, exist_ok=True)
    folders = {"alarm_clock": "Alarm clock", "banana": "Banana", "air_freshener": "Air freshener"}
    shared = {"Alarm clock": "analog clock; digital clock", "Banana": "banana"}
    (folder / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    (folder / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    return folder


def test_a_class_of_objectnet_may_be_several_of_imagenet(tmp_path: Path) -> None:
    folder = mappings(tmp_path)
    assert objectnet_classes(folder) == {"alarm_clock": [409, 530], "banana": [954]}
    path = folder / "objectnet_to_imagenet_1k.json"
    for text, message in (
        ('{"Banana": "bananas"}', "no mappings of ObjectNet to ImageNet: bananas"),
        ('{"Apple": "banana"}', "no mappings of ObjectNet to ImageNet: Apple"),
        ('{"Banana": 3}', "is no JSON object of texts"),
        ("{}", "no class"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            objectnet_classes(folder)


def test_objectnet_is_read_without_its_border(tmp_path: Path) -> None:
    counts = {"alarm_clock": 18_000, "banana": 574, "air_freshener": 1}
    fill(tmp_path / "images", counts, size=(20, 12))
    mappings(tmp_path / "mappings")
    source = opened(tmp_path, "objectnet")
    assert (source.name, len(source.ids), source.classes) == ("ObjectNet", 18_574, 1000)
    assert (source.answers or ())[0] == [409, 530]
    assert (source.targets[-1], source.class_names[954]) == (954, WNIDS[954])
    assert source.read(0).size == (16, 8)


@pytest.mark.parametrize("outputs", [None, [4, 0, 2, 6, 1, 3]])
@pytest.mark.parametrize("several", [False, True])
def test_accuracy_against_a_loop(outputs: list[int] | None, several: bool) -> None:
    rng = np.random.default_rng(several)
    logits, classes = rng.normal(size=(40, 7)).round(1), len(outputs or range(7))
    answers = [sorted(rng.choice(classes, 1 + several, replace=False).tolist()) for _ in range(40)]
    source = Source(
        *("table", "val", [f"s{place}" for place in range(40)], [own[0] for own in answers]),
        *(classes, lambda _: Image.new("L", (1, 1))),
        outputs=outputs,
        answers=answers if several else None,
    )
    table = torch.tensor(logits, dtype=torch.float32)
    images = Images(
        source.ids, source.targets, lambda place: place, lambda place: table[place], False
    )  # type: ignore[arg-type, return-value]
    cpu = torch.device("cpu")
    result = top_k.evaluate(nn.Identity(), images, source, cpu, 7, 0, silent)
    hits = {1: 0, 5: 0}
    for row, own in zip(logits, answers, strict=True):
        scores = row[outputs] if outputs else row
        best = max(scores[label] for label in own)
        others = [label for label in range(classes) if label not in own]
        ahead = sum(scores[label] >= best for label in others)
        for k in hits:
            hits[k] += ahead < k
    assert {k: result.metrics[f"top{k}"].value for k in hits} == pytest.approx(
        {k: 100 * count / 40 for k, count in hits.items()}
    )


@pytest.mark.parametrize(("name", "labelled"), [("imagenet-real", False), ("imagenet-r", True)])
def test_fidelity_uses_labels_only_where_images_have_one(name: str, labelled: bool) -> None:
    raw = {"logits": np.eye(3, dtype=np.float32)}
    columns = {"sample": np.array(["a", "b", "c"]), "label": np.arange(3)}
    dataset = Dataset(name="s", split="val", count=3, classes=3, fingerprint="0")
    found = TASK.fidelity(
        {"logits": raw["logits"][::-1]},
        Evaluation({}, 3, columns, dataset, raw),
        MODEL,
        DataRequest(dataset=f"{name}=/sets"),
    )
    assert {"kl", "agreement", "snr_db"} <= found.metrics.keys()
    assert ("wrong_to_right" in found.metrics) is ("nll" in found.outcomes) is labelled
