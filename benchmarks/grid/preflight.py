"""Missing data and weights of a grid's cells."""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class WeightsPlace(NamedTuple):
    """Place of the weights of a cell."""

    here: bool  #: True for a file on this machine
    repository: str = ""  #: repository of the hub, where they are not here
    command: str = ""  #: command that fetches them


def weights_place(cell: Cell) -> WeightsPlace:
    """Return the place of the weights without network. Raises ModelError for an unknown model."""
    from tasks.common.models.hub import cached_file

    if cell.task not in registry.TASKS:
        return WeightsPlace(here=True)
    catalogue, request = _tags(cell).CATALOGUE, cell.request.model
    if request.name in catalogue.demo_names or catalogue.local_weights(request) is not None:
        return WeightsPlace(here=True)
    place = catalogue.repository(catalogue.model_tag(request))
    if place is None or cached_file(place) is not None:
        return WeightsPlace(here=place is not None)
    return WeightsPlace(False, place.repo, f"hf download {place.repo} {place.files[0]}")


def missing_data(cell: Cell) -> Missing | None:
    """Return the data of a published model's cell if they are missing. Asks no network."""
    found: Missing | None = _tags(cell).missing_data(cell.request.data, False)
    return found


def _tags(cell: Cell) -> Any:
    return importlib.import_module(f"tasks.{cell.task}.tags")
