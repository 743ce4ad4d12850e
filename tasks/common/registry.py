"""Finding tasks. Nothing heavy is imported until a task runs, so that planning a grid takes no time."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fimaq_core.errors import RecipeError, suggest
from tasks.common.request import DataRequest, Missing, ModelRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from tasks.common.task import Task

#: Tasks that are packages here. Each has ``tags.py`` (light: names and what is missing) and ``task.py``.
TASKS = ("classification", "retrieval", "detection")
_REGISTERED: dict[str, Task] = {}


def register_task(task: Task) -> None:
    """Make a task from elsewhere known under its name.

    Raises:
        RecipeError: the name is taken.
    """
    if task.name in TASKS or task.name in _REGISTERED:
        raise RecipeError(f"A task named '{task.name}' exists already: choose another name.")
    _REGISTERED[task.name] = task


def get_task(name: str) -> Task:
    """Find a task, importing its package and libraries.

    Raises:
        RecipeError: there is no such task.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    _check(name)
    task: Task = importlib.import_module(f"tasks.{name}.task").TASK
    return task


def model_tag(name: str, request: ModelRequest) -> str:
    """Return ``model.tag`` of a request to task ``name``; light for short and demo names. Raises ModelError."""
    tag: str = _light(name, "model_tag")(request)
    return tag


def model_identity(name: str, request: ModelRequest) -> list[str]:
    """Return ``model.tag`` and, where the weights are a file here, its sha256: the model in a cell's identity."""
    digest: str | None = _light(name, "weights_digest", lambda _: None)(request)
    return [model_tag(name, request), *([] if digest is None else [digest])]


def scopes(name: str) -> tuple[str, ...]:
    """Return what of a model task ``name`` can quantize, the usual first; empty where that is always everything."""
    return tuple(_light(name, "SCOPES", ()))


def parts(name: str, scope: str | None) -> dict[str, str | None]:
    """Return the parts of a model that task ``name`` quantizes each by itself, and what of each ``scope`` takes.

    Only those that take long; ``{"": scope}`` where the model is one chain.
    """
    return dict(_light(name, "parts", lambda scope: {"": scope})(scope))


def evaluations(name: str) -> tuple[str, ...]:
    """Return what task ``name`` can measure, the usual first; empty where that is one thing only."""
    return tuple(_light(name, "EVALUATIONS", ()))


def defaults(name: str) -> dict[str, Any]:
    """Return recipe fields that task ``name`` sets for every method alike, where the user does not."""
    return dict(_light(name, "DEFAULTS", {}))


def preflight(name: str, model: ModelRequest, data: DataRequest) -> list[Missing]:
    """Return what task ``name`` needs of weights and data that is not there. Downloads nothing."""
    missing: list[Missing] = _light(name, "preflight")(model, data)
    return missing


def pictures(name: str, model: ModelRequest, data: DataRequest, ids: Sequence[str]) -> dict[str, Image.Image]:
    """Call :meth:`~tasks.common.task.Task.pictures` of task ``name``, without its libraries of models. Raises DataError."""
    if name in _REGISTERED:
        return _REGISTERED[name].pictures(model, data, ids)
    _check(name)
    found: dict[str, Image.Image] = importlib.import_module(f"tasks.{name}.pictures").pictures(model, data, ids)
    return found


def _light(name: str, what: str, *default: Any) -> Any:
    """An attribute of a registered task, or of the light module of one here, where it may be a constant."""
    if name in _REGISTERED:
        return getattr(_REGISTERED[name], what.lower(), *default)
    return getattr(_tags(name), what, *default)


@cache
def _tags(name: str) -> ModuleType:
    """The light module of a task that is a package here. Kept: a plan asks it several times a cell."""
    _check(name)
    return importlib.import_module(f"tasks.{name}.tags")


def _check(name: str) -> None:
    if name not in TASKS:
        raise RecipeError(f"Unknown task '{name}'.{suggest(name, [*TASKS, *_REGISTERED])}")
