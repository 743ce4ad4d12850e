"""Finding tasks. Nothing heavy is imported until a task runs, so that planning a grid takes no time."""

from __future__ import annotations

import importlib
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
    """``model.tag`` of a request to task ``name``; light for short and demo names. Raises ModelError."""
    if name in _REGISTERED:
        return _REGISTERED[name].model_tag(request)
    _check(name)
    tag: str = importlib.import_module(f"tasks.{name}.tags").model_tag(request)
    return tag


def model_identity(name: str, request: ModelRequest) -> list[str]:
    """``model.tag`` and, where the weights are a file here, its sha256: what a cell's identity needs of its model."""
    tag = model_tag(name, request)
    if name in _REGISTERED:
        return [tag]
    digest: str | None = importlib.import_module(f"tasks.{name}.tags").weights_digest(request)
    return [tag] if digest is None else [tag, digest]


def scopes(name: str) -> tuple[str, ...]:
    """What of a model task ``name`` can quantize, the usual first; empty where that is always everything."""
    if name in _REGISTERED:
        return _REGISTERED[name].scopes
    _check(name)
    found: tuple[str, ...] = importlib.import_module(f"tasks.{name}.tags").SCOPES
    return found


def evaluations(name: str) -> tuple[str, ...]:
    """What task ``name`` can measure, the usual first; empty where that is one thing only."""
    if name in _REGISTERED:
        return getattr(_REGISTERED[name], "evaluations", ())
    _check(name)
    found: tuple[str, ...] = getattr(importlib.import_module(f"tasks.{name}.tags"), "EVALUATIONS", ())
    return found


def defaults(name: str) -> dict[str, Any]:
    """Recipe fields that task ``name`` sets for every method alike, where the user does not."""
    if name in _REGISTERED:
        return dict(getattr(_REGISTERED[name], "defaults", {}))
    _check(name)
    return dict(getattr(importlib.import_module(f"tasks.{name}.tags"), "DEFAULTS", {}))


def preflight(name: str, model: ModelRequest, data: DataRequest) -> list[Missing]:
    """What task ``name`` needs of weights and data that is not there. Downloads nothing."""
    if name in _REGISTERED:
        return _REGISTERED[name].preflight(model, data)
    _check(name)
    missing: list[Missing] = importlib.import_module(f"tasks.{name}.tags").preflight(model, data)
    return missing


def pictures(name: str, model: ModelRequest, data: DataRequest, ids: Sequence[str]) -> dict[str, Image.Image]:
    """:meth:`~tasks.common.task.Task.pictures` of task ``name``, without its libraries of models. Raises DataError."""
    if name in _REGISTERED:
        return _REGISTERED[name].pictures(model, data, ids)
    _check(name)
    found: dict[str, Image.Image] = importlib.import_module(f"tasks.{name}.pictures").pictures(model, data, ids)
    return found


def _check(name: str) -> None:
    if name not in TASKS:
        raise RecipeError(f"Unknown task '{name}'.{suggest(name, [*TASKS, *_REGISTERED])}")
