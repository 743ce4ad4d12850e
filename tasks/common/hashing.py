"""Weight files: which there are, and their hashes. Imports nothing heavy."""

import hashlib
from functools import lru_cache
from pathlib import Path

from fimaq_core.errors import DataError

#: Kinds of weight files, in the order in which a folder is searched.
SUFFIXES = (".safetensors", ".pth", ".bin", ".pt", ".ckpt", ".pth.tar", ".tar")


def file_sha256(path: Path) -> str:
    """The sha256 (hex) of a file's bytes; read once while the file stays as it is.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    return _sha256(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _sha256(path: Path, changed: int, size: int) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
