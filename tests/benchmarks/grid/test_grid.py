"""Grids: what they expand to, and what they refuse."""

from pathlib import Path

import pytest
import yaml

from benchmarks.grid.cell import Places, RunOptions
from benchmarks.grid.expand import Filters, expand, parse_filters
from benchmarks.grid.schema import GridError, load_grid, parse_bits, parse_grid
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import METHODS, make_recipe

MINIMAL = {
    "name": "t",
    "tasks": {"classification": {"dataset": "d", "models": ["m"]}},
    "methods": ["fp", "rtn"],
    "bits": ["w3a3"],
    "seeds": [1],
}
EXTRA = {
    "task": "classification",
    "models": ["m"],
    "methods": ["rtn"],
    "bits": ["w3a3", "w8a8"],
    "seeds": [1, 2],
}


def test_demo_grid_has_its_cells_with_full_precision_first():
    everything = expand(load_grid("demo"), Filters(), RunOptions())
    cells = [cell for cell in everything if cell.section == "classification"]
    assert len(cells) == 3 * (2 + 12 * 2 + 1) + 2
    others = (1 + 5 * 2 * 2 * 2) + 2 * (1 + 4 * 2 * 2) + (1 + 3 * 2) + 1
    assert len(everything) == len(cells) + others
    left_out = {"qdrop-aphq", "gptq", "gptaq", "glfq", "mlp-finish"}
    assert {cell.method for cell in cells} == {"fp", *METHODS} - left_out
    by_model = {
        model: [cell for cell in cells if cell.model == model]
        for model in ("demo_vit", "demo_deit", "demo_swin")
    }
    for mine in by_model.values():
        assert mine[0].method == "fp"
        assert (mine[0].w_bit, mine[0].a_bit, mine[0].seed, mine[0].request.recipe) == (
            32,
            32,
            None,
            None,
        )
        assert len(mine) == (29 if mine[0].model == "demo_swin" else 27)
    assert {cell.request.variant for cell in cells} == {None, "demo"}
    assert len({cell.key for cell in cells}) == len(cells)
    assert all(
        cell.request.threads == 1 and cell.request.results == Path("results/runs") for cell in cells
    )


def test_demo_overrides_are_the_same_for_all_methods():
    grid = load_grid("demo")
    for cell in expand(grid, Filters(), RunOptions()):
        if cell.request.recipe is not None:
            for name, value in {**grid.overrides, **grid.tasks[cell.section].overrides}.items():
                own = getattr(cell.request.recipe, name)
                assert own == getattr(make_recipe("fimaq", {name: value}), name)


def test_paper_grid_uses_released_settings_and_the_given_data():
    options = RunOptions(
        data=Places(imagenet=Path("/data"), coco=Path("/other")), weights=Path("/weights")
    )
    cells = expand(load_grid("paper"), Filters(tasks=("classification",)), options)
    assert len(cells) == 7 * (2 + 17 * 3 + 3 * 3 + 3 + 2)
    assert {cell.method for cell in cells} == {"fp", *METHODS}
    for cell in cells:
        assert cell.request.data.path == Path("/data")
        assert cell.request.model.weights_folder == Path("/weights")
        assert cell.request.recipe is None or cell.request.recipe.changes() == {}


def test_a_grid_whose_models_bring_their_data_ignores_the_path():
    cells = expand(load_grid("demo"), Filters(), RunOptions(data=Places(*[Path("/data")] * 3)))
    assert {cell.request.data.path for cell in cells} == {None}


def test_filters_narrow_and_widen():
    grid = load_grid("paper")
    filters = parse_filters(
        grid, models="vit_large, deit_tiny", methods="fp,fimaq", bits="w2a4", seeds="5,6"
    )
    cells = expand(grid, filters, RunOptions())
    assert [cell.label for cell in cells if cell.model == "vit_large"] == [
        "vit_large fp",
        "vit_large fimaq w2a4 seed 5",
        "vit_large fimaq w2a4 seed 6",
    ]
    assert {cell.model for cell in cells} == {"vit_large", "deit_tiny"}
    assert parse_filters(grid) == Filters()
    assert filters != Filters()


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"models": "demo_vitt"}, "Did you mean 'demo_vit'?"),
        ({"methods": "fimac"}, "Did you mean 'fimaq'?"),
        ({"tasks": "clasification"}, "Did you mean 'classification'?"),
        ({"bits": "3x3"}, "w3a3"),
        ({"bits": "w1a4"}, "outside 2 to 8"),
        ({"bits": "w32a32"}, "method 'fp'"),
        ({"seeds": "one"}, "whole numbers"),
    ],
)
def test_bad_filters_say_what_was_meant(filters: dict[str, str], words: str):
    with pytest.raises(GridError) as caught:
        parse_filters(load_grid("demo"), **filters)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metods": ["fp"]}, "Unknown key 'metods'. Did you mean 'methods'?"),
        (
            {"tasks": {"classification": {"dataset": "d", "models": ["m"], "avialable": []}}},
            "Did you mean 'available'?",
        ),
        ({"methods": ["fimac"]}, "Did you mean 'fimaq'?"),
        ({"bits": ["w9a9"]}, "outside 2 to 8"),
        ({"overrides": {"stpes": 3}}, "Did you mean 'steps'?"),
        ({"overrides": {"seed": 3}}, "cannot be an override"),
        (
            {"extra": [{"task": "x", "models": [], "methods": [], "bits": [], "seeds": []}]},
            "unknown task 'x'",
        ),
        ({"name": "../x"}, "name"),
        (
            {"tasks": {"classification": {"dataset": "d", "models": ["m"], "data": "folder"}}},
            "'imagenet', 'coco' or 'flickr'",
        ),
        (
            {"tasks": {"classification": {"dataset": "d", "models": ["m"], "methods": ["fimac"]}}},
            "Did you mean 'fimaq'?",
        ),
        (
            {"tasks": {"classification": {"dataset": "d", "models": ["m"], "bits": ["w9a9"]}}},
            "outside 2 to 8",
        ),
        (
            {
                "tasks": {
                    "classification": {"dataset": "d", "models": ["m"], "overrides": {"stpes": 3}}
                }
            },
            "Did you mean 'steps'?",
        ),
        (
            {
                "tasks": {
                    "classification": {"dataset": "d", "models": ["m"], "overrides": {"scope": "x"}}
                }
            },
            "tasks.classification.overrides: 'scope' cannot be an override",
        ),
        ({"bits": ["w" + "9" * 5000 + "a4"]}, "is no bit-width: write such as w3a3"),
        (
            {"seeds": list(range(400)), "methods": ["rtn"] * 400},
            "160,000 cells are more than 100,000: make several grids",
        ),
        (
            {"axes": {"a": {f"p{n}": {} for n in range(60_000)}}},
            "120,002 cells are more than 100,000",
        ),
        (
            {"extra": [{**EXTRA, "seeds": list(range(1000)), "bits": ["w3a3"] * 1000}]},
            "1,000,002 cells are more than 100,000",
        ),
        ({"jobs": 10**18}, "jobs: Input should be less than or equal to 4096"),
    ],
)
def test_bad_grids_say_what_was_meant(change: dict[str, object], words: str):
    with pytest.raises(FimaqError) as caught:
        parse_grid({**MINIMAL, **change})
    assert words in str(caught.value)


def test_profiles_are_names_or_files(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    assert load_grid(str(path)).name == "t"
    with pytest.raises(GridError, match="Did you mean 'demo'"):
        load_grid("dmeo")
    with pytest.raises(GridError, match="Cannot read"):
        load_grid(str(tmp_path / "none.yaml"))


def test_extra_cells_are_added_once_and_obey_filters():
    grid = parse_grid({**MINIMAL, "extra": [EXTRA]})
    assert [cell.label for cell in expand(grid, Filters(), RunOptions())] == [
        "m fp",
        "m rtn w3a3 seed 1",
        "m rtn w3a3 seed 2",
        "m rtn w8a8 seed 1",
        "m rtn w8a8 seed 2",
    ]
    narrowed = expand(grid, parse_filters(grid, bits="w8a8", seeds="2"), RunOptions())
    assert [cell.label for cell in narrowed] == ["m fp", "m rtn w8a8 seed 2"]


def test_bits_parse():
    assert parse_bits("w2a4") == (2, 4)
    assert parse_bits("w4a32") == (4, 32)
