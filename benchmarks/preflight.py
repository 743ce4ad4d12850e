"""What a grid needs and that is not there."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cells import Adapter, Cell
from fimaq_core.errors import FimaqError
from tasks.common import registry
from tasks.common.request import Missing, describe_missing


def missing(cells: Sequence[Cell], adapter: Adapter) -> list[str]:
    """Return one message for every kind of data or weights that the cells need and that are not there.

    And one for every request that makes no sense, such as a scope that the task does not have.
    """
    found: list[Missing] = []
    errors: dict[str, None] = {}
    for cell in {(cell.section, cell.model): cell for cell in cells}.values():
        try:
            found += adapter.preflight(cell.request)
        except FimaqError as error:
            errors.setdefault(str(error))
    if not found and not errors:  # else a cell's folder may not be known
        for cell in {(cell.section, cell.scope): cell for cell in cells}.values():
            try:
                adapter.planned_folder(cell.request)
            except FimaqError as error:
                errors.setdefault(str(error))
    return [*errors, *(describe_missing(found) or "").splitlines()]


@dataclass(frozen=True)
class WeightsPlace:
    """Where the weights of a cell are.

    Attributes:
        here: a file of this machine has them.
        repository: the hub's repository that has them, where they are not here; empty for none.
        command: fetches them; empty where no hub has them.
    """

    here: bool
    repository: str = ""
    command: str = ""


def weights_place(cell: Cell) -> WeightsPlace:
    """Return where the weights are. Asks no network. Raises ModelError for an unknown model."""
    from tasks.common.hub import cached_file

    if cell.task not in registry.TASKS:
        return WeightsPlace(here=True)
    catalogue, request = _tags(cell).CATALOGUE, cell.request.model
    if request.name in catalogue.demo_names or catalogue.local_weights(request) is not None:
        return WeightsPlace(here=True)
    place = catalogue.repository(catalogue.model_tag(request))
    if place is None:
        return WeightsPlace(here=False)
    if cached_file(place) is not None:
        return WeightsPlace(here=True)
    return WeightsPlace(False, place.repo, f"hf download {place.repo} {place.files[0]}")


def missing_data(cell: Cell) -> Missing | None:
    """Return the data of a cell of a published model, if they are not there. Asks no network."""
    found: Missing | None = _tags(cell).missing_data(cell.request.data, False)
    return found


def _tags(cell: Cell) -> Any:
    return importlib.import_module(f"tasks.{cell.task}.tags")
