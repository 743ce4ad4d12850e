"""The index by which a plan finds what runs share, without loading a model."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fimaq_core.recipe import make_recipe
from tasks.common import registry
from tasks.common.cell import identity
from tasks.common.cell.identity import (
    note_shared,
    planned_folder,
    resolved,
    shared_digest,
    shared_digests,
)
from tasks.common.cell.run import run_cell
from tasks.common.registry import get_task
from tasks.common.request import CellRequest, DataRequest, ModelRequest

SETTINGS = {
    "calibration_images": 8,
    "range_images": 4,
    "steps": 2,
    "batch_size": 4,
    "w_bits": 4,
    "a_bits": 4,
}


def request_of(
    tmp_path: Path, task: str, model: str, method: str = "qdrop", **changes: object
) -> CellRequest:
    recipe = make_recipe(method, registry.defaults(task), SETTINGS, changes)
    data = DataRequest(limit=8)
    return CellRequest(
        task, ModelRequest(model), data, recipe, results=tmp_path / "runs", threads=1
    )


def cached(request: CellRequest) -> list[str]:
    return identity.cached(request, planned_folder(request))


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_a_run_leaves_what_a_plan_finds(tmp_path: Path):
    cell = request_of(tmp_path, "classification", "demo_vit", "aphq", mlp_steps=2, mlp_batch=4)
    assert cached(cell) == []
    run_cell(cell)
    other = replace(
        cell,
        recipe=make_recipe(
            "fimaq-mlp", cell.recipe.model_dump() | {"method": "fimaq-mlp", "steps": 3}
        ),
    )
    assert cached(other) == ["calibration", "MLPs"]
    # another seed or other data give other images, and another model has other ranges
    assert cached(replace(other, recipe=other.recipe.model_copy(update={"seed": 5}))) == []
    assert cached(replace(other, data=DataRequest(path=tmp_path))) == []
    assert cached(replace(other, model=ModelRequest("demo_deit"))) == []
    assert cached(replace(other, data=DataRequest(limit=8, skip_corrupt=True))) == []
    # what is measured on does not matter
    assert cached(replace(other, data=DataRequest(limit=9))) == ["calibration", "MLPs"]
    for file in (tmp_path / "calibration").glob("*.safetensors"):
        file.unlink()
    assert cached(other) == ["MLPs"]


def test_parts_of_a_retrieval_model_are_found_by_other_scopes(tmp_path: Path):
    both = resolved(request_of(tmp_path, "retrieval", "demo_clip"))
    vision = replace(both, recipe=both.recipe.model_copy(update={"scope": "vision"}))
    for kind, digests in shared_digests(vision).items():
        for number, digest in enumerate(digests):
            note_shared(
                vision, kind, digest, file := tmp_path / kind / f"{number:024x}.safetensors"
            )
            put(file)
    assert cached(vision) == ["calibration", "parts"]
    assert cached(both) == ["calibration 1 of 2", "parts 1 of 2"]
    text = replace(both, recipe=both.recipe.model_copy(update={"scope": "text"}))
    assert cached(text) == []


def test_blocks_are_counted_where_they_lie(tmp_path: Path):
    plain = request_of(tmp_path, "classification", "demo_vit")
    for number in range(3):
        put(planned_folder(plain) / "blocks" / f"block-{number:03d}.safetensors")
    assert cached(plain) == ["blocks 3"]
    part = resolved(request_of(tmp_path, "detection", "demo_mask_rcnn"))
    (digest,) = shared_digests(part)["reconstruction"]
    note_shared(
        part, "reconstruction", digest, tmp_path / "reconstruction" / f"{'a' * 24}.safetensors"
    )
    put(tmp_path / "reconstruction" / f"{'a' * 24}.blocks" / "block-000.safetensors")
    assert cached(part) == ["blocks 1"]
    put(tmp_path / "reconstruction" / f"{'a' * 24}.safetensors")
    assert cached(part) == ["parts"]


@pytest.mark.parametrize(
    "content",
    ["", "../x.safetensors", "/etc/passwd", "a" * 24, "a" * 24 + ".safetensors\n", "é", b"\xff"],
)
def test_entries_that_name_no_such_file_say_nothing(tmp_path: Path, content: str | bytes):
    cell = resolved(request_of(tmp_path, "classification", "demo_vit"))
    (digest,) = shared_digests(cell)["calibration"]
    file = tmp_path / "calibration" / f"{'a' * 24}.safetensors"
    note_shared(cell, "calibration", digest, file)
    put(file)
    put(tmp_path / "x.safetensors")
    assert cached(cell) == ["calibration"]
    (entry,) = (tmp_path / "calibration" / ".index").iterdir()
    entry.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cached(cell) == []
    note_shared(cell, "calibration", digest, file)
    assert cached(cell) == ["calibration"]


def test_an_entry_that_is_no_file_says_nothing_and_is_replaced(tmp_path: Path):
    cell = resolved(request_of(tmp_path, "classification", "demo_vit"))
    (digest,) = shared_digests(cell)["calibration"]
    file = tmp_path / "calibration" / f"{'a' * 24}.safetensors"
    note_shared(cell, "calibration", digest, file)
    put(file)
    (entry,) = (tmp_path / "calibration" / ".index").iterdir()
    for make in (os.mkfifo, lambda place: place.symlink_to("/dev/zero"), Path.mkdir):
        entry.unlink()
        make(entry)
        assert cached(cell) == []
        note_shared(cell, "calibration", digest, file)
        assert cached(cell) == ([] if entry.is_dir() else ["calibration"])


def test_an_index_that_cannot_be_written_ends_no_run(tmp_path: Path):
    cell = resolved(request_of(tmp_path, "classification", "demo_vit"))
    put(tmp_path / "calibration" / ".index")
    note_shared(cell, "calibration", "x", tmp_path / "calibration" / f"{'a' * 24}.safetensors")
    assert (tmp_path / "calibration" / ".index").is_file()


@pytest.mark.parametrize(
    ("task", "model", "scope"),
    [
        ("retrieval", "demo_clip", "both"),
        ("retrieval", "demo_clip", "text"),
        ("detection", "demo_mask_rcnn", "backbone+fpn+rpn+roi"),
        ("detection", "demo_mask_rcnn", "fpn+roi"),
        ("detection", "demo_mask_rcnn", "roi"),
    ],
)
def test_the_parts_that_plans_know_are_those_of_the_model(
    tmp_path: Path, task: str, model: str, scope: str
):
    found = get_task(task)
    recipe = make_recipe("qdrop", registry.defaults(task), {"scope": scope})
    names = [
        name
        for name in found.chains(found.load(ModelRequest(model)), recipe)
        if name not in ("bbox", "mask")
    ]
    assert registry.parts(task, scope) == {name: found.part_scope(name, recipe) for name in names}


def test_files_of_parts_are_told_apart():
    recipe = make_recipe("qdrop")
    for part, scope, address in (
        ("", None, ""),
        ("vision", "vision", "vision"),
        ("detector", "fpn", "detector fpn"),
    ):
        own = recipe.model_copy(update={"scope": scope})
        assert shared_digest("reconstruction", part, own) == address + own.digest()
        assert shared_digest("calibration", part, own) == address + own.digest("ranges")
