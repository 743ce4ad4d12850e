"""Reading of NumPy's ``.npz`` archives that may come from anyone."""

import math
import tokenize
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from fimaq_core.files import open_regular

#: Kinds of elements: booleans, integers, floats, bytes and text. Objects would be pickles.
_KINDS = "biufSU"
_MOST_MEMBERS = 1000
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
#: Errors of the readers for a damaged archive.
_BROKEN = (
    ValueError, TypeError, LookupError, ArithmeticError, SyntaxError, EOFError, RuntimeError,
    MemoryError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_arrays(
    path: Path, most_bytes: int, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Return the arrays of an archive by name.

    Everything is checked before anything is unpacked: a few kilobytes may stand for gigabytes.

    Args:
        path: the ``.npz`` file.
        most_bytes: bound on the sum of the unpacked sizes.
        names: arrays to read, those of them that the archive has; None: all.

    Raises:
        OSError: the file cannot be opened, is no regular file or is larger than ``most_bytes``.
        ValueError: the archive is damaged, is too large, or holds other elements than booleans,
            numbers and text.
    """
    with open_regular(path, most_bytes) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _unpacked(archive, most_bytes, names)
        except _BROKEN as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _unpacked(
    archive: zipfile.ZipFile, most_bytes: int, wanted: Collection[str] | None
) -> dict[str, np.ndarray]:
    members = archive.infolist()
    names = [member.filename.removesuffix(".npy") for member in members]
    if len(members) > _MOST_MEMBERS or len(set(names)) < len(names):
        raise ValueError(f"{len(members)} members, or two of the same name")
    if any(member.compress_type not in _COMPRESSIONS for member in members):
        raise ValueError("a compression that NumPy does not use")
    total = sum(member.file_size for member in members)
    if total > most_bytes:
        raise ValueError(f"it unpacks to {total:,} bytes; at most {most_bytes:,} are read")
    for member in members:
        with archive.open(member) as file:
            _check_header(file, member)
    arrays = {}
    for name, member in zip(names, members, strict=True):
        if wanted is not None and name not in wanted:
            continue
        with archive.open(member) as file:
            arrays[name] = npy.read_array(file, allow_pickle=False)
        _check_values(name, arrays[name])
    return arrays


def _check_header(file: zipfile.ZipExtFile, member: zipfile.ZipInfo) -> None:
    """Check that the size of a member is the one that its header says. Raises ValueError."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise ValueError(f"{member.filename} has a header of an unknown version")
    shape, _, dtype = readers[version](file)
    if dtype.kind not in _KINDS or dtype.itemsize == 0:
        raise ValueError(f"{member.filename} holds neither numbers nor text ({dtype.kind})")
    wanted = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or file.tell() + wanted != member.file_size:
        raise ValueError(f"{member.filename} does not have the size that its header says")


def _check_values(name: str, array: np.ndarray) -> None:
    """Check that booleans are 0 or 1, and that text is Unicode. Raises ValueError."""
    flat = array.ravel()
    if array.dtype.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
        raise ValueError(f"{name} holds booleans that are neither 0 nor 1")
    if array.dtype.kind == "U":
        codes = flat.astype(flat.dtype.newbyteorder("=")).view(np.uint32)
        if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
            raise ValueError(f"{name} holds text that is no Unicode")
