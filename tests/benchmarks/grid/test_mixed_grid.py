"""Bits of single layers in a grid: an override with a mapping."""

import pytest

from benchmarks.grid.cell import Places, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import GridError, load_grid, parse_grid
from fimaq_core.bits_map import BitsMap
from tasks.common.cell.identity import planned_folder, variant_name

MAP = {"blocks.0.attn.qkv": {"w": 3, "a": 5}, "head": {"w": 6}}


def content(bits: object) -> dict[str, object]:
    demo = {"dataset": "digits", "models": ["demo_vit"], "task": "classification"}
    return {
        "name": "mixed",
        "methods": ["rtn"],
        "bits": ["w4a4"],
        "seeds": [0],
        "tasks": {"uniform": demo, "mixed": {**demo, "overrides": {"bits_map": bits}}},
    }


def test_a_section_may_have_a_bits_map(tmp_path_factory: pytest.TempPathFactory) -> None:
    options = RunOptions(tmp_path_factory.mktemp("results"), Places(), None)
    grid = parse_grid(content(MAP))
    uniform, mixed = (cell.request for cell in expand(grid, Filters(), options))
    assert uniform.recipe is not None
    assert mixed.recipe is not None
    assert uniform.recipe.bits_map is None
    assert mixed.recipe.bits_map == BitsMap.of(MAP)
    assert variant_name(mixed) == f"bits_map={BitsMap.of(MAP)}"
    assert planned_folder(mixed) != planned_folder(uniform)


def test_a_wrong_map_is_an_error_of_the_grid() -> None:
    with pytest.raises(GridError, match="head needs bits by operand"):
        parse_grid(content({"head": 4}))


def test_the_demos_row_of_mixed_bits_has_a_variant_of_its_own() -> None:
    cells = expand(load_grid("demo"), Filters(), RunOptions())
    (mixed,) = [cell for cell in cells if cell.section == "mixed-mean-4-bits"]
    same = [cell for cell in cells if (cell.model, cell.method) == (mixed.model, "fimaq")]
    assert mixed.request.recipe.bits_map is not None
    assert [cell.request.variant for cell in same if cell is not mixed] == ["demo"] * 2
    assert mixed.request.variant == "mixed bits"
