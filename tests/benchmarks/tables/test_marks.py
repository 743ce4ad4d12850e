"""Marks of methods: special quantizers and optimised parts, read from the recipe."""

from typing import Any

import benchmark_fakes as fakes
import pytest

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.run.options import RunRequest
from benchmarks.run.plan import make_plan
from benchmarks.tables import summary
from benchmarks.tables.settings import marks, recipe_marks
from fimaq_core.recipe import METHODS, make_recipe


@pytest.mark.parametrize(
    ("softmax", "gelu", "text"),
    [
        ("uniform", "uniform", "-"),
        ("log2", "uniform", "softmax"),
        ("uniform", "twin", "GELU"),
        ("adalog", "twin", "softmax, GELU"),
    ],
)
def test_special_quantizers(softmax: str, gelu: str, text: str):
    recipe = make_recipe("fimaq", {"softmax_quantizer": softmax, "gelu_quantizer": gelu})
    assert recipe_marks(recipe)[0] == text


@pytest.mark.parametrize(
    ("method", "changes", "text"),
    [
        ("rtn", {}, "-"),
        ("qdrop", {}, "blocks"),
        ("mlp-recon", {}, "MLPs"),
        ("erq", {}, "weights"),
        ("fimaq-mlp", {}, "blocks + MLPs"),
        ("erq", {"reconstruct_mlp": True}, "MLPs + weights"),
        ("gptq", {}, "weights"),
        ("fimaq", {"start": "gptq"}, "blocks"),
        ("rtn", {"finish_steps": 9}, "whole model"),
    ],
)
def test_optimised(method: str, changes: dict[str, Any], text: str):
    assert recipe_marks(make_recipe(method, changes))[1] == text


def test_full_precision_has_no_marks():
    assert recipe_marks(None) == ("-", "-")


def test_the_table_leads_with_marks_also_of_what_is_not_measured(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(
        METHODS,
        "special",
        {
            "softmax_quantizer": "log2",
            "reconstruct": False,
            "refit": True,
            "range_search": "percentile",
        },
    )
    grid = fakes.plain_demo(methods=("fp", "special", "fimaq"))
    cells = expand(grid, Filters(), RunOptions(results=tmp_path))
    assert marks(cells).to_dict("index") == {
        "fp": {"special quantizers": "-", "optimised": "-"},
        "special": {"special quantizers": "softmax", "optimised": "weights"},
        "fimaq": {"special quantizers": "-", "optimised": "blocks"},
    }
    measured = fakes.write_cells(
        [cell for cell in cells if cell.method == "fimaq"], lambda cell: 80.0
    )
    rows = [
        line
        for line in summary.grid_markdown("Demo", measured, cells).splitlines()
        if line.startswith("|")
    ]
    fields = [[part.strip() for part in row.strip("|").split("|")] for row in rows]
    assert fields[0][:4] == ["method", "special quantizers", "optimised", "demo_vit w4a4"]
    assert fields[1][1].startswith(":-")
    assert ["special", "softmax", "weights", "-"] in [row[:4] for row in fields]
    assert ["fimaq", "-", "blocks", "80.00 ± 0.00"] in [row[:4] for row in fields]


def test_the_plan_shows_bits_of_attention_probabilities_where_they_differ(tmp_path):
    def headers_and_row(overrides):
        grid = fakes.plain_demo(methods=("fimaq",), bits=("w3a3",), overrides=overrides)
        request = RunRequest(grid, options=RunOptions(tmp_path), adapter=fakes.ADAPTER)
        lines = make_plan(request, reference=tmp_path).text.splitlines()
        return lines[0], lines[2], lines[4].split()

    common, headers, row = headers_and_row({"s_bits": 8})
    assert "s bits 8" in common
    assert row[1:4] == ["demo_vit", "fimaq", "w3a3"]
    for overrides in ({}, {"s_bits": 3}):
        common, headers, row = headers_and_row(overrides)
        assert "s bits" not in common + headers
