"""docs/notebook.ipynb: its cells run in order, and its outputs are those of its code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.run_notebook import NOTEBOOK, run_cells


def kinds(notebook: dict[str, Any]) -> list[list[tuple[str, list[str]]]]:
    """Of each code cell its outputs, as kinds of output and of data."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [cell["outputs"] for cell in cells]
    return [[(one["output_type"], sorted(one.get("data", {}))) for one in cell] for cell in outputs]


def test_the_file_is_small_and_was_run() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    outputs = kinds(json.loads(text))
    assert len(text.encode()) < 300_000
    figure = ("display_data", ["image/png"])
    assert sum(cell.count(figure) for cell in outputs) == 2
    assert str(Path.home()) not in text


@pytest.mark.slow
def test_its_cells_run_in_order() -> None:
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    run = json.loads(json.dumps(stored))
    names = run_cells(run)
    assert kinds(run) == kinds(stored)
    scores = names["scores"]
    assert scores["full precision"] > scores["fimaq"] > scores["rtn"] + 10
    assert torch.equal(names["again"](names["images"]), names["q"](names["images"]))
