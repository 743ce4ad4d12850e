"""``inspect``: checkpoints of every stage as text and JSON, and refused files."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fimaq_core import NUMERICS_VERSION
from fimaq_core.checkpoint import read_header, save_checkpoint
from tasks.classification import models
from tasks.classification.demo.models import DEMO
from tasks.common.cli.commands import build_group, main
from tasks.common.hashing import file_sha256
from tasks.common.request import ModelRequest

QUICK = [
    "--model", "demo_vit", "--method", "qdrop", "--w-bits", "4", "--a-bits", "4",
    "--range-search", "minmax", "--calibration-images", "16", "--calibration-transform", "eval",
    "--steps", "1", "--batch-size", "8", "--seed", "5", "--limit", "32", "--threads", "1",
]  # fmt: skip


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Done:
        code = 0
        capsys.readouterr()
        try:
            main(build_group("classification", "test"), [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "calibrated.safetensors"
    main_without_exit("calibrate", *QUICK, "--out", str(path))
    return path


def main_without_exit(*arguments: str) -> None:
    build_group("classification", "test").main(list(arguments), standalone_mode=False)


def test_text(calibrated: Path, command: Any) -> None:
    done = command("inspect", calibrated)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    columns = lines[0].split()

    def line(start: str) -> list[str]:
        (found,) = (text for text in lines if text.split("  ")[0] == start)
        return [part.strip() for part in found.split("  ") if part.strip()]

    assert line("blocks.2.attn.qkv") == [
        "blocks.2.attn.qkv", "linear", "4", "4", "240 scales (240, 1)", "per tensor", "uniform",
        "uniform", "-", "-", "[240, 80]", "19200", "76800", str(36 * 241), "633600",
        str(633600 * 16),
    ]  # fmt: skip
    scales = "4 scales (1, 4, 1, 1)"
    assert line("blocks.0.attn.query_key") == [
        "blocks.0.attn.query_key", "product", "32", "4", "none", f"{scales}; {scales}", "none",
        "uniform", "4", "uniform", "-", "0", "0", str(36 * 8), "87120", str(87120 * 16),
    ]  # fmt: skip
    first = dict(zip(columns, line("patch_embed.proj"), strict=True))
    assert first["input_bits"] == "32"
    assert (first["input_quantizer"], first["input_ranges"]) == ("none", "full precision")
    assert line("head.before.norm") == ["head.before.norm", "LayerNorm", "160", "5120"]
    for text in (
        "weights: 1281280 bits (160160 bytes); full precision 10250240 bits (1281280 bytes); "
        "ratio 8.00",
        "MACs per image: 11006400; quantized 11006400 (100.00 %)",
        "stage: calibrated",
        "method: qdrop w4a4, seed 5",
        f"float weights: sha256 {file_sha256(DEMO.weights_path('demo_vit'))}",
        f"calibration: {read_header(calibrated)[0].calibration}",
        f"numerics version: {NUMERICS_VERSION} (this is {NUMERICS_VERSION})",
    ):
        assert text in lines
    assert any(
        text.startswith("changes: ") and "steps=1" in text and "range_search=minmax" in text
        for text in lines
    )
    assert any(
        text.startswith("BOPs per image: ") and text.endswith("ratio 57.96") for text in lines
    )


def test_json(calibrated: Path, command: Any) -> None:
    done = command("inspect", calibrated, "--json")
    assert done.code == 0, done.err
    content = json.loads(done.out)
    fingerprint, _ = read_header(calibrated)
    assert (content["task"], content["stage"], content["method"]) == (
        "classification",
        "calibrated",
        "qdrop",
    )
    assert content["changes"] == fingerprint.recipe.changes()
    assert content["fingerprint"] == {
        "weights": fingerprint.weights,
        "calibration": fingerprint.calibration,
        "numerics": NUMERICS_VERSION,
        "recipe": fingerprint.recipe.digest(),
    }
    layers, sums = content["layers"], content["totals"]
    assert len(layers) == 2 + 4 * 6
    assert sums["bops"] == sum(layer["bops"] for layer in layers)
    assert sums["weight_bits"] == sum(layer["size_bits"] for layer in layers) == 1_281_280
    assert sums["full_precision_bits"] == sum(
        part["size_bits"] for part in content["full_precision"]
    )
    product = next(layer for layer in layers if layer["name"] == "blocks.3.attn.attention_value")
    assert (product["input_bits"], product["other_bits"], product["other_quantizer"]) == (
        4,
        4,
        "uniform",
    )
    assert product["weight_shape"] is None


def test_every_stage(calibrated: Path, command: Any, tmp_path: Path) -> None:
    """Deciding roundings and learning scales change neither sizes nor operations."""
    reconstructed = tmp_path / "reconstructed.safetensors"
    main_without_exit("reconstruct", str(calibrated), "--limit", "32", "--out", str(reconstructed))
    main_without_exit("run", *QUICK, "--results", str(tmp_path / "runs"))
    (whole,) = tmp_path.glob("runs/**/quantized.safetensors")
    found = [
        json.loads(command("inspect", path, "--json").out)
        for path in (calibrated, reconstructed, whole)
    ]
    assert [content["stage"] for content in found] == [
        "calibrated",
        "reconstructed",
        "reconstructed",
    ]
    for name in ("layers", "full_precision", "totals", "fingerprint"):
        assert found[0][name] == found[1][name] == found[2][name]


def test_what_is_refused(
    calibrated: Path, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "other.safetensors"
    state = load_file(DEMO.weights_path("demo_vit"))
    save_file({**state, "head.bias": state["head.bias"] + 1}, weights)
    fingerprint, facts = read_header(calibrated)
    other_task = tmp_path / "other_task.safetensors"
    save_checkpoint(other_task, load_file(calibrated), fingerprint, {**facts, "task": "detection"})
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(calibrated.read_bytes()[:-1000])

    def no_shape(request: ModelRequest) -> Any:
        return replace(original(request), input_shape=None)

    def refused(message: str, *arguments: object) -> None:
        done = command("inspect", *arguments)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
        assert done.err.count("\n") == 1

    refused("There is no checkpoint", tmp_path / "nowhere.safetensors")
    refused("is not a checkpoint of this project", weights)
    refused("is damaged", damaged)
    refused("is of task 'detection', not 'classification'", other_task)
    refused("was made from other weights", calibrated, "--weights", weights)
    original = models.load_model
    monkeypatch.setattr(models, "load_model", no_shape)
    refused("must set LoadedModel.input_shape", calibrated)
