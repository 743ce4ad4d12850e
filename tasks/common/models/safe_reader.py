"""Reader of local weight files that never runs code from them."""

import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fimaq_core.errors import ModelError
from tasks.common.hashing import SUFFIXES

#: Errors of the readers for a damaged file.
_BROKEN = (
    SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError,
    LookupError, AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class Inert:
    """Stand-in for an object beside the weights. It stores nothing and calls nothing."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Array(Inert):
    """Stand-in for a NumPy array."""


class _Mapping:
    """Stand-in for a mapping: an ordinary dictionary that may have attributes."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _List:
    """Stand-in for a sequence: an ordinary list."""

    def __new__(cls, *_: Any) -> Any:
        return []


#: Stand-ins and the classes and functions, by module, that they replace in the files of trainers.
#: The replaced ones are never imported or called. Any other name in a file is an error.
_STAND_INS: dict[type, dict[str, str]] = {
    Inert: {
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "builtins": "bool dict float frozenset getattr int list str tuple",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf": "dictconfig.DictConfig listconfig.ListConfig",
        "omegaconf.nodes": "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode "
        "StringNode",
        "typing": "Any",
        "datetime": "date datetime timedelta timezone",
        "pathlib": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
        "numpy": "core.multiarray.scalar _core.multiarray.scalar dtype",
        "mmengine.logging.history_buffer": "HistoryBuffer",
    },
    Array: {"numpy": "core.multiarray._reconstruct _core.multiarray._reconstruct ndarray"},
    _Mapping: {
        "collections": "defaultdict",
        "easydict": "EasyDict",
        "yacs.config": "CfgNode",
        "detectron2.config.config": "CfgNode",
        "fvcore.common.config": "CfgNode",
        "lightning.fabric.utilities.data": "AttributeDict",
        "lightning_fabric.utilities.data": "AttributeDict",
        "pytorch_lightning.utilities.parsing": "AttributeDict",
    },
    _List: {"collections": "deque"},
}


def read_content(path: Path) -> Any:
    """Return the content of a weights file: tensors, and stand-ins for other objects.

    Raises ModelError: the file is missing, damaged, a program, or names unknown objects.
    """
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}.")
    if is_torchscript(path):
        raise ModelError(
            f"The weights {path} are a TorchScript archive. It contains a program, which is not "
            "run: give the weights as safetensors."
        )
    stand_ins: list[Any] = [
        (own, f"{module}.{name}")
        for own, modules in _STAND_INS.items()
        for module, names in modules.items()
        for name in names.split()
    ]
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
            return load_file(path)
        if not start.startswith((b"PK", b"\x80")):
            suffixes = ", ".join(SUFFIXES)
            raise ValueError(f"give a file that ends in {suffixes}, of safetensors or torch.save")
        pickled = start if start[:1] == b"\x80" else _member(path, "data.pkl") or b""
        if pickled[:1] == b"\x80" and pickled[1:2] in (b"\x04", b"\x05"):
            raise ModelError(
                f"The weights {path} are in pickle protocol {pickled[1]}, which the weights-only "
                "reader does not know: save them again with torch.save's default protocol, or as "
                "safetensors."
            )
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"error:\s*(.*)", str(error))
        raise ModelError(
            f"The weights {path} hold more than tensors (code, or objects that only code can "
            f"rebuild: {found[1].strip() if found else error}) and are not loaded. "
            "Convert them to safetensors, or save model.state_dict() alone."
        ) from error
    except _BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"The weights {path} are damaged or no weights file: {reason}") from error


def _member(path: Path, name: str) -> bytes | None:
    """Return the first bytes of the member ``name`` of an archive; None if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [one for one in archive.namelist() if one.rpartition("/")[2] == name]
            return archive.open(found[0]).read(2) if found else None
    except _BROKEN:
        return None


def is_torchscript(path: Path) -> bool:
    """Return True for an archive of ``torch.jit.save``, the only kind with ``constants.pkl``."""
    return _member(path, "constants.pkl") is not None
