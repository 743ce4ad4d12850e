"""Files of an older version: its records and checkpoints load, and its finished work is used.

`old_files/frozen` was written by `python -m tasks.classification run --model demo_vit --method
fimaq --w-bits 4 --a-bits 4 --steps 3 --calibration-images 32 --range-images 32 --limit 64 --threads
1`. `checkpoints.json` holds header, names, dtypes and shapes of checkpoints of other models.
"""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fimaq_core.quantizers.logarithm import ADALOG_R, adalog_tables
from tasks.common.cli.commands import build_group, main
from tasks.common.record import read_record

DATA = Path(__file__).parents[1] / "old_files" / "frozen"
CELL = Path("classification/demo_vit.digits-v1/fimaq/w4a4/seed3407-acf8f80650")
RANGES = Path("calibration/5d31f31fd59dcd69c0df57f3.safetensors")
OPTIONS = [
    *("--model", "demo_vit", "--method", "fimaq", "--w-bits", "4", "--a-bits", "4", "--steps", "3"),
    *("--calibration-images", "32", "--range-images", "32", "--limit", "64", "--threads", "1"),
]
TYPES = {
    "F32": torch.float32,
    "U8": torch.uint8,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
#: Images of 64 whose answer may differ on another processor, in whose last bits logits differ.
OTHERS = 2
CHECKPOINTS = json.loads((DATA / "checkpoints.json").read_text(encoding="utf-8"))


def command(task: str, *arguments: object) -> str:
    """Run a task's command line in this process; return its output."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(build_group(task, "test"), [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    assert code == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA, tmp_path / "results"))


def test_a_finished_cell_is_not_measured_again(old: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()}
    out = command("classification", "run", *OPTIONS, "--results", old / "runs")
    assert str(old / "runs" / CELL / "result.json") in out
    assert {path: path.read_bytes() for path in before} == before
    record = read_record(old / "runs" / CELL / "result.json")
    assert (record.method, record.n, record.schema_version) == ("fimaq", 64, 6)
    assert record.metrics["top1"].value == 93.75
    assert record.calibration is not None
    assert len(record.calibration.ids) == 32
    assert len(record.blocks) == 6


def test_its_checkpoint_answers_as_it_did(old: Path) -> None:
    folder = old / "runs" / CELL
    out = command(
        "classification",
        "evaluate",
        folder / "quantized.safetensors",
        "--limit",
        64,
        "--threads",
        1,
    )
    (line,) = (line for line in out.splitlines() if "top1" in line)
    top1 = float(line.split("top1 ")[1].split()[0])
    correct = int(np.load(folder / "outcomes.npz", allow_pickle=False)["correct"].sum())
    assert abs(top1 / 100 * 64 - correct) <= OTHERS


def test_its_ranges_are_reused(old: Path) -> None:
    shutil.rmtree(old / "runs" / CELL)
    before = (old / RANGES).read_bytes()
    command("classification", "run", *OPTIONS, "--results", old / "runs")
    record = read_record(old / "runs" / CELL / "result.json")
    assert "calibrate (reused)" in record.seconds
    assert (old / RANGES).read_bytes() == before
    frozen = read_record(DATA / "runs" / CELL / "result.json")
    assert abs(record.metrics["top1"].value - frozen.metrics["top1"].value) <= OTHERS / 64 * 100
    assert record.recipe_digest == frozen.recipe_digest
    assert record.calibration is not None
    assert frozen.calibration is not None
    assert record.calibration.ids == frozen.calibration.ids
    assert record.calibration.fingerprint == frozen.calibration.fingerprint
    assert record.modules == frozen.modules


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_names_and_shapes_are_those_of_older_checkpoints(name: str, tmp_path: Path) -> None:
    content = CHECKPOINTS[name]
    tensors = {
        key: torch.ones(shape, dtype=TYPES[dtype])
        for key, (dtype, shape) in content["tensors"].items()
    }
    for key, table in tensors.items():
        if key.endswith((".shifts", ".mantissas")):  # those of base 2, as the ones in `step` say
            tensors[key] = adalog_tables(ADALOG_R, len(table))[key.endswith(".mantissas")]
    metadata = {part: json.dumps(content[part]) for part in ("fingerprint", "facts")}
    save_file(tensors, tmp_path / "old.safetensors", metadata=metadata)
    out = command(content["facts"]["task"], "inspect", tmp_path / "old.safetensors")
    assert content["facts"]["tag"] in out
