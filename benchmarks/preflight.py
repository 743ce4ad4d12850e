"""What a grid needs and that is not there."""

from collections.abc import Sequence

from benchmarks.cells import Adapter, Cell
from fimaq_core.errors import FimaqError
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
