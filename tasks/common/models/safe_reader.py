"""Reader of local weight files. It never runs code from them, and needs no more memory than they.

It reads safetensors, and both formats of ``torch.save``: archives (zip), and the format before
PyTorch 1.6, a chain of pickles with the values behind them.
"""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fimaq_core.documents import parse_json
from fimaq_core.errors import ModelError
from tasks.common.hashing import SUFFIXES, require_file
from tasks.common.models.pickles import MOST_BYTES, ForeignObjectError, Unusable, unpickle

#: Bound on the header of safetensors and on the directory of an archive, for 40,000 tensors.
_MOST_HEADER_BYTES = 2**22
#: Number at the start of files that torch.save wrote before PyTorch 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C

_DOWNLOAD = "the download failed: fetch the file itself"
_UNPACK = "unpack it, and give the weights in it"
#: First bytes of other files that get the name of weights, what they are, and what to do.
_OTHER_FILES = (
    (b"<", f"an HTML or XML page ({_DOWNLOAD})"),
    (b"{", f"JSON text ({_DOWNLOAD})"),
    (b"[", f"JSON text ({_DOWNLOAD})"),
    (b"version https://git-lfs", "a pointer of Git LFS (run `git lfs pull` in its repository)"),
    (b"\x1f\x8b", f"packed with gzip ({_UNPACK})"),
    (b"\xfd7zXZ", f"packed with xz ({_UNPACK})"),
    (b"BZh", f"packed with bzip2 ({_UNPACK})"),
    (b"\x28\xb5\x2f\xfd", f"packed with zstd ({_UNPACK})"),
    (b"7z\xbc\xaf", f"packed with 7-Zip ({_UNPACK})"),
    (b"Rar!", f"packed with rar ({_UNPACK})"),
    (b"\x89HDF", "an HDF5 file (convert it to safetensors)"),
    (b"\x93NUMPY", "a NumPy array (convert it to safetensors)"),
)


def read_content(path: Path) -> Any:
    """Return the content of a weights file: tensors, and stand-ins for other objects.

    Tensors are on the CPU, as stored. A tensor that cannot be loaded is an :class:`Unusable`.
    Raises ModelError: the file is missing, damaged, a program, or names unknown objects.
    """
    require_file(path)
    if is_torchscript(path):
        raise ModelError(
            f"The weights {path} are a TorchScript archive. It contains a program, which is not "
            "run: give the weights as safetensors."
        )
    try:
        with path.open("rb") as file:
            return _content(path, file, path.stat().st_size)
    except ForeignObjectError as error:
        raise ModelError(
            f"The weights {path} hold more than tensors (code, or objects that only code can "
            f"rebuild: {_line(error)}) and are not loaded. "
            "Convert them to safetensors, or save model.state_dict() alone."
        ) from error
    except Exception as error:  # damaged files end the readers in many ways
        reason = _line(error)
        raise ModelError(f"The weights {path} are damaged or no weights file: {reason}") from error


def is_torchscript(path: Path) -> bool:
    """Return True for an archive of ``torch.jit.save``, the only kind with ``constants.pkl``."""
    try:
        with path.open("rb") as file, _opened(file, path.stat().st_size) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except Exception:  # noqa: BLE001 - the reader says later what is wrong with the file
        return False


def _line(error: Exception) -> str:
    """Return the first line of an error, without characters that a terminal would obey."""
    text = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
    return text if text.isprintable() else ascii(text)


def _content(path: Path, file: BinaryIO, size: int) -> Any:
    start = file.read(512)
    file.seek(0)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length < size:
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, more than {_MOST_HEADER_BYTES}")
        # The library takes the last of two tensors of one name.
        header = file.read(8 + length)[8:].decode()
        parse_json(header, "its header", ModelError)
        return _safetensors(path)
    if start[:2] == b"PK":
        with _opened(file, size) as archive:
            return _archive(archive, size)
    if start[:1] == b"\x80":
        _check_protocol(start)
        return _legacy(file, size)
    raise ValueError(_description(start))


def _description(start: bytes) -> str:
    """Say what a file is that begins with ``start`` and is not of weights."""
    if not start:
        return "it is empty (download or save it again)"
    if start[257:262] == b"ustar":
        return f"it is a tar archive ({_UNPACK})"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    known = (f"it is {what}" for begin, what in _OTHER_FILES if text.startswith(begin))
    suffixes = ", ".join(SUFFIXES)
    return next(known, f"give a file that ends in {suffixes}, of safetensors or torch.save")


def _safetensors(path: Path) -> dict[str, Tensor | Unusable]:
    found: dict[str, Tensor | Unusable] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.offset_keys():
            try:
                found[name] = file.get_tensor(name)
            except (AttributeError, TypeError, SafetensorError):  # PyTorch has no such type
                found[name] = Unusable(f"as {file.get_slice(name).get_dtype()}")
    return found


def _opened(file: BinaryIO, size: int) -> zipfile.ZipFile:
    """Return the archive; Python would read a directory of any size. Raises ValueError."""
    record: Any = zipfile._EndRecData(file)  # type: ignore[attr-defined] - as ZipFile reads it
    length = record[zipfile._ECD_SIZE] if record else 0  # type: ignore[attr-defined]
    if length > min(size, _MOST_HEADER_BYTES):
        raise ValueError(f"its directory has {length} bytes, more than {_MOST_HEADER_BYTES}")
    return zipfile.ZipFile(file)


def _archive(archive: zipfile.ZipFile, size: int) -> Any:
    """Return the content of an archive of ``torch.save``."""
    members = {one.filename: one for one in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise ValueError("two members of the archive have one name")
    stored = all(
        one.compress_type == zipfile.ZIP_STORED and one.compress_size == one.file_size
        for one in members.values()
    )
    if not stored or sum(one.file_size for one in members.values()) > size:
        raise ValueError("its members are packed, and torch.save packs none: save it again")
    (name, *more) = [one for one in members if one.endswith("/data.pkl")] or [""]
    root = name.removesuffix("data.pkl")
    if not name or more:
        raise ValueError("it is a zip archive without data.pkl: unpack it")
    if members[name].file_size > MOST_BYTES:
        raise ValueError(f"its pickle has more than {MOST_BYTES} bytes")
    order = f"{root}byteorder"
    if order in members and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian: save it again on another computer")
    pickled = archive.read(name)
    _check_protocol(pickled)
    read: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in read:
            if (place := f"{root}data/{key}") not in members:
                raise ValueError(f"its storage {key[:20]!r} is missing")
            read[key] = _bytes(archive.read(members[place]))
        return _sized(read[key], dtype, key, count)

    return unpickle(io.BytesIO(pickled), storage)


def _legacy(file: BinaryIO, size: int) -> Any:
    """Return the content of a file of ``torch.save`` before PyTorch 1.6."""
    storages: dict[str, tuple[Tensor, int]] = {}
    left = size

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        nonlocal left
        if key not in storages:
            left -= count * dtype.itemsize
            if left < 0:
                raise ValueError(f"it has {size} bytes, and its tensors need more")
            values = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
            storages[key] = values, dtype.itemsize
        return _sized(storages[key][0], dtype, key, count)

    pickles = io.BytesIO(file.read(MOST_BYTES))
    if unpickle(pickles, storage) != _MAGIC:
        raise ValueError("it is a pickle, and not one of torch.save")
    _, system, content, keys = (unpickle(pickles, storage) for _ in range(4))
    if not system["little_endian"]:
        raise ValueError("its numbers are big-endian: save it again on another computer")
    file.seek(pickles.tell())
    for key in keys:
        values, width = storages.pop(key)
        (count,) = struct.unpack("<q", file.read(8))
        if count * width != len(values) or file.readinto(values.numpy()) != len(values):
            raise ValueError(f"its storage {key[:20]!r} is cut off")
    if storages:
        raise ValueError("it lacks the values of some tensors")
    return content


def _check_protocol(pickled: bytes) -> None:
    if pickled[:1] == b"\x80" and pickled[1:2] in (b"\x04", b"\x05"):
        raise ValueError(
            f"it is in pickle protocol {pickled[1]}, which is not read: save it again with "
            "torch.save's default protocol, or as safetensors"
        )


def _bytes(content: bytes) -> Tensor:
    """Return bytes as a tensor uint8 (n,)."""
    if not content:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _sized(values: Tensor, dtype: torch.dtype, key: str, count: int) -> Tensor:
    if len(values) != count * dtype.itemsize:
        raise ValueError(f"its storage {key[:20]!r} has {len(values)} bytes for {count} values")
    return values
