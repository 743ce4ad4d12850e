"""Classes of a detector and categories of annotations go together by name, whatever their order."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_fakes import annotation, loaded, tiny, write_images, write_json
from safetensors.torch import save_file

from fimaq_core.errors import DataError, ModelError
from tasks.common.models.weights import read_weights
from tasks.common.request import DataRequest
from tasks.detection.annotations import checked
from tasks.detection.categories import Matched, match_categories
from tasks.detection.coco import open_source
from tasks.detection.models import class_names


def matched(names: tuple[str, ...], *categories: str, used: str = "") -> Matched:
    """Categories with ids 0, 10, ...; ``used`` has the first letters of those with annotations."""
    kinds = [{"id": 10 * number, "name": name} for number, name in enumerate(categories)]
    marks = [
        annotation(n, 10, kind["id"], [1, 1, 5, 5])
        for n, kind in enumerate(kinds)
        if kind["name"][0] in used
    ]
    content = {**tiny(), "categories": kinds, "annotations": marks}
    return match_categories(checked(content, "here"), loaded(len(names), names), "data val")


def test_same_names_in_the_same_order() -> None:
    found = matched(("cat", "dog", "owl"), "cat", "dog", "owl", used="cdo")
    assert (found.labels, found.classes_from, found.notes) == ((0, 10, 20), "model", ())


def test_same_names_in_another_order() -> None:
    found = matched(("cat", "dog", "owl"), "owl", "cat", "dog", used="cdo")
    assert (found.labels, found.notes) == ((10, 20, 0), ())
    assert [entry["name"] for entry in found.coco["categories"]] == ["owl", "cat", "dog"]


def test_names_written_otherwise() -> None:
    found = matched(("traffic light", "Dog", "owl"), "dog ", "Traffic_Light", "owl", used="dTo")
    assert found.labels == (10, 0, 20)
    assert found.notes == (
        "2 categories match classes but for case, spaces and underscores, such as 'dog ' for 'Dog'",
    )


def test_the_exact_name_comes_first() -> None:
    found = matched(("cat", "Cat"), "Cat", "cat", used="Cc")
    assert (found.labels, found.notes) == ((10, 0), ())
    assert matched(("Cat", "dog"), "cat", "Cat", "dog", used="Cd").labels == (10, 20)


def test_names_that_could_be_either_are_not_guessed() -> None:
    with pytest.raises(
        DataError,
        match=r"has 2 annotations of categories that are no class of tiny.tag: 'CAT', 'Cat'",
    ):
        matched(("cat", "dog"), "CAT", "Cat", "dog", used="Cd")
    with pytest.raises(
        DataError, match=r"has 1 annotation of categories that are no class of tiny.tag: 'CAT'"
    ):
        matched(("cat", "Cat"), "CAT", used="C")


def test_unused_categories_are_left_out() -> None:
    found = matched(("cat", "dog"), "background", "dog", "cat", "thing", "void", "x", used="cd")
    assert found.labels == (20, 10)
    assert [entry["name"] for entry in found.coco["categories"]] == ["dog", "cat"]
    assert found.notes == (
        "Categories without annotations that the detector does not know are left out: "
        "'background', 'thing', 'void' and 1 more",
    )


def test_used_categories_that_the_detector_does_not_know() -> None:
    with pytest.raises(
        DataError,
        match=r"has 2 annotations of categories .*: 'bat', 'zebra'\. .*Did you mean 'cat'\?",
    ):
        matched(("cat", "dog"), "bat", "zebra", "cat", used="bzc")


def test_classes_without_a_category() -> None:
    found = matched(("cat", "dog", "owl"), "owl", used="o")
    assert found.labels == (None, None, 0)
    assert found.notes == (
        "data val has no category for 2 of 3 classes, such as 'cat': AP is over the other 1, and "
        "detections of these classes do "
        "not count",
    )
    with pytest.raises(DataError, match=r"has no category that is a class of tiny.tag: 'bat'"):
        matched(("cat", "dog"), "bat")


def test_unnamed_classes_are_the_categories_in_order() -> None:
    found = match_categories(checked(tiny(), "here"), loaded(3), "data val")
    assert (found.labels, found.classes_from) == ((7, 2, 30), "annotations")
    assert found.notes == (
        "The weights name no classes: the 3 categories, in the file's order, are taken for them",
    )
    with pytest.raises(
        DataError,
        match=r"3 categories \(3 of them .*\), tiny.tag has 10 classes, which .*torch.save",
    ):
        match_categories(checked(tiny(), "here"), loaded(10), "data val")


def test_unused_categories_of_unnamed_classes() -> None:
    content = {**tiny(), "categories": [{"id": 0, "name": "pets"}, *tiny()["categories"]]}
    found = match_categories(checked(content, "here"), loaded(3), "data val")
    assert found.labels == (7, 2, 30)
    assert [entry["name"] for entry in found.coco["categories"]] == ["cat", "dog", "owl"]
    assert (
        found.notes[1]
        == "Categories without annotations are left out, since only then their number fits: 'pets'"
    )
    whole = match_categories(checked(content, "here"), loaded(4), "data val")
    assert (whole.labels, len(whole.notes)) == ((0, 7, 2, 30), 1)
    content["categories"].append({"id": 31, "name": "void"})
    with pytest.raises(
        DataError, match=r"has 5 categories \(3 of them with annotations\), tiny.tag has 4 classes"
    ):
        match_categories(checked(content, "here"), loaded(4), "data val")


def test_the_advice_names_eighty_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(f"kind {n}" for n in range(80))
    content = {**tiny(), "categories": [{"id": n, "name": name} for n, name in enumerate(names)]}
    content["annotations"] = [annotation(n, 10, n, [1, 1, 5, 5]) for n in range(80)]
    coco = checked(content, "here")
    with pytest.raises(DataError, match="COCO 2017 are assumed") as caught:
        match_categories(coco, loaded(80), "data val")
    monkeypatch.chdir(tmp_path)
    line = re.search(r"torch\.save\(.*\)", str(caught.value))
    assert line is not None
    exec(line[0], {"torch": torch, "sd": {"w": torch.zeros(2)}, "names": names})
    found = class_names(read_weights(tmp_path / "named.pth"), 80)
    assert found == names
    assert match_categories(coco, loaded(80, found), "data val").labels == tuple(range(80))


def test_eighty_unnamed_classes_are_those_of_coco(tmp_path: Path) -> None:
    from tasks.detection import mm

    names = mm.CocoDataset.METAINFO["classes"]
    kinds = [{"id": n * 2, "name": name} for n, name in enumerate(names)]
    content = {**tiny(), "categories": kinds, "annotations": [annotation(1, 10, 4, [1, 1, 5, 5])]}
    write_images(tmp_path / "images", content)
    path = write_json(tmp_path / "x.json", content)
    source = open_source(loaded(80), DataRequest(path), "val")
    assert source.ids_by_label == tuple(range(0, 160, 2))
    described = source.describe()
    assert (described.class_names_from, described.class_categories) == ("published", names)
    content["categories"] = kinds[::-1]
    assert open_source(
        loaded(80), DataRequest(write_json(path, content)), "val"
    ).ids_by_label == tuple(range(0, 160, 2))
    content["categories"] = [{**kinds[2], "name": "narwhal"}, *kinds[3:]]
    with pytest.raises(
        DataError,
        match="whose weights name none, so that those of COCO 2017 are assumed: 'narwhal'",
    ):
        open_source(loaded(80), DataRequest(write_json(path, content)), "val")


def test_categories_do_not_matter_to_calibration(tmp_path: Path) -> None:
    write_images(tmp_path / "images", tiny())
    path = write_json(tmp_path / "x.json", tiny())
    request = DataRequest(calibration_data=path)
    assert len(open_source(loaded(80), request, "train").image_ids) == 4


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"dataset_meta": {"classes": ("b", "a"), "palette": None}}, ("b", "a")),
        ({"dataset_meta": {"CLASSES": ["b", "a"]}}, ("b", "a")),
        ({"CLASSES": ("b", "a")}, ("b", "a")),
        ({"CLASSES": None}, None),
        ({"epoch": 12}, None),
        (None, None),
    ],
)
@pytest.mark.parametrize("archive", [True, False])
def test_names_in_files_of_mmdet(meta: Any, expected: Any, archive: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(
        {"state_dict": {"w": torch.zeros(2)}, "meta": meta},
        path,
        _use_new_zipfile_serialization=archive,
    )
    assert class_names(read_weights(path), 2) == expected


def test_safetensors_have_no_names(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.ckpt"):
        save_file({"w": torch.zeros(2)}, tmp_path / name)
        assert class_names(read_weights(tmp_path / name), 2) is None


def test_names_that_cannot_be_the_classes(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    state = {"w": torch.zeros(2)}
    torch.save({"state_dict": state, "meta": {"CLASSES": "ball"}}, path)
    assert class_names(read_weights(path), 1) == ("ball",)
    with pytest.raises(ModelError, match=r"x.pth name 1 classes and have outputs for 2"):
        class_names(read_weights(path), 2)
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": ("a", "a")}}}, path)
    with pytest.raises(ModelError, match="are not distinct"):
        class_names(read_weights(path), 2)
