"""Result records: round trip, schema, fingerprint, damage, and a full disk."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fimaq_core import files
from fimaq_core.errors import CheckpointError
from fimaq_core.recipe import make_recipe
from tasks.common.outcome_files import outcomes_problem
from tasks.common.record import (
    BlockFigures,
    Calibration,
    Dataset,
    Environment,
    Exported,
    LayerEntry,
    Metric,
    ModuleMap,
    ResultRecord,
    Weights,
    bits_name,
    cell_folder,
    fingerprint,
    has_record,
    own_seconds,
    proportion,
    read_record,
    recipe_of,
    write_record,
)

#: Changes of :func:`record` for the full-precision model.
FULL: dict[str, Any] = {
    **dict.fromkeys(("seed", "recipe", "calibration", "modules")),
    **{"method": "fp", "recipe_digest": "", "w_bit": 32, "a_bit": 32},
}

EXPORTED = Exported(
    sha256="3" * 64,
    bytes=23_000_000,
    float_bytes=89_000_000,
    weights="int8",
    signed=False,
    integer_macs=90,
    quantized_macs=90,
    macs=100,
    speed=1.7,
    runtime="onnxruntime 1",
)


def record(**changes: Any) -> ResultRecord:
    recipe = make_recipe("fimaq", {"w_bits": 3, "a_bits": 3})
    facts: dict[str, Any] = {
        "task": "classification",
        "model": "vit.tag",
        "method": "fimaq",
        "variant": "released",
        "w_bit": 3,
        "a_bit": 3,
        "seed": 3407,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest(),
        "metrics": {"top1": Metric(value=71.25, stderr=0.1)},
        "n": 50_000,
        "fp_metrics": {"top1": Metric(value=81.4, stderr=0.1)},
        "weights": Weights(tag="tag", source="file", sha256="0" * 64),
        "dataset": Dataset(name="folder", split="val", count=50_000, classes=2, fingerprint="f"),
        "calibration": Calibration(
            ids=["train/a/1.png"],
            transform="train",
            fingerprint="c",
            dataset="folder",
            split="train",
        ),
        "identity": "1" * 64,
        "model_args": {"depth": 2},
        "artefacts": {"calibration-0.safetensors": "2" * 64},
        "modules": ModuleMap(
            quantized=[
                LayerEntry(
                    name="head",
                    kind="linear",
                    weight_bits=3,
                    input_bits=3,
                    weight_ranges="2",
                    input_ranges="per tensor",
                )
            ],
            full_precision=["norm (LayerNorm)"],
        ),
        "last_loss": {"head": 0.5},
        "fisher_passes": {"head": 0},
        "notes": ["Δ"],
        "skipped_images": [],
        "environment": Environment(
            versions={"torch": "2"}, git_revision="abc", device="cpu", threads=1
        ),
        "seconds": {"load": 0.1},
        "peak_memory_bytes": 7,
        "finished": "2025-01-01T00:00:00+00:00",
        "outcomes": "outcomes.npz",
    }
    return ResultRecord(**{**facts, **changes})


def test_round_trip(tmp_path: Path) -> None:
    original = record()
    path = write_record(original, tmp_path / "cell")
    assert path == tmp_path / "cell" / "result.json"
    assert read_record(path).model_copy(update={"fingerprint": ""}) == original
    assert len(read_record(path).fingerprint) == 64
    assert recipe_of(read_record(path)) == make_recipe("fimaq", {"w_bits": 3, "a_bits": 3})
    export = record(exported=EXPORTED)
    path = write_record(export, tmp_path / "cell")
    assert read_record(path).exported == EXPORTED
    full = record(**FULL)
    path = write_record(full, tmp_path / "cell")
    assert read_record(path).model_copy(update={"fingerprint": ""}) == full
    assert recipe_of(full) is None


def test_the_fingerprint_is_of_the_canonical_json_of_all_else(tmp_path: Path) -> None:
    blocks = {"head": BlockFigures(error=1e-7, fisher=4e-05), "blocks.0": BlockFigures(error=0.25)}
    path = write_record(
        record(blocks=blocks, examples="examples.json", stage_memory_bytes={"load": 2**40}),
        tmp_path,
    )
    content = json.loads(path.read_text(encoding="utf-8"))
    mark = content.pop("fingerprint")
    assert (
        mark
        == hashlib.sha256(
            json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()
    )
    # The file's layout and the order of its fields do not count.
    path.write_text(
        json.dumps({"fingerprint": mark, **dict(reversed(content.items()))}), encoding="utf-8"
    )
    assert read_record(path).blocks == blocks


def written(folder: Path, **changes: Any) -> Path:
    """A record with ``changes``, valid or not, and the fingerprint that goes with them."""
    path = write_record(record(), folder)
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({**content, "fingerprint": fingerprint(content)}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "change", ["a digit", "a note", "no fingerprint", "an empty one", "an older version"]
)
def test_records_edited_by_hand_are_refused(tmp_path: Path, change: str) -> None:
    path = write_record(record(), tmp_path)
    text = path.read_text(encoding="utf-8")
    mark = read_record(path).fingerprint
    edited = {
        "a digit": text.replace("71.25", "81.25"),
        "a note": text.replace("Δ", "δ"),
        "no fingerprint": text.replace("fingerprint", "finger", 1).replace(
            f',\n "fingerprint": "{mark}"', ""
        ),
        "an empty one": text.replace(mark, ""),
        "an older version": text.replace('"schema_version": 6', '"schema_version": 1'),
    }[change]
    assert edited != text
    path.write_text(edited, encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"changed after it was written|version 1 has no field"
    ) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert "restore it, or delete it to measure that cell again" in str(caught.value)
    assert path.read_text(encoding="utf-8") == edited


def test_newer_schemas_and_what_is_no_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"schema version 7, and this version of fimaq reads up to 6: update fimaq",
    ):
        read_record(written(tmp_path, schema_version=7))
    for version in (None, "2", 0, True, 2.0):
        with pytest.raises(CheckpointError, match="is no record: its schema version is"):
            read_record(written(tmp_path, schema_version=version))
    path = tmp_path / "result.json"
    path.write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="is no record: its schema version is None"):
        read_record(path)


def test_invalid_records_name_the_field(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not valid: n:"):
        read_record(written(tmp_path, n="many"))
    with pytest.raises(CheckpointError, match="is not valid: surprise:"):
        read_record(written(tmp_path, surprise=1))
    with pytest.raises(CheckpointError, match=r"is not valid: blocks.head.error"):
        read_record(written(tmp_path, blocks={"head": {"error": "large"}}))


def test_numbers_and_texts_that_no_run_writes_are_refused(tmp_path: Path) -> None:
    top1 = {"value": 71.25, "stderr": 0.1}
    dataset = record().dataset.model_dump(mode="json")
    machine = record().environment.model_dump(mode="json")
    layer = {
        **{"name": "head", "kind": "linear", "weight_bits": 3, "input_bits": 3},
        **{"weight_ranges": "2", "input_ranges": "per tensor"},
    }
    for field, value in (
        ("metrics", {"top1": {**top1, "value": 150}}),
        ("metrics", {"top1": {**top1, "value": -1}}),
        ("metrics", {"top1": {**top1, "stderr": -0.5}}),
        ("metrics", {"top1": {**top1, "stderr": 1e200}}),
        ("metrics", {"top1": {**top1, "stderr": 1e5}}),
        ("metrics", {}),
        ("fp_metrics", {"top1": {**top1, "value": 101}}),
        ("n", -1),
        ("n", 0),
        ("n", 10**30),
        ("seed", 10**30),
        ("seed", 2**63),
        ("seed", -1),
        ("w_bit", 9),
        ("w_bit", 0),
        ("a_bit", 1),
        ("seconds", {"load": -1}),
        ("seconds", {"load": 1e200}),
        ("peak_memory_bytes", -1),
        ("peak_memory_bytes", 10**30),
        ("stage_memory_bytes", {"load": 2**61}),
        ("fisher_passes", {"head": -1}),
        ("blocks", {"head": {"error": -1}}),
        ("blocks", {"head": {"error": 1e300}}),
        ("finished", "yesterday"),
        ("finished", "2025-13-01T00:00:00+00:00"),
        ("finished", "2025-01-01T00:00:00" + "0" * 100),
        ("dataset", {**dataset, "count": -5}),
        ("dataset", {**dataset, "captions": 10**400}),
        ("environment", {**machine, "threads": -1}),
        ("modules", {"quantized": [{**layer, "weight_bits": 10**6}], "full_precision": []}),
        ("variant", "x" * 10_001),
        ("identity", "0" * 63),
        ("artefacts", {"../x": "0" * 64}),
        ("artefacts", {"x.safetensors": "0"}),
        ("outcomes_sha256", "0"),
        ("exported", {**EXPORTED.model_dump(mode="json"), "speed": -1}),
        ("exported", {**EXPORTED.model_dump(mode="json"), "weights": "int1"}),
    ):
        with pytest.raises(CheckpointError, match=f"is not valid: {field}") as caught:
            read_record(written(tmp_path, **{field: value}))
        assert "\n" not in str(caught.value)
    # A rank is no percentage, and a seed has 63 bits.
    rank = {"i2t_median_rank": {"value": 2500.5, "stderr": 12.0}}
    facts = {"task": "retrieval", "metrics": rank, "fp_metrics": {}}
    assert read_record(written(tmp_path, **facts)).metrics["i2t_median_rank"].value == 2500.5
    recipe = make_recipe("fimaq", {"w_bits": 3, "a_bits": 3, "seed": 2**63 - 1})
    changes = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": recipe.digest()}
    assert read_record(written(tmp_path, seed=2**63 - 1, **changes)).seed == 2**63 - 1


def test_records_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    recipe = record().recipe
    assert recipe is not None
    both = make_recipe("fimaq", {"w_bits": 3, "a_bits": 3, "scope": "both"})
    export = EXPORTED.model_dump(mode="json")
    for changes, words in (
        ({"method": "qdrop"}, "method is 'qdrop', and 'fimaq' in its recipe"),
        ({"w_bit": 4}, "w_bit is 4, and 3 in its recipe"),
        ({"a_bit": 8}, "a_bit is 8, and 3 in its recipe"),
        ({"seed": 7}, "seed is 7, and 3407 in its recipe"),
        ({"seed": None}, "seed is None, and 3407 in its recipe"),
        ({"recipe_digest": "0" * 64}, "its recipe has another digest"),
        ({"recipe": {**recipe, "steps": 1}}, "its recipe has another digest"),
        ({"recipe": None}, "method 'fimaq' and its recipe do not go together"),
        ({"method": "fp"}, "method 'fp' and its recipe do not go together"),
        ({**FULL, "seed": 1}, "full-precision model, with facts"),
        ({**FULL, "w_bit": 4}, "full-precision model, with facts"),
        (
            {"recipe": both.model_dump(mode="json"), "recipe_digest": both.digest()},
            "its variant 'released' does not name its scope 'both'",
        ),
        ({"n": 50_001}, "n is 50001, with 50000 samples and 0 damaged images"),
        ({"n": 49_998, "skipped_images": ["a.png"]}, "n is 49998, with 50000 samples and 1"),
        ({"task": "detection"}, "task detection has no metric 'top1'"),
        ({**FULL, "exported": export}, "full-precision model, and of an export"),
        ({"exported": {**export, "integer_macs": 91}}, "more multiply-adds in integers"),
        ({"exported": {**export, "macs": 89}}, "more multiply-adds in integers"),
    ):
        with pytest.raises(CheckpointError, match="is not valid") as caught:
            read_record(written(tmp_path, **changes))
        assert words in str(caught.value)
    # Damaged calibration images are listed too, so there may be more of them than samples lack.
    assert read_record(written(tmp_path, n=49_999, skipped_images=["a.png", "b.png"])).n == 49_999
    # A recipe of another version has no digest here.
    other = {**recipe, "setting_of_tomorrow": 1}
    assert read_record(written(tmp_path, recipe=other, recipe_digest="1" * 64)).method == "fimaq"


def test_a_record_in_the_folder_of_another_cell_is_refused(tmp_path: Path) -> None:
    own = record(identity="ab" * 32)
    cell = tmp_path / "runs" / "classification" / "vit.tag" / "fimaq" / "w3a3"
    folder = cell / "seed3407-ababababab"
    assert read_record(write_record(own, folder)) is not None
    for other in (
        cell / "seed3407-cdababab00",
        cell / "seed1-ababababab",
        cell.parent / "w4a4" / folder.name,
        cell.parents[1] / "qdrop" / "w3a3" / folder.name,
        cell.parents[2] / "other.tag" / "fimaq" / "w3a3" / folder.name,
        tmp_path / "retrieval" / "vit.tag" / "fimaq" / "w3a3" / folder.name,
        cell.parents[1] / "fp" / "fp" / "ababababab",
    ):
        path = write_record(own, other)
        with pytest.raises(CheckpointError, match="is of another cell") as caught:
            read_record(path)
        there = "/".join(other.parts[-5:])
        own_place = "classification/vit.tag/fimaq/w3a3/seed3407-ababababab"
        assert f"it is of {own_place}, and its folder of {there}" in str(caught.value)
    # A folder without the form of a cell's folder holds any record.
    assert read_record(write_record(own, tmp_path / "mine")).method == "fimaq"


def test_an_old_record_is_compared_by_its_path_and_by_the_digest_of_the_recipe(
    tmp_path: Path,
) -> None:
    old, cell = record(identity=""), tmp_path / "classification" / "vit.tag" / "fimaq" / "w3a3"
    path = write_record(old, cell / "seed3407-0123456789")
    assert read_record(path, old.recipe_digest).identity == ""
    with pytest.raises(CheckpointError, match="with other settings than the cell of this folder"):
        read_record(path, make_recipe("fimaq", {"w_bits": 3, "a_bits": 3, "steps": 9}).digest())
    with pytest.raises(CheckpointError, match="is of another cell"):
        read_record(write_record(old, cell.parent / "w4a4" / "seed3407-0123456789"))


def test_only_regular_files_of_a_usual_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.mkdir()
    with pytest.raises(CheckpointError, match="it is a folder"):
        read_record(path)
    path.rmdir()
    os.mkfifo(path)  # opening it would wait for a writer
    with pytest.raises(CheckpointError, match="it is a pipe or a device"):
        has_record(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(64 << 20)
    with pytest.raises(CheckpointError, match="at most 33,554,432 are read"):
        read_record(path)
    path.unlink()
    assert not has_record(path)
    path.symlink_to(tmp_path / "nowhere")  # such as one on a disk that is not mounted
    with pytest.raises(CheckpointError, match="is a link to nothing: mount its disk"):
        has_record(path)
    folder = tmp_path / "cell"
    folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cell is a link to nothing"):
        has_record(folder / "result.json")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, value: str) -> None:
    for number in ("71.25", "0.5", "0.1"):  # a metric, a loss, and seconds
        path = write_record(record(), tmp_path)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(f" {number}", f" {value}", 1), encoding="utf-8")
        assert path.read_text(encoding="utf-8") != text
        with pytest.raises(CheckpointError, match=r"is damaged|is not valid"):
            read_record(path)


@pytest.mark.parametrize("field", ["outcomes", "examples"])
@pytest.mark.parametrize(
    "name",
    [
        "../x.npz",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        ".hidden",
        "a\0b",
        "a\n",
        "C:x",
        "é" * 3,
        "a" * 300,
    ],
)
def test_records_name_files_beside_them_only(tmp_path: Path, field: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"is not valid: {field}:"):
        read_record(written(tmp_path, **{field: name}))


def test_outcomes_that_are_not_the_records_are_told(tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.npz"
    outcomes.write_bytes(b"right, wrong")
    own = record(outcomes_sha256=hashlib.sha256(b"right, wrong").hexdigest())
    assert outcomes_problem(own, tmp_path) is None
    assert outcomes_problem(record(), tmp_path / "nowhere") is None  # of schema 1: nobody can tell
    outcomes.write_bytes(b"right, right")
    problem = outcomes_problem(own, tmp_path)
    assert problem is not None
    assert f"{outcomes} does not belong to the record beside it" in problem
    outcomes.unlink()
    problem = outcomes_problem(own, tmp_path)
    assert problem is not None
    assert str(outcomes) in problem


@pytest.mark.parametrize("damage", ["cut", "empty", "bytes", "nesting", "digits"])
def test_damaged_records_are_refused(tmp_path: Path, damage: str) -> None:
    path = write_record(record(), tmp_path)
    raw = path.read_bytes()
    harm = {
        "cut": raw[: len(raw) // 2],
        "empty": b"",
        "bytes": b"\xff\xfe\x80" + raw,
        "nesting": b'{"a":' * 50_000,
        "digits": raw.replace(b"50000", b"9" * 5000),
    }[damage]
    path.write_bytes(harm)
    with pytest.raises(CheckpointError, match=r"is damaged .*delete it"):
        read_record(path)
    assert path.read_bytes() == harm


def test_missing_record(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Cannot read the record"):
        read_record(tmp_path / "result.json")


def test_no_number_that_is_none() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            Metric(value=value, stderr=0.0)


def test_a_full_disk_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(record(), tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            write_record(record(n=2), tmp_path)
    assert read_record(path).n == 50_000
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
    recipe = make_recipe("fimaq", {"w_bits": 3, "a_bits": 4, "seed": 7})
    folder = cell_folder(tmp_path, "classification", "vit.tag", recipe, "0123456789abcdef")
    assert folder == tmp_path / "classification" / "vit.tag" / "fimaq" / "w3a4" / "seed7-0123456789"
    folder = cell_folder(tmp_path, "classification", "vit.tag", None, "0123456789abcdef")
    assert folder == tmp_path / "classification" / "vit.tag" / "fp" / "fp" / "0123456789"


def test_waiting_for_another_is_no_cost_of_a_cell() -> None:
    waited = record().model_copy(update={"seconds": {"load": 1.0, "wait": 60.0, "evaluate": 2.0}})
    assert own_seconds(waited) == 3.0
