"""Prediction samples: their choice, the order of answers, and limits on foreign files."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fimaq_core.errors import CheckpointError
from tasks.common.cell.prediction_samples import (
    EXAMPLES_FILE,
    ClassSample,
    ObjectSample,
    Spread,
    leaders,
    read_examples,
    shortened,
)
from tasks.common.data.class_names import distinct_names, readable_names

CLASSES = {
    "sample": "val/a/1.png",
    "truth": "cat",
    "top": [{"name": "cat", "share": 0.75}, {"name": "dog", "share": 0.25}],
}
CAPTIONS = {
    "sample": "1.png",
    "truth": ["a cat", "cat"],
    "top": [{"caption": "a dog", "score": -0.2, "correct": False}],
}
OBJECT = {"name": "cat", "box": [1, 2.5, 3, 4], "polygons": [[0, 0, 4, 0, 4, 4.5]]}
OBJECTS = {
    "sample": "val2017/1.jpg",
    "size": [64, 48],
    "truth": [OBJECT],
    "found": [{**OBJECT, "score": 0.5}],
}


def example_file(task: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"task": task, "samples": samples}


def chosen(count: int, broken: set[int] = frozenset(), batch: int = 7) -> list[int]:
    """Positions chosen of a set that comes in batches, without its damaged samples."""
    spread, found = Spread(count), []
    for start in range(0, count, batch):
        positions = [
            position
            for position in range(start, min(start + batch, count))
            if position not in broken
        ]
        found += [positions[index] for index in spread.take(positions)]
    return found


@pytest.mark.parametrize("count", [1, 5, 12, 13, 30, 64, 1000])
def test_samples_are_evenly_spaced(count: int) -> None:
    found = chosen(count)
    assert found[0] == 0
    assert len(found) == min(count, 12)
    assert chosen(count, batch=1) == chosen(count, batch=1000) == found
    steps = np.diff([*found, count])
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1


def test_the_next_sample_stands_in_for_a_damaged_one() -> None:
    assert chosen(120) == [10 * strip for strip in range(12)]
    assert chosen(120, {0, 20, 21, 22, 119}) == [1, 10, 23, *(10 * strip for strip in range(3, 12))]
    assert chosen(120, set(range(30, 40))) == [10 * strip for strip in range(12) if strip != 3]
    assert chosen(5, {2}) == [0, 1, 3, 4]


def test_leaders_against_a_sorted_list() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 50):
        scores, correct = rng.normal(size=count).round(1), rng.random(count) < 0.3
        expected = sorted(range(count), key=lambda index: (-scores[index], correct[index], index))[
            :3
        ]
        assert leaders(scores, correct) == expected


def test_long_texts_are_cut() -> None:
    assert shortened("a" * 1000) == "a" * 1000
    assert shortened("a" * 1001) == "a" * 999 + "…"


def test_names_of_classes() -> None:
    assert readable_names(["cats", "dogs"]) == ("cats", "dogs")
    folders = ["mine", "n01440764", "n02012849", "n03126707", "n99999999"]
    assert readable_names(folders) == (
        "mine",
        "tench",
        "crane (n02012849)",
        "crane (n03126707)",
        "n99999999",
    )
    assert distinct_names(["a", "b", "a"], ["x", "y", "z"]) == ("a (x)", "b", "a (z)")


def write(folder: Path, content: object) -> None:
    (folder / EXAMPLES_FILE).write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )


@pytest.mark.parametrize("sample", [CLASSES, CAPTIONS, OBJECTS])
def test_what_is_written_is_read(tmp_path: Path, sample: dict[str, Any]) -> None:
    write(tmp_path, example_file("mine", [sample] * 12))
    found = read_examples(tmp_path, EXAMPLES_FILE)
    assert found.task == "mine"
    assert len(found.samples) == 12
    assert found.samples[0].model_dump() == sample
    if sample is OBJECTS:
        assert isinstance(found.samples[0], ObjectSample)
        assert found.samples[0].found[0].score == 0.5
    if sample is CLASSES:
        assert isinstance(found.samples[0], ClassSample)


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place: Any = content
        for part in way:
            place = place[part]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("sample", "change"),
    [
        (CLASSES, _set("more", 1)),
        (CLASSES, _set("task", 1)),
        (CLASSES, _set("samples", {})),
        (CLASSES, _set("samples", [CLASSES] * 65)),
        (CLASSES, _set("samples", [CLASSES, CAPTIONS])),
        (CLASSES, _set("samples.0.sample", "")),
        (CLASSES, _set("samples.0.sample", "a" * 5000)),
        (CLASSES, _set("samples.0.sample", 7)),
        (CLASSES, _set("samples.0.more", "<script>")),
        (CLASSES, _set("samples.0.truth", ["cat"])),
        (CLASSES, _set("samples.0.truth", "a" * 1001)),
        (CLASSES, _set("samples.0.top.0.share", 1.5)),
        (CLASSES, _set("samples.0.top.0.share", "0.5")),
        (CLASSES, _set("samples.0.top.0.share", True)),
        (CLASSES, _set("samples.0.top.0.share", float("nan"))),
        (CLASSES, _set("samples.0.top", [CLASSES["top"][0]] * 4)),  # type: ignore[index]
        (CAPTIONS, _set("samples.0.top.0.score", float("nan"))),
        (CAPTIONS, _set("samples.0.top.0.score", float("inf"))),
        (CAPTIONS, _set("samples.0.top.0.correct", 1)),
        (CAPTIONS, _set("samples.0.truth", ["a"] * 11)),
        (OBJECTS, _set("samples.0.size", [64])),
        (OBJECTS, _set("samples.0.size", [64, 0])),
        (OBJECTS, _set("samples.0.size", [64, 10**9])),
        (OBJECTS, _set("samples.0.truth.0.score", 0.5)),
        (OBJECTS, _set("samples.0.truth.0.box", [1, 2, 3])),
        (OBJECTS, _set("samples.0.truth.0.box", [1, 2, 3, float("nan")])),
        (OBJECTS, _set("samples.0.found.0.polygons", [[0, 0, 1, 1]])),
        (OBJECTS, _set("samples.0.found.0.polygons", [[0.0] * 2000])),
        (OBJECTS, _set("samples.0.found.0.score", None)),
        (OBJECTS, _set("samples.0.found", [OBJECTS["found"][0]] * 21)),  # type: ignore[index]
    ],
)
def test_other_content_is_refused(
    tmp_path: Path, sample: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    content = copy.deepcopy(example_file("mine", [sample, sample]))
    write(tmp_path, content)
    read_examples(tmp_path, EXAMPLES_FILE)
    change(content)
    write(tmp_path, content)
    with pytest.raises(
        CheckpointError, match=r"examples .* are not valid: .*measure that cell again"
    ):
        read_examples(tmp_path, EXAMPLES_FILE)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"task": "\\ud800", "samples": []}', "\x00"]
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    with pytest.raises(CheckpointError, match="not valid"):
        read_examples(tmp_path, EXAMPLES_FILE)


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    content = json.dumps(example_file("mine", [CLASSES]))
    write(tmp_path, content + " " * (5_000_000 - len(content)))
    read_examples(tmp_path, EXAMPLES_FILE)
    write(tmp_path, content + " " * (5_000_001 - len(content)))
    with pytest.raises(CheckpointError, match="exceed 5 MB"):
        read_examples(tmp_path, EXAMPLES_FILE)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../examples.json", "a/examples.json", "/etc/passwd", "a\\b", "a\0"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "cell" / "a").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "cell", tmp_path / "cell" / "a"):
        write(folder, example_file("mine", [CLASSES]))
    with pytest.raises(CheckpointError, match="no file beside it"):
        read_examples(tmp_path / "cell", name)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no file"):
        read_examples(tmp_path, EXAMPLES_FILE)
    (tmp_path / EXAMPLES_FILE).mkdir()
    with pytest.raises(CheckpointError, match="There is no file"):
        read_examples(tmp_path, EXAMPLES_FILE)


def test_pictures_need_no_model_library() -> None:
    """Reports show them where no model runs."""
    code = """if True:
        import json, sys
        from tasks.common.registry import originals
        from tasks.common.request import DataRequest, ModelRequest

        demos = [("classification", "vit"), ("retrieval", "clip"), ("detection", "cascade")]
        found = [
            originals(task, ModelRequest(f"demo_{model}"), DataRequest(), [])
            for task, model in demos
        ]
        heavy = ("timm", "open_clip", "mmdet", "mmcv")
        print(json.dumps([found, [name for name in heavy if name in sys.modules]]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[{}, {}, {}], []]
