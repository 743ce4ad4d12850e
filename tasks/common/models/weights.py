"""Weights of local files: entries of checkpoints, names of tensors, and loading into a model."""

import difflib
import re
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
from tasks.common.models.safe_reader import Array, Inert, read_content

#: Entries of a checkpoint that hold weights, in timm's order of preference
#: (``timm.models._helpers.load_state_dict``): averaged weights come first.
_PREFERRED = ("state_dict_ema", "model_ema", "state_dict", "model")
#: Further entries that hold weights, even if other tensors lie beside them.
_WRAPPERS = (
    "model_state_dict", "net", "network", "module", "params", "params_ema", "ema", "weights",
)  # fmt: skip
#: Parts that wrappers insert into names: torch.compile, FSDP, activation checkpointing.
_INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
#: First parts that wrappers and trainers put before names: DataParallel, Lightning and others.
_PREFIXES = ("module.", "model.", "net.", "network.", "_forward_module.")
#: Names of entries with averaged weights.
_AVERAGED = re.compile(r"(?i:(?<![a-z])(?:ema|swa)(?![a-z])|averag)|(?<![A-Z])(?:EMA|SWA)")
#: Names of the values that optimizers keep for each parameter.
_OPTIMIZER = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
#: Name of the entry for tensors of the file itself, where other entries lie deeper.
_TOP = "."
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a file."""

    path: Path
    state: dict[str, Tensor]  # by the names of the model, without parts that wrappers add to names
    entry: str | None = None  # the entry that was taken; None if the file is one state dict
    entries: tuple[str, ...] = ()  # all entries that hold weights
    class_names: tuple[str, ...] | None = None  # by label; empty for names that cannot be read

    def sha256(self, model: nn.Module, *, altered: bool) -> str:
        """Return the identity of these weights in ``model``: the sha256 of file or tensors.

        The tensors are hashed if arguments of the user ``altered`` the loaded weights, or if the
        file has several entries.
        """
        return state_sha256(model) if altered or len(self.entries) > 1 else file_sha256(self.path)


def read_weights(path: Path, entry: str | None = None) -> StoredWeights:
    """Read weights from safetensors, or with the weights-only reader from a file of ``torch.save``.

    Args:
        path: the file. Its content decides how to read it; its suffix does not matter.
        entry: the entry to take, such as ``state_dict``; None takes the entry that timm prefers.

    Raises:
        ModelError: the file is missing, damaged, of another kind or contains code, has no such
            entry, or has several entries and no known preference among them.
    """
    content = read_content(path)
    states: dict[str, dict[str, Tensor]] = {}
    if isinstance(content, dict):
        states = _states(content) if content else {"": {}}
        if len(states) > 1 and "" in states:
            states = {name or _TOP: state for name, state in states.items()}
    if not states:
        raise ModelError(f"The weights {path} hold no state dict: they do not fit any model.")
    entries = tuple(filter(None, states))
    counter = states.get("ema_state_dict", {}).get("steps")
    if "state_dict" in states and counter is not None and counter.ndim == 0:
        # EMAHook of mmengine saves the averaged weights as ``state_dict``, with this counter.
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


def _states(content: dict[Any, Any], depth: int = 4) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts by the names of their entries, joined by dots; ``""`` is ``content``.

    Optimizers are skipped: their tensors have names of the model too. Tensors beside an inner
    state dict are skipped if no name of theirs has a dot: they are no weights of a model.
    """
    inner: dict[str, dict[str, Tensor]] = {}
    for name, value in content.items():
        known = isinstance(name, str) and not name.startswith("optim")
        if depth and known and isinstance(value, dict):
            for rest, state in _states(value, depth - 1).items():
                inner[f"{name}.{rest}" if rest else name] = state
    own = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    weights = any(value.is_floating_point() and value.ndim for value in own.values())
    named = not inner or any("." in name for name in own)
    wrapped = any(name.partition(".")[0] in (*_PREFERRED, *_WRAPPERS) for name in inner)
    arrays = any(isinstance(value, Array) for value in content.values())
    if weights and named and not wrapped and not arrays and not own.keys() & _OPTIMIZER:
        return {"": own, **inner}
    return inner


def _chosen(names: list[str], wanted: str | None, path: Path) -> str:
    """Return the entry that the user wants, else the entry that timm prefers."""
    given = [one for one in names if wanted in (None, one) or one.startswith(f"{wanted}.")]
    if not given:
        lone = " It is one state dict: leave it out."
        known = suggest(str(wanted), names) if any(names) else lone
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
    """Return the names that timm's order of preference leaves, level by level."""
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


def _renamed(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the weights by the names of the model, without what wrappers added."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "n_averaged" and value.ndim == 0:  # of torch.optim.swa_utils.AveragedModel
            continue
        problem = None
        if value.is_meta:
            problem = "on the device 'meta', without values"
        elif value.layout is not torch.strided:
            problem = f"in the layout {_short(value.layout)}"
        elif value.is_quantized or (value.is_floating_point() and value.dtype not in _FLOATS):
            problem = f"as {_short(value.dtype)}"
        if problem:
            advice = "save it as a dense tensor of float32, float16 or bfloat16"
            raise ModelError(f"The weights {path} have '{name}' {problem}: {advice}.")
        own = name
        for part in _INSERTED:
            own = own.replace(part, "")
        while own.startswith(_PREFIXES):
            own = own.partition(".")[2]
        if own in found:
            raise ModelError(
                f"The weights {path} have '{own}' more than once, with and without a prefix such "
                f"as '{name.removesuffix(own)}': save the weights of one model alone."
            )
        found[own] = value
    return found


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _class_names(content: dict[Any, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes that trainers keep beside the weights, by label.

    None for a file without names; empty for names that cannot be read (NumPy labels, gaps).
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
    """Load ``state`` into ``model`` strictly; ``where`` names its origin in messages.

    Raises ModelError for other names, shapes or types, and NumericsError for NaN or infinity.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"The weights {where} have NaN or infinite values in '{name}': use another file."
            )
    problem = _misfit(model.state_dict(), state)
    try:
        if not problem:
            model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        problem = str(error).replace("\n\t", " ")[:600]
    if problem:
        raise ModelError(f"The weights {where} do not fit the model: {problem}")


def _misfit(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Describe the differences between two state dicts in at most 8 lines; empty for none.

    Names that resemble each other, such as ``fc_norm.weight`` and ``norm.weight``, come first.
    """
    missing = [name for name in expected if name not in state]
    surplus = [name for name in state if name not in expected]
    common = [(name, expected[name], state[name]) for name in state if name in expected]
    shapes = [name for name, own, given in common if own.shape != given.shape]
    kinds = [
        f"{name} is {_short(given.dtype)}"
        for name, own, given in common
        if own.is_floating_point() and not given.is_floating_point()
    ]
    if not (missing or surplus or shapes or kinds):
        return ""
    pairs = _nearest(missing, surplus)
    found = {
        "Missing names": [*(own for own, _ in pairs), *missing],
        "Unexpected names": [*(given for _, given in pairs), *surplus],
        "Shape mismatch": shapes,
        "Not floating point, as quantized weights are": kinds,
    }
    lines = [". ".join(f"{what}: {_some(names)}" for what, names in found.items() if names) + "."]
    lines += [f"  near: the model has '{own}', the file '{given}'" for own, given in pairs[:3]]
    for name in shapes[:3]:
        given, own = tuple(state[name].shape), tuple(expected[name].shape)
        lines.append(f"  '{name}' is {given} in the file, {own} in the model")
    advice = "Give weights of this model, or the model (--model, --model-args) of these weights."
    return "\n".join([*lines, advice])


def _nearest(missing: list[str], surplus: list[str]) -> list[tuple[str, str]]:
    """Return pairs of names that resemble each other, the nearest first.

    Of all names that differ in numbers only, the first is compared; of each kind 60 at most.
    """
    kinds: list[dict[str, str]] = [{}, {}]
    for kind, names in zip(kinds, (missing, surplus), strict=True):
        for name in names:
            kind.setdefault(re.sub(r"\d+", "#", name), name)
    left, right = ([*kind.values()][:60] for kind in kinds)
    pairs = [(own, one) for own in left for one in difflib.get_close_matches(own, right, n=1)]
    return sorted(pairs, key=lambda pair: -difflib.SequenceMatcher(None, *pair).ratio())


def _some(names: Iterable[str]) -> str:
    """Return the count of distinct names and the first three."""
    listed = list(dict.fromkeys(names))
    more = " and more" if len(listed) > 3 else ""
    return f"{len(listed)} ({', '.join(map(repr, listed[:3]))}{more})"
