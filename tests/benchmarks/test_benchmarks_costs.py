"""Costs of cells: the order of their origins, kinds of device, and what published minutes stand for."""

import json
from pathlib import Path

import pytest

from benchmarks.cells import Cell, RunOptions
from benchmarks.costs import CostRow, Costs, Source, other_rows, published_cost
from benchmarks.grid import Filters, expand, load_grid
from benchmarks.published.minutes import published_minutes

GPU, CPU = "NVIDIA H200", "cpu Intel"


def cells_of(methods: str, models: str = "deit_small", bits: str = "w3a3", device: str = "cuda") -> list[Cell]:
    filters = Filters(("classification",), (models,), tuple(methods.split(",")), tuple(bits.split(",")))
    return expand(load_grid("paper"), filters, RunOptions(device=device))


def cell_of(method: str, model: str = "deit_small", bits: str = "w3a3", device: str = "cuda") -> Cell:
    return next(cell for cell in cells_of(method, model, bits, device) if cell.bits in (bits, "fp"))


def row_of(cell: Cell, seconds: float, device: str = GPU, memory: int = 10**9) -> CostRow:
    return CostRow(
        section=cell.section, model=cell.model, scope=cell.scope, method=cell.method, bits=cell.bits, seed=cell.seed,
        point=cell.point, seconds=seconds, peak_memory_bytes=memory, device=device, threads=4,
    )  # fmt: skip


def test_origins_come_in_their_order():
    cell, alike = cells_of("fimaq", bits="w3a3,w4a4")[:2]
    rows: dict[Source, list[CostRow]] = {
        "reference": [row_of(cell, 300.0)],
        "rehearsal": [row_of(cell, 200.0)],
    }
    everything = list(rows.items())
    own, here = [(cell, row_of(cell, 500.0))], [(alike, row_of(alike, 400.0))]
    assert [
        (cost.source, cost.seconds, cost.memory)
        for finished, others in ((own, everything), (here, everything), ([], everything), ([], everything[1:]), ([], []))
        if (cost := Costs(finished, others, [cell, alike]).of(cell)) is not None
    ] == [
        ("measured", 500.0, 10**9), ("here", 400.0, 10**9), ("reference", 300.0, 10**9), ("rehearsal", 200.0, 10**9),
        ("published", 49 * 60, None),
    ]  # fmt: skip


def test_rehearsals_are_read_here_first_and_damaged_ones_are_a_warning(tmp_path: Path):
    cell = cell_of("fimaq")
    committed = {**row_of(cell, 60.0).model_dump(), "disk_bytes": 7, "rehearsed": {"steps": 20}}
    (tmp_path / "rehearsal.json").write_text(json.dumps({"cells": [committed], "images": 64}))
    costs = Costs([], other_rows(["paper"], tmp_path, tmp_path)[0], [cell])
    assert (cost := costs.of(cell)) is not None
    assert (cost.source, cost.seconds, cost.disk) == ("rehearsal", 60.0, 7)
    assert costs.machines("rehearsal") == {"NVIDIA H200, 4 threads": 1}

    local = tmp_path / "rehearsal" / "rehearsal.json"
    local.parent.mkdir()
    local.write_text(json.dumps({"cells": [{**committed, "seconds": 30.0}]}))
    assert (cost := Costs([], other_rows(["paper"], tmp_path, tmp_path)[0], [cell]).of(cell)) is not None
    assert cost.seconds == 30.0

    local.write_text('{"cells": [{}]}')
    rows, (note,) = other_rows(["paper"], tmp_path, tmp_path)
    assert f"Cannot read the rehearsal {local}" in note
    assert (cost := Costs([], rows, [cell]).of(cell)) is not None
    assert cost.seconds == 60.0


def test_costs_say_which_kind_of_device_they_are_from_and_the_right_kind_comes_first():
    rows: list[tuple[Source, list[CostRow]]] = [("reference", [row_of(cell_of("fimaq"), 9000.0, CPU)])]
    found = {device: Costs([], rows, [cell]).of(cell) for device in ("cuda", "auto", "cpu")
             if (cell := cell_of("fimaq", device=device))}  # fmt: skip
    assert {device: (cost.source, cost.device, cost.seconds) for device, cost in found.items() if cost} == {
        "cuda": ("published", "gpu", 2940.0), "auto": ("published", "gpu", 2940.0), "cpu": ("reference", "cpu", 9000.0)
    }  # fmt: skip
    # Cells alike never lend a GPU's time to a CPU's cells.
    slow, quick = cells_of("fimaq", "vit_large", "w3a3,w4a4", "cpu")[:2]
    both = [(slow, row_of(slow, 9000.0, CPU)), (quick, row_of(quick, 10.0, GPU))]
    assert (cost := Costs(both, [], []).of(cell_of("fimaq", "vit_large", "w6a6", "cpu"))) is not None
    assert (cost.device, cost.seconds) == ("cpu", 9000.0)
    # Where nothing else is known, the other kind is said to be that.
    assert (cost := Costs([], [], []).of(cell_of("fimaq", device="cpu"))) is not None
    assert (cost.device, cost.note) == ("gpu", "an H800 (GLF-Q Table 7)")


@pytest.mark.parametrize(
    ("method", "model", "source", "minutes", "note"),
    [
        ("aphq", "swin_small", "published", 170, "an RTX 4090 (APHQ-ViT Table 7)"),
        ("lsvit", "vit_base", "published", 56, "an H800 (GLF-Q Table 7)"),
        # 32 images, as the method has them, not 128
        ("ptq4vit", "vit_base", "published", 4, "an unstated GPU (github:hahnyuan/PTQ4ViT:README.md@b42c790c)"),
        ("erq", "deit_small", "published", 4, "an unstated GPU (survey quoting ERQ)"),
        ("brecq", "vit_small", "alike", 48, "fimaq on an H800 (GLF-Q Table 7)"),
        ("brecq", "deit_small", "alike", 47, "qdrop on an RTX 4090 (APHQ-ViT Table 7)"),
        ("fimaq-mlp", "vit_base", "alike", 87, "fimaq on an H800 (GLF-Q Table 7)"),
        ("repq", "swin_tiny", "alike", 3, "ptq4vit on an unstated GPU (github:hahnyuan/PTQ4ViT:README.md@b42c790c)"),
    ],
)
def test_published_minutes_of_the_method_or_of_one_alike(method: str, model: str, source: str, minutes: float, note: str):
    assert (cost := Costs([], [], []).of(cell_of(method, model))) is not None
    assert (cost.source, cost.seconds, cost.note, cost.device) == (source, 60 * minutes, note, "gpu")


def test_what_was_not_published_is_not_known():
    nothing = Costs([], [], [])
    assert [nothing.of(cell_of(*cell)) for cell in (("fp",), ("mlp-recon",), ("fimaq", "vit_large"))] == [None] * 3
    (fewer,) = expand(
        load_grid("paper").model_copy(update={"overrides": {"steps": 500}, "extra": ()}),
        Filters(("classification",), ("vit_small",), ("fimaq",), ("w3a3",)), RunOptions(),
    )  # fmt: skip
    assert nothing.of(fewer) is None
    # Other settings with the same steps take about as long, but are not what was timed.
    ablation = expand(load_grid("paper-ablation"), Filters(models=("swin_small",)), RunOptions())
    assert (cost := nothing.of(next(cell for cell in ablation if cell.point == "k=15"))) is not None
    assert (cost.source, cost.seconds) == ("alike", 115 * 60)


def test_evidence_bits_and_study_decide_in_this_order(tmp_path: Path):
    lines = [
        "study,model,method,variant,w_bit,a_bit,metric,value,source,evidence",
        "time_a,deit_small,FIMA-Q,,3,3,minutes,1,A,secondary",
        "time_a,deit_small,FIMA-Q,,8,8,minutes,2,A,primary",
        "time_a,deit_small,FIMA-Q,,4,4,minutes,3,A,primary",
        "time_h800,deit_small,FIMA-Q,,4,4,minutes,4,B,primary",
        "time_h800,deit_small,FIMA-Q,,4,4,ms,5,B,primary",
        "time_h800,deit_small,Unheard-of,,3,3,minutes,6,B,primary",
    ]
    path = tmp_path / "cost.csv"
    path.write_text("\n".join(lines) + "\n")
    times = published_minutes(path)["deit_small"]
    assert [time.minutes for time in times] == [1, 2, 3, 4]

    def minutes(bits: str) -> float | None:
        cost = published_cost(cell_of("fimaq", bits=bits), times)
        return None if cost is None else cost.seconds / 60

    assert [minutes(bits) for bits in ("w3a3", "w4a4", "w6a6", "w8a8")] == [4, 4, 4, 2]
    assert published_minutes(path)["deit_small_patch16_224.fb_in1k"] == times


def test_every_method_and_model_of_the_published_times_has_a_time():
    nothing = Costs([], [], [])
    for model, times in published_minutes().items():
        if "." not in model:
            for time in times:
                assert nothing.of(cell_of(time.method, model)) is not None, (model, time)
