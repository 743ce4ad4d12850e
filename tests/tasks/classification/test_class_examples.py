"""Prediction samples of classification against the model's outputs, and their original images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fimaq_core.errors import DataError
from fimaq_core.progress import silent
from fimaq_core.recipe import make_recipe
from tasks.classification.data import digit_pairs
from tasks.classification.task import TASK
from tasks.common import registry
from tasks.common.cell.prediction_samples import ClassSample, read_examples
from tasks.common.cell.run import run_cell
from tasks.common.data.folders import Source, open_folder
from tasks.common.data.images import DamagedImage, Images
from tasks.common.record import read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.common.task import Evaluation
from tasks.common.top_k import evaluate

CPU = torch.device("cpu")
DEMO = ModelRequest("demo_vit")
QUICK = {"calibration_images": 4, "range_images": 4, "range_candidates": 16, "range_rounds": 1}


def measure(
    logits: Tensor, targets: list[int], names: tuple[str, ...], broken: tuple[int, ...] = ()
) -> Evaluation:
    def read(index: int) -> int:
        if index in broken:
            raise DamagedImage("truncated")
        return index

    ids = [f"s{index}" for index in range(len(logits))]
    classes, image = logits.shape[1], Image.new("L", (1, 1))
    source = Source("table", "val", ids, targets, classes, lambda _: image, names)
    images = Images(ids, targets, read, lambda index: logits[index].view(1, 1, -1), True)
    return evaluate(nn.Flatten(1), images, source, CPU, 7, 0, silent)


def by_hand(logits: list[float], target: int, names: tuple[str, ...]) -> dict[str, Any]:
    """The answers to one image by a plain loop."""
    powers = [np.exp(value - max(logits)) for value in logits]
    order = sorted(range(len(logits)), key=lambda label: (-logits[label], label == target))[:3]
    return {
        "truth": names[target],
        "top": [{"name": names[label], "share": powers[label] / sum(powers)} for label in order],
    }


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_answers_against_a_loop(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(60, classes, generator=generator).round(decimals=1)  # some ties
    targets = torch.randint(0, classes, (60,), generator=generator).tolist()
    names = tuple(f"class {number}" for number in range(classes))
    found = measure(logits, targets, names).examples
    assert [entry["sample"] for entry in found] == [f"s{5 * strip}" for strip in range(12)]
    for strip, entry in enumerate(found):
        expected = by_hand(logits[5 * strip].double().tolist(), targets[5 * strip], names)
        assert entry["truth"] == expected["truth"]
        assert [answer["name"] for answer in entry["top"]] == [
            answer["name"] for answer in expected["top"]
        ]
        shares = [answer["share"] for answer in entry["top"]]
        assert shares == pytest.approx([answer["share"] for answer in expected["top"]], abs=1e-12)
        assert len(shares) == min(classes, 3)


def test_ties_count_against_the_model() -> None:
    """An example is right exactly if the sample counts as correct."""
    logits = torch.zeros(12, 5)
    logits[:, 1] = logits[:, 2] = 1
    logits[6:, 2] += 1
    result = measure(logits, [1, 2] * 6, tuple("abcde"))
    right = [entry["top"][0]["name"] == entry["truth"] for entry in result.examples]
    assert right == result.outcomes["correct"].tolist()
    assert 0 < sum(right) < 12


def test_damaged_images_and_classes_without_names() -> None:
    logits = torch.randn(120, 4)
    found = measure(logits, [3] * 120, (), (0, 20, 21)).examples
    assert [entry["sample"] for entry in found] == [
        "s1",
        "s10",
        "s22",
        *(f"s{10 * strip}" for strip in range(3, 12)),
    ]
    assert {entry["truth"] for entry in found} == {"3"}


def test_every_cell_of_the_demo_shows_the_same_samples(tmp_path: Path) -> None:
    """Their answers are the models' own, their pictures those that the models saw."""
    data, found = DataRequest(limit=40), {}
    loaded = TASK.load(DEMO)
    for method in ("rtn", "repq"):
        recipe = make_recipe(method, QUICK)
        path = run_cell(
            CellRequest(
                "classification", DEMO, data, recipe, results=tmp_path / "runs", eval_batch=16
            )
        )
        found[method] = read_examples(path.parent, read_record(path).examples or "")
        if method == "rtn":
            full = path.parents[3] / "fp"
    (whole,) = full.rglob("examples.json")
    found["fp"] = read_examples(whole.parent, whole.name)
    assert all(file.task == "classification" for file in found.values())
    ids = [entry.sample for entry in found["fp"].samples]
    assert ids == [digit_pairs("test").ids[-(-40 * strip // 12)] for strip in range(12)]
    assert all([entry.sample for entry in file.samples] == ids for file in found.values())
    assert found["rtn"] != found["fp"] != found["repq"] != found["rtn"]

    pictures = registry.originals("classification", DEMO, data, ids)
    assert list(pictures) == ids
    assert {(image.mode, image.size) for image in pictures.values()} == {("RGB", (64, 32))}
    pixels = torch.stack([loaded.eval_transform(image.convert("L")) for image in pictures.values()])
    with torch.no_grad():
        logits = loaded.model(pixels).double()
    for entry, row in zip(found["fp"].samples, logits, strict=True):
        assert isinstance(entry, ClassSample)
        pair = entry.sample.partition("-")[2].split("+")
        assert entry.truth == "".join(
            str(int(number) // 500) for number in pair
        )  # the digits are sorted by class
        shares, order = row.softmax(0).sort(descending=True)
        assert [answer.name for answer in entry.top] == [
            f"{label:02d}" for label in order[:3].tolist()
        ]
        assert [answer.share for answer in entry.top] == pytest.approx(
            shares[:3].tolist(), abs=1e-6
        )
    assert (
        sum(
            entry.truth == entry.top[0].name
            for entry in found["fp"].samples
            if isinstance(entry, ClassSample)
        )
        > 8
    )


def write_folder(root: Path) -> None:
    for part in ("train", "val"):
        for number, name in enumerate(("n01440764", "own")):
            (root / part / name).mkdir(parents=True)
            for index in range(3):
                colour = (40 * number + index, 200, 7)
                Image.new("RGB", (30 + index, 20), colour).save(root / part / name / f"{index}.png")


def test_pictures_and_names_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    (tmp_path / "data" / "val" / "own" / "3.png").write_bytes(b"no image")
    data = DataRequest(tmp_path / "data", skip_corrupt=True)
    loaded = replace(TASK.load(DEMO), classes=2)
    loaded.eval_transform = lambda image: (
        torch.tensor(float(image.width)).view(1, 1, 1).expand(1, 1, 2)
    )
    result = TASK.evaluate(nn.Flatten(1), loaded, data, CPU, 4, 0, silent)
    assert [entry["sample"] for entry in result.examples] == [
        f"val/{name}/{i}.png" for name in ("n01440764", "own") for i in range(3)
    ]
    assert [entry["truth"] for entry in result.examples] == ["tench"] * 3 + ["own"] * 3
    ids = [entry["sample"] for entry in result.examples]
    pictures = TASK.originals(ModelRequest("deit_tiny"), data, ids[::-2])
    assert list(pictures) == ids[::-2]
    source = open_folder(tmp_path / "data", "val")
    for name, image in pictures.items():
        expected = source.read(source.ids.index(name))
        assert (image.mode, image.size) == ("RGB", expected.size)
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    with pytest.raises(DataError, match="is damaged"):
        TASK.originals(ModelRequest("deit_tiny"), data, ["val/own/3.png"])


OUTSIDE = [
    "../secret.png",
    "val/../../secret.png",
    "val/own/../../../secret.png",
    "/{root}/secret.png",
    "val//own/0.png",
    "val/./own/0.png",
    "train/own/0.png",
    "val/own",
    "val/own/list.txt",
    "val/own/9.png",
    "val/own/\0.png",
    "val/own/" + 300 * "a" + ".png",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_ids_do_not_lead_out_of_the_data(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "data")
    (tmp_path / "data" / "val" / "own" / "list.txt").write_text("0.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    name = name.replace("/{root}", tmp_path.as_posix())
    with pytest.raises(DataError):
        TASK.originals(
            ModelRequest("deit_tiny"), DataRequest(tmp_path / "data"), ["val/own/0.png", name]
        )
    TASK.originals(ModelRequest("deit_tiny"), DataRequest(tmp_path / "data"), ["val/own/0.png"])


def test_unknown_samples_and_missing_data() -> None:
    with pytest.raises(DataError, match="no sample 'test/1' in the demo's digit pairs"):
        TASK.originals(DEMO, DataRequest(), ["test/1"])
    with pytest.raises(DataError, match="give --data"):
        TASK.originals(ModelRequest("deit_tiny"), DataRequest(), ["val/a/0.png"])
    with pytest.raises(DataError, match="no image of the sample"):
        TASK.originals(ModelRequest("deit_tiny"), DataRequest(Path("nowhere")), ["val/a/0.png"])
