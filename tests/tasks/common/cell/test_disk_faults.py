"""Faults of the disk in a real run: one message, nothing overwritten, finished work is kept."""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fimaq_core.errors import CheckpointError, FimaqError
from fimaq_core.progress import Progress
from fimaq_core.recipe import make_recipe
from tasks.common.cell.identity import forget, planned_folder
from tasks.common.cell.run import run_cell
from tasks.common.record import ResultRecord, read_record, write_record
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
OLD = Path(__file__).parents[1] / "old_files" / "record-v1.json"


def cell(results: Path, method: str | None = "qdrop") -> CellRequest:
    recipe = None if method is None else make_recipe(method, QUICK)
    return CellRequest(
        "classification",
        ModelRequest("demo_vit"),
        DataRequest(limit=64),
        recipe,
        results=results / "runs",
    )


def record_path(request: CellRequest) -> Path:
    return planned_folder(request) / "result.json"


def content(root: Path) -> dict[Path, bytes]:
    """All finished files below ``root``; hidden ones belong to what is under way."""
    return {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def measured(record: ResultRecord) -> dict[str, Any]:
    """Fields of a record that do not depend on the time of the measurement or on its length."""
    return record.model_dump(
        include={
            "metrics",
            "last_loss",
            "blocks",
            "outcomes_sha256",
            "modules",
            "calibration",
            "recipe",
        }
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(read_record(run_cell(cell(tmp_path_factory.mktemp("undisturbed")))))


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system lets no file grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory; skips where this user may not mount one."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("stage", "file"), [("reconstruct", "block-002.safetensors"), ("evaluate", "outcomes.npz")]
)
def test_a_file_that_may_not_grow(
    stage: str, file: str, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    request, finished = cell(tmp_path), run_cell(cell(tmp_path, "rtn"))
    before = content(finished.parent)

    def tighten(event: Progress) -> None:
        if event.stage == stage and event.block in ("", "blocks.1"):
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )

    with (
        no_file_above(2**40),
        pytest.raises(CheckpointError, match=rf"Cannot write .*{file}.*kept") as caught,
    ):
        run_cell(request, tighten)
    assert "\n" not in str(caught.value)
    assert "File too large" in str(caught.value)
    assert not record_path(request).exists()
    kept = sorted(path.name for path in (planned_folder(request) / "blocks").iterdir())
    count = 2 if stage == "reconstruct" else 6
    assert kept == [f"block-{number:03d}.safetensors" for number in range(count)]
    assert content(finished.parent) == before

    started: list[str] = []

    def watch(event: Progress) -> None:
        if event.stage == "reconstruct" and event.block and event.block not in started:
            started.append(event.block)

    record = read_record(run_cell(request, watch))
    assert started == ["blocks.1", "blocks.2", "blocks.3", "head"][: 6 - count]
    assert measured(record) == undisturbed
    assert not (planned_folder(request) / "blocks").exists()


def test_a_full_disk(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    with mounted(tmp_path / "disk", "24m") as disk:
        request, filler = cell(disk), disk / "filler"

        def fill(event: Progress) -> None:
            if (event.stage, event.block) == ("reconstruct", "blocks.0") and not filler.exists():
                with filler.open("wb") as file:
                    try:
                        while True:
                            file.write(b"\0" * 65536)
                            file.flush()
                    except OSError:
                        os.ftruncate(file.fileno(), file.tell() // 65536 * 65536)

        with pytest.raises(
            CheckpointError, match=r"Cannot write .*block-001.*No space left on device.*Free space"
        ) as caught:
            run_cell(request, fill)
        assert "\n" not in str(caught.value)
        assert [path.name for path in (planned_folder(request) / "blocks").iterdir()] == [
            "block-000.safetensors"
        ]
        filler.unlink()
        assert measured(read_record(run_cell(request))) == undisturbed
        assert read_record(record_path(cell(disk, None))).method == "fp"


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "24m") as disk:
        finished = run_cell(cell(disk, "rtn"))
        before = content(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for act in (
            partial(run_cell, cell(disk)),
            partial(forget, [cell(disk, "rtn")]),
            partial(forget, [cell(disk, None)]),
        ):
            with pytest.raises(FimaqError, match=r"Read-only file system") as caught:
                act()
            assert "\n" not in str(caught.value)
        assert content(disk) == before
        assert read_record(finished).method == "rtn"


@pytest.mark.parametrize("method", [None, "qdrop"])
def test_results_that_lie_below_a_file(method: str | None, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    with pytest.raises(FimaqError, match=r"Not a directory|File exists") as caught:
        run_cell(cell(tmp_path / "results", method))
    assert str(tmp_path / "results") in str(caught.value)
    assert content(tmp_path) == {tmp_path / "results": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop root")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    finished = run_cell(cell(tmp_path, "rtn"))
    finished.parent.chmod(0o555)
    try:
        assert run_cell(cell(tmp_path, "rtn")) == finished
        with pytest.raises(FimaqError, match="Permission denied"):
            forget([cell(tmp_path, "rtn")])
    finally:
        finished.parent.chmod(0o755)


def damaged(path: Path, how: str) -> None:
    """Damage a record."""
    text = path.read_text(encoding="utf-8")
    content = {
        "cut": text[: len(text) // 2],
        "edited": text.replace('"n": 64', '"n": 65'),
        "empty": "",
        "newer": read_record(path)
        .model_dump_json()
        .replace('"schema_version":6', '"schema_version":7'),
    }[how]
    assert content != text
    path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "is damaged"),
        ("edited", "was changed after it was written"),
        ("empty", "is damaged"),
        ("newer", "update fimaq"),
    ],
)
def test_a_record_that_is_not_as_it_was_written(how: str, message: str, tmp_path: Path) -> None:
    full, quantized = cell(tmp_path, None), cell(tmp_path, "rtn")
    run_cell(quantized)
    for own in (full, quantized):
        kept = record_path(own).read_bytes()
        damaged(record_path(own), how)
        before = content(tmp_path)
        with pytest.raises(CheckpointError, match=message) as caught:
            run_cell(own)
        assert str(record_path(own)) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert content(tmp_path) == before
        # Other cells of the model need the full-precision record, and no other.
        other = replace(cell(tmp_path, "rtn"), variant=f"beside {own.variant} {how}")
        if own is full:
            with pytest.raises(CheckpointError, match=message):
                run_cell(other)
            assert content(tmp_path) == before
        else:
            assert read_record(run_cell(other)).method == "rtn"
        record_path(own).write_bytes(kept)
        assert run_cell(own) == record_path(own)
        assert record_path(own).read_bytes() == kept


def test_a_record_that_was_deleted_is_measured_again(tmp_path: Path) -> None:
    path = run_cell(cell(tmp_path, "rtn"))
    first = read_record(path)
    damaged(path, "cut")
    path.unlink()
    assert measured(read_record(run_cell(cell(tmp_path, "rtn")))) == measured(first)


def test_records_of_the_former_schema_are_finished_cells(tmp_path: Path) -> None:
    request = cell(tmp_path, "fimaq")
    path = record_path(request)
    path.parent.mkdir(parents=True)
    shutil.copy(OLD, path)
    assert run_cell(request) == path
    assert content(tmp_path) == {path: OLD.read_bytes()}
    # A full-precision record of that schema serves new cells.
    full = record_path(cell(tmp_path, None))
    run_cell(cell(tmp_path, None))
    text = full.read_text(encoding="utf-8")
    for name in ("stage_memory_bytes", "blocks", "outcomes_sha256", "examples", "fingerprint"):
        assert f'"{name}"' in text
    later = {"stage_memory_bytes", "blocks", "outcomes_sha256", "examples", "fingerprint"}
    later |= {"identity", "model_args", "artefacts", "exported", "fidelity"}
    old = read_record(full).model_dump(mode="json", exclude=later)
    full.write_text(json.dumps({**old, "schema_version": 1}), encoding="utf-8")
    before = full.read_bytes()
    assert read_record(run_cell(cell(tmp_path, "rtn"))).fp_metrics == read_record(full).metrics
    assert full.read_bytes() == before
    assert write_record(read_record(full), tmp_path / "anew").is_file()
