"""Files in class folders: each once, in torchvision's order, whatever links lead to."""

import os
import socket
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets.folder import make_dataset

from fimaq_core.errors import DataError
from tasks.common.data.folders import open_folder
from tasks.common.data.walk import files_by_class

CLASSES = ("ant", "bee")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images, one of them with a folder below it, in the part ``val``."""
    for name in ("ant/1.png", "ant/2.png", "bee/1.png", "bee/more/3.png"):
        path = tmp_path / "data" / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return tmp_path / "data"


PLAIN = ["val/ant/1.png", "val/ant/2.png", "val/bee/1.png", "val/bee/more/3.png"]


def test_plain_folders_are_listed_as_by_torchvision(tmp_path: Path) -> None:
    """Folders sort by their whole path as text, where ``a-b`` comes before ``a/b``."""
    names = ["x/a/1", "x/a/b/1", "x/a-b/1", "x/1", "x/B", "x/ä", "y/10/1", "y/9", "y/9.5/z", "Z/1"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    classes = ["x", "Z", "y"]
    labels = {name: label for label, name in enumerate(classes)}
    expected = make_dataset(tmp_path, labels, is_valid_file=lambda path: True)
    assert files_by_class(tmp_path, classes, lambda path: True) == (expected, [], [])
    assert len(expected) == len(names)


def test_links_that_lead_in_circles(root: Path) -> None:
    """Two of them made a walk that did not end; one counted an image 41 times."""
    (root / "val" / "ant" / "loop").symlink_to(".")
    (root / "val" / "ant" / "up").symlink_to("..")
    (root / "val" / "bee" / "top").symlink_to(root.parent)
    (root / "val" / "bee" / "more" / "a").symlink_to(root / "val" / "ant")
    (root / "val" / "bee" / "more" / "b").symlink_to("../more")
    found = open_folder(root, "val", "text")
    assert found.ids == PLAIN
    assert found.notes() == [
        "5 links to what is there already, left out: "
        "val/ant/loop, val/ant/up, val/bee/more/a and 2 more"
    ]


def test_a_file_counts_once(root: Path) -> None:
    """The file itself counts, else the first link; a second name (a hard link) is a second file."""
    plain = open_folder(root, "val", "text").fingerprint
    store = root.parent / "store"
    store.mkdir()
    Image.new("RGB", (4, 4)).save(store / "far.png")
    (root / "val" / "ant" / "0.png").symlink_to("../ant/2.png")
    (root / "val" / "bee" / "0.png").symlink_to(root / "val" / "bee" / "more" / "3.png")
    found = open_folder(root, "val", "text")
    assert (found.ids, found.fingerprint) == (PLAIN, plain)
    assert [*found.again] == ["val/ant/0.png", "val/bee/0.png"]
    for name in ("ant/9.png", "bee/8.png", "bee/9.png"):
        (root / "val" / name).symlink_to(store / "far.png")
    os.link(root / "val" / "ant" / "1.png", root / "val" / "ant" / "3.png")
    found = open_folder(root, "val", "text")
    assert found.ids == sorted([*PLAIN, "val/ant/3.png", "val/ant/9.png"])
    assert found.describe().left_out == 0


def test_a_data_folder_may_be_made_of_links(root: Path, tmp_path: Path) -> None:
    """Of the part, of its classes or of each image; ids and fingerprint stay."""
    plain = open_folder(root, "val", "text")
    roots = [tmp_path / name for name in ("of part", "of classes", "of images")]
    for other in roots:
        other.mkdir()
    (roots[0] / "val").symlink_to(root / "val")
    (roots[1] / "val").mkdir()
    for name in CLASSES:
        (roots[1] / "val" / name).symlink_to(root / "val" / name)
    for name in PLAIN:
        (roots[2] / name).parent.mkdir(parents=True, exist_ok=True)
        (roots[2] / name).symlink_to(root / name)
    for other in roots:
        found = open_folder(other, "val", "text")
        assert (found.ids, found.fingerprint, found.notes()) == (PLAIN, plain.fingerprint, [])
        assert found.read(0).size == (4, 4)


def test_two_classes_that_are_the_same_folder(root: Path) -> None:
    (root / "val" / "cat").symlink_to("ant")
    with pytest.raises(DataError, match=r"val holds no images in class folders \(cat\)"):
        open_folder(root, "val", "text")


def test_pipes_and_sockets_are_no_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "val" / "ant" / "3.png")
    (root / "val" / "ant" / "4.png").symlink_to("3.png")
    os.mkfifo(root / "val" / "loose")
    monkeypatch.chdir(root / "val" / "bee")  # the path of a socket may be short only
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("5.png")
        found = open_folder(root, "val", "text")
    assert found.ids == PLAIN
    names = ["val/loose", "val/ant/3.png", "val/ant/4.png", "val/bee/5.png"]
    assert [*found.left_out] == names


def test_links_to_nothing_are_damaged_images(root: Path) -> None:
    (root / "val" / "ant" / "3.png").symlink_to("gone.png")
    (root / "val" / "ant" / "4.png").symlink_to("4.png")
    (root / "val" / "gone").symlink_to("nowhere")
    (root / "val" / "round").symlink_to("round")
    found = open_folder(root, "val", "text")
    assert found.ids == [*PLAIN[:2], "val/ant/3.png", "val/ant/4.png", *PLAIN[2:]]
    assert [*found.left_out] == ["val/gone", "val/round"]
