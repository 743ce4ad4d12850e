"""What a checkpoint says of the model that it was made of. It decides what is built and loaded, and is not trusted."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fimaq_core.checkpoint import Fingerprint, read_header
from fimaq_core.errors import CheckpointError, first_problem
from tasks.common.preprocessing import GivenPreprocessing
from tasks.common.registry import scopes

#: Names of models. No address such as ``hf-hub:...`` or ``local-dir:...``, and no way up or to a root of files.
_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.+-]+)*")
#: Texts in arguments: names of pools, activations and the like. No paths, no addresses, no dotted names of Python's.
_WORD = re.compile(r"[A-Za-z0-9_ +-]*")


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    task: str
    model: str
    model_args: dict[str, Any]
    tag: str
    stage: Literal["mlp", "calibrated", "reconstructed"]
    weights_entry: str | None = None
    preprocessing: GivenPreprocessing = GivenPreprocessing()


def read_origin(path: Path, task: str) -> tuple[Fingerprint, dict[str, Any]]:
    """Read the header of a checkpoint of a whole model; return its fingerprint and what it says of the model.

    Args:
        task: name of the task that it must be of.

    Returns:
        The fingerprint, and ``task``, ``model``, ``model_args``, ``tag`` and ``stage``; where they were
        given, ``weights_entry`` and ``preprocessing``.

    Raises:
        CheckpointError: no such checkpoint, one of another task or of a part of a model, or facts that are to make a library read
            files, fetch or import something.
    """
    fingerprint, content = read_header(path)
    if content.get("task", task) != task:
        raise CheckpointError(f"The checkpoint {path} is of task {content['task']!r}, not {task!r}.")
    try:
        facts = _Facts.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"The checkpoint {path} does not say which model it is of ({first_problem(error)}).") from error
    if not _NAME.fullmatch(facts.model):
        raise CheckpointError(f"The checkpoint {path} is of a model {facts.model!r}, which is no name of a model.")
    for where, text in _texts(facts.model_args, "model_args"):
        if not _WORD.fullmatch(text):
            raise CheckpointError(
                f"The checkpoint {path} has {text!r} in {where}: a checkpoint may not name files, addresses or modules."
            )
    scope, known = fingerprint.recipe.scope, scopes(task)
    if scope is not None and scope not in known:
        raise CheckpointError(f"The checkpoint {path} has the scope {scope!r}, which task '{task}' does not have.")
    given = {"weights_entry": facts.weights_entry, "preprocessing": facts.preprocessing.fields()}
    own = facts.model_dump(exclude=set(given))
    return fingerprint, own | {name: value for name, value in given.items() if value}


def _texts(value: object, where: str) -> Iterator[tuple[str, str]]:
    """All texts in a JSON value, keys too, each with where it is."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield where, name
            yield from _texts(item, f"{where}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{where}.{number}")
