"""The identity of a cell: where its record is, before anything heavy is imported."""

import hashlib
import json
from pathlib import Path

from fimaq_core import NUMERICS_VERSION
from tasks.common import registry
from tasks.common.hashing import file_sha256
from tasks.common.record import cell_folder
from tasks.common.request import CellRequest, Missing


def planned_folder(request: CellRequest) -> Path:
    """The folder of a cell, its identity: task, model.tag, method, bits, seed, and a digest of all the rest."""
    model = registry.model_identity(request.task, request.model)
    tag = model[0]
    recipe, chosen = request.recipe, request.data.calibration_list
    rest = {
        "numerics": NUMERICS_VERSION,
        "model": model,
        "recipe": None if recipe is None else recipe.digest(),
        "variant": variant_name(request),
        "model_args": request.model.model_args,
        "data": None if request.data.path is None else str(request.data.path.resolve()),
        "list": None if chosen is None or recipe is None else file_sha256(chosen),
        "limit": request.data.limit,
    }
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    if recipe is None:
        return cell_folder(request.results, request.task, tag, "fp", 32, 32, None, digest)
    return cell_folder(request.results, request.task, tag, recipe.method, recipe.w_bits, recipe.a_bits, recipe.seed, digest)


def preflight(request: CellRequest) -> list[Missing]:
    """What the cell needs of data and weights that is not there; see :func:`tasks.common.request.describe_missing`."""
    return registry.preflight(request.task, request.model, request.data)


def variant_name(request: CellRequest) -> str:
    """Name of the variant: as asked for, else what differs from the method's released settings."""
    if request.variant is not None:
        return request.variant
    if request.recipe is None:
        return "fp"
    changes = request.recipe.changes()
    return ",".join(f"{name}={value}" for name, value in changes.items()) if changes else "released"
