"""A cell from its request to its record, on a demo model and few samples."""

import errno
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fimaq_core import files
from fimaq_core.checkpoint import load_checkpoint, read_header
from fimaq_core.errors import CheckpointError, RecipeError
from fimaq_core.layers import set_quantized
from fimaq_core.progress import Progress, silent
from fimaq_core.recipe import make_recipe
from tasks.classification.task import TASK
from tasks.common.cell import run as run_module
from tasks.common.cell.environment import resolve_device
from tasks.common.cell.identity import forget, planned_folder, variant_name
from tasks.common.cell.lease import this_process
from tasks.common.cell.run import run_cell
from tasks.common.outcome_files import outcomes_problem
from tasks.common.record import read_record, recipe_of
from tasks.common.request import CellRequest, DataRequest, ModelRequest

pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {
    "calibration_images": 16,
    "range_images": 4,
    "range_candidates": 16,
    "range_rounds": 1,
    "steps": 3,
    "batch_size": 8,
    "fisher_k": 1,
}


def cell(results: Path, method: str | None = "rtn", **changes: Any) -> CellRequest:
    recipe = None if method is None else make_recipe(method, QUICK, changes)
    return CellRequest(
        "classification",
        ModelRequest("demo_vit"),
        DataRequest(limit=64),
        recipe,
        results=results / "runs",
    )


def test_a_cell_that_is_only_calibrated_keeps_its_decided_codes(tmp_path: Path) -> None:
    path = run_cell(cell(tmp_path, "rtn"))
    state = load_file(path.with_name("quantized.safetensors"))
    codes = {name: value for name, value in state.items() if name.endswith("codes")}
    weights = [name for name in state if name.endswith("weight_quantizer.scale")]
    assert len(codes) == len(weights) > 10
    assert all(value.numel() and int(value.max()) < 16 for value in codes.values())


def test_a_cell_and_its_full_precision_record(tmp_path: Path) -> None:
    request = cell(tmp_path, "fimaq")
    path = run_cell(request)
    assert path == planned_folder(request) / "result.json"
    record = read_record(path)
    assert (record.task, record.method, record.w_bit, record.a_bit, record.seed, record.n) == (
        "classification",
        "fimaq",
        4,
        4,
        3407,
        64,
    )
    assert record.model.startswith("demo_vit.")
    assert recipe_of(record) == request.recipe
    assert record.dataset.split == "test[:64]"
    assert record.calibration is not None
    assert len(record.calibration.ids) == 16
    assert record.modules is not None
    assert record.fisher_passes == {
        "patch_embed": 1,
        **{f"blocks.{i}": 1 for i in range(4)},
        "head": 0,
    }
    assert record.blocks.keys() == record.last_loss.keys()
    assert all(0 < block.error < 1 for block in record.blocks.values())
    assert [label for label, block in record.blocks.items() if block.fisher is None] == ["head"]
    full = read_record(planned_folder(cell(tmp_path, None)) / "result.json")
    assert full.blocks == {}
    assert full.metrics == record.fp_metrics
    assert (full.method, full.recipe, full.seed, full.w_bit) == ("fp", None, None, 32)
    assert list(full.seconds) == ["load", "evaluate"]
    assert list(record.seconds) == ["load", "calibrate", "reconstruct", "evaluate"]
    for one, own in ((record, path.parent), (full, planned_folder(cell(tmp_path, None)))):
        assert list(one.stage_memory_bytes) == list(one.seconds)
        assert one.peak_memory_bytes == max(one.stage_memory_bytes.values())
        assert min(one.stage_memory_bytes.values()) > 0
        assert one.outcomes_sha256 is not None
        assert outcomes_problem(one, own) is None
    outcomes = np.load(path.parent / record.outcomes)
    assert set(outcomes.files) >= {"sample", "label", "predicted", "correct"}
    assert record.metrics["top1"].value == pytest.approx(100 * outcomes["correct"].mean())
    assert not (path.parent / "blocks").exists()

    (ranges,) = (tmp_path / "calibration").glob("*.safetensors")
    own = path.parent / "quantized.safetensors"
    stated = {file.name: safe_open(file, "pt").metadata()["sha256"] for file in (ranges, own)}
    assert record.artefacts == stated
    assert list(full.artefacts) == ["outputs.npz"]
    again = read_record(run_cell(cell(tmp_path, "qdrop")))  # reuses the ranges
    assert again.artefacts[ranges.name] == stated[ranges.name]
    assert list(again.artefacts) == sorted(stated)

    loaded = TASK.load(request.model)
    chain = TASK.build(loaded, make_recipe("fimaq", QUICK))
    _, facts = read_header(path.parent / "quantized.safetensors")
    assert facts["stage"] == "reconstructed"
    load_checkpoint(path.parent / "quantized.safetensors", chain, None)
    set_quantized(chain, True)
    again = TASK.evaluate(chain, loaded, request.data, torch.device("cpu"), 32, 0, silent)
    assert np.array_equal(again.outcomes["predicted"], outcomes["predicted"])
    assert again.metrics == record.metrics


def test_finished_cells_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_cell(cell(tmp_path))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(
            run_module, "prepare", lambda *_: pytest.fail("a finished cell was loaded again")
        )
        assert run_cell(cell(tmp_path)) == path
    assert path.read_bytes() == before
    forget([cell(tmp_path)])
    assert list(path.parent.iterdir()) == []
    assert not list((tmp_path / "calibration").glob("*.safetensors"))
    assert run_cell(cell(tmp_path)) == path
    assert path.read_bytes() != before


def test_scales_at_their_lower_bound_are_in_one_note_of_the_record(tmp_path: Path) -> None:
    """One step larger than the scales moves many to the bound; the cell is finished anyway."""
    record = read_record(run_cell(cell(tmp_path, "qdrop", lr_scale=10.0, steps=1)))
    (note,) = [note for note in record.notes if "lower bound" in note]
    assert note.startswith(
        "Learned activation scales that ended at or near their lower bound (below 0.02 of the "
    )
    assert "blocks.0 " in note
    assert "blocks.3 " in note


def test_identity_of_cells(tmp_path: Path) -> None:
    base = cell(tmp_path)
    others = [
        cell(tmp_path, None),
        cell(tmp_path, "fimaq"),
        cell(tmp_path, w_bits=3),
        cell(tmp_path, seed=1),
        cell(tmp_path, range_images=5),
        replace(base, data=DataRequest(limit=65)),
        replace(base, variant="mine"),
        replace(base, model=ModelRequest("demo_deit")),
        replace(base, data=DataRequest(path=tmp_path)),
    ]
    folders = {planned_folder(request) for request in (base, *others)}
    assert len(folders) == len(others) + 1
    assert planned_folder(replace(base, device="cuda", threads=3, eval_batch=5)) == planned_folder(
        base
    )
    assert variant_name(cell(tmp_path, None)) == "fp"
    assert "steps=3" in variant_name(base)
    assert variant_name(replace(base, recipe=make_recipe("rtn"))) == "released"


def test_methods_share_their_calibration(tmp_path: Path) -> None:
    for method in ("qdrop", "brecq"):
        run_cell(cell(tmp_path, method))
    (ranges,) = (tmp_path / "calibration").glob("*.safetensors")
    assert ranges.suffix == ".safetensors"
    reused = read_record(planned_folder(cell(tmp_path, "brecq")) / "result.json")
    assert "calibrate (reused)" in reused.seconds
    alone = cell(tmp_path / "alone", "brecq")
    assert read_record(run_cell(alone)).last_loss == reused.last_loss


#: Forks one process per cell that it reads; each prints its id, and its record or the holder.
AT_ONCE = """
import os, pickle, sys
import tasks.classification.task
from tasks.common.cell.lease import Busy
from tasks.common.cell.run import run_cell

pids = []
for cell in pickle.load(sys.stdin.buffer):
    pid = os.fork()
    if pid == 0:
        try:
            said = run_cell(cell)
        except Busy as busy:
            said = f"busy {busy.holder}"
        print(os.getpid(), said, flush=True)
        os._exit(0)
    pids.append(pid)
sys.exit(any(os.waitpid(pid, 0)[1] for pid in pids))
"""


def test_cells_that_run_at_the_same_time_calibrate_once_and_none_runs_twice(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    cells = pickle.dumps([cell(tmp_path, method) for method in ("qdrop", "brecq", "brecq")])
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE],
        input=cells,
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
    )
    lines = [line.split(" ", 1) for line in done.stdout.decode().splitlines()]
    processes, said = {pid for pid, _ in lines}, [text for _, text in lines]
    assert len(processes) == 3
    paths = {Path(text) for text in said if not text.startswith("busy")}
    busy = [text for text in said if text.startswith("busy")]
    assert len(paths) == 2
    assert all(
        text in {f"busy process {pid} on {this_process()[0]}" for pid in processes} for text in busy
    )
    stages = [read_record(path).seconds for path in paths]
    assert sorted("calibrate (reused)" in own for own in stages) == [False, True]
    assert len(list((tmp_path / "calibration").glob("*.safetensors"))) == 1
    full = read_record(
        planned_folder(cell(tmp_path, None)) / "result.json"
    )  # measured by the one, found there by the other
    assert all(read_record(path).fp_metrics == full.metrics for path in paths)


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    folder = planned_folder(cell(tmp_path))
    folder.mkdir(parents=True)
    (folder / ".result.json.0123456789ab").write_text("{")
    (folder / ".mine").write_text("kept")
    run_cell(cell(tmp_path))
    assert {file.name for file in folder.iterdir() if file.name.startswith(".")} == {".mine"}


def test_a_record_serves_as_calibration_list(tmp_path: Path) -> None:
    first = run_cell(cell(tmp_path, "fimaq", seed=5))
    request = replace(
        cell(tmp_path, "fimaq", seed=5), data=DataRequest(limit=64, calibration_list=first)
    )
    second = run_cell(request)
    assert second != first
    a, b = read_record(first), read_record(second)
    assert a.calibration is not None
    assert b.calibration == a.calibration.model_copy(update={"listed": True})
    assert (a.metrics, a.last_loss) == (b.metrics, b.last_loss)


def test_a_full_disk_keeps_what_is_finished_and_a_later_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = run_cell(cell(tmp_path))
    before = finished.read_bytes()
    request = cell(tmp_path, "fimaq")
    original, written = files.os.replace, []

    def full_after_four(source: Any, target: Any) -> None:
        if (
            len(written) == 4
        ):  # the calibration's entry in its index, the calibration and two blocks
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)
        written.append(Path(target).name)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full_after_four)
        with pytest.raises(
            CheckpointError, match=r"Cannot write .*block-002.safetensors.*No space left"
        ):
            run_cell(request)
    assert written[2:] == ["block-000.safetensors", "block-001.safetensors"]
    assert finished.read_bytes() == before
    assert read_record(finished).method == "rtn"
    started: list[str] = []

    def watch(event: Progress) -> None:
        if event.stage == "reconstruct" and event.block and event.block not in started:
            started.append(event.block)

    record = read_record(run_cell(request, watch))
    assert started == ["blocks.1", "blocks.2", "blocks.3", "head"]
    undisturbed = read_record(run_cell(cell(tmp_path / "undisturbed", "fimaq")))
    assert record.metrics == undisturbed.metrics
    assert record.last_loss == undisturbed.last_loss
    assert record.blocks == undisturbed.blocks


def test_damaged_records_are_not_taken_for_finished(tmp_path: Path) -> None:
    path = run_cell(cell(tmp_path))
    path.write_text(path.read_text()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        run_cell(cell(tmp_path))


def test_unknown_tasks_and_devices() -> None:
    request = replace(cell(Path("x")), task="clasification")
    with pytest.raises(
        RecipeError, match=r"Unknown task 'clasification'. Did you mean 'classification'\?"
    ):
        planned_folder(request)
    for name in ("gpu", "cuda:99", "xla", "meta"):
        with pytest.raises(RecipeError, match=r"Device|device"):
            resolve_device(name)
    assert resolve_device("cpu").type == "cpu"
