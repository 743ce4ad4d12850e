"""Image names relative to their folder, to the data's folder, or absolute: one file, one id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from coco_fakes import tiny, write_images, write_json, write_root

from fimaq_core.errors import DataError
from tasks.detection import coco
from tasks.detection.coco import DetectionSource, open_coco, open_file

Rename = Callable[[str], str]


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of these tests count as COCO 2017."""
    monkeypatch.setattr(coco, "COUNTS", {"train": 4, "val": 4})
    monkeypatch.setattr(coco, "CATEGORIES", 3)


def content(rename: Rename) -> dict[str, Any]:
    found = tiny()
    for entry in found["images"]:
        entry["file_name"] = rename(entry["file_name"])
    return found


def named(root: Path, rename: Rename) -> Path:
    """A file of annotations with other names for the images in ``root/val2017``."""
    return write_json(root / "annotations" / "instances_val2017.json", content(rename))


@pytest.mark.parametrize(
    "form",
    [
        "{name}",
        "val2017/{name}",
        "./val2017//{name}",
        "{root}/val2017/{name}",
        "val2017\\{name}",
        ".\\{name}",
    ],
)
def test_every_form_gives_the_same_data(form: str, tmp_path: Path) -> None:
    root = write_root(tmp_path / "coco", tiny())
    expected = open_coco(root, "val")
    path = named(root, lambda name: form.format(name=name, root=root))
    for found in (open_coco(root, "val"), open_file(path)):
        assert (found.image_ids, found.split, found.root) == (expected.image_ids, "val2017", root)
        assert found.fingerprint == expected.fingerprint
        assert (found.read(3) == expected.read(3)).all()


def test_forms_may_be_mixed(tmp_path: Path) -> None:
    root = write_root(tmp_path / "coco", tiny())
    expected = open_coco(root, "val").image_ids
    path = named(
        root,
        lambda name: {"4": name, "3": f"val2017/{name}"}.get(name[-5], f"{root}/val2017/{name}"),
    )
    assert open_file(path).image_ids == expected


def test_images_in_several_folders_below_the_root(tmp_path: Path) -> None:
    root = write_root(tmp_path / "coco", tiny())
    source = open_file(
        named(root, lambda name: f"{'train' if name[-5] == '3' else 'val'}2017/{name}")
    )
    assert source.image_ids[2] == "train2017/000000000003.png"
    assert source.image_ids[0] == "val2017/000000000004.png"


def test_images_beside_their_file_by_absolute_paths(tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "images", tiny())
    path = write_json(
        tmp_path / "data" / "x.json", content(lambda name: f"{tmp_path}/data/images/{name}")
    )
    assert open_file(path).image_ids[0] == "images/000000000004.png"


def test_absolute_paths_through_a_link_to_the_data(tmp_path: Path) -> None:
    root = write_root(tmp_path / "coco", tiny())
    (tmp_path / "link").symlink_to(root)
    path = named(root, lambda name: f"{root}/val2017/{name}")
    assert (
        open_file(tmp_path / "link" / path.relative_to(root)).image_ids[0]
        == "val2017/000000000004.png"
    )


def test_paths_out_of_the_data_are_refused(tmp_path: Path) -> None:
    root = write_root(tmp_path / "coco", tiny())
    write_images(tmp_path / "other", tiny())
    for form in ("../other/{}", "..\\other\\{}", "val2017/../../other/{}", f"{root}/../other/{{}}"):
        with pytest.raises(
            DataError, match="is not the path of an image below the folder of the data"
        ):
            open_file(named(root, form.format))
    outside = named(root, lambda name: f"{tmp_path}/other/{name}")
    with pytest.raises(
        DataError, match=r"names 4 images outside of the data's folder .*/coco, such as"
    ):
        open_coco(root, "val")
    with pytest.raises(DataError, match=r"images of .* are missing"):
        open_file(outside)
    some = named(root, lambda name: f"{tmp_path}/other/{name}" if name[-5] == "3" else name)
    with pytest.raises(
        DataError,
        match=r"names 1 image outside of the data's folder .*/coco, such as '.*/other/0+3.png'",
    ):
        open_file(some)


def test_a_name_of_several_files(tmp_path: Path) -> None:
    root = write_root(tmp_path / "coco", tiny())
    expected = open_coco(root, "val")
    name = "000000000003.png"
    (root / name).write_bytes((root / "val2017" / name).read_bytes())
    assert open_coco(root, "val").image_ids == expected.image_ids
    (root / name).write_bytes(b"another")
    with pytest.raises(
        DataError,
        match=r"names the image '0+3.png', which stands for different files: .* and .*/coco/0+3",
    ):
        open_coco(root, "val")


def test_an_image_under_two_names(tmp_path: Path) -> None:
    root = write_root(tmp_path / "coco", tiny())
    path = named(root, lambda name: "val2017/000000000004.png" if name[-5] == "3" else name)
    with pytest.raises(
        DataError,
        match=r"lists 1 image twice under different names, such as .*/val2017/000000000004.png",
    ):
        open_file(path)


@pytest.mark.parametrize(("on_disk", "in_file"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_unicode_forms(on_disk: Any, in_file: Any, tmp_path: Path) -> None:
    root = tmp_path / "é"
    folder = root / normalize(on_disk, "Zoé")
    write_images(folder, content(lambda name: normalize(on_disk, f"où{name}")))
    path = write_json(root / "x.json", content(lambda name: normalize(in_file, f"Zoé/où{name}")))
    source = open_file(path)
    assert source.image_ids[0] == normalize(in_file, "é/Zoé/où000000000004.png").replace(
        normalize(in_file, "é/"), "é/", 1
    )
    assert source.read(0).shape == (60, 80, 3)


def test_unicode_forms_of_two_files(tmp_path: Path) -> None:
    names = [normalize(form, "é.png") for form in ("NFC", "NFD")]
    found = tiny()
    found["images"] = found["images"][:1]
    found["annotations"] = []
    for number, name in enumerate(names):
        found["images"][0].update(file_name=name, id=40 + number)
        write_images(tmp_path / "images", found)

    def opened(name: str) -> DetectionSource:
        found["images"][0]["file_name"] = name
        return open_file(write_json(tmp_path / "x.json", found))

    # The same text wins; where there is none, nothing tells.
    assert not (opened(names[0]).read(0) == opened(names[1]).read(0)).all()
    (tmp_path / "images" / names[0]).rename(tmp_path / "images" / "e\u0301\u0323.png")
    write_images(
        tmp_path / "images",
        {"images": [{**found["images"][0], "id": 7, "file_name": "\u1eb9\u0301.png"}]},
    )
    with pytest.raises(DataError, match="in other Unicode forms: rename all but one"):
        opened("e\u0323\u0301.png")
