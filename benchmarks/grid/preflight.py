"""Checks for missing data, weights and packages of cells."""

import importlib
from collections.abc import Sequence
from typing import Any

from benchmarks.grid.cell import Adapter, Cell
from fimaq_core.errors import FimaqError
from fimaq_core.export import require_export
from tasks.common import registry
from tasks.common.request import Missing, describe_missing


def not_made(cell: Cell) -> str | None:
    """Return the command that makes the data and weights of a cell, if its folder is missing."""
    folder = cell.request.data.path
    if not cell.made_by or folder is None or (folder / "val").is_dir():
        return None
    return f"Missing: the folder {folder} of {cell.section}. Make it: {cell.made_by}"


def missing(cells: Sequence[Cell], adapter: Adapter) -> list[str]:
    """Return one message per missing data set, weights file and extra, and impossible request."""
    found: list[Missing] = []
    errors: dict[str, None] = {}
    if any(cell.request.export for cell in cells):
        try:
            require_export()
        except FimaqError as error:
            errors[str(error)] = None
    for cell in {(cell.section, cell.model): cell for cell in cells}.values():
        if (message := not_made(cell)) is not None:
            errors[message] = None
            continue
        try:
            found += adapter.preflight(cell.request)
        except FimaqError as error:
            errors[str(error)] = None
    if not found and not errors:  # the folder depends on data and weights
        for cell in {(cell.section, cell.scope): cell for cell in cells}.values():
            try:
                adapter.planned_folder(cell.request)
            except FimaqError as error:
                errors[str(error)] = None
    return [*errors, *(describe_missing(found) or "").splitlines()]


def fetch_weights(cell: Cell) -> str | None:
    """Return the command that downloads the weights of a cell; does not use the network.

    None if the weights are on this machine; empty if no hub has them.

    Raises:
        ModelError: the model is unknown.
    """
    from tasks.common.models.hub import cached_file

    if cell.task not in registry.TASKS:
        return None
    catalogue, request = _tags_module(cell).CATALOGUE, cell.request.model
    if request.name in catalogue.demo_names or catalogue.local_weights(request) is not None:
        return None
    place = catalogue.repository(catalogue.model_tag(request))
    if place is None:
        return ""
    return None if cached_file(place) else f"hf download {place.repo} {place.files[0]}"


def missing_data(cell: Cell) -> Missing | None:
    """Return the data of a cell if they are missing; does not use the network.

    The model must be a published one: demo models bring their own data.
    """
    found: Missing | None = _tags_module(cell).missing_data(cell.request.data, False)
    return found


def _tags_module(cell: Cell) -> Any:
    return importlib.import_module(f"tasks.{cell.task}.tags")
