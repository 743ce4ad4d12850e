"""Origin of a checkpoint or an export: task, model and stage. The file is not trusted."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fimaq_core.checkpoint import Fingerprint, read_header
from fimaq_core.documents import Strict
from fimaq_core.errors import CheckpointError, FimaqError, ModelError, first_problem
from fimaq_core.export.opening import OnnxFile
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.finish import Finishing
from tasks.common.preprocessing import GivenPreprocessing
from tasks.common.registry import scopes
from tasks.common.request import CellRequest

#: Names of models: no address such as ``hf-hub:...``, no absolute path, no ``..``.
_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.+-]+)*")
#: Texts in arguments, such as kinds of pooling: no paths, no addresses, no dotted Python names.
_WORD = re.compile(r"[A-Za-z0-9_ +-]*")


class Origin(Strict, strict=True):
    """Facts in a checkpoint's header, or an export, that tell how to build and load its model."""

    task: str
    model: str
    model_args: dict[str, Any]
    tag: str
    stage: Literal["mlp", "calibrated", "reconstructed", "finished"]
    weights_entry: str | None = None
    preprocessing: GivenPreprocessing = GivenPreprocessing()
    finishing: Finishing | None = None  # of a model of one part
    head: Literal["knn", "linear"] | None = None  # classifier on the features that the model gives


def read_origin(path: Path, task: str) -> tuple[Fingerprint, Origin]:
    """Read fingerprint and origin of the checkpoint of a whole model of ``task``.

    Raises CheckpointError if the file is no checkpoint, belongs to another task or to one part of a
    model, or has facts that would make a library read a file, download or import something.
    """
    fingerprint, content = read_header(path)

    def refused(why: str) -> CheckpointError:
        return CheckpointError(f"The checkpoint {path} {why}.")

    return fingerprint, _checked(content, task, fingerprint.recipe.scope, refused)


def origin_of_export(file: OnnxFile, task: str) -> tuple[Recipe, Origin]:
    """Return recipe and origin of an export of ``task``, under the rules of :func:`read_origin`.

    Raises ModelError.
    """
    facts = file.facts
    given = facts.extra.get("origin", {})
    own = {name: getattr(facts, name) for name in ("task", "model", "model_args", "tag")}
    recipe = Recipe.model_validate(facts.recipe)

    def refused(why: str) -> ModelError:
        return ModelError(f"{file.path} {why}.")

    if not facts.task:
        raise refused(f"is of no task: export a checkpoint with `python -m tasks.{task} export`")
    if not isinstance(given, dict):
        raise refused("does not name its model (origin is no object)")
    return recipe, _checked({**given, **own, "stage": "calibrated"}, task, recipe.scope, refused)


def with_origin(request: CellRequest, origin: Origin, recipe: Recipe | None = None) -> CellRequest:
    """Return the request with a file's model; fields given in the request have priority."""
    model = replace(
        request.model,
        name=origin.model,
        model_args=origin.model_args,
        weights_entry=request.model.weights_entry or origin.weights_entry,
        preprocessing=origin.preprocessing.fields() | request.model.preprocessing,
        head=origin.head,
        from_file=True,
    )
    return replace(request, model=model, recipe=recipe)


def _checked(
    content: dict[str, Any], task: str, scope: str | None, refused: Callable[[str], FimaqError]
) -> Origin:
    """Return the origin in ``content``; ``refused`` makes the error from a text about the file."""
    if content.get("task", task) != task:
        raise refused(f"is of task {content['task']!r}, not {task!r}")
    try:
        origin = Origin.model_validate(content)
    except ValidationError as error:
        raise refused(f"does not name its model ({first_problem(error)})") from error
    if not _NAME.fullmatch(origin.model):
        raise refused(f"names the model {origin.model!r}, which is not a valid name")
    rule = "it may not name files, addresses or modules"
    for where, text in _texts(origin.model_args, "model_args"):
        if not _WORD.fullmatch(text):
            raise refused(f"has {text!r} in {where}: {rule}")
    if scope is not None and scope not in scopes(task):
        raise refused(f"has the scope {scope!r}, which task '{task}' does not have")
    return origin


def _texts(value: object, where: str) -> Iterator[tuple[str, str]]:
    """Yield place and text of each string in a JSON value, keys included."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield where, name
            yield from _texts(item, f"{where}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{where}.{number}")
