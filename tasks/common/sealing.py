"""JSON files that show whether they were changed after they were written: reading them, and the fingerprint that tells."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from fimaq_core.errors import CheckpointError

#: The field that holds the fingerprint of all others.
FIELD = "fingerprint"


def fingerprint(content: dict[str, Any]) -> str:
    """The sha256 (hex) of the canonical JSON of ``content`` without its own fingerprint.

    Canonical: keys sorted, no whitespace, characters beyond ASCII escaped, so the file's layout does not count.

    Args:
        content: as it is read from JSON.

    Raises:
        ValueError: a number is NaN, infinite or of thousands of digits.
    """
    rest = {name: value for name, value in content.items() if name != FIELD}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def read_object(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Read a UTF-8 file with one JSON object.

    Args:
        path: the file.
        what: it is, for people, such as ``record``.
        remedy: what to do about a damaged one, the end of a sentence.

    Raises:
        CheckpointError: it cannot be read, is cut off, is no UTF-8 text, no JSON or no object, nests without end, or holds NaN or
            infinity.
    """
    try:
        content = from_json(path.read_bytes(), allow_inf_nan=False)
    except OSError as error:
        raise CheckpointError(f"Cannot read the {what} {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"The {what} {path} is damaged ({error}): {remedy}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no {what}: it holds a JSON {type(content).__name__}, not an object.")
    return content
