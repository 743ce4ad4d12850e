"""Detectors in grids, tables, references and paired comparisons, with one COCO folder."""

import json
from dataclasses import replace
from pathlib import Path

import benchmark_fakes as fakes
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from grid_fakes import ONE_FOLDER

from benchmarks.cli import cli
from benchmarks.compare import reference
from benchmarks.grid.cell import Adapter, Cell, Places, RunOptions
from benchmarks.grid.expand import Filters, expand, parse_filters
from benchmarks.grid.preflight import missing
from benchmarks.grid.schema import load_grid, parse_grid
from benchmarks.results import scores
from benchmarks.results.outcomes import compare, read_outcomes
from benchmarks.run.order import make_chains
from benchmarks.tables import summary
from benchmarks.tables.expected_orders import order_lines
from benchmarks.tables.settings import settings_lines
from tasks.common.cell import identity
from tasks.common.outcome_files import OutcomesError
from tasks.detection import tags

DEMO = load_grid("demo")
WHOLE = "backbone+fpn+rpn+roi"
SCORES = {"fp": 60.0, "rtn": 20.0, "qdrop": 45.0, "aphq": 47.0, "fimaq": 48.0}


def demo_cells(options: RunOptions = RunOptions(), **filters: str) -> list[Cell]:
    return expand(DEMO, parse_filters(DEMO, **filters), options)


def value(cell: Cell) -> float:
    lost = 8.0 * (cell.bits == "w3a3") + 2.0 * (cell.model == "demo_cascade")
    return SCORES[cell.method] - lost + (0.0 if cell.seed is None else cell.seed - 1.5)


def contributions(cell: Cell) -> np.ndarray:
    """150 numbers beyond 0..1 whose mean is the cell's value as a fraction."""
    own = np.random.default_rng([len(cell.method), cell.w_bit, cell.seed or 0]).normal(0, 0.4, 150)
    return own - own.mean() + value(cell) / 100


def test_the_demo_profile_has_two_detectors_and_runs_them_on_request():
    cells = demo_cells(tasks="detection")
    assert len(cells) == 2 * (1 + 4 * 2 * 2)
    assert {cell.model for cell in cells} == set(tags.DEMO_NAMES)
    assert {(cell.method, cell.bits, cell.seed) for cell in cells} == {("fp", "fp", None)} | {
        (method, bits, seed)
        for method in ("rtn", "qdrop", "aphq", "fimaq")
        for bits in ("w4a4", "w3a3")
        for seed in (1, 2)
    }
    assert {(cell.task, cell.scope, cell.request.data.path) for cell in cells} == {
        ("detection", "", None)
    }
    others = demo_cells(tasks="classification,retrieval,deepfake")
    assert {cell.task for cell in others} == {"classification", "retrieval", "deepfake"}
    assert len(others) + len(cells) == len(demo_cells())


def test_filters_narrow_detectors_too():
    labels = [
        cell.label
        for cell in demo_cells(models="demo_cascade", methods="fp,qdrop", bits="w3a3", seeds="2")
    ]
    assert labels == ["demo_cascade fp", "demo_cascade qdrop w3a3 seed 2"]
    assert {cell.bits for cell in demo_cells(tasks="detection", bits="w6a6", methods="rtn")} == {
        "w6a6"
    }
    # What other sections run and this one does not is asked for by the section's name.
    assert "detection" not in {cell.section for cell in demo_cells(methods="lsvit,brecq")}
    assert {cell.method for cell in demo_cells(tasks="detection", methods="brecq")} == {"brecq"}


def test_settings_of_the_task_stand_below_the_grids_and_the_sections():
    content = {
        "name": "t",
        "methods": ["qdrop"],
        "bits": ["w4a4"],
        "seeds": [1],
        "overrides": {"calibration_images": 100, "range_images": 10},
        "tasks": {
            "detection": {
                "dataset": "d",
                "models": ["demo_mask_rcnn"],
                "overrides": {"range_images": 3},
            }
        },
    }
    (cell,) = expand(parse_grid(content), Filters(), RunOptions())
    recipe = cell.request.recipe
    assert recipe is not None
    assert {name: getattr(recipe, name) for name in tags.DEFAULTS} == {
        **tags.DEFAULTS,
        "calibration_images": 100,
        "range_images": 3,
    }


def test_the_demo_profiles_detectors_keep_what_their_task_sets_but_for_counts():
    for cell in demo_cells(tasks="detection"):
        recipe = cell.request.recipe
        if recipe is not None:
            kept = {
                name: value
                for name, value in tags.DEFAULTS.items()
                if name not in ("calibration_images", "range_images")
            }
            assert {name: getattr(recipe, name) for name in kept} == kept
            assert (
                recipe.range_images
                <= recipe.calibration_images
                < tags.DEFAULTS["calibration_images"]
            )


def test_the_paper_profiles_detectors_have_released_settings(tmp_path: Path):
    grid = load_grid("paper")
    options = RunOptions(data=Places(coco=tmp_path))
    cells = expand(grid, Filters(tasks=("detection",)), options)
    published = {
        "mask_rcnn_swin_tiny",
        "mask_rcnn_swin_small",
        "cascade_mask_rcnn_swin_tiny",
        "cascade_mask_rcnn_swin_small",
    }
    assert {cell.model for cell in cells} == published
    assert len(cells) == 4 * (2 + 7 * 2 + 1)
    assert {cell.bits for cell in cells} == {"fp", "w4a4", "w6a6"}
    recipes = [cell.request.recipe for cell in cells if cell.request.recipe is not None]
    assert all(recipe.changes(tags.DEFAULTS) == {} and recipe.batch_size == 1 for recipe in recipes)
    assert {cell.request.data.path for cell in cells} == {tmp_path}
    assert len({identity.planned_folder(cell.request) for cell in cells}) == len(cells)
    (base, *_) = expand(grid, parse_filters(grid, models="mask_rcnn_swin_base"), options)
    assert base.section == "detection"
    assert {
        name for part in grid.tasks.values() for name in (*part.models, *part.available)
    } >= set(tags.SHORT_NAMES)


CAPTIONS = ("dataset_coco.json", "train2014/", "val2014/")
INSTANCES = (
    "annotations/instances_val2017.json",
    "val2017/",
    "annotations/instances_train2017.json",
    "train2017/",
)
#: Real checks ahead of a run; nothing is measured.
CHECKS = Adapter(fakes.run_cell, fakes.planned_folder, identity.preflight)


def one_folder(tmp_path: Path, *parts: str) -> RunOptions:
    """Options with a COCO folder of these files and folders, and with all weights."""
    for part in parts:
        path = tmp_path / "coco" / part
        path.mkdir(parents=True) if part.endswith("/") else (
            path.parent.mkdir(parents=True, exist_ok=True),
            path.touch(),
        )
    (tmp_path / "weights").mkdir()
    for name in ("ViT-B-32-quickgelu.openai", "mask_rcnn_swin_tiny.coco_3x"):
        (tmp_path / "weights" / f"{name}.pth").touch()
    return RunOptions(data=Places(coco=tmp_path / "coco"), weights=tmp_path / "weights")


def test_one_coco_folder_serves_captions_and_detection(tmp_path: Path):
    options = one_folder(tmp_path, *CAPTIONS, *INSTANCES)
    assert missing(expand(parse_grid(ONE_FOLDER), Filters(), options), CHECKS) == []


@pytest.mark.parametrize(
    ("parts", "absent", "lacking", "rest"),
    [
        (CAPTIONS, INSTANCES, "detection", "classification,captions"),
        (INSTANCES, ("the captions in ",), "captions", "classification,detection"),
        ((*CAPTIONS, *INSTANCES[:2]), INSTANCES[2:], "detection", "classification,captions"),
    ],
)
def test_a_coco_folder_for_one_of_them_says_what_the_other_lacks(
    tmp_path: Path, parts: tuple[str, ...], absent: tuple[str, ...], lacking: str, rest: str
):
    options = one_folder(tmp_path, *parts)
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(ONE_FOLDER, sort_keys=False))
    places = ["--coco", str(options.data.coco), "--weights", str(options.weights)]
    result = CliRunner().invoke(
        cli, ["run", "--profile", str(path), *places, "--results", str(tmp_path)], obj=CHECKS
    )
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: Missing: ")
    assert all(part.rstrip("/") in lines[0] for part in absent)
    assert not any(f"/{part.rstrip('/')}" in lines[0].split(". ")[0] for part in parts)
    assert result.output.splitlines()[-1] == (
        f"Cannot run: {lacking}. To run the rest: TASKS={rest} for make, --tasks {rest} for a grid."
    )
    grid = parse_grid(ONE_FOLDER)
    assert missing(expand(grid, parse_filters(grid, tasks=rest), options), CHECKS) == []


def test_tables_have_boxes_and_beside_them_masks(tmp_path: Path):
    cells = demo_cells(RunOptions(results=tmp_path), tasks="detection")
    measured = fakes.write_cells(cells, value)
    text = summary.grid_markdown("T", measured, cells)
    assert "## detection: AP_box (percent), mean ± sd over seeds" in text
    (fimaq, pair, _) = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| fimaq")
    ]
    # Seeds half a point below and above.
    assert fimaq[3:] == ["48.00 ± 0.71", "40.00 ± 0.71", "46.00 ± 0.71", "38.00 ± 0.71"]
    assert pair[1:] == ["48.00 / 44.00", "40.00 / 36.00", "46.00 / 42.00", "38.00 / 34.00"]
    assert "Box / mask AP (percent), mean over seeds:" in text
    assert "Brackets name" not in text
    assert "- Data: digit scenes for detection, split test, n = 150 samples." in text
    rows = scores.scores(measured)
    assert len(rows) == 2 * len(cells)
    assert set(rows["metric"]) == {"AP_box", "AP_mask"}
    assert set(rows["variant"]) == {"fp", "demo"}


def without_masks(item: scores.Measured) -> scores.Measured:
    metrics = {
        name: metric for name, metric in item.record.metrics.items() if not name.endswith("_mask")
    }
    return replace(item, record=item.record.model_copy(update={"metrics": metrics}))


def test_tables_of_boxes_alone(tmp_path: Path):
    """Data whose annotations have no masks: mask AP is missing, for all cells or for some."""
    cells = demo_cells(RunOptions(results=tmp_path), tasks="detection")
    measured = fakes.write_cells(cells, value)
    bare = [without_masks(item) for item in measured]
    text = summary.grid_markdown("T", bare, cells)
    assert "48.00 ± 0.71" in text
    assert "mask AP" not in text
    paper = summary.grid_latex("demo", bare, cells)
    assert "48.00" in paper
    assert "mask AP" not in paper
    mixed = [
        without_masks(item) if item.cell.model == "demo_cascade" else item for item in measured
    ]
    lines = [
        line
        for line in summary.grid_markdown("T", mixed, cells).splitlines()
        if line.startswith("| fimaq")
    ]
    assert [part.strip() for part in lines[1].strip("|").split("|")][1:] == [
        "48.00 / 44.00", "40.00 / 36.00", "46.00 / -", "38.00 / -",
    ]  # fmt: skip
    assert "46.00 / -" in summary.grid_latex("demo", mixed, cells)


def test_settings_are_set_against_those_of_the_task(tmp_path: Path):
    cells = demo_cells(RunOptions(results=tmp_path), tasks="detection")
    (settings, _) = settings_lines(fakes.write_cells(cells, value))
    assert "calibration_images 32 (released: 256)" in settings
    assert "steps 150 (released: 20000)" in settings
    assert "batch_size 1," in settings
    assert "mlp_percentile" not in settings


def test_methods_are_compared_by_what_images_contribute(tmp_path: Path):
    cells = demo_cells(RunOptions(results=tmp_path), models="demo_cascade", bits="w4a4")
    measured = fakes.write_cells(cells, value, contributions)
    mine, base = (
        [item for item in measured if item.cell.method == method] for method in ("aphq", "rtn")
    )
    found = read_outcomes(mine[0])
    assert found is not None
    (part,) = found.metrics["AP_box"]
    order = np.argsort([f"s{i}" for i in range(150)])
    np.testing.assert_array_equal(part.score, contributions(mine[0].cell)[order])
    result = compare(mine, base)
    assert result is not None
    assert result.difference == pytest.approx(SCORES["aphq"] - SCORES["rtn"])
    gaps = np.mean(
        [contributions(a.cell) - contributions(b.cell) for a, b in zip(mine, base, strict=True)],
        axis=0,
    )
    assert result.se == pytest.approx(100 * gaps.std(ddof=1) / np.sqrt(150))
    (line,) = [
        line
        for line in order_lines(scores.scores(measured), measured)
        if line.startswith("No method below rtn at w4a4")
    ]
    assert "yes: lowest is qdrop on demo_cascade +25.00 ± " in line
    # Without the main metric's contributions there is nothing to compare.
    assert mine[0].folder is not None
    np.savez(mine[0].folder / "outcomes.npz", sample=found.sample, AP_mask=part.score - 0.04)
    read_outcomes.cache_clear()
    with pytest.raises(OutcomesError, match="has other metrics"):
        read_outcomes(mine[0])


def test_what_the_task_sets_is_part_of_a_references_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cells = demo_cells(RunOptions(results=tmp_path), tasks="detection")
    measured = fakes.write_cells(cells, value)
    folder = tmp_path / "reference"
    reference.write_reference(DEMO, measured, "# T\n\nx", folder)
    stated = json.loads((folder / "demo.json").read_text())["settings"]
    assert stated["overrides"] == DEMO.overrides
    effective = {**stated["overrides"], **stated["sections"]["detection"]}
    assert effective == DEMO.overrides_of("detection")
    assert effective["batch_size"] == 1
    (line,) = reference.compare(DEMO, measured, folder)
    assert line.startswith("Agrees with the reference (")
    monkeypatch.setitem(tags.DEFAULTS, "batch_size", 2)
    (line,) = reference.compare(DEMO, measured, folder)
    assert line.startswith("Not compared with the reference in detection: it has other settings")


def test_a_chain_has_the_whole_detector_last():
    scopes = [WHOLE, "backbone", "backbone+fpn"]
    content = {
        "name": "t",
        "methods": ["rtn"],
        "bits": ["w4a4"],
        "seeds": [1],
        "tasks": {"detection": {"dataset": "d", "models": ["demo_cascade"], "scopes": scopes}},
    }
    (chain,) = make_chains(expand(parse_grid(content), Filters(), RunOptions()))
    assert [cell.scope for cell in chain] == [*scopes[1:], WHOLE]


def test_profiles_name_data_as_records_state_them():
    from tasks.detection.coco import COCO_NAME
    from tasks.detection.demo.scenes import DATA

    assert load_grid("demo").tasks["detection"].dataset == DATA
    assert load_grid("paper").tasks["detection"].dataset == COCO_NAME
