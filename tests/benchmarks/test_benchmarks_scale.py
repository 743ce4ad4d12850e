"""The measure of plans and tables of many cells, with few."""

import gc
from pathlib import Path

import pytest

from benchmarks.cells import Places, RunOptions, default_adapter
from benchmarks.faults.scale import plan_and_aggregate
from benchmarks.grid import Filters, expand, load_grid
from benchmarks.tables import collect


@pytest.mark.filterwarnings("error")
def test_every_step_is_measured_and_what_it_writes_are_records(tmp_path: Path):
    found = plan_and_aggregate(150, tmp_path)
    steps = {"expand", "plan", "write", "collect", "frame", "report", "csv"}
    assert set(found) == {"cells", "cpu", *steps}
    assert set(found["cpu"]) == steps
    assert all(found[name] >= 0 for name in steps)
    options = RunOptions(results=tmp_path, data=Places(imagenet=tmp_path / "imagenet"))
    cells = expand(load_grid(str(tmp_path / "scale.yaml")), Filters(), options)
    measured = collect([*cells, *cells], default_adapter())
    assert [item.cell.key for item in measured] == [cell.key for cell in cells[:150]]
    assert gc.isenabled()
    quantized = next(item.record for item in measured if item.record.modules is not None)
    assert len(quantized.modules.quantized) == 100
