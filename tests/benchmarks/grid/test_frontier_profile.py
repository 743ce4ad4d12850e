"""The profile `frontier`: its cells, points that a method does not take, data that are made."""

from pathlib import Path

import benchmark_fakes as fakes
import pytest
from grid_fakes import AXES_GRID, cells_of

from benchmarks.cli import cli
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, chosen_axes, expand, parse_filters
from benchmarks.grid.preflight import missing, not_made
from benchmarks.grid.schema import GridError, load_grid, parse_grid
from tasks.common.cell.identity import planned_folder, unfinished

PARTS = {
    "rotate": {"hadamard": {"rotate": "hadamard"}, "none": {"rotate": "none"}},
    "start": {"gptq": {"start": "gptq"}},
    "finish": {"9": {"finish_steps": 9}},
    "together": {"rotate+finish": {"rotate": "hadamard", "finish_steps": 9}},
}
GRID = {**AXES_GRID, "methods": ["fimaq", "glfq"], "axes": PARTS}


def points_of(method, **filters):
    cells = cells_of(GRID, models="demo_vit", seeds="1", methods=method, **filters)
    return {cell.point: cell.axis_points for cell in cells}


def test_a_method_has_the_points_that_its_recipe_allows():
    assert points_of("fimaq") == {
        "": (("rotate", "none"),),
        "rotate=hadamard": (("rotate", "hadamard"),),
        "start=gptq": (("start", "gptq"),),
        "finish=9": (("finish", "9"),),
        "together=rotate+finish": (("together", "rotate+finish"),),
    }
    # Straight-through weights have no start, and GLF-Q rotates: two points are one cell.
    assert points_of("glfq") == {
        "": (("rotate", "hadamard"),),
        "rotate=none": (("rotate", "none"),),
        "finish=9": (("finish", "9"), ("together", "rotate+finish")),
    }


def test_a_finished_cell_starts_from_a_cell_of_the_grid():
    cells = cells_of(GRID, models="demo_vit", seeds="1", methods="fimaq,glfq")
    folders = {planned_folder(cell.request): cell.point for cell in cells}
    bases = {
        (cell.method, cell.point): folders[planned_folder(unfinished(cell.request))]
        for cell in cells
        if cell.request.recipe.finish_steps
    }
    assert bases == {
        ("fimaq", "finish=9"): "",
        ("fimaq", "together=rotate+finish"): "rotate=hadamard",
        ("glfq", "finish=9"): "",
    }


def test_a_point_that_no_method_allows_is_refused():
    with pytest.raises(GridError, match="weight_learning rounding"):
        parse_grid({**GRID, "methods": ["fp", "glfq"]})


def test_filters_choose_single_points_or_none():
    assert set(points_of("fimaq", axes="none")) == {""}
    assert set(points_of("fimaq", axes="finish,rotate=none")) == {"", "finish=9"}
    grid = parse_grid(GRID)
    chosen = parse_filters(grid, axes="start,rotate=hadamard")
    assert chosen_axes(grid, chosen) == {
        "rotate": {"hadamard": {"rotate": "hadamard"}},
        "start": PARTS["start"],
    }


def test_profile_has_methods_alone_and_with_parts(tmp_path):
    grid, options = load_grid("frontier"), RunOptions(results=tmp_path)
    assert {cell.bits for cell in expand(grid, Filters(), options)} == {
        "fp",
        "w4a4",
        "w3a3",
        "w2a4",
    }
    filters = parse_filters(grid, bits="w3a3", seeds="1")
    cells = expand(grid, filters, options)
    models = {cell.subject for cell in cells if cell.method != "fp"}
    assert models == {
        *("demo_vit", "demo_deit", "demo_swin", "demo_clip [vision]"),
        "vit_small_patch14_dinov2.lvd142m",
    }
    rows = [cell.row for cell in cells if cell.model == "demo_vit"]
    alone = ["fp", "fimaq", "lsvit", "aphq", "fimaq-mlp", "glfq"]
    alone += ["rtn", "gptq", "gptaq", "qdrop", "mlp-finish"]
    assert [row for row in rows if " " not in row] == alone
    assert len(cells) == len(models) * len(rows)
    assert {row.partition(" ")[0] for row in rows if "=" in row} == set(alone[1:6])
    assert {"glfq rotate=none", "fimaq together=all"} <= set(rows)


def test_prepared_folder_gives_data_weights_and_arguments(tmp_path):
    cells = expand(load_grid("frontier"), Filters(tasks=("dinov2",)), RunOptions(results=tmp_path))
    folder = tmp_path / "prepared" / "dinov2-photos"
    for cell in cells:
        request = cell.request
        assert request.data.path == request.model.weights_folder == folder
        assert request.model.model_args == {"img_size": 112, "num_classes": 10}
    message = not_made(cells[0])
    assert message is not None
    assert "scripts/dinov2_from_onnx.py" in message
    assert f"--out {folder}/vit_small_patch14_dinov2.lvd142m.safetensors" in message
    assert missing(cells, fakes.ADAPTER) == [message]
    (folder / "val").mkdir(parents=True)
    assert not_made(cells[0]) is None
    assert (Path(__file__).parents[3] / "scripts" / "dinov2_from_onnx.py").is_file()


def test_cells_without_their_prepared_folder_are_left_out(tmp_path, capsys):
    content = (
        "name: p\ntable: frontier\nmethods: [fp, rtn]\nbits: [w3a3]\nseeds: [1]\nthreads: 1\n"
        "tasks:\n  classification: {dataset: digit-pairs, models: [demo_vit]}\n"
        "  own: {task: classification, dataset: mine, models: [demo_swin],"
        " prepared: {name: mine, command: 'make {folder}'}}\n"
    )
    path = tmp_path / "p.yaml"
    path.write_text(content)
    arguments = ["run", "--profile", str(path), "--results", str(tmp_path / "results")]
    for _ in range(2):  # measured, then finished
        code = cli.main(arguments, standalone_mode=False, obj=fakes.ADAPTER)
        found = capsys.readouterr()
        assert not code
        assert "2 of 4 cells were left out. Missing: the folder" in found.err
        assert "make " + str(tmp_path / "results" / "prepared" / "mine") in found.out + found.err


def test_a_section_may_have_recipe_fields_of_single_methods():
    tasks = {name: dict(part) for name, part in GRID["tasks"].items()}
    section = next(iter(tasks))
    tasks[section] |= {"overrides": {"steps": 7}, "of_methods": {"glfq": {"steps": 9}}}
    content = {**GRID, "tasks": tasks}
    cells = cells_of(content, models="demo_vit", seeds="1", methods="fimaq,glfq")
    steps = {(cell.method, cell.request.recipe.steps) for cell in cells}
    assert steps == {("fimaq", 7), ("glfq", 9)}
    for wrong, words in (({"glf": {}}, "glfq"), ({"glfq": {"stpes": 9}}, "Did you mean 'steps'")):
        tasks[section]["of_methods"] = wrong
        with pytest.raises(GridError, match=words):
            parse_grid(content)
