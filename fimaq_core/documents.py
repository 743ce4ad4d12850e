"""Reading of YAML files that users write; one message lists all problems of a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fimaq_core.errors import FimaqError, suggest

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Base of records and settings in files: frozen, unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Loader(yaml.SafeLoader):
    """Loader that refuses a key twice in a mapping; PyYAML would silently drop the first value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        found: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                problem = f"the key '{key.value}' stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            found.add(key.value)
        return node


def read_yaml(path: Path, what: str, error: type[FimaqError]) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Args:
        path: the file.
        what: kind of the file for messages, such as ``grid``.
        error: class of the error for a file that cannot be read or holds no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as problem:
        raise error(f"Cannot read the {what} {path}: {problem.strerror}.") from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise error(f"The {what} {path} is not YAML: {problem}") from problem
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise error(f"The {what} {path} must hold 'key: value' lines.")
    return content


def validate(model: type[Model], content: Any, where: str, error: type[FimaqError]) -> Model:
    """Return ``content`` as a model; raise ``error`` with all problems of the content."""
    try:
        return model.model_validate(content)
    except ValidationError as problem:
        raise error(f"{where}: {problems(problem, model)}") from problem
    except FimaqError as problem:
        raise error(f"{where}: {problem}") from problem


def problems(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one sentence per problem; for an unknown key it suggests a known one."""
    return " ".join(_sentence(item, model) for item in error.errors(include_url=False))


def _sentence(item: Any, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in item["loc"] if part != "[key]")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        known = _owner(model, item["loc"][:-1]).model_fields
        return f"Unknown key '{place}'.{suggest(str(item['loc'][-1]), known)}"
    if not place:  # fields that do not go together
        return f"{message}."
    if item["type"] == "string_type" and not isinstance(item["input"], dict | list):
        message = "write it in quotes, since YAML does not read it as text"
    return f"{place}: {message} (given: {item['input']!r})."


def _owner(model: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel]:
    """Return the model class at ``path`` inside ``model``; keys and indices are skipped."""
    for part in path:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            model = next(_models(field.annotation), model)
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
