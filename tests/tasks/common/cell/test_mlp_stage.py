"""MLP reconstruction from the command line: its stage, later stages, and shared files."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fimaq_core.checkpoint import read_header
from fimaq_core.errors import RecipeError
from fimaq_core.recipe import make_recipe
from fimaq_core.reconstruction import mlp as mlp_module
from tasks.common.cell.identity import forget, planned_folder
from tasks.common.cell.run import run_cell
from tasks.common.cli.commands import build_group, main
from tasks.common.record import ResultRecord, read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest

pytestmark = pytest.mark.slow

MODEL = ["--model", "demo_vit"]
MLP = [
    "--calibration-images",
    "16",
    "--calibration-transform",
    "eval",
    "--seed",
    "5",
    "--mlp-steps",
    "4",
    "--mlp-batch",
    "8",
    "--mlp-lr",
    "0.001",
    "--mlp-percentile",
    "0.99",
]
QUICK = [
    *MLP,
    "--range-search",
    "minmax",
    "--range-images",
    "8",
    "--steps",
    "2",
    "--batch-size",
    "8",
]
PLACE = ["--limit", "64", "--threads", "1"]


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def top1(self) -> str:
        (line,) = (line for line in self.out.splitlines() if "top1" in line)
        return line.split("top1 ")[1].split()[0]


def command(*arguments: object) -> Done:
    """Run the adapter's command line in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(build_group("classification", "test"), [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def well(*arguments: object) -> Done:
    done = command(*arguments)
    assert done.code == 0, done.err
    return done


def refused(message: str, *arguments: object) -> None:
    done = command(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def record_of(results: Path, method: str, bits: str = "w4a4") -> tuple[Path, ResultRecord]:
    (path,) = results.glob(f"*/*/{method}/{bits}/*/result.json")
    return path, read_record(path)


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@dataclass(frozen=True)
class Stages:
    """Checkpoints of the stages, made once."""

    mlp: Path
    calibrated: Path
    reconstructed: Path


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    folder = tmp_path_factory.mktemp("mlp")
    made = Stages(
        folder / "mlp.safetensors",
        folder / "calibrated.safetensors",
        folder / "reconstructed.safetensors",
    )
    well("reconstruct-mlp", *MODEL, *MLP, *PLACE, "--out", made.mlp)
    well(
        "calibrate",
        *MODEL,
        "--method",
        "aphq",
        *QUICK,
        *PLACE,
        "--mlp-checkpoint",
        made.mlp,
        "--out",
        made.calibrated,
    )
    well("reconstruct", made.calibrated, *PLACE, "--out", made.reconstructed)
    assert {file.name for file in folder.iterdir()} == {
        path.name for path in (made.mlp, made.calibrated, made.reconstructed)
    }
    return made


def test_stages_and_runs_agree_bit_for_bit(stages: Stages, tmp_path: Path) -> None:
    """With the MLPs of the stage, and with MLPs of its own."""
    assert [
        read_header(path)[1]["stage"]
        for path in (stages.mlp, stages.calibrated, stages.reconstructed)
    ] == ["mlp", "calibrated", "reconstructed"]
    assert read_header(stages.reconstructed)[0].recipe.method == "aphq"
    top1 = well("evaluate", stages.reconstructed, *PLACE).top1
    for name, given in (("own", []), ("given", ["--mlp-checkpoint", stages.mlp])):
        results = tmp_path / name / "runs"
        done = well("run", *MODEL, "--method", "aphq", *QUICK, *PLACE, *given, "--results", results)
        path, record = record_of(results, "aphq")
        assert done.top1 == top1 == f"{record.metrics['top1'].value:.2f}"
        assert same_tensors(path.parent / "quantized.safetensors", stages.reconstructed)
        shared = list((tmp_path / name).glob("mlp/*.safetensors"))
        if name == "own":
            assert same_tensors(shared[0], stages.mlp)
            assert "reconstruct MLPs" in record.seconds
        else:
            assert shared == []
            assert "reconstruct MLPs (reused)" in record.seconds
        assert record.fisher_passes == {
            "patch_embed": 1,
            **{f"blocks.{i}": 1 for i in range(4)},
            "head": 0,
        }
        assert any(entry == "blocks.0.mlp.act (ReLU)" for entry in record.modules.full_precision)


def test_calibrate_keeps_its_mlps_beside_its_checkpoint(stages: Stages, tmp_path: Path) -> None:
    out = tmp_path / "ranges.safetensors"
    well("calibrate", *MODEL, "--method", "aphq", *QUICK, *PLACE, "--out", out)
    assert same_tensors(out, stages.calibrated)
    assert same_tensors(tmp_path / "ranges.mlp.safetensors", stages.mlp)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_finished_stage_is_kept(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_module, "_train", lambda *_: pytest.fail("reconstructed again"))
    before = stages.mlp.stat().st_mtime_ns
    well(
        "reconstruct-mlp",
        *MODEL,
        "--method",
        "aphq",
        *MLP,
        *PLACE,
        "--w-bits",
        "3",
        "--out",
        stages.mlp,
    )
    assert stages.mlp.stat().st_mtime_ns == before
    refused(
        "mlp_steps (4, here 5)",
        "reconstruct-mlp",
        *MODEL,
        *MLP,
        "--mlp-steps",
        "5",
        *PLACE,
        "--out",
        stages.mlp,
    )
    refused(
        "of stage 'calibrated'", "reconstruct-mlp", *MODEL, *MLP, *PLACE, "--out", stages.calibrated
    )


def test_the_stage_evaluates_in_full_precision_as_mlp_recon(stages: Stages, tmp_path: Path) -> None:
    results = tmp_path / "runs"
    done = well(
        "run",
        *MODEL,
        "--method",
        "mlp-recon",
        *QUICK,
        *PLACE,
        "--mlp-checkpoint",
        stages.mlp,
        "--results",
        results,
    )
    path, record = record_of(results, "mlp-recon", "fp")
    assert (record.method, record.w_bit, record.a_bit, record.seed) == ("mlp-recon", 32, 32, 5)
    assert (record.step_engine, record.last_loss, record.fisher_passes) == (None, {}, {})
    assert record.modules is not None
    assert record.modules.quantized == []
    assert {"blocks.1.mlp.fc1 (Linear)", "blocks.1.attn.query_key (MatMul)"} <= set(
        record.modules.full_precision
    )
    assert well("evaluate", stages.mlp, *PLACE).top1 == done.top1
    assert well("evaluate", path.parent / "quantized.safetensors", *PLACE).top1 == done.top1
    whole, part = load_file(path.parent / "quantized.safetensors"), load_file(stages.mlp)
    assert torch.equal(whole["segments.2.block.mlp.fc1.weight"], part["1.fc1.weight"])
    assert record.metrics["top1"].value != record.fp_metrics["top1"].value


def test_cells_of_a_folder_share_their_mlps(tmp_path: Path) -> None:
    """Also across methods and bits; --force remakes only the MLPs of the forced cell."""
    results = tmp_path / "runs"
    run = ["run", *MODEL, *QUICK, "--no-reconstruct", *PLACE, "--results", results]
    well(*run, "--method", "aphq")
    assert "reconstruct MLPs" in record_of(results, "aphq")[1].seconds
    (shared,) = (tmp_path / "mlp").glob("*.safetensors")
    written = shared.stat().st_mtime_ns
    for method, bits in (("fimaq-mlp", "4"), ("aphq", "3")):
        well(*run, "--method", method, "--w-bits", bits, "--a-bits", bits)
        seconds = record_of(results, method, f"w{bits}a{bits}")[1].seconds
        assert "reconstruct MLPs (reused)" in seconds
        assert "reconstruct MLPs" not in seconds
    well(*run, "--method", "rtn", "--force")
    assert not any("MLP" in stage for stage in record_of(results, "rtn")[1].seconds)
    assert shared.stat().st_mtime_ns == written
    well(*run, "--method", "aphq", "--force")
    assert "reconstruct MLPs" in record_of(results, "aphq")[1].seconds
    assert shared.stat().st_mtime_ns > written


def test_a_checkpoint_that_is_the_shared_one_survives_force(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(
        "mlp-recon",
        {
            "calibration_images": 16,
            "calibration_transform": "eval",
            "seed": 5,
            "mlp_steps": 4,
            "mlp_batch": 8,
            "mlp_lr": 0.001,
        },
    )
    data, runs = DataRequest(limit=64), tmp_path / "runs"
    request = CellRequest(
        "classification", ModelRequest("demo_vit"), data, recipe, results=runs, threads=1
    )
    run_cell(request)
    (shared,) = (tmp_path / "mlp").glob("*.safetensors")
    request = replace(request, mlp_checkpoint=shared)
    forget([request])
    assert not (planned_folder(request) / "result.json").exists()
    record = read_record(run_cell(request))
    assert shared.is_file()
    assert same_tensors(shared, stages.mlp)
    with safe_open(shared, framework="pt") as file:
        assert record.artefacts[shared.name] == file.metadata()["sha256"]


@pytest.mark.parametrize("method", ["qdrop", "rtn", "fp"])
def test_mlps_that_would_not_be_used_are_an_error(
    stages: Stages, tmp_path: Path, method: str
) -> None:
    message = f"The recipe of '{method}' has no MLP reconstruction, so --mlp-checkpoint is not used"
    refused(
        message,
        "run",
        *MODEL,
        "--method",
        method,
        *QUICK,
        *PLACE,
        "--mlp-checkpoint",
        stages.mlp,
        "--results",
        tmp_path,
    )
    if method != "fp":
        out = tmp_path / "ranges.safetensors"
        refused(
            message,
            "calibrate",
            *MODEL,
            "--method",
            method,
            *QUICK,
            "--mlp-checkpoint",
            stages.mlp,
            "--out",
            out,
        )
    assert not any(tmp_path.iterdir())


def test_what_is_refused(stages: Stages, tmp_path: Path) -> None:
    aphq = [
        "calibrate",
        *MODEL,
        "--method",
        "aphq",
        *QUICK,
        *PLACE,
        "--out",
        tmp_path / "out.safetensors",
    ]
    refused("There is no checkpoint", *aphq, "--mlp-checkpoint", tmp_path / "none.safetensors")
    refused(
        "holds no reconstructed MLPs but a checkpoint of stage 'calibrated'",
        *aphq,
        "--mlp-checkpoint",
        stages.calibrated,
    )
    refused("with other calibration images", *aphq, "--seed", "6", "--mlp-checkpoint", stages.mlp)
    refused("mlp_steps (4, here 5)", *aphq, "--mlp-steps", "5", "--mlp-checkpoint", stages.mlp)
    refused(
        "reconstruct needs a calibrated one",
        "reconstruct",
        stages.mlp,
        *PLACE,
        "--out",
        tmp_path / "out.safetensors",
    )
    refused(
        "mlp_lr (0.001, here 0.01)",
        "reconstruct",
        stages.calibrated,
        *PLACE,
        "--mlp-lr",
        "0.01",
        "--out",
        tmp_path / "out",
    )
    out = ["--out", tmp_path / "out.safetensors"]
    refused("Method 'fp' has no stages", "reconstruct-mlp", *MODEL, "--method", "fp", *out)
    refused(
        "gelu_quantizer must be uniform",
        "reconstruct-mlp",
        *MODEL,
        "--method",
        "adalog",
        *MLP,
        *out,
    )
    refused(
        "fewer than a batch of 17: lower mlp_batch",
        "reconstruct-mlp",
        *MODEL,
        *MLP,
        "--mlp-batch",
        "17",
        *out,
    )
    refused(
        "blocks.0.mlp: the MLP's loss is", "reconstruct-mlp", *MODEL, *MLP, "--mlp-lr", "1e30", *out
    )
    assert not any(tmp_path.iterdir())


def test_a_finished_cell_is_not_shown_for_one_with_other_mlps(tmp_path: Path) -> None:
    recipe = make_recipe("rtn", {"calibration_images": 16, "range_images": 8})
    request = CellRequest(
        "classification",
        ModelRequest("demo_vit"),
        DataRequest(limit=64),
        recipe,
        results=tmp_path / "runs",
    )
    run_cell(request)
    with pytest.raises(RecipeError, match="has no MLP reconstruction"):
        run_cell(replace(request, mlp_checkpoint=tmp_path / "mlp.safetensors"))


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(well("inspect", path, "--json").out)
    return found


def test_inspect_says_that_the_mlp_stage_is_in_full_precision(stages: Stages) -> None:
    found = content(stages.mlp)
    assert (found["stage"], found["method"]) == ("mlp", "fimaq")
    assert found["changes"]["reconstruct_mlp"] is True
    assert {
        bits for layer in found["layers"] for bits in (layer["weight_bits"], layer["input_bits"])
    } == {32}
    assert {layer["input_quantizer"] for layer in found["layers"]} == {"none"}
    sums = found["totals"]
    assert sums["bops"] == sums["full_bops"]
    assert sums["size_bits"] == sums["full_size_bits"]
    assert sums["quantized_macs"] == sums["overhead_bits"] == 0
    assert (
        "stage: mlp (MLPs reconstructed, full precision)"
        in well("inspect", stages.mlp).out.splitlines()
    )


def test_inspect_of_a_model_with_reconstructed_mlps(stages: Stages) -> None:
    """Layers, sizes and operations are those of the method without the stage before it."""
    calibrated, reconstructed = content(stages.calibrated), content(stages.reconstructed)
    assert (calibrated["stage"], reconstructed["stage"]) == ("calibrated", "reconstructed")
    assert calibrated["method"] == reconstructed["method"] == "aphq"
    for name in ("layers", "full_precision", "totals"):
        assert calibrated[name] == reconstructed[name]
    assert {
        layer["weight_bits"] for layer in calibrated["layers"] if layer["weight_shape"] is not None
    } == {4}
    assert calibrated["totals"]["bops_ratio"] == pytest.approx(57.96, abs=0.01)
    assert "stage: calibrated" in well("inspect", stages.calibrated).out.splitlines()
