"""Sections that evaluate the quantized models of a profile on other data."""

from pathlib import Path

import pytest

from benchmarks.grid.cell import Places, RunOptions, default_adapter
from benchmarks.grid.datasets import with_datasets
from benchmarks.grid.expand import expand, parse_filters
from benchmarks.grid.preflight import missing
from benchmarks.grid.schema import GridError, load_grid
from benchmarks.run.order import CellQueue

PAPER = load_grid("paper")


def test_the_models_of_a_profile_are_measured_on_each_data_set(tmp_path: Path) -> None:
    places = RunOptions(data=Places(imagenet=tmp_path))
    grid = with_datasets(PAPER, "imagenet-r=/sets/r, fog:3,imagenet-real")
    names = [name for name in grid.tasks if name not in PAPER.tasks]
    assert names == [f"classification-{end}" for end in ("imagenet-r", "fog-3", "imagenet-real")]
    titles = [grid.tasks[name].dataset for name in names]
    assert titles == ["ImageNet-R", "ImageNet-1k val, fog:3", "ImageNet-1k val, ReaL labels"]
    cells = expand(grid, parse_filters(grid, tasks="classification", bits="w4a4,w3a4"), places)
    of = {
        name: [cell for cell in cells if cell.section == name]
        for name in ("classification", *names)
    }
    assert all(len(own) == len(of["classification"]) for own in of.values())
    for cell, home in zip(of[names[0]], of["classification"], strict=True):
        assert cell.request.recipe == home.request.recipe
        assert cell.request.data.path == home.request.data.path == tmp_path
        assert cell.request.data.dataset == "imagenet-r=/sets/r"
        assert (home.key in cell.needs) is (cell.request.recipe is not None)
    assert of[names[1]][0].request.data.corrupt == "fog:3"
    assert grid.at_home().tasks == PAPER.tasks
    assert grid.at_home().extra == PAPER.extra
    assert with_datasets(PAPER, "") == PAPER


def test_a_cell_waits_for_the_cell_at_home() -> None:
    grid = with_datasets(load_grid("demo"), "fog:3")
    filters = parse_filters(grid, models="demo_vit", methods="fp,rtn", bits="w4a4", seeds="1")
    queue = CellQueue(expand(grid, filters, RunOptions()))
    taken = []
    while (cell := queue.take("slot")) is not None:
        taken.append(cell.section)
        queue.remove(cell)
    assert sorted(taken) == ["classification"] * 2 + ["classification-fog-3"] * 2
    assert taken[-1] == "classification-fog-3"


def test_a_name_without_severity_stands_for_all() -> None:
    parts = with_datasets(PAPER, "imagenet-c=/c").tasks
    assert len(parts) - len(PAPER.tasks) == 75
    assert parts["classification-imagenet-c-snow-5"].on == "imagenet-c:snow:5=/c"
    for text, count in (("fog", 5), ("imagenet-c:fog=/c", 5), ("imagenet-c:fog:2=/c", 1)):
        assert len(with_datasets(PAPER, text).tasks) - len(PAPER.tasks) == count


@pytest.mark.parametrize(
    ("text", "profile", "message"),
    [
        ("imagenet-q=/q", "paper", r"no data set 'imagenet-q'. Did you mean"),
        ("fog:9", "paper", "no corruption 'fog:9'"),
        ("imagenet-c:smog=/c", "paper", "no corruption 'smog:1'"),
        ("imagenet-r=/r", "demo", "'demo' has no classifiers for 'imagenet-r=/r'"),
    ],
)
def test_a_mistake_has_one_message(text: str, profile: str, message: str) -> None:
    with pytest.raises(GridError, match=message):
        with_datasets(load_grid(profile), text)


def test_a_missing_data_set_is_named_before_the_run(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    grid = with_datasets(PAPER, f"imagenet-r={tmp_path / 'r'}")
    filters = parse_filters(grid, tasks="classification-imagenet-r", models="vit_small")
    options = RunOptions(data=Places(imagenet=tmp_path), weights=tmp_path)
    text = "\n".join(missing(expand(grid, filters, options), default_adapter()))
    assert f"the folder {tmp_path / 'r'}" in text
