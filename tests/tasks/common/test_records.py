"""Result records: round trip, schema, damage, and a full disk."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from fimaq_core import files
from fimaq_core.errors import CheckpointError
from fimaq_core.recipe import make_recipe
from tasks.common.record import (
    Calibration,
    Dataset,
    Environment,
    LayerEntry,
    Metric,
    ModuleMap,
    ResultRecord,
    Weights,
    bits_name,
    cell_folder,
    proportion,
    read_record,
    recipe_of,
    write_record,
)


def record(**changes: Any) -> ResultRecord:
    recipe = make_recipe("fimaq", {"w_bits": 3, "a_bits": 3})
    facts: dict[str, Any] = {
        "task": "classification", "model": "vit.tag", "method": "fimaq", "variant": "released", "w_bit": 3, "a_bit": 3,
        "seed": 3407, "recipe": recipe.model_dump(mode="json"), "recipe_digest": recipe.digest(),
        "metrics": {"top1": Metric(value=71.25, stderr=0.1)}, "n": 50_000, "fp_metrics": {"top1": Metric(value=81.4, stderr=0.1)},
        "weights": Weights(tag="tag", source="file", sha256="0" * 64),
        "dataset": Dataset(name="folder", split="val", count=5, classes=2, fingerprint="f"),
        "calibration": Calibration(ids=["train/a/1.png"], transform="train", fingerprint="c"),
        "modules": ModuleMap(
            quantized=[
                LayerEntry(name="head", kind="linear", weight_bits=3, input_bits=3, weight_ranges="2", input_ranges="per tensor")
            ],
            full_precision=["norm (LayerNorm)"],
        ),
        "last_loss": {"head": 0.5}, "fisher_passes": {"head": 0}, "notes": ["Δ"], "skipped_images": [],
        "environment": Environment(versions={"torch": "2"}, git_revision="abc", device="cpu", threads=1),
        "seconds": {"load": 0.1}, "peak_memory_bytes": 7, "finished": "2025-01-01T00:00:00+00:00", "outcomes": "outcomes.npz",
    }  # fmt: skip
    return ResultRecord(**{**facts, **changes})


def test_round_trip(tmp_path: Path) -> None:
    original = record()
    path = write_record(original, tmp_path / "cell")
    assert path == tmp_path / "cell" / "result.json"
    assert read_record(path) == original
    assert recipe_of(read_record(path)) == make_recipe("fimaq", {"w_bits": 3, "a_bits": 3})
    full = record(method="fp", recipe=None, seed=None, calibration=None, modules=None, w_bit=32, a_bit=32)
    path = write_record(full, tmp_path / "cell")
    assert read_record(path) == full
    assert recipe_of(full) is None


def test_records_from_before_quantizers_had_names(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    entry = {"name": "a", "kind": "product", "weight_bits": 32, "input_bits": 4, "weight_ranges": "none", "input_ranges": "x; x"}
    content["modules"]["quantized"] = [entry]
    path.write_text(json.dumps(content), encoding="utf-8")
    modules = read_record(path).modules
    assert modules is not None
    (found,) = modules.quantized
    assert found == LayerEntry(**entry, weight_quantizer="uniform", input_quantizer="uniform")
    assert (found.other_bits, found.other_quantizer) == (None, None)


def edited(path: Path, **changes: Any) -> Path:
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_other_schemas_are_refused(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    with pytest.raises(CheckpointError, match=r"schema version 2; this version of fimaq reads 1"):
        read_record(edited(path, schema_version=2))
    with pytest.raises(CheckpointError, match="schema version None"):
        read_record(edited(path, schema_version=None))
    path.write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="schema version None"):
        read_record(path)


def test_invalid_records_name_the_field(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    with pytest.raises(CheckpointError, match="is not valid: n:"):
        read_record(edited(path, n="many"))
    path = write_record(record(), tmp_path)
    with pytest.raises(CheckpointError, match="is not valid: surprise:"):
        read_record(edited(path, surprise=1))
    path = write_record(record(), tmp_path)
    content = json.loads(path.read_text())
    content["metrics"]["top1"]["value"] = float("nan")
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is not valid: metrics.top1.value"):
        read_record(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "bytes"])
def test_damaged_records_are_refused(tmp_path: Path, damage: str) -> None:
    path = write_record(record(), tmp_path)
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "bytes": b"\xff\xfe\x80" + raw}[damage])
    with pytest.raises(CheckpointError, match=r"is damaged .*delete it"):
        read_record(path)


def test_missing_record(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Cannot read the record"):
        read_record(tmp_path / "result.json")


def test_no_number_that_is_none() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            Metric(value=value, stderr=0.0)


def test_a_full_disk_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(record(n=1), tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            write_record(record(n=2), tmp_path)
    assert read_record(path).n == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_proportion() -> None:
    metric = proportion(30, 40)
    assert metric.value == pytest.approx(75.0)
    assert metric.stderr == pytest.approx(100 * (0.75 * 0.25 / 40) ** 0.5)
    assert proportion(0, 5).stderr == 0
    assert proportion(5, 5).value == 100


def test_the_path_is_the_identity(tmp_path: Path) -> None:
    assert bits_name(32, 32) == "fp"
    assert bits_name(32, 4) == "w32a4"
    folder = cell_folder(tmp_path, "classification", "vit.tag", "fimaq", 3, 4, 7, "0123456789abcdef")
    assert folder == tmp_path / "classification" / "vit.tag" / "fimaq" / "w3a4" / "seed7-0123456789"
    folder = cell_folder(tmp_path, "classification", "vit.tag", "fp", 32, 32, None, "0123456789abcdef")
    assert folder == tmp_path / "classification" / "vit.tag" / "fp" / "fp" / "0123456789"
