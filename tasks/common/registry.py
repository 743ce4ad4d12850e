"""Finding tasks. Nothing heavy is imported until a task runs: planning a grid takes no time."""

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

#: Tasks that are packages here. Each has ``task.py`` and the light ``tags.py``.
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
    """Return ``model.tag`` of a request; light for short and demo names. Raises ModelError."""
    tag: str = _light(name, "model_tag")(request)
    return tag


def model_identity(name: str, request: ModelRequest) -> list[str]:
    """Return the model in a cell's identity: ``model.tag``, and the sha256 of weights in a file here."""
    tag = model_tag(name, request)
    digest: str | None = _light(name, "weights_digest", lambda _: None)(request)
    return [tag] if digest is None else [tag, digest]


def scopes(name: str) -> tuple[str, ...]:
    """Return what of a model can be quantized, the usual first; empty: always everything."""
    return tuple(_light(name, "SCOPES", ()))


def parts(name: str, scope: str | None) -> dict[str, str | None]:
    """Return the parts of a model that are quantized each by itself, and what of each ``scope`` takes.

    Only those that take long; ``{"": scope}`` where the model is one chain.
    """
    return dict(_light(name, "parts", lambda scope: {"": scope})(scope))


def evaluations(name: str) -> tuple[str, ...]:
    """Return what the task can measure, the usual first; empty where that is one thing only."""
    return tuple(_light(name, "EVALUATIONS", ()))


def defaults(name: str) -> dict[str, Any]:
    """Return recipe fields that the task sets for every method alike, where the user does not."""
    return dict(_light(name, "DEFAULTS", {}))


def preflight(name: str, model: ModelRequest, data: DataRequest) -> list[Missing]:
    """Return what task ``name`` needs of weights and data that is not there. Downloads nothing."""
    missing: list[Missing] = _light(name, "preflight")(model, data)
    return missing


def originals(
    name: str, model: ModelRequest, data: DataRequest, ids: Sequence[str]
) -> dict[str, Image.Image]:
    """Call :meth:`tasks.common.task.Task.originals` without libraries of models. Raises DataError."""
    if name in _REGISTERED:
        return _REGISTERED[name].originals(model, data, ids)
    _check(name)
    found: dict[str, Image.Image] = importlib.import_module(f"tasks.{name}.originals").originals(
        model, data, ids
    )
    return found


def _light(name: str, what: str, *default: Any) -> Any:
    """An attribute of a registered task, or of the light module of one here."""
    if name in _REGISTERED:
        return getattr(_REGISTERED[name], what.lower(), *default)
    return getattr(_tags(name), what, *default)


@cache
def _tags(name: str) -> ModuleType:
    """The light module of a task here. Kept: a plan asks for it several times per cell."""
    _check(name)
    return importlib.import_module(f"tasks.{name}.tags")


def _check(name: str) -> None:
    if name not in TASKS:
        raise RecipeError(f"Unknown task '{name}'.{suggest(name, [*TASKS, *_REGISTERED])}")
