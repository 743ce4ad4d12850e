"""Exports of the towers of the demo CLIP model, by the command line."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

from fimaq_core.export.opening import open_onnx
from fimaq_core.export.runtime import OnnxModel
from tasks.common.cli.commands import build_group, main
from tasks.common.record import read_record
from tasks.retrieval.command import OPTIONS

pytestmark = pytest.mark.slow

FEW = [
    *("--model", "demo_clip", "--method", "qdrop", "--w-bits", "3", "--a-bits", "3"),
    *("--range-search", "minmax", "--calibration-images", "16", "--range-images", "16"),
    *("--calibration-transform", "eval", "--steps", "3", "--batch-size", "8"),
    *("--divergence-batch", "8", "--seed", "5"),
]


def command(*arguments: object, fails: bool = False) -> str:
    """Run the command line in this process; return what it says."""
    out, error, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(error):
        try:
            main(build_group("retrieval", "test", OPTIONS), [str(one) for one in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    assert code == (2 if fails else 0), error.getvalue()
    return error.getvalue() if fails else out.getvalue()


def record_in(text: str) -> Path:
    return Path(text.rpartition("record: ")[2].strip())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of both towers."""
    place = tmp_path_factory.mktemp("clip")
    record = record_in(command("run", *FEW, "--limit", 64, "--results", place / "runs"))
    return record.parent / "quantized.safetensors"


def test_a_tower_must_be_chosen(both: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    assert "choose with --tower vision or --tower text" in command(
        "export", both, "--out", out, fails=True
    )
    assert "in its text tower: leave --with-preprocessing out" in command(
        *("export", both, "--out", out, "--tower", "text", "--with-preprocessing"), fails=True
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("tower", "form"), [("vision", "--with-preprocessing"), ("text", "--packed")]
)
def test_a_tower_with_the_other_in_full_precision(
    both: Path, tmp_path: Path, tower: str, form: str
) -> None:
    out, results = tmp_path / "model.onnx", both.parents[5]
    form_and_check = [form, "--no-speed", "--check-samples", 16]
    said = command("export", both, "--out", out, "--tower", tower, *form_and_check)
    assert "100.0 % of the multiply-adds with two quantized operands run in integers" in said
    assert "of 16 samples" in said
    assert "R@1" in said
    file = open_onnx(out)
    assert file.facts.part == tower
    assert file.facts.check is not None
    assert file.facts.check.agreement >= 93  # 15 of 16
    assert file.facts.recipe["scope"] == tower
    assert file.facts.normalised == (tower == "text")
    place = record_in(command("evaluate", out, "--limit", 64, "--results", results))
    record = read_record(place)
    assert (record.variant, record.recipe["scope"]) == (f"onnx [{tower}]", tower)
    assert record.exported is not None
    assert record.exported.weights == ("packed" if tower == "text" else "int8")
    assert record.exported.integer_macs == record.exported.quantized_macs
    assert (record.exported.speed, record.exported.float_bytes) == (None, None)
    # The simulated model with the other tower in full precision shares the tower's reconstruction.
    given = [*FEW, "--towers", tower, "--limit", 64, "--results", results]
    simulated = record_in(command("run", *given))
    scores = [read_record(one).metrics["R@1"].value for one in (place, simulated)]
    assert abs(scores[0] - scores[1]) <= 1.6  # two of 128 queries
    ranks = [np.load(one.parent / "outcomes.npz")["correct"] for one in (place, simulated)]
    assert (ranks[0] == ranks[1]).mean() >= 0.98
    if tower == "text":
        ids = torch.randint(1, 20, (9, OnnxModel(out)._session.get_inputs()[0].shape[1]))
        on, off = (OnnxModel(out, optimised=optimised)(ids) for optimised in (True, False))
        assert torch.nn.functional.cosine_similarity(on, off).min() > 0.99
