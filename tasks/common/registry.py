"""Tasks by name. Planning stays fast, because libraries are imported only when a task runs.

Each package ``tasks/<name>`` with ``tags.py``, ``task.py``, ``originals.py`` and ``__main__.py`` is
a task; no list names it. :func:`register_task` adds a task of another project.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fimaq_core.errors import RecipeError, suggest
from tasks.common.request import DataRequest, Missing, ModelRequest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from PIL import Image

    from tasks.common.task import Task

#: Names of the packages beside this one that are tasks.
TASKS = tuple(sorted(file.parent.name for file in Path(__file__).parents[1].glob("*/tags.py")))
_REGISTERED: dict[str, Task] = {}


def register_task(task: Task) -> None:
    """Add a task of another project. Raises RecipeError if its name is taken."""
    if task.name in TASKS or task.name in _REGISTERED:
        raise RecipeError(f"A task named '{task.name}' exists already: choose another name.")
    _REGISTERED[task.name] = task


def get_task(name: str) -> Task:
    """Import and return a task with its libraries. Raises RecipeError for an unknown name."""
    return _REGISTERED[name] if name in _REGISTERED else _module(name, "task").TASK


def model_tag(name: str, request: ModelRequest) -> str:
    """Return the ``model.tag`` of a request. Raises ModelError."""
    return _of_tags(name, "model_tag")(request)


def model_identity(name: str, request: ModelRequest) -> list[str]:
    """Return the identity of a model: its tag and, for a local weights file, the sha256."""
    tag = model_tag(name, request)
    digest = _of_tags(name, "weights_digest", lambda _: None)(request)
    return [tag] if digest is None else [tag, digest]


def scopes(name: str) -> tuple[str, ...]:
    """Return the scopes, the default first; empty if the whole model is always quantized."""
    return tuple(_of_tags(name, "SCOPES", ()))


def parts(name: str, scope: str | None) -> dict[str, str | None]:
    """Return the scope of each part of a model that takes time; ``{"": scope}`` for one chain."""
    return dict(_of_tags(name, "parts", lambda scope: {"": scope})(scope))


def evaluations(name: str) -> tuple[str, ...]:
    """Return the names of measurements, the default first; empty if the task has only one."""
    return tuple(_of_tags(name, "EVALUATIONS", ()))


def main_metric(name: str) -> str:
    """Return the metric that the tables of a task show."""
    return str(_of_tags(name, "MAIN_METRIC"))


def defaults(name: str) -> dict[str, Any]:
    """Return the task's own defaults of recipe fields, which hold for every method."""
    return dict(_of_tags(name, "DEFAULTS", {}))


def preflight(name: str, model: ModelRequest, data: DataRequest) -> list[Missing]:
    """Return the missing weights and data. Downloads nothing."""
    return _of_tags(name, "preflight")(model, data)


def originals(
    name: str, model: ModelRequest, data: DataRequest, ids: Sequence[str]
) -> dict[str, Image.Image]:
    """Call :meth:`tasks.common.task.Task.originals` without importing model libraries."""
    source = _REGISTERED[name] if name in _REGISTERED else _module(name, "originals")
    return source.originals(model, data, ids)


def _of_tags(name: str, attribute: str, default: Any = None) -> Any:
    """Return an attribute of ``tags.py``; a registered task may have it itself, in lower case."""
    task = _REGISTERED.get(name)
    tags = _module(name, "tags") if task is None else task.tags
    return getattr(task, attribute.lower(), getattr(tags, attribute, default))


@cache  # a plan asks for each module several times per cell
def _module(name: str, module: str) -> ModuleType:
    if name not in TASKS:
        raise RecipeError(f"Unknown task '{name}'.{suggest(name, [*TASKS, *_REGISTERED])}")
    return importlib.import_module(f"tasks.{name}.{module}")
