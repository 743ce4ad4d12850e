"""Sections of a grid: several of one task, each with its own lists, settings, data and scopes."""

from dataclasses import replace
from pathlib import Path

import benchmark_fakes as fakes
import grid_fakes
import pytest
import yaml
from click.testing import CliRunner, Result
from grid_fakes import SECTIONS_GRID

from benchmarks.cli import cli
from benchmarks.grid.cell import Adapter, Cell, Places, RunOptions, default_adapter
from benchmarks.grid.expand import Filters, expand, parse_filters
from benchmarks.grid.preflight import missing
from benchmarks.grid.schema import GridError, load_grid, parse_grid
from benchmarks.run.options import RunRequest
from benchmarks.run.order import CellQueue, make_chains
from benchmarks.run.plan import make_plan
from fimaq_core.errors import RecipeError
from tasks.common.request import CellRequest, Missing

GRID = SECTIONS_GRID


def cells_of(grid=GRID, **more):
    return grid_fakes.cells_of(grid, **more)


def by_section(cells: list[Cell]) -> dict[str, list[Cell]]:
    return {
        name: [cell for cell in cells if cell.section == name]
        for name in dict.fromkeys(cell.section for cell in cells)
    }


def test_a_section_has_its_own_lists_and_the_grids_where_it_has_none():
    cells = by_section(cells_of())
    assert list(cells) == ["classification", "coco", "zero-shot"]
    assert [cell.label for cell in cells["classification"]] == [
        "demo_vit fp",
        "demo_vit rtn w3a3 seed 7",
        "demo_vit qdrop w3a3 seed 7",
    ]
    assert [cell.label for cell in cells["coco"]] == [
        "coco clip_b fp",
        "coco clip_b [both] rtn w4a4 seed 1",
        "coco clip_b [both] fimaq w4a4 seed 1",
        "coco clip_b [vision] rtn w4a4 seed 1",
        "coco clip_b [vision] fimaq w4a4 seed 1",
        "coco clip_b [both] rtn w4a4 seed 2",
        "coco clip_b [both] fimaq w4a4 seed 2",
        "coco clip_b [vision] rtn w4a4 seed 2",
        "coco clip_b [vision] fimaq w4a4 seed 2",
    ]
    assert [cell.label for cell in cells["zero-shot"]][1:] == [
        "zero-shot clip_b [vision] rtn w3a3 seed 7",
        "zero-shot clip_b [vision] qdrop w3a3 seed 7",
    ]
    everything = cells_of()
    assert len({cell.key for cell in everything}) == len(everything) == 3 + 9 + 3


def test_cells_carry_task_data_evaluation_scope_and_settings():
    cells = by_section(cells_of())
    assert {cell.task for cell in cells["coco"] + cells["zero-shot"]} == {"retrieval"}
    found = {
        name: {(c.request.task, c.request.data.path, c.request.data.evaluation) for c in own}
        for name, own in cells.items()
    }
    assert found == {
        "classification": {("classification", None, None)},
        "coco": {("retrieval", Path("/coco"), None)},
        "zero-shot": {("retrieval", Path("/imagenet"), "zero-shot")},
    }
    for name, steps in (("classification", 5), ("coco", 9), ("zero-shot", 5)):
        recipes = [cell.request.recipe for cell in cells[name] if cell.request.recipe is not None]
        assert {(recipe.steps, recipe.batch_size) for recipe in recipes} == {(steps, 8)}
        assert [recipe.scope or "" for recipe in recipes] == [
            cell.scope for cell in cells[name][1:]
        ]
    (full,) = [cell for cell in cells["coco"] if cell.request.recipe is None]
    assert (full.scope, full.subject, full.seed) == ("", "clip_b", None)


def test_filters_on_tasks_match_sections_and_tasks():
    assert list(by_section(cells_of(tasks="retrieval"))) == ["coco", "zero-shot"]
    assert list(by_section(cells_of(tasks="zero-shot,classification"))) == [
        "classification",
        "zero-shot",
    ]
    with pytest.raises(
        GridError, match=r"Unknown task 'retrievel' in profile 's'. Did you mean 'retrieval'\?"
    ):
        cells_of(tasks="retrievel")


def test_filters_replace_a_sections_lists():
    cells = by_section(cells_of(tasks="coco", models="clip_l", bits="w8a8", seeds="3"))
    assert [cell.label for cell in cells["coco"]][-1] == "coco clip_l [vision] fimaq w8a8 seed 3"
    assert len(cells["coco"]) == 1 + 2 * 2


def test_a_method_of_other_sections_is_not_added_to_one_without_it():
    # coco alone has fimaq, the others alone have qdrop; brecq is nobody's.
    methods = {
        name: {cell.method for cell in own}
        for name, own in by_section(cells_of(methods="fimaq,qdrop,brecq")).items()
    }
    assert methods == {
        "classification": {"qdrop", "brecq"},
        "coco": {"fimaq", "brecq"},
        "zero-shot": {"qdrop", "brecq"},
    }
    # Asked for by itself, a section takes it.
    assert {cell.method for cell in cells_of(tasks="coco", methods="qdrop")} == {"qdrop"}
    extra = {
        "task": "coco",
        "models": ["clip_b"],
        "methods": ["lsvit"],
        "bits": ["w6a6"],
        "seeds": [1],
    }
    assert list(by_section(cells_of(grid={**GRID, "extra": [extra]}, methods="lsvit"))) == ["coco"]


def test_extra_cells_are_of_a_section_and_have_its_scopes_and_settings():
    extra = {
        "task": "coco",
        "models": ["clip_b"],
        "methods": ["qdrop"],
        "bits": ["w6a6"],
        "seeds": [1],
    }
    cells = [cell for cell in cells_of(grid={**GRID, "extra": [extra]}) if cell.bits == "w6a6"]
    assert [(cell.section, cell.scope, cell.request.recipe.steps) for cell in cells] == [
        ("coco", "both", 9),
        ("coco", "vision", 9),
    ]
    with pytest.raises(GridError, match=r"unknown task 'retrieval' in extra"):
        parse_grid({**GRID, "extra": [{**extra, "task": "retrieval"}]})


def test_points_of_axes_keep_their_scope_and_name_it_once():
    grid = {**GRID, "methods": ["fimaq"], "axes": {"k": {"1": {"fisher_k": 1}, "5": {}}}}
    cells = [
        cell for cell in cells_of(grid=grid, tasks="coco", seeds="1") if cell.method == "fimaq"
    ]
    assert [(cell.scope, cell.point, cell.request.recipe.scope) for cell in cells] == [
        ("both", "", "both"),
        ("both", "k=1", "both"),
        ("vision", "", "vision"),
        ("vision", "k=1", "vision"),
    ]
    from tasks.common.cell.identity import variant_name

    assert variant_name(cells[3].request) == "x k=1 [vision]"
    assert len({cell.key for cell in cells}) == 4


def test_chains_keep_scopes_together_with_the_whole_model_last():
    chains = [
        [cell.label for cell in chain] for chain in make_chains(cells_of(tasks="coco", seeds="1"))
    ]
    assert chains == [
        ["coco clip_b fp"],
        [
            "coco clip_b [vision] rtn w4a4 seed 1",
            "coco clip_b [vision] fimaq w4a4 seed 1",
            "coco clip_b [both] rtn w4a4 seed 1",
            "coco clip_b [both] fimaq w4a4 seed 1",
        ],
    ]
    everything = make_chains(cells_of())
    assert all(
        len({(c.section, c.model, c.bits, c.seed) for c in chain}) == 1 for chain in everything
    )
    assert [chain[0].method for chain in everything[:3]] == ["fp"] * 3
    # The same bits and seed in two sections: other data, other chains.
    assert (
        len(
            make_chains(
                [cell for cell in cells_of(bits="w4a4", seeds="1", tasks="retrieval") if cell.scope]
            )
        )
        == 2
    )


def test_full_precision_holds_up_its_own_section_only():
    cells = by_section(cells_of(tasks="retrieval", seeds="1", bits="w4a4"))
    queue = CellQueue([*cells["coco"], *cells["zero-shot"]])
    full = {cell.section: cell for cell in (queue.take("a"), queue.take("b")) if cell is not None}
    assert all(cell.method == "fp" for cell in full.values())
    queue.remove(full["zero-shot"])
    assert queue.take("c").section == "zero-shot"
    assert queue.take("d") is None
    queue.remove(full["coco"])
    assert queue.take("d").section == "coco"


def plan_of(**filters: str) -> str:
    grid = parse_grid(GRID)
    request = RunRequest(grid, filters=parse_filters(grid, **filters), adapter=fakes.ADAPTER)
    return make_plan(request).text


def test_the_plan_lists_sections_and_scopes():
    lines = plan_of(seeds="1").splitlines()
    assert lines[0].split()[:6] == ["#", "task", "model", "scope", "method", "bits"]
    rows = [line.split()[1:6] for line in lines]
    assert ["coco", "clip_b", "vision", "fimaq", "w4a4"] in rows
    assert ["coco", "clip_b", "-", "fp", "fp"] in rows
    assert ["classification", "demo_vit", "-", "rtn", "w3a3"] in rows
    assert "scope" not in plan_of(tasks="classification")


def grid_file(tmp_path: Path) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(GRID, sort_keys=False))
    return str(path)


def invoke(tmp_path: Path, *args: str, adapter: Adapter = fakes.ADAPTER) -> Result:
    return CliRunner().invoke(
        cli, [*args, "--profile", grid_file(tmp_path), "--results", str(tmp_path)], obj=adapter
    )


def test_the_command_line_has_a_place_for_each_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[RunOptions] = []
    monkeypatch.setattr(
        "benchmarks.cli.run_grid", lambda request: seen.append(request.options) or 0
    )
    monkeypatch.setattr(
        "benchmarks.tables.write.make_reference",
        lambda grid, options, adapter, add: seen.append(options) or 0,
    )
    for command in ("run", "reference"):
        result = invoke(tmp_path, command, "--imagenet", "/i", "--coco", "~/c", "--flickr", "/f")
        assert result.exit_code == 0, result.output
    places = Places(Path("/i"), Path.home() / "c", Path("/f"))
    assert [options.data for options in seen] == [places, places]
    assert [places.of(name) for name in ("own", "imagenet", "coco", "flickr")] == [
        None,
        *map(Path, ("/i", places.coco, "/f")),
    ]


def test_sections_are_measured_and_tabled_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for place in ("c", "i"):
        (tmp_path / place).mkdir()
    places = ["--coco", str(tmp_path / "c"), "--imagenet", str(tmp_path / "i")]
    first = invoke(
        tmp_path, "run", "--jobs", "1", *places, "--tasks", "zero-shot", "--methods", "fp,rtn"
    )
    assert first.exit_code == 0, first.output
    assert "zero-shot clip_b [vision] rtn w3a3 seed 7: top1" in first.output
    rest = invoke(tmp_path, "run", "--jobs", "1", *places, "--methods", "fp,rtn")
    assert rest.exit_code == 0, rest.output
    assert "coco clip_b [both] rtn w4a4 seed 2: R@1" in rest.output
    text = (tmp_path / "tables/s.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## classification: top1 (percent), mean ± sd over seeds",
        "## coco: R@1 (percent), mean ± sd over seeds",
        "## zero-shot: top1 (percent), mean ± sd over seeds",
    ]
    rows = (tmp_path / "tables/s.csv").read_text().splitlines()
    # classification 2, coco 1 + 4 with four metrics each, zero-shot 2
    assert len(rows) == 1 + 2 + 5 * 4 + 2
    assert (
        sum(row.startswith("retrieval,digit-scenes,clip_b,rtn,x [vision],4,4,") for row in rows)
        == 2 * 4
    )


def test_what_is_not_given_is_named_with_a_way_around_it(tmp_path: Path):
    def preflight(request: CellRequest) -> list[Missing]:
        lacks = request.task == "retrieval" and request.data.path is None
        return [Missing("the data", "Fetch it.")] if lacks else []

    adapter = replace(fakes.ADAPTER, preflight=preflight)
    result = invoke(tmp_path, "run", "--imagenet", "/i", adapter=adapter)
    assert result.exit_code == 2
    assert "error: Missing: the data. Fetch it." in result.output
    assert result.output.splitlines()[-1] == (
        "Cannot run: coco (COCO=/path or --coco). To run the rest: "
        "TASKS=classification,zero-shot for make, --tasks classification,zero-shot for a grid."
    )
    alone = invoke(tmp_path, "run", "--tasks", "coco", adapter=adapter)
    assert "Cannot run" not in alone.output


def test_a_scope_that_the_task_does_not_have_is_refused_before_anything_runs():
    def planned_folder(request):
        if request.recipe is not None and request.recipe.scope == "vision":
            raise RecipeError("Task 'retrieval' has no scope 'vision'.")
        return fakes.planned_folder(request)

    adapter = Adapter(fakes.run_cell, planned_folder, fakes.preflight)
    assert missing(cells_of(), adapter) == ["Task 'retrieval' has no scope 'vision'."]
    assert missing(cells_of(tasks="classification"), adapter) == []


def test_the_profiles_scopes_are_those_of_their_tasks():
    from tasks.common import registry

    for profile in ("demo", "paper"):
        grid = load_grid(profile)
        for section, part in grid.tasks.items():
            assert set(part.scopes) <= set(registry.scopes(grid.task_of(section)))


def test_the_paper_profile_runs_clip_models_on_three_data_sets(tmp_path: Path):
    places = Places(*(tmp_path / name for name in ("imagenet", "coco", "flickr")))
    cells = expand(load_grid("paper"), Filters(tasks=("retrieval",)), RunOptions(data=places))
    sections = by_section(cells)
    assert {
        name: (own[0].request.data.path, own[0].request.data.evaluation)
        for name, own in sections.items()
    } == {
        "retrieval-coco": (places.coco, None),
        "retrieval-flickr": (places.flickr, None),
        "zero-shot": (places.imagenet, "zero-shot"),
    }
    for own in sections.values():
        assert len(own) == 8 * (1 + 6 * 3 * 2)
        assert {cell.bits for cell in own} == {"fp", "w4a4", "w6a6", "w8a8"}
        assert {cell.scope for cell in own if cell.seed is not None} == {"vision", "both"}
        recipes = [cell.request.recipe for cell in own if cell.request.recipe is not None]
        assert all(
            recipe.changes() == {} and recipe.gelu_quantizer == "uniform" for recipe in recipes
        )
    folder = default_adapter().planned_folder
    assert len({folder(cell.request) for cell in cells}) == len(cells)
