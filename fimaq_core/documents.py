"""Reading of text, JSON and YAML that may come from anyone; one message per file."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fimaq_core.errors import FimaqError, suggest
from fimaq_core.files import open_regular

Model = TypeVar("Model", bound=BaseModel)
#: Bounds on the size of a file in bytes; data files have their own. PyYAML reads 100 kB a second.
MOST_BYTES, _MOST_YAML_BYTES = 2**25, 2**18
#: Bounds on nested lists and mappings, on values in a YAML file, and on the size of an integer.
_DEPTH, _MOST_NODES, _INTEGERS = 100, 20_000, 2**63
_MOST_PROBLEMS, _MOST_TEXT = 20, 300  # in one message; the second is in characters
_TOO_LARGE = "an integer has more than 64 bits"
_TOO_DEEP = f"lists or objects are nested more than {_DEPTH} deep"
#: Tags of the YAML values that JSON has too, and of the merge key ``<<``.
_PLAIN = tuple(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "merge", "int", "float", "bool", "null", "seq", "map")
)
_TEXTS, _NUMBERS = _PLAIN[:2], _PLAIN[2:4]
_MOST_DIGITS = 100


class Strict(BaseModel):
    """Base of records and settings in files: frozen, unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_text(
    path: Path, error: type[FimaqError], what: str = "", most_bytes: int = MOST_BYTES
) -> str:
    """Return the UTF-8 text of a regular file, without its byte order mark.

    Args:
        path: the file.
        error: class of the error for a file that cannot be read, is larger or is no text.
        what: kind of the file for messages, such as ``grid``.
        most_bytes: bound on the size of the file.
    """
    name = f"the {what} {path}" if what else str(path)
    try:
        with open_regular(path, most_bytes) as file:
            return file.read().decode("utf-8").removeprefix("\ufeff")
    except OSError as problem:
        raise error(f"Cannot read {name}: {problem.strerror}.") from problem
    except UnicodeDecodeError as problem:
        byte = f"byte {problem.start} (counted from 0) is 0x{problem.object[problem.start]:02x}"
        raise error(f"{name[0].upper()}{name[1:]} is not UTF-8 text: {byte}.") from problem


def read_json(
    path: Path, error: type[FimaqError], what: str = "", most_bytes: int = MOST_BYTES
) -> Any:
    """Return the content of a JSON file; the arguments are those of :func:`read_text`."""
    text = read_text(path, error, what, most_bytes)
    return parse_json(text, f"The {what} {path}" if what else str(path), error)


def parse_json(
    text: str,
    where: str,
    error: type[FimaqError],
    hook: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """Return the content of JSON text, which may come from anyone.

    Args:
        text: JSON. A key twice in an object, NaN, infinity, integers beyond 64 bits, halves of
            characters and nesting deeper than 100 are refused: later code would fail on them.
        where: name of the text at the start of messages.
        error: class of the error for other text.
        hook: function that replaces each object.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {shown(twice)} stands twice in an object")
        return found if hook is None else hook(found)

    def refused(name: str) -> float:
        raise ValueError(f"{name} is not a JSON number")

    try:
        content = json.loads(text, object_pairs_hook=distinct, parse_constant=refused)
        check_values(content)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not valid JSON: {_reason(problem)}.") from problem
    return content


def shown(value: object, most: int = 100) -> str:
    """Return ``value`` as Python writes it, at most ``most`` characters, for messages."""
    return clipped(repr(value), most)


def clipped(text: str, most: int = _MOST_TEXT) -> str:
    """Return at most ``most`` characters of a text, for messages."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_values(content: Any) -> None:
    """Check lists and mappings of plain values. Raises ValueError with the reason.

    Numbers have to be finite, integers have to fit into 64 bits, and text has to be Unicode. Lists
    may be 100 deep. The check costs little beside parsing, also for annotations of gigabytes.
    """
    level = [[content]]
    for _ in range(_DEPTH + 1):
        inner: list[list[Any]] = []
        for values in level:
            kinds = set(map(type, values))
            if float in kinds:
                floats = values if len(kinds) == 1 else [x for x in values if type(x) is float]
                if not all(map(math.isfinite, floats)):
                    raise ValueError("a number is not finite")
            if int in kinds and not all(
                -_INTEGERS <= x < _INTEGERS for x in values if type(x) is int
            ):
                raise ValueError(_TOO_LARGE)
            if str in kinds:
                try:
                    "".join(x for x in values if type(x) is str).encode()
                except UnicodeEncodeError as problem:
                    raise ValueError("a text holds half a character (a surrogate)") from problem
            if dict in kinds:
                inner += [[*x.keys(), *x.values()] for x in values if type(x) is dict]
            if list in kinds:
                inner += [x for x in values if type(x) is list]
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)


class _Loader(yaml.SafeLoader):
    """Loader of plain values: text, numbers, true, false, null, lists and mappings.

    It refuses tags, a key twice in a mapping (PyYAML would drop the first value) and aliases that
    make a small file large. Dates stay text.
    """

    yaml_implicit_resolvers = {
        start: [pair for pair in pairs if pair[0] in _PLAIN]
        for start, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.count = 0  # of nodes so far; each alias counts all nodes that it stands for
        self.sizes: dict[yaml.Node, int] = {}  # number of nodes in each complete node

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self.count  # type: ignore[no-untyped-call]
        node: Any = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and node not in self.sizes:
            raise _problem("the alias stands inside its own anchor", event)
        self.count = before + self.sizes.get(node, self.count - before + 1)
        if self.count > _MOST_NODES:
            raise _problem(f"the file holds more than {_MOST_NODES:,} values", event)
        # PyYAML takes quadratic time for numbers such as 1:1:1, in base 60.
        if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
            raise _problem(_TOO_LARGE, event)
        if node.tag not in _PLAIN:
            raise _problem(f"the tag {node.tag} is not known", event)
        self.sizes[node] = self.count - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        found: set[Any] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            # Keys of other texts may be equal, such as 1 and 1.0, or yes and true.
            value = key.value if key.tag in _TEXTS else self.construct_object(key)
            if value in found:
                raise _problem(f"the key '{key.value}' stands twice", key)
            found.add(value)
        return node


def _problem(text: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=place.start_mark)


def _reason(problem: Exception) -> str:
    """Return the reason in one line; messages of Python and PyYAML may have several."""
    if isinstance(problem, RecursionError):
        return _TOO_DEEP
    if isinstance(problem, yaml.MarkedYAMLError) and (mark := problem.problem_mark) is not None:
        return f"{clipped(str(problem.problem))} in line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(problem, LookupError):
        return "a value does not fit its tag"
    text = clipped(" ".join(str(problem).split()))
    return _TOO_LARGE if "integer string conversion" in text else text


def read_yaml(path: Path, what: str, error: type[FimaqError]) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Values are those of JSON. Anchors, aliases and merge keys work; tags are refused.

    Args:
        path: the file.
        what: kind of the file for messages, such as ``grid``.
        error: class of the error for a file that cannot be read or holds no mapping.
    """
    text = read_text(path, error, what, _MOST_YAML_BYTES)
    try:
        content = yaml.load(text, _Loader)
        check_values(content)
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, RecursionError) as problem:
        raise error(f"The {what} {path} is not YAML: {_reason(problem)}.") from problem
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
        raise error(f"{where}: {clipped(str(problem), 1000)}") from problem


def problems(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one sentence per problem; for an unknown key it suggests a known one."""
    found = error.errors(include_url=False)
    more = [f"There are {len(found) - _MOST_PROBLEMS} more."] if len(found) > _MOST_PROBLEMS else []
    return " ".join([*(_sentence(item, model) for item in found[:_MOST_PROBLEMS]), *more])


def _sentence(item: Any, model: type[BaseModel]) -> str:
    place = clipped(".".join(str(part) for part in item["loc"] if part != "[key]"))
    message = clipped(item["msg"].removeprefix("Value error, "), 1000)
    if item["type"] == "extra_forbidden":
        known = _owner(model, item["loc"][:-1]).model_fields
        return f"Unknown key '{place}'.{suggest(str(item['loc'][-1]), known)}"
    if not place:  # fields that do not go together
        return f"{message}."
    if item["type"] == "string_type" and not isinstance(item["input"], dict | list):
        message = "write it in quotes, since YAML does not read it as text"
    return f"{place}: {message} (given: {shown(item['input'])})."


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
