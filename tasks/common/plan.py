"""The identity of a cell: where its record is, before anything heavy is imported."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from fimaq_core import NUMERICS_VERSION
from fimaq_core.errors import RecipeError, suggest
from tasks.common import registry
from tasks.common.hashing import file_sha256
from tasks.common.record import cell_folder
from tasks.common.request import CellRequest, Missing


def planned_folder(request: CellRequest) -> Path:
    """The folder of a cell, its identity: task, model.tag, method, bits, seed, and a digest of all the rest."""
    request = resolved(request)
    model = registry.model_identity(request.task, request.model)
    tag = model[0]
    recipe, chosen = request.recipe, request.data.calibration_list
    rest = {
        "numerics": NUMERICS_VERSION,
        "model": model,
        # One local file may be loaded under several names, which may say which transform goes with it.
        "name": None if request.model.weights is None else request.model.name,
        "recipe": None if recipe is None else recipe.digest(),
        "variant": variant_name(request),
        "model_args": request.model.model_args,
        "data": _path(request.data.path),
        "list": None if chosen is None or recipe is None else file_sha256(chosen),
        "limit": request.data.limit,
        "evaluation": request.data.evaluation,
        "calibration_data": _path(request.data.calibration_data) if recipe is not None else None,
    }
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    if recipe is None:
        return cell_folder(request.results, request.task, tag, "fp", 32, 32, None, digest)
    return cell_folder(request.results, request.task, tag, recipe.method, recipe.w_bits, recipe.a_bits, recipe.seed, digest)


def preflight(request: CellRequest) -> list[Missing]:
    """What the cell needs of data and weights that is not there; see :func:`tasks.common.request.describe_missing`."""
    request = resolved(request)
    return registry.preflight(request.task, request.model, request.data)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def resolved(request: CellRequest) -> CellRequest:
    """The request with the scope of its recipe spelled out, and no name for the usual evaluation: each has one name only.

    Raises:
        RecipeError: the task has no such scope or evaluation.
    """
    recipe, wanted = request.recipe, request.data.evaluation
    if wanted is not None:
        evaluations = registry.evaluations(request.task)
        if wanted not in evaluations:
            known = suggest(wanted, evaluations) if evaluations else " It has one only: leave this out."
            raise RecipeError(f"Task '{request.task}' has no evaluation '{wanted}'.{known}")
        if wanted == evaluations[0]:
            request = replace(request, data=replace(request.data, evaluation=None))
    if recipe is None:
        return request
    scopes = registry.scopes(request.task)
    if recipe.scope is None:
        return replace(request, recipe=recipe.model_copy(update={"scope": scopes[0]})) if scopes else request
    if not scopes:
        raise RecipeError(f"Task '{request.task}' always quantizes the whole model: leave scope '{recipe.scope}' out.")
    if recipe.scope not in scopes:
        raise RecipeError(f"Task '{request.task}' has no scope '{recipe.scope}'.{suggest(recipe.scope, scopes)}")
    return request


def variant_name(request: CellRequest) -> str:
    """Name of the variant: as asked for, else what differs from the method's released settings; with the scope if it has one."""
    recipe = request.recipe
    if recipe is None:
        return "fp" if request.variant is None else request.variant
    name = request.variant
    if name is None:
        changes = recipe.changes(registry.defaults(request.task))
        name = ",".join(f"{key}={value}" for key, value in changes.items()) if changes else "released"
    return name if recipe.scope is None else f"{name} [{recipe.scope}]"
