"""Kinds of weight files, and hashes of files. Imports nothing heavy."""

import hashlib
from functools import lru_cache
from pathlib import Path

from fimaq_core.errors import DataError

#: Kinds of weight files, in the order in which a folder is searched.
SUFFIXES = (".safetensors", ".pth", ".bin", ".pt", ".ckpt", ".pth.tar", ".tar")


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file. An unchanged file is read only once. Raises DataError."""
    try:
        state = path.stat()
        return _sha256(path, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


@lru_cache(maxsize=8192)  # outcomes of all cells of a large grid
def _sha256(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
