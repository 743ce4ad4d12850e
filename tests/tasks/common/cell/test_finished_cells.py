"""Joint finishing of cells and checkpoints, on demo models with few images and steps."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fimaq_core.recipe import make_recipe
from tasks.common.cell.identity import planned_folder, shared_digests
from tasks.common.cell.run import run_cell
from tasks.common.cli.commands import build_group, main
from tasks.common.record import ResultRecord, own_seconds, read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.retrieval.command import OPTIONS

pytestmark = pytest.mark.slow

FEW = {
    **{"range_search": "minmax", "calibration_images": 24, "calibration_transform": "eval"},
    **{"seed": 5, "w_bits": 3, "a_bits": 3, "steps": 2, "batch_size": 8, "fisher_k": 1},
    **{"divergence_batch": 8},
}
FINISH = {"finish_steps": 6, "finish_batch": 8, "finish_held_out": 8, "finish_lr": 3e-3}
PLACE = ["--limit", "64", "--threads", "1"]


@dataclass
class Done:
    code: int
    out: str
    error: str


def command(task: str, *arguments: object) -> Done:
    """Run a task's command line in this process."""
    out, error, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(error):
        try:
            group = build_group(task, "test", OPTIONS)
            main(group, [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), error.getvalue())


def flags(settings: dict[str, object]) -> list[str]:
    return [
        text for key, one in settings.items() for text in (f"--{key.replace('_', '-')}", str(one))
    ]


def cell(
    results: Path, method: str, task: str = "classification", **changes: object
) -> CellRequest:
    recipe = make_recipe(method, FEW, changes)
    model = ModelRequest("demo_vit" if task == "classification" else "demo_clip")
    return CellRequest(task, model, DataRequest(limit=64), recipe, results=results, threads=1)


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ResultRecord, ResultRecord]:
    """Folder of records, and the records of a cell without finishing and with it."""
    results = tmp_path_factory.mktemp("finished") / "runs"
    path = run_cell(cell(results, "fimaq", **FINISH))
    # The cell without finishing is measured already: its folder has the record.
    base = planned_folder(cell(results, "fimaq")) / "result.json"
    return results, read_record(base), read_record(path)


def test_a_finished_cell_starts_from_the_cell_without(
    finished: tuple[Path, ResultRecord, ResultRecord],
) -> None:
    results, base, record = finished
    folders = {path.parent.name for path in results.rglob("result.json")}
    assert len(folders) == 3
    assert record.variant == base.variant + ",finish_steps=6,finish_lr=0.003,finish_batch=8," + (
        "finish_held_out=8"
    )
    (note,) = [one for one in record.notes if one.startswith("finishing: ")]
    assert note.startswith("finishing: held-out objective 2.000 -> ")
    assert note.endswith("of 6")
    assert not [one for one in base.notes if one.startswith("finishing")]
    for field in ("blocks", "last_loss", "fisher_passes", "step_engine", "modules", "calibration"):
        assert getattr(record, field) == getattr(base, field), field
    assert set(base.artefacts) == set(record.artefacts)
    name = "quantized.safetensors"
    assert base.artefacts[name] != record.artefacts[name]
    before, after = (
        load_file(planned_folder(cell(results, "fimaq", **changes)) / name)
        for changes in ({}, FINISH)
    )
    codes = [key for key in before if key.endswith("codes")]
    assert len(codes) > 10
    assert all(torch.equal(before[key], after[key]) for key in codes)
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_the_export_of_a_finished_cell_answers_as_the_cell(
    finished: tuple[Path, ResultRecord, ResultRecord],
) -> None:
    results, _, record = finished
    simulated = cell(results, "fimaq", **FINISH)
    path = run_cell(replace(simulated, export=True))
    exported = read_record(path)
    assert exported.variant == "onnx"
    assert any(note.startswith("finishing: ") for note in exported.notes)
    one, other = (
        np.load(place / "outcomes.npz") for place in (path.parent, planned_folder(simulated))
    )
    assert (one["sample"] == other["sample"]).all()
    # Other roundings than those of the simulated model may decide one of 64 images.
    assert (one["predicted"] != other["predicted"]).sum() <= 1
    assert abs(exported.metrics["top1"].value - record.metrics["top1"].value) <= 1.6


def test_the_seconds_are_those_of_both_cells(
    finished: tuple[Path, ResultRecord, ResultRecord],
) -> None:
    _, base, record = finished
    assert list(record.seconds) == [
        *("load", "calibrate (reused)", "reconstruct (reused)", "finish", "evaluate")
    ]
    assert record.seconds["reconstruct (reused)"] == base.seconds["reconstruct"]
    made = base.seconds["calibrate"] + base.seconds["reconstruct"] + record.seconds["finish"]
    assert own_seconds(record) > made
    assert record.peak_memory_bytes >= base.stage_memory_bytes["reconstruct"]


def test_stages_and_run_agree_bit_for_bit(
    finished: tuple[Path, ResultRecord, ResultRecord], tmp_path: Path
) -> None:
    results, _, _ = finished
    paths = [tmp_path / f"{name}.safetensors" for name in ("calibrated", "reconstructed", "out")]
    calibrated, reconstructed, out = paths
    own = ["--model", "demo_vit", *flags(FEW), *PLACE, "--out", calibrated]
    assert command("classification", "calibrate", *own).code == 0
    early = command("classification", "finish", calibrated, *PLACE, "--out", out)
    assert early.code == 2
    assert "its recipe needs the stage 'reconstructed' before finishing" in early.error
    assert (
        command("classification", "reconstruct", calibrated, *PLACE, "--out", reconstructed).code
        == 0
    )
    none = command("classification", "finish", reconstructed, *PLACE, "--out", out)
    assert (none.code, none.error.count("\n")) == (2, 1)
    assert "give --finish-steps, such as 500" in none.error
    arguments = [reconstructed, *flags(FINISH), *PLACE, "--out", out]
    done = command("classification", "finish", *arguments)
    assert done.code == 0, done.error
    assert "note: finishing: held-out objective 2.000 -> " in done.out
    assert f"finished checkpoint: {out}" in done.out
    whole = planned_folder(cell(results, "fimaq", **FINISH)) / "quantized.safetensors"
    assert same_tensors(out, whole)
    # A second call keeps the file, and later commands take it.
    written = out.stat().st_mtime_ns
    assert command("classification", "finish", *arguments).out == done.out
    assert out.stat().st_mtime_ns == written
    evaluated = command("classification", "evaluate", out, *PLACE)
    assert "note: finishing: held-out objective" in evaluated.out
    assert f"top1 {finished[2].metrics['top1'].value:.2f}" in evaluated.out
    assert command("classification", "inspect", out).code == 0
    again = command("classification", "finish", out, *flags(FINISH), *PLACE, "--out", calibrated)
    assert again.code == 2
    assert "is of stage 'finished'" in again.error
    few = [*arguments[:-1], tmp_path / "few.safetensors", "--finish-held-out", "20"]
    refused = command("classification", "finish", *few)
    assert (refused.code, refused.error.count("\n")) == (2, 1)
    assert "24 calibration images are fewer than twice the 20" in refused.error


def test_an_interrupted_cell_keeps_its_finished_checkpoint(tmp_path: Path) -> None:
    request = cell(tmp_path / "runs", "rtn", **FINISH)
    path = run_cell(request)
    first = read_record(path)
    path.unlink()
    written = path.with_name("quantized.safetensors").stat().st_mtime_ns
    again = read_record(run_cell(request))
    assert path.with_name("quantized.safetensors").stat().st_mtime_ns == written
    assert "finish (reused)" in again.seconds
    assert (again.metrics, again.notes) == (first.metrics, first.notes)
    assert again.artefacts == first.artefacts


def test_each_tower_is_finished_alone_and_shared(tmp_path: Path) -> None:
    results = tmp_path / "runs"
    both = read_record(run_cell(cell(results, "rtn", "retrieval", scope="both", **FINISH)))
    notes = [note.split(":")[0] for note in both.notes if "held-out objective" in note]
    assert notes == ["vision.finishing", "text.finishing"]
    assert both.calibration is not None
    assert both.calibration.batch == 8
    request = cell(results, "rtn", "retrieval", scope="vision", **FINISH)
    vision = read_record(run_cell(request))
    assert "finish vision (reused)" in vision.seconds
    assert shared_digests(request)["finish"] != shared_digests(request)["calibration"]
    towers = [
        load_file(planned_folder(one) / "quantized.safetensors")
        for one in (cell(results, "rtn", "retrieval", scope="both", **FINISH), request)
    ]
    name = next(key for key in towers[1] if key.endswith("ln_1.weight"))
    assert torch.equal(towers[0][name], towers[1][name])
