"""Identity of a cell: where its record is, and what it shares with others. Imports nothing heavy."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fimaq_core import NUMERICS_VERSION
from fimaq_core.errors import CheckpointError, RecipeError, suggest
from fimaq_core.files import remove, replaced_whole
from fimaq_core.recipe import Recipe
from tasks.common import registry
from tasks.common.cell.lease import acquire
from tasks.common.data.class_order import chosen as chosen_order
from tasks.common.data.class_order import order_identity
from tasks.common.hashing import file_sha256
from tasks.common.record import cell_folder
from tasks.common.request import CellRequest, Missing


def planned_folder(request: CellRequest) -> Path:
    """Return the folder of a cell: task, model.tag, method, bits, seed, and a digest of all the rest."""
    request = resolved(request)
    recipe, basis = request.recipe, _basis(request)
    own = None if recipe is None else recipe.digest()
    digest = _digest(
        {**basis, "recipe": own, "variant": variant_name(request), "limit": request.data.limit}
    )
    name = (
        ("fp", 32, 32, None)
        if recipe is None
        else (recipe.method, recipe.w_bits, recipe.a_bits, recipe.seed)
    )
    return cell_folder(request.results, request.task, basis["model"][0], *name, digest)


def _basis(request: CellRequest) -> dict[str, Any]:
    """All that decides the result of a resolved request, but for the recipe and the evaluated samples."""
    recipe, chosen = request.recipe, request.data.calibration_list
    order = chosen_order(request.data.class_order, request.data.path)
    given = {"entry": request.model.weights_entry, "preprocessing": request.model.preprocessing}
    return {
        **{name: value for name, value in given.items() if value},
        "numerics": NUMERICS_VERSION,
        "model": registry.model_identity(request.task, request.model),
        # One local file may be loaded under several names, which may stand for other transforms.
        "name": None if request.model.weights is None else request.model.name,
        "model_args": request.model.model_args,
        "data": _path(request.data.path),
        "list": None if chosen is None or recipe is None else file_sha256(chosen),
        "evaluation": request.data.evaluation,
        "calibration_data": _path(request.data.calibration_data) if recipe is not None else None,
        # Only where it is given, so that cells from before this option keep their identity.
        **({} if request.data.exif is None else {"exif": request.data.exif}),
        # Without an order, cells keep the identity that they had before there was a choice.
        **({} if order is None else {"class_order": order_identity(order)}),
    }


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def note_shared(request: CellRequest, kind: str, digest: str, path: Path) -> None:
    """Note in the index of its folder that a cell of the resolved ``request`` shares the file ``path``.

    The file's name comes from weights and images, which only a run has loaded; the index goes by the
    request alone, so that plans find the file. ``kind``, ``digest``: see :func:`shared_digest`.
    """
    entry = _index(request, kind) / _entry(request, _basis(request), kind, digest)
    try:
        if not entry.is_file() or entry.read_bytes() != path.name.encode():
            with replaced_whole(entry, durable=False) as temporary:
                temporary.write_text(path.name, encoding="utf-8")
    except (CheckpointError, OSError):
        return  # plans then do not know of the file, which is no reason to end a run


#: Digests that settle a shared file beside model, data and part, by its kind.
_DIGESTS: dict[str, Callable[[Recipe], str]] = {
    "calibration": Recipe.calibration_digest,
    "mlp": Recipe.mlp_digest,
    "reconstruction": Recipe.digest,
}


def shared_digest(kind: str, part: str, recipe: Recipe) -> str:
    """Return what settles the shared file of a part beside model and data.

    Args:
        kind: ``calibration``, ``mlp`` or ``reconstruction``.
        part: its name; empty where the model is one chain.
        recipe: the run's, with the scope of this part alone.
    """
    return f"{part_address(part, recipe.scope)}{_DIGESTS[kind](recipe)}"


def part_address(name: str, scope: str | None) -> str:
    """Return what tells shared files of a part from those of other parts and of other scopes in it."""
    return name if scope in (None, name) or not name else f"{name} {scope}"


def shared_digests(request: CellRequest) -> dict[str, list[str]]:
    """Return the digests of the files that a cell of a resolved ``request`` shares, by kind.

    One file for each part of the model that the task knows without loading it.
    """
    recipe = request.recipe
    if recipe is None:
        return {}
    parts = registry.parts(request.task, recipe.scope)
    wanted = {
        "calibration": True,
        "mlp": recipe.reconstruct_mlp,
        "reconstruction": recipe.reconstruct and "" not in parts,
    }
    own = {name: recipe.model_copy(update={"scope": scope}) for name, scope in parts.items()}
    return {
        kind: [shared_digest(kind, *part) for part in own.items()]
        for kind, use in wanted.items()
        if use
    }


#: Names of the kinds of shared files for people.
_KINDS = {"calibration": "calibration", "mlp": "MLPs", "reconstruction": "parts"}


def cached(request: CellRequest, folder: Path) -> list[str]:
    """Describe, for people, the work of an unfinished cell that is done already.

    Such as ``blocks 3``, ``calibration``, ``MLPs``, ``parts 1 of 2``. Nothing is loaded: only the
    run can tell whether it still belongs to the cell.
    """
    blocks = _count(folder / "blocks")
    texts = []
    for kind, files in _noted(request).items():
        there = sum(file is not None and file.is_file() for file in files)
        if there:
            texts.append(_KINDS[kind] + (f" {there} of {len(files)}" if there < len(files) else ""))
        if kind == "reconstruction":
            # What a reconstruction that is not whole has finished lies beside where it will be.
            blocks += sum(
                _count(file.with_suffix(".blocks")) for file in files if file and not file.is_file()
            )
    return [*([f"blocks {blocks}"] if blocks else []), *texts]


def forget(
    requests: Iterable[CellRequest], folder_of: Callable[[CellRequest], Path] = planned_folder
) -> None:
    """Remove all that is there of cells and of files they share, so that a run starts from nothing.

    Files given by ``mlp_checkpoint`` stay.

    Raises:
        Busy: another process measures a cell or makes a file; nothing is removed.
        CheckpointError: a folder cannot be written.
    """
    kept: dict[Path, list[Path]] = {}
    for request in requests:
        folder = folder_of(request)
        if folder.is_dir():
            # The record goes first: without one, a cell of which a part is left is not finished.
            rest = sorted(path for path in folder.glob("[!.]*") if path.name != "result.json")
            kept[folder / "result.json"] = [folder / "result.json", *rest]
        for kind, files in _noted(request).items():
            if kind == "mlp" and request.mlp_checkpoint is not None:
                continue
            for file in files:
                if file is not None:
                    kept[file] = [file, file.with_suffix(".blocks"), file.with_suffix(".mlps")]
    for path in kept:
        acquire(path).release()
    for path, parts in kept.items():
        with acquire(path):
            for part in parts:
                remove(part)


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("block-*.safetensors"))


def _noted(request: CellRequest) -> dict[str, list[Path | None]]:
    """The files by kind that a cell shares, there or not; None for one that no run has noted."""
    if not any(_index(request, kind).is_dir() for kind in _KINDS):
        return {}
    request = resolved(request)
    basis = _basis(request)
    return {
        kind: [
            _shared_file(_index(request, kind) / _entry(request, basis, kind, digest))
            for digest in digests
        ]
        for kind, digests in shared_digests(request).items()
    }


def _shared_file(entry: Path) -> Path | None:
    try:
        with entry.open(encoding="utf-8") as file:
            name = file.read(64)
    except (OSError, UnicodeDecodeError):
        return None
    return entry.parent.parent / name if re.fullmatch(r"[0-9a-f]{24}\.safetensors", name) else None


def _index(request: CellRequest, kind: str) -> Path:
    return request.results.parent / kind / ".index"


def _entry(request: CellRequest, basis: dict[str, Any], kind: str, digest: str) -> str:
    return _digest(
        {
            **basis,
            "task": request.task,
            "skip_corrupt": request.data.skip_corrupt,
            "kind": kind,
            "digest": digest,
        }
    )


def preflight(request: CellRequest) -> list[Missing]:
    """Return what the cell needs of data and weights that is not there."""
    request = resolved(request)
    return registry.preflight(request.task, request.model, request.data)


def _path(path: Path | None) -> str | None:
    return None if path is None else os.path.realpath(path)


def resolved(request: CellRequest) -> CellRequest:
    """Return the request with one name for each choice: scope spelled out, usual evaluation None.

    Raises:
        RecipeError: the task has no such scope or evaluation.
    """
    recipe, wanted = request.recipe, request.data.evaluation
    if wanted is not None:
        evaluations = registry.evaluations(request.task)
        if wanted not in evaluations:
            known = (
                suggest(wanted, evaluations) if evaluations else " It has one only: leave this out."
            )
            raise RecipeError(f"Task '{request.task}' has no evaluation '{wanted}'.{known}")
        if wanted == evaluations[0]:
            request = replace(request, data=replace(request.data, evaluation=None))
    if recipe is None:
        return request
    scopes = registry.scopes(request.task)
    if recipe.scope is None:
        return (
            replace(request, recipe=recipe.model_copy(update={"scope": scopes[0]}))
            if scopes
            else request
        )
    if not scopes:
        raise RecipeError(
            f"Task '{request.task}' always quantizes the whole model: leave scope '{recipe.scope}' out."
        )
    if recipe.scope not in scopes:
        raise RecipeError(
            f"Task '{request.task}' has no scope '{recipe.scope}'.{suggest(recipe.scope, scopes)}"
        )
    return request


def variant_name(request: CellRequest) -> str:
    """Return the variant's name: as asked for, else the changes of the method's settings; and the scope."""
    recipe = request.recipe
    if recipe is None:
        return "fp" if request.variant is None else request.variant
    name = request.variant
    if name is None:
        changes = recipe.changes(registry.defaults(request.task))
        name = (
            ",".join(f"{key}={value}" for key, value in changes.items()) if changes else "released"
        )
    return name if recipe.scope is None else f"{name} [{recipe.scope}]"
