"""Costs of cells: the order of origins, kinds of device, what published minutes stand for."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import benchmark_fakes as fakes
import pytest

from benchmarks.costs.sources import (
    COMMITTED,
    FINISHED,
    REHEARSED,
    Cost,
    CostRow,
    Costs,
    gather,
    published_cost,
    published_minutes,
)
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.names import PUBLISHED, load_names
from benchmarks.grid.schema import load_grid
from fimaq_core.recipe import make_recipe

GPU, CPU = "NVIDIA H200", "cpu Intel"
WIDTHS = ("w3a3", "w4a4", "w6a6")
NOTHING = Costs([], [])
README = "an unstated GPU (github:hahnyuan/PTQ4ViT:README.md@b42c790c)"


def cell_of(
    method: str, model: str = "deit_small", bits: str = "w3a3", device: str = "cuda"
) -> Cell:
    filters = Filters(("classification",), (model,), (method,), (bits,))
    (cell,) = expand(load_grid("paper"), filters, RunOptions(device=device))
    return cell


def row_of(cell: Cell, seconds: float, device: str = GPU, memory: int = 10**9) -> CostRow:
    return CostRow(
        **cell.name._asdict(),
        seed=cell.seed,
        seconds=seconds,
        peak_memory_bytes=memory,
        device=device,
        threads=4,
    )


def found_in(folder: Path, cell: Cell) -> Cost | None:
    """Return the cost of a cell that is not finished, by files in ``folder``."""
    costs, warnings = gather([cell], fakes.ADAPTER, ["paper"], folder, folder)
    assert not warnings
    return costs.of(cell)


def test_sources_come_in_their_order():
    cell, similar = cell_of("fimaq"), cell_of("fimaq", bits="w4a4")
    rows = [
        (FINISHED, row_of(cell, 500.0)),
        (FINISHED, row_of(similar, 400.0)),
        (COMMITTED, row_of(cell, 300.0)),
        (REHEARSED, row_of(cell, 200.0)),
    ]
    found = [Costs([cell, similar], rows[start:]).of(cell) for start in range(5)]
    assert [(cost.source, cost.seconds, cost.memory) for cost in found if cost is not None] == [
        ("measured", 500.0, 10**9),
        ("from finished cells", 400.0, 10**9),
        ("from the reference", 300.0, 10**9),
        ("rehearsed", 200.0, 10**9),
        ("published", 49 * 60, None),
    ]


def test_published_minutes_take_memory_from_a_rehearsal_on_another_device():
    cell = cell_of("fimaq")
    row = row_of(cell, 9e5, device=CPU, memory=3 * 10**9)
    cost = Costs([cell], [(REHEARSED, row)]).of(cell)
    assert cost is not None
    assert (cost.source, cost.seconds, cost.device) == ("published", 49 * 60, "gpu")
    place = "an H800 (GLF-Q Table 7)"
    origin = f"published, {place}; memory rehearsed, cpu Intel, 4 threads"
    assert (cost.memory, cost.origin) == (3 * 10**9, origin)


def test_rehearsals_are_read_here_first_and_damaged_ones_are_a_warning(tmp_path: Path):
    cell = cell_of("fimaq")
    committed = {**row_of(cell, 60.0).model_dump(), "disk_bytes": 7, "rehearsed": {"steps": 20}}
    (tmp_path / "rehearsal.json").write_text(json.dumps({"cells": [committed], "images": 64}))
    assert (cost := found_in(tmp_path, cell)) is not None
    assert (cost.seconds, cost.disk) == (60.0, 7)
    assert cost.origin == "rehearsed, NVIDIA H200, 4 threads"

    local = tmp_path / "rehearsal" / "rehearsal.json"
    local.parent.mkdir()
    local.write_text(json.dumps({"cells": [{**committed, "seconds": 30.0}]}))
    costs, _ = gather([cell], fakes.ADAPTER, ["paper"], tmp_path, tmp_path)
    assert (cost := costs.of(cell)) is not None
    assert cost.seconds == 30.0
    # The same name with other settings was not rehearsed, nor another model.
    fewer = replace(
        cell.request, recipe=make_recipe("fimaq", {"steps": 9, "w_bits": 3, "a_bits": 3})
    )
    other = replace(cell, request=fewer)
    assert found_in(tmp_path, other) is None
    assert (cost := costs.of(cell_of("fimaq", "vit_base"))) is not None
    assert cost.source == "published"
    assert (cost := costs.of(cell_of("fimaq", bits="w4a4"))) is not None
    assert (cost.source, cost.seconds) == ("rehearsed", 30.0)

    local.write_text('{"cells": [{}]}')
    costs, (warning,) = gather([cell], fakes.ADAPTER, ["paper"], tmp_path, tmp_path)
    assert f"Cannot read the rehearsal {local}" in warning
    assert (cost := costs.of(cell)) is not None
    assert cost.seconds == 60.0


def test_costs_say_which_kind_of_device_they_are_from_and_the_right_kind_comes_first():
    slow = [(COMMITTED, row_of(cell_of("fimaq"), 9000.0, CPU))]
    cells = [cell_of("fimaq", device=device) for device in ("cuda", "auto", "cpu")]
    found = [Costs([cell], slow).of(cell) for cell in cells]
    assert [(cost.source, cost.device, cost.seconds) for cost in found if cost is not None] == [
        ("published", "gpu", 2940.0),
        ("published", "gpu", 2940.0),
        ("from the reference", "cpu", 9000.0),
    ]
    # Similar cells never lend a GPU's time to a CPU's cells.
    first, second, wanted = (cell_of("fimaq", "vit_large", bits, "cpu") for bits in WIDTHS)
    both = [(FINISHED, row_of(first, 9000.0, CPU)), (FINISHED, row_of(second, 10.0, GPU))]
    assert (cost := Costs([first, second], both).of(wanted)) is not None
    assert (cost.device, cost.seconds) == ("cpu", 9000.0)
    # Where nothing else is known, the other kind is said to be that.
    assert (cost := NOTHING.of(cell_of("fimaq", device="cpu"))) is not None
    assert (cost.device, cost.origin) == ("gpu", "published, an H800 (GLF-Q Table 7)")


@pytest.mark.parametrize(
    ("method", "model", "minutes", "origin"),
    [
        ("aphq", "swin_small", 170, "published, an RTX 4090 (APHQ-ViT Table 7)"),
        ("lsvit", "vit_base", 56, "published, an H800 (GLF-Q Table 7)"),
        # 32 images, as the method has them, not 128
        ("ptq4vit", "vit_base", 4, f"published, {README}"),
        ("erq", "deit_small", 4, "published, an unstated GPU (survey quoting ERQ)"),
        ("brecq", "vit_small", 48, "published for fimaq, an H800 (GLF-Q Table 7)"),
        ("brecq", "deit_small", 47, "published for qdrop, an RTX 4090 (APHQ-ViT Table 7)"),
        ("fimaq-mlp", "vit_base", 87, "published for fimaq, an H800 (GLF-Q Table 7)"),
        ("repq", "swin_tiny", 3, f"published for ptq4vit, {README}"),
    ],
)
def test_published_minutes_of_the_method_or_of_a_similar_one(
    method: str, model: str, minutes: float, origin: str
):
    assert (cost := NOTHING.of(cell_of(method, model))) is not None
    assert (cost.seconds, cost.origin) == (60 * minutes, origin)
    assert cost.device == "gpu"


def test_what_was_not_published_is_not_known():
    for cell in (cell_of("fp"), cell_of("mlp-recon"), cell_of("fimaq", "vit_large")):
        assert NOTHING.of(cell) is None
    # Other settings with the same steps take about as long, but are not what was timed.
    ablation = expand(load_grid("paper-ablation"), Filters(models=("swin_small",)), RunOptions())
    assert (cost := NOTHING.of(next(cell for cell in ablation if cell.point == "k=15"))) is not None
    assert (cost.source, cost.seconds) == ("published, similar method", 115 * 60)


def test_the_best_evidence_counts_then_the_first_row(tmp_path: Path):
    lines = [
        "study,model,method,variant,w_bit,a_bit,metric,value,source,evidence",
        "time_a,deit_small,FIMA-Q,,3,3,minutes,1,A,secondary",
        "time_h800,deit_small,FIMA-Q,,4,4,minutes,2,B,primary",
        "time_a,deit_small,FIMA-Q,,4,4,minutes,3,A,primary",
        "time_h800,deit_small,FIMA-Q,,4,4,ms,4,B,primary",
        "time_h800,deit_small,Unheard-of,,3,3,minutes,5,B,primary",
    ]
    path = tmp_path / "cost.csv"
    path.write_text("\n".join(lines) + "\n")
    times = published_minutes(path)["deit_small"]
    assert [time.minutes for time in times] == [2, 3, 1]
    assert (cost := published_cost(cell_of("fimaq"), times)) is not None
    assert (cost.seconds, cost.origin) == (120, "published, an H800 (B)")
    assert published_minutes(path)["deit_small_patch16_224.fb_in1k"] == times


def test_every_method_and_model_of_the_published_times_has_a_time():
    for model, times in published_minutes().items():
        if "." not in model:
            for time in times:
                assert NOTHING.of(cell_of(time.method, model)) is not None, (model, time)


def test_named_studies_are_those_of_the_file():
    with (PUBLISHED / "cost.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    timed = {row["study"] for row in rows if row["metric"] == "minutes"}
    # Studies without a name here do not say their device.
    assert timed - set(load_names().studies) == {"time", "time_32imgs", "time_128imgs"}
    assert set(load_names().studies) <= timed
