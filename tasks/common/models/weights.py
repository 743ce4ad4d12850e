"""Reading local weight files without running anything in them."""

import difflib
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fimaq_core.checkpoint import state_sha256
from fimaq_core.errors import ModelError, NumericsError, suggest
from tasks.common.data.class_order import by_label
from tasks.common.hashing import SUFFIXES, file_sha256

#: Entries of a checkpoint that hold weights, in timm's order of preference
#: (`timm.models._helpers.load_state_dict`): averaged weights come first.
PREFERRED = ("state_dict_ema", "model_ema", "state_dict", "model")

#: Further entries that hold weights even if tensors lie beside them.
_WRAPPERS = (
    "model_state_dict", "net", "network", "module", "params", "params_ema", "ema", "weights",
)  # fmt: skip

#: Parts of names that wrappers of modules add: torch.compile, FSDP, activation checkpointing.
_INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

#: First parts of names that wrappers and trainers add: DataParallel, Lightning and the like.
_PREFIXES = ("module.", "model.", "net.", "network.", "_forward_module.")

#: Names of entries with averaged weights.
_AVERAGED = re.compile(r"(?i:(?<![a-z])(?:ema|swa)(?![a-z])|averag)|(?<![A-Z])(?:EMA|SWA)")

#: Names of what optimizers keep for each parameter.
_OPTIMIZER = {"exp_avg", "exp_avg_sq", "momentum_buffer"}

#: The entry of tensors that lie in the file itself, where others lie deeper.
_TOP = "."

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Inert:
    """Takes the place of an object beside the weights. It keeps nothing and calls nothing."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Array(_Inert):
    """Takes the place of a NumPy array."""


class _Mapping:
    """Becomes a dictionary that the weights-only reader lets have attributes."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _List:
    """Becomes a plain list."""

    def __new__(cls, *_: Any) -> Any:
        return []


#: Classes and functions, by module, that trainers' files name beside the weights. None of them is imported or
#: called: the class on the left takes its place. Any other name is an error.
_STAND_INS: dict[type, dict[str, str]] = {
    _Inert: {
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "builtins": "bool dict float frozenset getattr int list str tuple",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf": "dictconfig.DictConfig listconfig.ListConfig",
        "omegaconf.nodes": "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode StringNode",
        "typing": "Any",
        "datetime": "date datetime timedelta timezone",
        "pathlib": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
        "numpy": "core.multiarray.scalar _core.multiarray.scalar dtype",
        "mmengine.logging.history_buffer": "HistoryBuffer",
    },
    _Array: {"numpy": "core.multiarray._reconstruct _core.multiarray._reconstruct ndarray"},
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


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a file.

    Attributes:
        path: of the file.
        state: tensors by the model's own names, without what wrappers added to them.
        entry: the entry of the file that was taken; None where the file is the state dict itself.
        entries: all entries of the file that hold weights.
        class_names: of the classes in order; None where the file has none, empty where they cannot
            be read.
    """

    path: Path
    state: dict[str, Tensor]
    entry: str | None = None
    entries: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None

    def sha256(self, model: nn.Module, *, altered: bool) -> str:
        """Return the identity of these weights in ``model``.

        The file's hash is not enough where arguments have ``altered`` what was loaded, or where the
        file has several entries.
        """
        return state_sha256(model) if altered or len(self.entries) > 1 else file_sha256(self.path)


def read_weights(path: Path, entry: str | None = None) -> StoredWeights:
    """Read weights from safetensors, or from a file of ``torch.save`` by the weights-only reader.

    Args:
        path: the file. Its content decides how it is read, its ending does not.
        entry: which entry to take, such as ``state_dict``; None takes timm's choice.

    Raises:
        ModelError: missing, damaged, of another kind, with code in it, without the entry, or with
            several entries of which none is known to be preferred.
    """
    content = _content(path)
    states: dict[str, dict[str, Tensor]] = {}
    if isinstance(content, dict):
        states = _states(content) if content else {"": {}}
        if len(states) > 1 and "" in states:
            states = {name or _TOP: state for name, state in states.items()}
    if not states:
        raise ModelError(
            f"The weights {path} hold no state dict (a mapping of names to tensors): they do not fit any model."
        )
    entries = tuple(filter(None, states))
    counter = states.get("ema_state_dict", {}).get("steps")
    if (
        "state_dict" in states and counter is not None and counter.ndim == 0
    ):  # of mmengine's EMAHook
        del states["ema_state_dict"]["steps"]
        said = {
            "state_dict": " (averaged: mmengine swaps them)",
            "ema_state_dict": " (not averaged)",
        }
        entries = tuple(name + said.get(name, "") for name in entries)
        entry = entry or "state_dict"
    name = _chosen(list(states), entry, path)
    return StoredWeights(
        path, _renamed(states[name], path), name or None, entries, _class_names(content)
    )


def _content(path: Path) -> Any:
    """Read a file whole, with stand-ins for objects that are no tensors."""
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}.")
    if is_torchscript(path):
        raise ModelError(
            f"The weights {path} are a TorchScript archive: a program with weights, which is not "
            "run. Give the weights as safetensors."
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
            raise ValueError(
                f"give a file that ends in {', '.join(SUFFIXES)}, as safetensors or torch.save write it"
            )
        protocol = _protocol(path, start)
        if protocol in (4, 5):
            raise ModelError(
                f"The weights {path} are in pickle protocol {protocol}, which the weights-only reader "
                "does not know: save them again with torch.save's default protocol, or as safetensors."
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
    except (
        SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError,
        LookupError, AssertionError, ArithmeticError, struct.error,
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"The weights {path} are damaged or no weights file: {reason}") from error


def _protocol(path: Path, start: bytes) -> int | None:
    """The pickle protocol of a file of ``torch.save``; None where the file does not say."""
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                pickles = [
                    name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"
                ]
                start = archive.open(pickles[0]).read(2) if pickles else b""
        except (
            OSError,
            zipfile.BadZipFile,
            NotImplementedError,
            RuntimeError,
            EOFError,
            zlib.error,
        ):
            return None  # torch.load says what is wrong
    return start[1] if start[:1] == b"\x80" and len(start) > 1 else None


def _states(content: dict[Any, Any], depth: int = 4) -> dict[str, dict[str, Tensor]]:
    """Return state dicts by the names of the entries that lead to them, joined by dots; ``""`` for `content`.

    Optimizers, which have tensors by the model's names too, are passed over; so are tensors beside
    an inner state dict if none of their names has a dot: they are no model's.
    """
    inner: dict[str, dict[str, Tensor]] = {}
    for name, value in content.items():
        if (
            depth
            and isinstance(name, str)
            and isinstance(value, dict)
            and not name.startswith("optim")
        ):
            found = _states(value, depth - 1)
            inner |= {f"{name}.{rest}" if rest else name: state for rest, state in found.items()}
    own = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    weights = any(value.is_floating_point() and value.ndim for value in own.values())
    weights = (
        weights and not own.keys() & _OPTIMIZER and (not inner or any("." in name for name in own))
    )
    wrapped = any(name.partition(".")[0] in (*PREFERRED, *_WRAPPERS) for name in inner)
    if weights and not wrapped and not any(isinstance(value, _Array) for value in content.values()):
        return {"": own, **inner}
    return inner


def _chosen(names: list[str], wanted: str | None, path: Path) -> str:
    """The name of the state dict to take: as wanted, else as timm prefers."""
    given = [
        name for name in names if wanted is None or name == wanted or name.startswith(f"{wanted}.")
    ]
    if not given:
        known = (
            suggest(str(wanted), names) if any(names) else " It is one state dict: leave it out."
        )
        raise ModelError(f"The weights {path} have no entry '{wanted}' (--weights-entry).{known}")
    best = _preferred(given)
    averaged = [name for name in given if _AVERAGED.search(name)]
    if len(best) > 1 or (wanted is None and averaged and best[0] not in averaged):
        raise ModelError(
            f"The weights {path} have several entries with weights: {', '.join(map(repr, given))}. "
            f"Choose one with --weights-entry, such as --weights-entry {given[0]}."
        )
    return best[0]


def _preferred(names: list[str]) -> list[str]:
    """The names that are left once timm's order has decided, level by level."""
    if len(names) == 1:
        return names
    if _TOP in names:
        return [_TOP]
    first = {name.partition(".")[0] for name in names}
    for head in (*PREFERRED, *(first if len(first) == 1 else ())):
        if head in names:
            return [head]
        inner = [name.removeprefix(f"{head}.") for name in names if name.startswith(f"{head}.")]
        if inner:
            return [f"{head}.{name}" for name in _preferred(inner)]
    return names


def _renamed(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights without what wrappers added: prefixes of names, and a counter of averages."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "n_averaged" and value.ndim == 0:  # of torch.optim.swa_utils.AveragedModel
            continue
        problem = _unreadable(value)
        if problem is not None:
            raise ModelError(
                f"The weights {path} have '{name}' {problem}: save it as a dense tensor of float32, float16 or bfloat16."
            )
        own = _own_name(name)
        if own in found:
            raise ModelError(
                f"The weights {path} have '{own}' more than once, with and without a prefix such "
                f"as '{name.removesuffix(own)}': save the weights of one model alone."
            )
        found[own] = value
    return found


def _unreadable(tensor: Tensor) -> str | None:
    """Reason why a tensor cannot be copied into a model; None if it can."""
    if tensor.is_meta:
        return "on the device 'meta', without values"
    if tensor.layout is not torch.strided:
        return f"in the layout {_short(tensor.layout)}"
    if tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
        return f"as {_short(tensor.dtype)}"
    return None


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _own_name(name: str) -> str:
    for part in _INSERTED:
        name = name.replace(part, "")
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _class_names(content: dict[Any, Any]) -> tuple[str, ...] | None:
    """Names of classes as trainers keep them beside the weights.

    None where there are none, empty where they cannot be read: labels of NumPy, labels with gaps.
    """
    meta = content.get("meta")
    inner = meta.get("dataset_meta") if isinstance(meta, dict) else None
    unread = False
    for holder in (content, inner, meta, content.get("dataset_meta")):
        if not isinstance(holder, dict):
            continue
        for key in ("class_to_idx", "idx_to_class", "class_names", "classes", "CLASSES"):
            value = holder.get(key)
            names = _names(value, key)
            if names:
                return tuple(names)
            unread |= isinstance(value, dict | list | tuple | _Inert) and value not in ({}, [], ())
    return () if unread else None


def _names(value: Any, key: str) -> list[str] | None:
    if isinstance(value, str) and not key.startswith(("class_to", "idx_to")):
        return [value]
    if isinstance(value, dict):
        pairs = list(value.items())
        turned = [(label, str(name) if type(name) is int else name) for name, label in pairs]
        first, second = (pairs, turned) if key != "class_to_idx" else (turned, pairs)
        return by_label(first) or by_label(second)
    listed = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return list(value) if listed else None


def is_torchscript(path: Path) -> bool:
    """True for an archive of ``torch.jit.save``, which alone holds a program's constants."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load ``state`` into ``model`` strictly.

    Raises:
        ModelError: names or shapes differ.
        NumericsError: a value is NaN or infinite.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"The weights {where} have NaN or infinite values in '{name}': use another file."
            )
    problem = _misfit(model.state_dict(), state)
    if problem is not None:
        raise ModelError(f"The weights {where} do not fit the model: {problem}")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        text = str(error).replace("\n\t", " ")
        raise ModelError(f"The weights {where} do not fit the model: {text[:600]}") from error


def _misfit(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str | None:
    """The differences between two state dicts in at most 8 lines; None if there are none.

    Names that resemble each other, such as ``fc_norm.weight`` and ``norm.weight``, come first.
    """
    common = expected.keys() & state.keys()
    missing = [name for name in expected if name not in common]
    surplus = [name for name in state if name not in common]
    shapes = [
        name for name in state if name in common and state[name].shape != expected[name].shape
    ]
    kinds = [
        f"{name} is {_short(value.dtype)}"
        for name, value in state.items()
        if name in common and expected[name].is_floating_point() and not value.is_floating_point()
    ]
    if not (missing or surplus or shapes or kinds):
        return None
    pairs = _nearest(missing, surplus)
    found = {
        "Missing names": [*(pair[0] for pair in pairs), *missing],
        "Unexpected names": [*(pair[1] for pair in pairs), *surplus],
        "Shape mismatch": shapes,
        "Not floating point, as quantized weights are": kinds,
    }
    listed = ". ".join(
        f"{what}: {_some(dict.fromkeys(names))}" for what, names in found.items() if names
    )
    lines = [f"{listed}."]
    lines += [f"  near: the model has '{a}', the file '{b}'" for a, b in pairs[:3]]
    for name in shapes[:3]:
        lines.append(
            f"  '{name}' is {tuple(state[name].shape)} in the file, {tuple(expected[name].shape)} in the model"
        )
    return "\n".join(
        [
            *lines,
            "Give weights of this model, or the model (--model, --model-args) that they are of.",
        ]
    )


def _nearest(missing: list[str], surplus: list[str]) -> list[tuple[str, str]]:
    """Pairs of names that resemble each other, the nearest first; one pair per kind of name."""
    left = _kinds(surplus)
    pairs = [
        (difflib.SequenceMatcher(None, name, close).ratio(), name, close)
        for name in _kinds(missing)
        for close in difflib.get_close_matches(name, left, n=1)
    ]
    return [(a, b) for _, a, b in sorted(pairs, key=lambda pair: -pair[0])]


def _kinds(names: list[str]) -> list[str]:
    """The first of all names that differ in numbers only; 60 at most."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    return list(kinds.values())[:60]


def _some(names: Iterable[str]) -> str:
    """The count of names and the first three."""
    listed = list(names)
    more = " and more" if len(listed) > 3 else ""
    return f"{len(listed)} ({', '.join(map(repr, listed[:3]))}{more})"
