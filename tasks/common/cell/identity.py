"""Identity of a cell: folder of its record, and files shared with others. Imports nothing heavy."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fimaq_core import NUMERICS_VERSION
from fimaq_core.errors import CheckpointError, RecipeError, suggest
from fimaq_core.export.recipes import check_exportable
from fimaq_core.files import is_there, open_regular, remove, replaced_whole
from fimaq_core.recipe import Fields, Recipe
from tasks.common import registry
from tasks.common.cell.lease import acquire
from tasks.common.data import class_order
from tasks.common.data.elsewhere import folder_of, read_dataset, settled
from tasks.common.hashing import file_sha256
from tasks.common.record import cell_folder
from tasks.common.request import DRAWN, CellRequest, Missing

#: Variant of cells that measure an export.
ONNX = "onnx"
#: Kinds of shared files, each with its name for people.
_KINDS = {"calibration": "calibration", "mlp": "MLPs", "reconstruction": "parts"}
_KINDS["finish"] = "finished parts"


class Place(NamedTuple):
    """Place of a cell in a results folder."""

    folder: Path  # of the record
    identity: str  # sha256 (hex) of all that determines the result; the folder has 10 digits of it


def planned_folder(request: CellRequest) -> Path:
    """Return the folder of a cell, made of task, model.tag, method, bits, seed and a digest."""
    return planned_place(request).folder


def planned_place(request: CellRequest, exported: str = "") -> Place:
    """Return the folder of a cell and its whole identity.

    ``exported`` is the sha256 (hex) of an ONNX file to measure; empty if the cell makes its own.
    """
    request = resolved(request)
    recipe, basis = request.recipe, _basis(request)
    own = None if recipe is None else recipe.digest()
    rest = {"recipe": own, "variant": variant_name(request), "limit": request.data.limit}
    export = {"export": exported or True} if request.export else {}
    digest, tag = _digest({**basis, **rest, **export}), basis["model"][0]
    return Place(cell_folder(request.results, request.task, tag, recipe, digest), digest)


def recipe_digest(request: CellRequest) -> str:
    """Return the digest of a cell's recipe; empty for full precision."""
    recipe = resolved(request).recipe
    return "" if recipe is None else recipe.digest()


def _basis(request: CellRequest) -> dict[str, Any]:
    """Return all that determines the result of a resolved request, except recipe and limit."""
    recipe, model, data = request.recipe, request.model, request.data
    # The full-precision model needs no calibration images.
    listed, other = (data.calibration_list, data.calibration_data) if recipe else (None, None)
    # A named data set is measured in full precision without the data folder, unless for a head.
    home = data.path if recipe or model.head or data.dataset is None else None
    order = class_order.chosen(data.class_order, home)
    named = None
    if data.dataset is not None:
        named = [read_dataset(data.dataset).name, os.path.realpath(folder_of(data))]
    # Newer fields count only if they are given, so that older cells keep their folders.
    later = {
        "entry": model.weights_entry,
        "head": model.head,
        "preprocessing": model.preprocessing,
        "exif": data.exif,
        "class_order": None if order is None else class_order.order_identity(order),
        "dataset": named,
        "corrupt": data.corrupt,
    }
    return {
        **{name: value for name, value in later.items() if value},
        "numerics": NUMERICS_VERSION,
        "model": registry.model_identity(request.task, model),
        # A local file may be loaded under several names, and the name decides the transforms.
        "name": None if model.weights is None else model.name,
        "model_args": model.model_args,
        "data": home and os.path.realpath(home),
        "list": listed and file_sha256(listed),
        "evaluation": data.evaluation,
        "calibration_data": other and _place(other),
    }


def _place(data: Path) -> str:
    """Return the identity of calibration data: its folder, or the name of what a demo draws."""
    return str(data) if str(data).startswith(DRAWN) else os.path.realpath(data)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resolved(request: CellRequest) -> CellRequest:
    """Return the request in its only form: with a named scope, and None for the default evaluation.

    Raises RecipeError if the task has no such scope or evaluation, if ``mlp_checkpoint`` is given
    for a recipe without MLP reconstruction, or if the recipe of an export has no integer form.
    """
    if request.export:
        if request.recipe is None:
            raise RecipeError("The full-precision model has no export: give another method.")
        check_exportable(request.recipe)
    recipe, data = request.recipe, request.data
    scopes, evaluations = registry.scopes(request.task), registry.evaluations(request.task)
    scope = None if recipe is None else recipe.scope
    if request.mlp_checkpoint is not None and (recipe is None or not recipe.reconstruct_mlp):
        method = "fp" if recipe is None else recipe.method
        raise RecipeError(
            f"The recipe of '{method}' has no MLP reconstruction, so --mlp-checkpoint is not used: "
            "give --reconstruct-mlp too, or take method aphq."
        )
    for kind, wanted, known, alone in (
        ("evaluation", data.evaluation, evaluations, "It has only one"),
        ("scope", scope, scopes, "It always quantizes the whole model"),
    ):
        if wanted is not None and wanted not in known:
            hint = suggest(wanted, known) if known else f" {alone}: leave this out."
            raise RecipeError(f"Task '{request.task}' has no {kind} '{wanted}'.{hint}")
    if data.evaluation in evaluations[:1]:
        data = replace(data, evaluation=None)
    request = replace(request, data=settled(data))
    if recipe is not None and scope is None and scopes:
        request = replace(request, recipe=recipe.model_copy(update={"scope": scopes[0]}))
    return request


def unfinished(request: CellRequest) -> CellRequest:
    """Return the request of the cell that a cell with joint finishing starts from."""
    assert request.recipe is not None
    return replace(request, recipe=request.recipe.unfinished(), variant=request.base_variant)


def variant_name(request: CellRequest) -> str:
    """Return the given name, or else the settings that differ from the method's; and the scope."""
    recipe, name = request.recipe, request.variant
    if recipe is None:
        return "fp" if name is None else name
    if request.export:
        name = ONNX
    elif name is None:
        changes = recipe.changes(registry.defaults(request.task))
        name = ",".join(f"{key}={value}" for key, value in changes.items()) or "released"
    return name if recipe.scope is None else f"{name} [{recipe.scope}]"


def preflight(request: CellRequest) -> list[Missing]:
    """Return the missing data and weights of the cell."""
    request = resolved(request)
    return registry.preflight(request.task, request.model, request.data)


def shared_digest(kind: str, part: str, recipe: Recipe) -> str:
    """Return the identity of a part's shared file, without that of model and data.

    Args:
        kind: ``calibration``, ``mlp``, ``reconstruction`` or ``finish``.
        part: name of the part; empty if the model is one chain.
        recipe: recipe of the run, with its scope limited to this part.
    """
    fields: dict[str, Fields] = {"calibration": "ranges", "mlp": "mlp"}
    if kind == "reconstruction":
        recipe = recipe.unfinished()
    address = part if recipe.scope in (None, part) or not part else f"{part} {recipe.scope}"
    return address + recipe.digest(fields.get(kind, "all"))


def shared_digests(request: CellRequest) -> dict[str, list[str]]:
    """Return :func:`shared_digest` of each file that a resolved request shares, by kind.

    Each part of the model has its own file. The model is not loaded.
    """
    recipe = request.recipe
    if recipe is None:
        return {}
    parts = registry.parts(request.task, recipe.scope)
    own = {name: recipe.model_copy(update={"scope": scope}) for name, scope in parts.items()}
    wanted = ["calibration"]
    if recipe.reconstruct_mlp:
        wanted.append("mlp")
    if recipe.reconstruct and "" not in parts:
        wanted.append("reconstruction")
    if recipe.finish_steps and "" not in parts:
        wanted.append("finish")
    return {kind: [shared_digest(kind, *part) for part in own.items()] for kind in wanted}


def note_shared(request: CellRequest, kind: str, digest: str, path: Path) -> None:
    """Enter the file ``path``, which a cell of the resolved ``request`` shares, into the index.

    The name of the file depends on weights and images, which only a run loads. The index entry
    depends on the request alone, so that a plan finds the file.
    """
    entry = _index_entry(request, _basis(request), kind, digest)
    # If this fails, only plans miss the file, so the run goes on.
    with contextlib.suppress(CheckpointError), replaced_whole(entry, durable=False) as temporary:
        temporary.write_text(path.name, encoding="utf-8")


def cached(request: CellRequest, folder: Path) -> list[str]:
    """Describe the finished work of an unfinished cell, such as ``blocks 3`` or ``parts 1 of 2``.

    No file is loaded. Only a run finds out if the files still belong to the cell.
    """
    folders, texts = [folder / "blocks"], []
    for kind, files in _shared_files(request).items():
        made = [file for file in files if file and is_there(file)]
        if made:
            rest = f" {len(made)} of {len(files)}" if len(made) < len(files) else ""
            texts.append(f"{_KINDS[kind]}{rest}")
        if kind == "reconstruction":  # blocks of an unfinished part lie beside its future file
            folders += [file.with_suffix(".blocks") for file in files if file and file not in made]
    blocks = sum(1 for place in folders for _ in place.glob("block-*.safetensors"))
    return [*([f"blocks {blocks}"] if blocks else []), *texts]


def forget(
    requests: Iterable[CellRequest], folder_of: Callable[[CellRequest], Path] = planned_folder
) -> None:
    """Remove all files of cells and all files they share, so that a run starts from nothing.

    Files given by ``mlp_checkpoint`` stay. Raises Busy, and removes nothing, if another process
    works on one of the files. Raises CheckpointError if a folder cannot be written.
    """
    doomed: dict[Path, list[Path]] = {}  # files to remove, by the file whose lease protects them
    for request in requests:
        folder = folder_of(request)
        if folder.is_dir():
            # The record is removed first: a cell without a record counts as unfinished.
            record = folder / "result.json"
            doomed[record] = [record, *sorted(folder.glob("[!.]*"))]
        for kind, files in _shared_files(request).items():
            if kind != "mlp" or request.mlp_checkpoint is None:
                for file in filter(None, files):
                    doomed[file] = [file, file.with_suffix(".blocks"), file.with_suffix(".mlps")]
    for path in doomed:
        acquire(path).release()
    for path, files in doomed.items():
        with acquire(path):
            for file in files:
                remove(file)


def _shared_files(request: CellRequest) -> dict[str, list[Path | None]]:
    """Return the files that a cell shares, existing or not, by kind; None if not in the index."""
    if not any(os.path.isdir(request.results.parent / kind / ".index") for kind in _KINDS):
        return {}
    if request.data.dataset is not None or request.data.corrupt is not None:
        return {}  # the cell takes the checkpoint of the cell at home
    request = resolved(request)
    basis = _basis(request)
    return {
        kind: [_indexed_file(_index_entry(request, basis, kind, digest)) for digest in digests]
        for kind, digests in shared_digests(request).items()
    }


def _index_entry(request: CellRequest, basis: dict[str, Any], kind: str, digest: str) -> Path:
    """Return the path of the index entry of one shared file."""
    skip, task = request.data.skip_corrupt, request.task
    content = {**basis, "task": task, "skip_corrupt": skip, "kind": kind, "digest": digest}
    return request.results.parent / kind / ".index" / _digest(content)


def _indexed_file(entry: Path) -> Path | None:
    """Return the shared file that an index entry names; None if the entry is absent or invalid."""
    try:
        with open_regular(entry, 64) as file:
            name = file.read().decode()
    except (OSError, UnicodeDecodeError):
        return None
    return entry.parent.parent / name if re.fullmatch(r"[0-9a-f]{24}\.safetensors", name) else None
