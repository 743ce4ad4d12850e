"""Kinds of weight files, and hashes of files. Imports nothing heavy."""

import hashlib
import sys
from functools import lru_cache
from pathlib import Path

from fimaq_core.errors import DataError, ModelError
from fimaq_core.files import open_regular

#: Kinds of weight files, in the order in which a folder is searched.
SUFFIXES = (".safetensors", ".pth", ".bin", ".pt", ".ckpt", ".pth.tar", ".tar")


def require_file(path: Path) -> None:
    """Raise ModelError unless ``path`` is a regular file of weights that may be read."""
    try:
        path.stat()
    except FileNotFoundError as error:
        raise ModelError(f"There is no weights file {path}.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"Cannot read the weights {path}: {reason}.") from error
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise ModelError(f"The weights {path} are {kind}: give a file.")


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file. An unchanged file is read only once. Raises DataError."""
    try:
        state = path.stat()
        return _sha256(path, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


@lru_cache(maxsize=8192)  # outcomes of all cells of a large grid
def _sha256(path: Path, changed: int, size: int) -> str:
    with open_regular(path, sys.maxsize) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
