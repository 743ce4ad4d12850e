"""Weights of local files: choice of the entry, names of the tensors, loading into a model."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.checkpoint import state_sha256
from fimaq_core.errors import ModelError, NumericsError, suggest
from tasks.common.data.class_order import names_by_label
from tasks.common.hashing import file_sha256
from tasks.common.models.pickles import Array, Inert, Unusable
from tasks.common.models.safe_reader import read_content

#: Names of entries that hold weights, in timm's order of preference: averaged weights come first
#: (``timm.models._helpers.load_state_dict``).
_PREFERRED = ("state_dict_ema", "model_ema", "state_dict", "model")
#: Names of further entries that hold weights; tensors beside such an entry are no weights.
_WRAPPERS = (
    "model_state_dict", "net", "network", "module", "params", "params_ema", "ema", "weights",
)  # fmt: skip
#: Parts that torch.compile, FSDP and activation checkpointing insert into names of tensors.
_INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
#: First parts that DataParallel, Lightning and other trainers put before names of tensors.
_PREFIXES = ("module.", "model.", "net.", "network.", "_forward_module.")
#: Names of entries with averaged weights.
_AVERAGED = re.compile(r"(?i:(?<![a-z])(?:ema|swa)(?![a-z])|averag)|(?<![A-Z])(?:EMA|SWA)")
#: Names of the values that optimizers keep for each parameter.
_OPTIMIZER = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
#: Name of the entry for tensors at the top of a file that has other entries too.
_TOP = "."
#: Types that are read. Others are packed (float8, int4), and PyTorch cannot convert all of them.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OTHERS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64,
    torch.complex128,
)  # fmt: skip
#: End of messages.
ADVICE = "Give weights of this model, or the model (--model, --model-args) of these weights."
#: Bounds on the entries of a file and on the length of a name; messages compare names.
_MOST_ENTRIES, _MOST_LETTERS = 1000, 500


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a file."""

    path: Path
    state: dict[str, Tensor]  # by the names that the model uses
    entry: str | None = None  # entry that was taken; None if the file is one state dict
    entries: tuple[str, ...] = ()  # all entries that hold weights
    class_names: tuple[str, ...] | None = None  # by label; empty for names that cannot be read

    def sha256(self, model: nn.Module, *, altered: bool) -> str:
        """Return the sha256 that identifies these weights, loaded into ``model``.

        It is the sha256 of the file. If the user ``altered`` the weights by arguments, or the file
        has several entries, it is the sha256 of the tensors of ``model``.
        """
        return state_sha256(model) if altered or len(self.entries) > 1 else file_sha256(self.path)

    def notes(self) -> list[str]:
        """Return one line if tensors are stored in another floating-point type than float32."""
        floats = Counter(one.dtype for one in self.state.values() if one.is_floating_point())
        others = {kind: count for kind, count in floats.items() if kind != torch.float32}
        found = ", ".join(f"{count} as {_type_name(kind)}" for kind, count in others.items())
        return [f"weights: converted to float32, stored {found}"] if found else []


def read_weights(path: Path, entry: str | None = None) -> StoredWeights:
    """Read weights from a file of safetensors or ``torch.save``; its suffix does not matter.

    ``entry`` is the entry to take, such as ``state_dict``; None takes the entry that timm prefers.
    Raises ModelError: the file cannot be read safely, has no such entry, or has several entries
    and timm prefers none of them.
    """
    content = read_content(path)
    states: dict[str, dict[str, Any]] = {}
    if isinstance(content, dict):
        states = _states(content, {}) if content else {"": {}}
        if len(states) > _MOST_ENTRIES:
            raise ModelError(f"The weights {path} have more than {_MOST_ENTRIES} entries.")
        for name in states:
            if len(name) > _MOST_LETTERS or not name.isprintable():
                raise ModelError(f"The weights {path} have the odd entry {name[:50]!r}.")
        if len(states) > 1 and "" in states:
            states = {name or _TOP: state for name, state in states.items()}
    if not states:
        raise ModelError(f"The weights {path} hold no state dict: they do not fit any model.")
    entries = tuple(filter(None, states))
    counter = states.get("ema_state_dict", {}).get("steps")
    if "state_dict" in states and counter is not None and counter.ndim == 0:
        # EMAHook of mmengine stores this counter, and the averaged weights as ``state_dict``.
        del states["ema_state_dict"]["steps"]
        remarks = {
            "state_dict": " (averaged: mmengine swaps them)",
            "ema_state_dict": " (not averaged)",
        }
        entries = tuple(name + remarks.get(name, "") for name in entries)
        entry = entry or "state_dict"
    name = _chosen(list(states), entry, path)
    state = _renamed(states[name], path)
    return StoredWeights(path, state, name or None, entries, _class_names(content))


def _states(
    content: dict[Any, Any], found: dict[tuple[int, int], Any], depth: int = 4
) -> dict[str, dict[str, Any]]:
    """Return every state dict in ``content`` by its path of entries, joined by dots.

    The path ``""`` means the tensors of ``content`` itself. Entries of optimizers are skipped,
    since they have the tensor names of the model. Tensors beside an inner state dict are skipped
    if none of their names has a dot, since they are no weights of a model. ``found`` keeps results,
    because a small file can hold one dictionary at many places.
    """
    if (id(content), depth) in found:
        return found[id(content), depth]
    inner: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        known = isinstance(name, str) and not name.startswith("optim")
        if depth and known and isinstance(value, dict) and len(inner) <= _MOST_ENTRIES:
            for rest, state in _states(value, found, depth - 1).items():
                inner[f"{name}.{rest}" if rest else name] = state
    tensors = Tensor | Unusable
    own = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, tensors)}
    weights = any(
        isinstance(value, Unusable) or (value.is_floating_point() and value.ndim)
        for value in own.values()
    )
    named = not inner or any("." in name for name in own)
    wrapped = any(name.partition(".")[0] in (*_PREFERRED, *_WRAPPERS) for name in inner)
    arrays = any(isinstance(value, Array) for value in content.values())
    if weights and named and not wrapped and not arrays and not own.keys() & _OPTIMIZER:
        inner = {"": own, **inner}
    found[id(content), depth] = inner
    return inner


def _chosen(names: list[str], wanted: str | None, path: Path) -> str:
    """Return the entry that the user wants, else the entry that timm prefers."""
    given = [one for one in names if wanted in (None, one) or one.startswith(f"{wanted}.")]
    if not given:
        lone = " The file is one state dict: leave the option out."
        known = suggest(str(wanted), names[:20]) if any(names) else lone
        raise ModelError(f"The weights {path} have no entry {wanted!r} (--weights-entry).{known}")
    best = _preferred(given)
    averaged = [name for name in given if _AVERAGED.search(name)]
    if len(best) > 1 or (wanted is None and averaged and best[0] not in averaged):
        raise ModelError(
            f"The weights {path} have several entries with weights: {_first_names(given)}. "
            f"Choose one with --weights-entry, such as --weights-entry {given[0]}."
        )
    return best[0]


def _preferred(names: list[str]) -> list[str]:
    """Return the name that timm prefers, level by level; several names if it prefers none."""
    if len(names) == 1 or _TOP in names:
        return [_TOP] if _TOP in names else names
    first = {name.partition(".")[0] for name in names}
    for head in (*_PREFERRED, *(first if len(first) == 1 else ())):
        if head in names:
            return [head]
        inner = [name.removeprefix(f"{head}.") for name in names if name.startswith(f"{head}.")]
        if inner:
            return [f"{head}.{name}" for name in _preferred(inner)]
    return names


def _renamed(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the weights by the names of the model, without the parts that wrappers added.

    Raises ModelError: a tensor has no float values that can be loaded, or a name appears twice.
    """
    found: dict[str, Tensor] = {}
    given: dict[str, str] = {}  # names in the file, by names of the model
    for name, value in state.items():
        if len(name) > _MOST_LETTERS:
            start = f"{name[:50]!r}"
            raise ModelError(f"The weights {path} have a name of {len(name)} letters: {start}.")
        problem = value.problem if isinstance(value, Unusable) else None
        if problem is None and value.dtype not in (*_FLOATS, *_OTHERS):
            problem = f"as {_type_name(value.dtype)}"
        if problem:
            advice = "save it as a dense tensor of float32, float16 or bfloat16"
            raise ModelError(f"The weights {path} have {name!r} {problem}: {advice}.")
        if name == "n_averaged" and value.ndim == 0:  # of torch.optim.swa_utils.AveragedModel
            continue
        own = name
        for part in _INSERTED:
            own = own.replace(part, "")
        while own.startswith(_PREFIXES):
            own = own.partition(".")[2]
        if own in found:
            raise ModelError(
                f"The weights {path} have {own!r} more than once, as {given[own]!r} and as "
                f"{name!r}: save the weights of one model alone."
            )
        found[own], given[own] = value, name
    return found


def _type_name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _class_names(content: dict[Any, Any]) -> tuple[str, ...] | None:
    """Return the class names that trainers store beside the weights, by label.

    The result is None for a file without names, and empty for names that cannot be read.
    """
    meta = content.get("meta")
    inner = meta.get("dataset_meta") if isinstance(meta, dict) else None
    unread = False
    for holder in (content, inner, meta, content.get("dataset_meta")):
        for key in ("class_to_idx", "idx_to_class", "class_names", "classes", "CLASSES"):
            value = holder.get(key) if isinstance(holder, dict) else None
            if isinstance(value, str) and "_to_" not in key:
                return (value,)
            if names := names_by_label(value, turned=key == "class_to_idx"):
                return tuple(names)
            unread |= isinstance(value, dict | list | tuple | Inert) and value not in ({}, [], ())
    return () if unread else None


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load ``state`` into ``model``; ``where`` is the origin of the weights, for messages.

    Raises ModelError: names, shapes or types differ. Raises NumericsError: NaN or infinite values.
    """
    expected = model.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        own = expected.get(name, tensor)
        cast = tensor.to(own.dtype) if own.is_floating_point() else tensor
        if not bool(torch.isfinite(cast).all()):
            kind = "NaN or infinite values"
            if bool(torch.isfinite(tensor).all()):
                kind = f"values too large for {_type_name(own.dtype)}"
            raise NumericsError(f"The weights {where} have {kind} in {name!r}: use another file.")
    problem = _misfit(expected, state)
    try:
        if not problem:
            model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        problem = str(error).replace("\n\t", " ")[:600]
    if problem:
        raise ModelError(f"The weights {where} do not fit the model: {problem}")


def _misfit(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Describe the differences between two state dicts in at most 8 lines; empty if they fit.

    Similar names, such as ``fc_norm.weight`` and ``norm.weight``, come first.
    """
    missing = [name for name in expected if name not in state]
    surplus = [name for name in state if name not in expected]
    common = [(name, expected[name], state[name]) for name in state if name in expected]
    shapes = [name for name, own, given in common if own.shape != given.shape]
    kinds, integers = (
        [
            f"{name} is {_type_name(given.dtype)}"
            for name, own, given in common
            if own.is_floating_point() is floating and not _is_kept(given, own)
        ]
        for floating in (True, False)
    )
    if not (missing or surplus or shapes or kinds or integers):
        return ""
    pairs = _similar_names(missing, surplus)
    found = {
        "Missing names": [*(own for own, _ in pairs), *missing],
        "Unexpected names": [*(given for _, given in pairs), *surplus],
        "Shape mismatch": shapes,
        "Not floating point, as quantized weights are": kinds,
        "Not the same as integers": integers,
    }
    lines = [". ".join(f"{what}: {_brief(names)}" for what, names in found.items() if names) + "."]
    lines += [f"  similar: the model has {own!r}, the file {given!r}" for own, given in pairs[:3]]
    for name in shapes[:3]:
        given, own = tuple(state[name].shape), tuple(expected[name].shape)
        lines.append(f"  {name!r} is {given} in the file, {own} in the model")
    return "\n".join([*lines, ADVICE])


def _is_kept(given: Tensor, own: Tensor) -> bool:
    """Return True if ``given`` keeps its values in the type of ``own``; floats may be rounded."""
    if own.is_floating_point() or own.is_complex():
        return given.is_floating_point() is own.is_floating_point()
    if given.is_floating_point() or given.is_complex():
        return False
    return given.dtype == own.dtype or torch.equal(given.to(own.dtype).to(given.dtype), given)


def _similar_names(missing: list[str], surplus: list[str]) -> list[tuple[str, str]]:
    """Return pairs of similar names, the most similar first.

    Of names that differ in numbers only, the last is compared; at most 60 names of each side.
    """
    kinds = [{re.sub(r"\d+", "#", name): name for name in names} for names in (missing, surplus)]
    left, right = ([*kind.values()][:60] for kind in kinds)
    pairs = [(own, one) for own in left for one in difflib.get_close_matches(own, right, n=1)]
    return sorted(pairs, key=lambda pair: -difflib.SequenceMatcher(None, *pair).ratio())


def _brief(names: Iterable[str]) -> str:
    """Return the count of distinct names and the first three."""
    listed = list(dict.fromkeys(names))
    return f"{len(listed)} ({_first_names(listed, 3)})"


def _first_names(names: list[str], most: int = 10) -> str:
    more = " and more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
