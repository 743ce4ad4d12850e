"""Rehearsals: smaller requests, the kill of each process, the estimates, and random data."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_fakes as fakes
import pytest
import yaml

from benchmarks.rehearsal.cell import few_classes, in_small, read_events
from benchmarks.rehearsal.full_cost import Spent, real_memory, real_seconds, spent
from benchmarks.rehearsal.inputs import make_data
from fimaq_core.recipe import make_recipe
from tasks.common.data.folders import open_folder
from tasks.common.data.imagenet import is_imagenet
from tasks.common.request import CellRequest, DataRequest, ModelRequest


def request(method: str = "aphq", **changes: Any) -> CellRequest:
    made = CellRequest(
        "classification", ModelRequest("vit_small"), DataRequest(Path("data")), make_recipe(method)
    )
    return replace(made, **changes)


def test_a_cpu_rehearses_with_two_steps_and_few_images():
    small = in_small(request())
    recipe = small.recipe
    assert recipe is not None
    assert (recipe.steps, recipe.mlp_steps) == (2, 2)
    assert (recipe.calibration_images, recipe.batch_size, recipe.mlp_batch) == (2, 2, 2)
    assert (recipe.range_images, recipe.range_candidates, small.data.limit) == (1, 16, 2)
    # Settings that choose the code path stay the same.
    same = ("method", "w_bits", "a_bits", "loss", "fisher_k", "range_search", "per_token", "seed")
    real = make_recipe("aphq")
    assert [getattr(recipe, name) for name in same] == [getattr(real, name) for name in same]


def test_a_gpu_rehearses_with_real_batches():
    small = in_small(request(device="cuda"))
    recipe = small.recipe
    assert recipe is not None
    assert (recipe.batch_size, recipe.range_images, recipe.calibration_images) == (32, 128, 128)
    assert (small.eval_batch, recipe.steps) == (32, 5)  # a graph is captured after the third step
    # Full precision is measured once, on the same images as all methods.
    assert small.data.limit == in_small(request(recipe=None, device="cuda")).data.limit == 32


def test_detectors_calibrate_on_one_image_of_their_own_file_and_are_measured_on_two():
    detector = request("fimaq", task="detection", data=DataRequest(Path("coco")))
    small = in_small(detector)
    assert small.recipe is not None
    assert (small.recipe.calibration_images, small.data.limit) == (1, 2)
    # An annotation file of COCO 2017 does not have the name of a published data set.
    assert small.data.path == Path("coco/annotations/instances_val2017.json")
    assert small.data.calibration_data == Path("coco/annotations/instances_train2017.json")


def test_full_precision_and_zero_shot_in_small():
    small = in_small(request(recipe=None, data=DataRequest(Path("data"), evaluation="zero-shot")))
    assert small.recipe is None
    assert small.data.path == few_classes(Path("data"))


def event(time: float, stage: str, block: str = "", **more: Any) -> dict[str, Any]:
    fields = {"attempt": 1, "done": 0, "total": 9, "loss": None, "tape_bytes": None, "memory": 5}
    return {**fields, "time": time, "stage": stage, "block": block, **more}


def test_times_are_summed_by_what_they_are_spent_on():
    """Block a: passes of 4 and 3 s (the last one counts), steps of 5 and 2 s; MLP: 1 and 0.5 s."""
    events = [
        event(0, "reconstruct MLPs", "a.mlp"),
        event(1, "reconstruct MLPs", "a.mlp", loss=1.0),
        event(1.5, "reconstruct MLPs", "a.mlp", loss=1.0),
        event(2, "calibrate", "a"),
        event(7, "calibrate", memory=50),
        event(10, "reconstruct", "a"),
        event(11, "Fisher pass", "a"),
        event(15, "reconstruct", "a"),
        event(20, "reconstruct", "a", loss=1.0),
        event(20, "Fisher pass", "a"),
        event(23, "reconstruct", "a"),
        event(25, "reconstruct", "a", loss=1.0),
        event(26, "reconstruct", "a", tape_bytes=70),
        event(0, "reconstruct", "b", attempt=2),
        event(8, "reconstruct", "b", attempt=2, loss=1.0),
        event(9, "reconstruct", "b", attempt=2, loss=1.0),
        event(9, "reconstruct", attempt=2),
        event(10, "embed classes", attempt=2, done=10),
        event(14, "embed classes", attempt=2, done=30),
    ]
    found = spent(events)
    assert found.calibrate == 5
    assert found.fisher_pass == 3
    assert found.step == 2 + 1
    # 3 s after the calibration, 1 s before the pass, 1 s after the last step; the excess of the
    # first step and pass over the second: 3 s and 1 s (block a), 7 s (block b); MLPs: 0.5 s twice
    assert found.rest == 3 + 1 + 1 + 3 + 1 + 7 + 0.5 + 0.5
    assert found.mlp_step == 0.5
    assert (found.text, found.texts) == (4 / 20, 30)
    assert (found.tape_bytes, found.peak_memory_bytes) == (70, 50)
    assert found.total == 26 + 14


def test_the_estimate_follows_steps_images_and_passes():
    small = in_small(request("fimaq")).recipe
    assert small is not None
    record = fakes.make_record(
        recipe=small, seconds={"load": 7.0, "evaluate": 8.0}, n=4, peak_memory_bytes=500,
        stage_memory_bytes={"load": 100}, preprocessing=None,
    )  # fmt: skip
    found = Spent(
        calibrate=1.0, fisher_pass=2.0, step=0.5, mlp_step=0.0, rest=3.0, text=0.1, texts=20,
        total=9.0, tape_bytes=40, peak_memory_bytes=450,
    )  # fmt: skip
    real = make_recipe("fimaq")
    expected = (
        7  # load
        + 50_000 * (8 - 20 * 0.1) / 4
        + 80_000 * 0.1
        + 1.0 * 128 / 1 * 128 / 16 * (1 + 3) / (1 + 1)  # range images, candidates, rounds
        + (3.0 + 5 * 2.0) * 1024 / 2  # rest, five passes
        + 0.5 * 20_000 * 32 / 2
    )
    assert real_seconds(record, found, real, 50_000) == pytest.approx(expected)
    # 400 bytes beyond the loaded model, 40 of them for the tape; the batches grow by 16.
    images = 1024 * 4 * 3 * 800 * 1344  # a record without preprocessing is of a detector
    beyond = 360 * 16 + images
    assert real_memory(record, found, real, 32, False) == (100 + beyond + 40 * 512, 40 * 512)
    assert real_memory(record, found, real, 32, True) == (100 + beyond, 40 * 512)
    assert real_memory(fakes.make_record(peak_memory_bytes=9, n=4), found, None, 32, False)[1] == 0


def test_random_data_open_as_the_real_sets_do(tmp_path: Path):
    places = make_data(tmp_path, ["imagenet", "coco", "flickr"])
    assert places.imagenet is not None
    for part in ("train", "val"):
        source = open_folder(places.imagenet, part)
        assert (source.classes, len(source.ids)) == (1000, 1000)
        assert is_imagenet(source.class_names)
        assert source.name == "folder-1000-classes"
    modes = {source.read(index).mode for index in range(8)}
    assert modes == {"RGB"}  # also of grey and CMYK files, and of a PNG file named as a JPEG
    assert open_folder(few_classes(places.imagenet), "val").classes == 8
    assert places.coco is not None
    content = json.loads((places.coco / "annotations/instances_val2017.json").read_text())
    assert len(content["categories"]) == 80
    assert {entry["category_id"] for entry in content["annotations"]} == set(range(2, 81))


@pytest.fixture(scope="module")
def rehearsed(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Rehearse a grid of a small demo model with the command; return the folder and the output."""
    folder = tmp_path_factory.mktemp("rehearsal")
    content = {
        "name": "small",
        "tasks": {"classification": {"dataset": "digit-pairs", "models": ["demo_vit"]}},
        "methods": ["fp", "rtn", "aphq", "fimaq"], "bits": ["w4a4"], "seeds": [3407],
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder, command(folder)


def command(folder: Path, *chosen: str) -> subprocess.CompletedProcess[str]:
    chosen = chosen or ("--profile", str(folder / "small.yaml"))
    arguments = ["run", *chosen, "--results", str(folder), "--rehearse"]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def test_every_cell_is_killed_once_and_goes_on(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]],
):
    folder, result = rehearsed
    assert result.returncode == 0, result.stdout + result.stderr
    cells = sorted((folder / "rehearsal/runs").rglob("result.json"))
    assert len(cells) == 4
    for path in cells:
        attempts = [[], []]  # type: ignore[var-annotated]
        for entry in read_events(path.parent):
            attempts[entry["attempt"] - 1].append((entry["stage"], entry["block"]))
        first, second = attempts
        assert first, path
        assert second, path
        # The process was killed when a block began. Finished blocks were not computed again.
        if "fimaq" in path.parts:
            assert first[-1] == ("reconstruct", "blocks.0")
            assert not any(stage == "calibrate" for stage, _ in second)
            assert ("reconstruct", "patch_embed") not in second
        if "rtn" in path.parts:
            assert first[-1] == ("calibrate", "blocks.0")
    assert result.stdout.count("waits again") == 4


def test_a_rehearsal_estimates_and_counts_for_nothing(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]],
):
    folder, result = rehearsed
    content = json.loads((folder / "rehearsal/rehearsal.json").read_text())
    rows = {row["method"]: row for row in content["cells"]}
    assert list(rows) == ["aphq", "fimaq", "fp", "rtn"]
    assert rows["fimaq"]["seconds"] > 100 * rows["rtn"]["seconds"]
    assert 0 < rows["fimaq"]["rehearsed"]["seconds_per_step"] < 60
    assert rows["fimaq"]["rehearsed"]["batch_size"] == 2
    assert rows["fimaq"]["tape_bytes"] > 0
    assert "Nothing here counts as measured" in result.stdout
    assert not (folder / "runs").exists()
    again = command(folder)
    assert again.returncode == 0
    assert "All 4 cells are done already." in again.stdout


def test_a_published_table_is_rehearsed(tmp_path: Path):
    """The table has the published layout but no verdict; the model is real, with 1000 classes."""
    result = command(tmp_path, "--table", "fimaq", "--models", "deit_tiny", "--bits", "w4a4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "DeiT-T" in result.stdout
    assert "66.84" in result.stdout  # published beside
    assert "Nothing is comparable with the published table: 2 numbers measured" in result.stdout
    rows = json.loads((tmp_path / "rehearsal/rehearsal.json").read_text())["cells"]
    assert [(row["model"], row["method"], row["bits"]) for row in rows] == [
        ("deit_tiny", "fimaq", "w4a4"),
        ("deit_tiny", "fp", "fp"),
    ]
