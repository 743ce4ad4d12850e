"""Missing data and weights of a grid's cells."""

import importlib
from collections.abc import Sequence
from typing import Any

from benchmarks.grid.cell import Adapter, Cell
from fimaq_core.errors import FimaqError
from tasks.common import registry
from tasks.common.request import Missing, describe_missing


def missing(cells: Sequence[Cell], adapter: Adapter) -> list[str]:
    """Return one message per kind of missing data or weights, and per bad request."""
    found: list[Missing] = []
    errors: dict[str, None] = {}
    for cell in {(cell.section, cell.model): cell for cell in cells}.values():
        try:
            found += adapter.preflight(cell.request)
        except FimaqError as error:
            errors[str(error)] = None
    if not found and not errors:  # otherwise a cell's folder may not be known
        for cell in {(cell.section, cell.scope): cell for cell in cells}.values():
            try:
                adapter.planned_folder(cell.request)
            except FimaqError as error:
                errors[str(error)] = None
    return [*errors, *(describe_missing(found) or "").splitlines()]


def fetch_weights(cell: Cell) -> str | None:
    """Return the command that fetches the weights from the hub, without asking the network.

    None if the weights are on this machine; empty if no hub has them. Raises ModelError for an
    unknown model.
    """
    from tasks.common.models.hub import cached_file

    if cell.task not in registry.TASKS:
        return None
    catalogue, request = _tags(cell).CATALOGUE, cell.request.model
    if request.name in catalogue.demo_names or catalogue.local_weights(request) is not None:
        return None
    place = catalogue.repository(catalogue.model_tag(request))
    if place is None:
        return ""
    return None if cached_file(place) else f"hf download {place.repo} {place.files[0]}"


def missing_data(cell: Cell) -> Missing | None:
    """Return the data of a published model's cell if they are missing. Asks no network."""
    found: Missing | None = _tags(cell).missing_data(cell.request.data, False)
    return found


def _tags(cell: Cell) -> Any:
    return importlib.import_module(f"tasks.{cell.task}.tags")
