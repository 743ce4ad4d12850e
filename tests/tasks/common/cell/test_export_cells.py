"""Exports of checkpoints to ONNX, and their measurement, on demo models with few steps."""

import io
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fimaq_core.errors import ModelError, RecipeError
from fimaq_core.export.opening import open_onnx
from fimaq_core.export.runtime import OnnxModel
from fimaq_core.export.writing import with_facts
from fimaq_core.recipe import make_recipe
from tasks.classification.task import TASK as CLASSIFICATION
from tasks.common.cell.identity import planned_place
from tasks.common.cell.run import run_cell
from tasks.common.cli.commands import build_group, main
from tasks.common.cli.options import TaskOptions
from tasks.common.outcome_files import outcomes_problem
from tasks.common.record import ResultRecord, read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.retrieval.command import OPTIONS

pytestmark = pytest.mark.slow

LIMIT = 500
FEW = {
    **{"range_search": "minmax", "calibration_images": 32, "calibration_transform": "eval"},
    **{"steps": 3, "fisher_k": 2, "seed": 5, "batch_size": 8, "divergence_batch": 8},
}


@dataclass
class Done:
    code: int
    out: str
    error: str


def command(task: str, *arguments: object) -> Done:
    """Run a task's command line in this process."""
    own = OPTIONS if task == "retrieval" else TaskOptions()
    out, error, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(error):
        try:
            main(build_group(task, "test", own), [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), error.getvalue())


def fails(task: str, *arguments: object) -> str:
    """Run a command that must fail; return its message of one line."""
    done = command(task, *arguments)
    assert done.code == 2, done.out
    (line,) = [line for line in done.error.splitlines() if line.startswith("error: ")]
    assert "Unexpected" not in line
    return line


def cell(results: Path, **changes: object) -> CellRequest:
    recipe = make_recipe("fimaq", {**FEW, "w_bits": 4, "a_bits": 4})
    data, model = DataRequest(limit=LIMIT), ModelRequest("demo_vit")
    return CellRequest("classification", model, data, recipe, results=results, **changes)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[ResultRecord, Path]:
    """Record of the simulated demo ViT, and path of the record of its export."""
    results = tmp_path_factory.mktemp("vit") / "runs"
    path = run_cell(cell(results, export=True))
    return read_record(run_cell(cell(results))), path


def same_answers(one: Path, other: Path, column: str) -> float:
    """Return the percentage of samples with equal entries in the outcomes of two cells."""
    first, second = (np.load(path.parent / "outcomes.npz") for path in (one, other))
    assert (first["sample"] == second["sample"]).all()
    return 100 * float((first[column] == second[column]).mean())


def test_a_cell_measures_its_export(vit: tuple[ResultRecord, Path], tmp_path: Path) -> None:
    simulated, path = vit
    record = read_record(path)
    results = path.parents[5]
    assert record.identity == planned_place(cell(results, export=True)).identity
    assert record.identity != simulated.identity
    assert (record.variant, simulated.exported) == ("onnx", None)
    for field in ("method", "recipe_digest", "calibration", "modules", "fp_metrics", "n", "blocks"):
        assert getattr(record, field) == getattr(simulated, field)
    # On some processors, up to two images of 500 may have another answer.
    assert abs(record.metrics["top1"].value - simulated.metrics["top1"].value) <= 0.4
    assert same_answers(path, run_cell(cell(results)), "predicted") >= 99.5
    assert outcomes_problem(record, path.parent) is None
    assert {"load", "export", "evaluate"} <= record.seconds.keys()
    own, file = record.exported, open_onnx(path.parent / "model.onnx")
    assert own is not None
    assert own.float_bytes is not None
    assert own.speed is not None
    assert own.speed > 0
    assert (own.sha256, own.bytes, own.weights, own.signed) == (
        file.sha256,
        file.bytes,
        "int8",
        False,
    )
    assert own.integer_macs == own.quantized_macs < own.macs
    assert own.bytes < 0.5 * own.float_bytes
    facts = file.facts
    assert (facts.task, facts.model, facts.part) == ("classification", "demo_vit", "")
    assert facts.class_names is not None
    assert len(facts.class_names) == 100
    assert facts.preprocessing is not None
    assert facts.preprocessing["input_size"] == [1, 32, 64]
    assert facts.check is not None
    assert facts.check.samples == 32
    assert facts.check.agreement >= 96
    assert str(path.parents[6]) not in file.path.read_bytes().decode("latin1")
    # A finished cell is not measured again.
    before = path.stat().st_mtime_ns
    assert run_cell(cell(results, export=True)) == path
    assert path.stat().st_mtime_ns == before


def test_optimisations_of_the_runtime_change_no_answer(vit: tuple[ResultRecord, Path]) -> None:
    file = vit[1].parent / "model.onnx"
    images = torch.randn(64, 1, 32, 64, generator=torch.Generator().manual_seed(0))
    on, off = (OnnxModel(file, optimised=optimised)(images) for optimised in (True, False))
    assert (on.argmax(1) == off.argmax(1)).float().mean() >= 0.98


def test_evaluate_records_an_exported_file(vit: tuple[ResultRecord, Path], tmp_path: Path) -> None:
    simulated, path = vit
    file = Path(shutil.copy(path.parent / "model.onnx", tmp_path / "any name.onnx"))
    how = ["--limit", LIMIT, "--results", path.parents[5]]
    done = command("classification", "evaluate", file, *how)
    assert done.code == 0, done.error
    place = Path(done.out.rpartition("record: ")[2].strip())
    record, cells = read_record(place), read_record(path)
    assert place != path
    assert record.metrics == cells.metrics
    assert record.exported == cells.exported
    assert (record.variant, record.fp_metrics) == ("onnx", simulated.fp_metrics)
    assert (record.calibration, record.modules) == (None, None)
    assert f"top1 {record.metrics['top1'].value:.2f}" in done.out
    assert "speed" in done.out
    # The same file under another name is the same cell.
    again = command("classification", "evaluate", path.parent / "model.onnx", *how)
    assert again.out == done.out
    assert "runs on the CPU" not in again.out
    assert "Exported files run on the CPU" in fails(
        "classification", "evaluate", file, *how, "--device", "cuda"
    )


def test_files_that_claim_something_else_are_refused(
    vit: tuple[ResultRecord, Path], tmp_path: Path
) -> None:
    file = Path(shutil.copy(vit[1].parent / "model.onnx", tmp_path / "model.onnx"))
    facts = open_onnx(file).facts
    results = ["--results", tmp_path / "runs"]
    for changes, words in (
        ({"model": "hf-hub:someone/something"}, "not a valid name"),
        ({"model": "/etc/passwd"}, "not a valid name"),
        ({"model_args": {"norm_layer": "os.system"}}, "may not name files, addresses or modules"),
        ({"task": "retrieval", "part": "vision", "class_names": None}, "is of task 'retrieval'"),
        ({"task": ""}, "is of no task"),
        ({"weights_sha256": "0" * 64}, "was made from other weights (sha256 000000000000)"),
        ({"model": "demo_deit"}, "was made from other weights"),
        ({"check": None}, "was not checked"),
        ({"extra": {"origin": 3}}, "origin is no object"),
        ({"extra": {"origin": {"weights_entry": 3}}}, "does not name its model (weights_entry"),
    ):
        with_facts(file, facts.model_copy(update=changes))
        assert words in fails("classification", "evaluate", file, "--limit", 8, *results)
    # The classes of the weights are those of the data; the file has others.
    loaded = CLASSIFICATION.load(ModelRequest("demo_vit"))
    with pytest.raises(ModelError, match=r"outputs of shape .* has 100 classes: export the check"):
        CLASSIFICATION.from_onnx(loaded, {"": torch.nn.Flatten()})
    text = tmp_path / "text.onnx"
    text.write_text("no onnx")
    assert "no ONNX file" in fails("classification", "evaluate", text)
    assert "There is no file" in fails("classification", "evaluate", tmp_path / "none.onnx")


def test_recipes_without_integers_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    log2 = make_recipe("fimaq", {**FEW, "softmax_quantizer": "log2"})
    with pytest.raises(RecipeError, match="no integer form"):
        run_cell(CellRequest("classification", ModelRequest("demo_vit"), DataRequest(), log2,
                             results=tmp_path / "runs", export=True))  # fmt: skip
    full = CellRequest("classification", ModelRequest("demo_vit"), DataRequest(), None, export=True)
    with pytest.raises(RecipeError, match="full-precision model has no export"):
        run_cell(full)
    assert not [*tmp_path.iterdir()]
    how = ["--model", "demo_vit", "--method", "rtn", "--softmax-quantizer", "log2"]
    few = ["--calibration-images", 8, "--range-images", 8, "--calibration-transform", "eval"]
    source = tmp_path / "log2.safetensors"
    assert command("classification", "calibrate", *how, *few, "--out", source).code == 0
    out = tmp_path / "new" / "model.onnx"
    assert "softmax_quantizer log2" in fails("classification", "export", source, "--out", out)
    assert not out.parent.exists()
