"""Records of older schemas: they are read as what they are, and their files stay as they are."""

import json
import shutil
from pathlib import Path

import pytest

from fimaq_core.errors import CheckpointError
from tasks.common.outcome_files import outcomes_problem
from tasks.common.record import SCHEMA_VERSION, LayerEntry, read_record, recipe_of, write_record

#: ``record-v1.json``: FIMA-Q on ``demo_vit`` in three steps, written by the code of schema 1.
DATA = Path(__file__).parent / "old_files"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copy(DATA / "record-v1.json", tmp_path / "result.json"))


def test_every_older_version_has_its_record() -> None:
    for version in range(1, SCHEMA_VERSION):
        assert (
            json.loads((DATA / f"record-v{version}.json").read_text(encoding="utf-8"))[
                "schema_version"
            ]
            == version
        )


def test_version_1(old: Path) -> None:
    before, state = old.read_bytes(), old.stat().st_mtime_ns
    content, record = json.loads(before), read_record(old)
    assert (old.read_bytes(), old.stat().st_mtime_ns) == (before, state)
    assert record.schema_version == SCHEMA_VERSION
    assert (record.stage_memory_bytes, record.blocks, record.outcomes_sha256, record.examples) == (
        {},
        {},
        None,
        None,
    )
    assert record.fingerprint == ""
    assert outcomes_problem(record, old.parent) is None
    assert (record.method, record.n, record.peak_memory_bytes) == (
        "fimaq",
        64,
        content["peak_memory_bytes"],
    )
    assert record.metrics["top1"].value == content["metrics"]["top1"]["value"]
    assert record.last_loss == content["last_loss"]
    assert record.modules is not None
    assert len(record.modules.quantized) == 26
    recipe = recipe_of(record)
    assert recipe is not None
    assert recipe.digest() == record.recipe_digest
    # Written anew it is of the present version, with nothing lost.
    again = read_record(write_record(record, old.parent / "again"))
    assert len(again.fingerprint) == 64
    assert again.model_copy(update={"fingerprint": ""}) == record


def test_version_2(tmp_path: Path) -> None:
    path = Path(shutil.copy(DATA / "record-v2.json", tmp_path / "result.json"))
    before = path.read_bytes()
    content, record = json.loads(before), read_record(path)
    assert path.read_bytes() == before
    assert record.schema_version == SCHEMA_VERSION
    assert record.fingerprint == content["fingerprint"]
    assert record.blocks.keys() == content["blocks"].keys()
    assert record.metrics["top1"].value == content["metrics"]["top1"]["value"]
    assert record.calibration is not None
    assert record.calibration.ids == content["calibration"]["ids"]
    # A change after it was written is noticed in old records too.
    path.write_text(before.decode().replace('"n": 64', '"n": 65'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        read_record(path)


def test_version_3(tmp_path: Path) -> None:
    path = Path(shutil.copy(DATA / "record-v3.json", tmp_path / "result.json"))
    content, record = json.loads(path.read_bytes()), read_record(path)
    assert record.schema_version == SCHEMA_VERSION
    assert (record.identity, record.model_args, record.artefacts) == ("", {}, {})
    assert record.calibration is not None
    assert (record.calibration.dataset, record.calibration.split) == (None, None)
    assert record.calibration.listed is None
    assert record.weights.sha256 == content["weights"]["sha256"]
    # Without the new fields it is what it was.
    new = {"identity", "model_args", "artefacts", "exported", "schema_version", "fingerprint"}
    new |= {"fidelity"}
    dump = record.model_dump(mode="json", exclude=new)
    for name in ("dataset", "split", "listed"):
        del dump["calibration"][name]
    assert dump == {name: value for name, value in content.items() if name not in new}
    # A record cannot pass as older than its fields.
    path.write_text(json.dumps({**content, "identity": "0" * 64}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        read_record(path)
    path.write_text(json.dumps({"schema_version": 1, "identity": ""}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="version 1 has no field 'identity'"):
        read_record(path)


def test_version_4(tmp_path: Path) -> None:
    path = Path(shutil.copy(DATA / "record-v4.json", tmp_path / "result.json"))
    content, record = json.loads(path.read_bytes()), read_record(path)
    assert (record.schema_version, record.exported) == (SCHEMA_VERSION, None)
    # Without the new field it is what it was.
    new = {"exported", "fidelity", "schema_version"}
    dump = record.model_dump(mode="json", exclude=new)
    assert dump == {name: value for name, value in content.items() if name not in new}
    path.write_text(json.dumps({"schema_version": 4, "exported": None}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        read_record(path)


def test_version_5(tmp_path: Path) -> None:
    path = Path(shutil.copy(DATA / "record-v5.json", tmp_path / "result.json"))
    content, record = json.loads(path.read_bytes()), read_record(path)
    assert (record.schema_version, record.fidelity) == (SCHEMA_VERSION, {})
    new = {"fidelity", "schema_version"}
    dump = record.model_dump(mode="json", exclude=new)
    assert dump == {name: value for name, value in content.items() if name not in new}


def test_version_1_from_before_quantizers_had_names(old: Path) -> None:
    content = json.loads(old.read_text(encoding="utf-8"))
    entry = {
        "name": "a",
        "kind": "product",
        "weight_bits": 32,
        "input_bits": 4,
        "weight_ranges": "none",
        "input_ranges": "x; x",
    }
    content["modules"]["quantized"] = [entry]
    old.write_text(json.dumps(content), encoding="utf-8")
    modules = read_record(old).modules
    assert modules is not None
    (found,) = modules.quantized
    assert found == LayerEntry(**entry, weight_quantizer="uniform", input_quantizer="uniform")
    assert (found.other_bits, found.other_quantizer) == (None, None)


def test_version_1_is_not_trusted_either(old: Path) -> None:
    text = old.read_text(encoding="utf-8")
    for harm, message in (
        (text.replace('"outcomes.npz"', '"../../outcomes.npz"'), "is not valid: outcomes:"),
        (text.replace('"n": 64', '"n": "many"'), "is not valid: n:"),
        (text.replace('"n": 64', '"n": 64, "examples": null'), "version 1 has no field 'examples'"),
        (text.replace('"n": 64', '"n": NaN'), "is damaged"),
        (text[:5000], "is damaged"),
    ):
        assert harm != text
        old.write_text(harm, encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            read_record(old)
