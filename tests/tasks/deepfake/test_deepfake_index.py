"""Index files of DeepfakeBench: labels, compressions, chosen frames, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.request import DataRequest
from tasks.deepfake.index import FRAMES, open_frames, parse_index
from tasks.deepfake.tags import missing_data


def video(label: str, names: list[Any]) -> dict[str, Any]:
    return {"label": label, "frames": names}


def celeb(frames: int = 3) -> dict[str, Any]:
    def names(kind: str, key: str) -> list[str]:
        return [f"Celeb-DF-v2\\{kind}\\frames\\{key}\\{i:03d}.png" for i in range(frames)]

    return {
        "Celeb-DF-v2": {
            "CelebDFv2_real": {
                "train": {"a": video("CelebDFv2_real", names("Celeb-real", "a"))},
                "test": {"id0": video("CelebDFv2_real", names("Celeb-real", "id0"))},
            },
            "CelebDFv2_fake": {
                "test": {"id0": video("CelebDFv2_fake", names("Celeb-synthesis", "id0"))}
            },
        }
    }


def test_videos_of_equal_names_stay_apart() -> None:
    real, fake = parse_index(celeb(), "Celeb-DF-v2", "test", "file")
    assert (real.key, fake.key) == ("CelebDFv2_real/id0", "CelebDFv2_fake/id0")
    assert (real.label, fake.label) == (0, 1)
    assert real.frames[0] == "Celeb-DF-v2/Celeb-real/frames/id0/000.png"


def test_compressed_sets_have_one_level_more() -> None:
    def split(label: str) -> dict[str, Any]:
        levels = {
            level: {"000": video(label, [f"{label}/{level}/0.png"])} for level in ("c23", "c40")
        }
        return {"test": levels}

    content = {"FaceForensics++": {label: split(label) for label in ("FF-real", "FF-DF")}}
    found = parse_index(content, "FaceForensics++", "test", "file")
    assert [one.frames for one in found] == [["FF-real/c23/0.png"], ["FF-DF/c23/0.png"]]
    assert [one.key for one in found] == ["FF-real/c23/000", "FF-DF/c23/000"]
    for label in ("FF-real", "FF-DF"):
        del content["FaceForensics++"][label]["test"]["c23"]
    with pytest.raises(DataError, match="has no compression c23"):
        parse_index(content, "FaceForensics++", "test", "file")


def test_long_videos_give_frames_at_even_distances() -> None:
    found = parse_index(celeb(100), "Celeb-DF-v2", "test", "file")[0].frames
    places = [int(name[-7:-4]) for name in found]
    assert len(places) == FRAMES == 32
    assert places[0] == 0
    assert {*np.diff(places)} <= {3, 4}
    assert places[-1] >= 96


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update({"x": c.pop("Celeb-DF-v2")}), "has no set 'Celeb-DF-v2'"),
        (
            lambda c: c["Celeb-DF-v2"].update({"CelebDFv2_reel": {}}),
            "unknown label 'CelebDFv2_reel'. Did you mean 'CelebDFv2_real'",
        ),
        (lambda c: c["Celeb-DF-v2"].pop("CelebDFv2_fake"), "no real and tampered videos"),
        (
            lambda c: c["Celeb-DF-v2"]["CelebDFv2_real"]["test"]["id0"].update({"frames": []}),
            "CelebDFv2_real/id0 has no frames",
        ),
        (
            lambda c: c["Celeb-DF-v2"]["CelebDFv2_real"]["test"]["id0"].update(
                {"frames": ["..\\..\\secret.png"]}
            ),
            "is not the path of an image below the folder",
        ),
        (
            lambda c: c["Celeb-DF-v2"]["CelebDFv2_real"].update({"test": 3}),
            "is no object of videos",
        ),
    ],
)
def test_wrong_indices_are_named(change: Any, words: str) -> None:
    content = celeb()
    change(content)
    with pytest.raises(DataError, match=words):
        parse_index(content, "Celeb-DF-v2", "test", "file")


def test_frames_are_read_and_missing_ones_are_counted(tmp_path: Path) -> None:
    content = celeb()
    path = tmp_path / "dataset_json" / "Celeb-DF-v2.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    for label in content["Celeb-DF-v2"].values():
        for name in label["test"]["id0"]["frames"]:
            file = tmp_path / name.replace("\\", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(file)
    found = open_frames(tmp_path, "Celeb-DF-v2", "test")
    assert (found.video, found.source.targets) == ([0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1])
    assert found.source.read(5).size == (8, 8)
    file.unlink()
    with pytest.raises(DataError, match=r"names 1 of 6 frames that are not below .*002\.png"):
        open_frames(tmp_path, "Celeb-DF-v2", "test")
    wanted = missing_data(DataRequest(tmp_path, evaluation="Celeb-DF-v2"), False)
    assert wanted is not None
    assert wanted.what == f"the file {tmp_path}/dataset_json/FaceForensics++.json"
