"""Checkpoints: safetensors files, so they hold no code.

The header holds a :class:`Fingerprint` of the run and a sha256 of the content. A checkpoint of
another run, or with changed bits, is refused with the reason. Headers and tensors are not trusted.
"""

import contextlib
import functools
import hashlib
import json
import logging
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError, field_validator
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fimaq_core import NUMERICS_VERSION
from fimaq_core.documents import Strict
from fimaq_core.errors import CheckpointError, first_problem
from fimaq_core.files import cause_of, is_there, open_regular, remove, replaced_whole
from fimaq_core.layers import QuantLinear, quant_layers
from fimaq_core.recipe import Fields, Recipe
from fimaq_core.terminal import one_line

#: Bound on the length of the texts in a header; those of the largest models have 10**5 characters.
_MOST_TEXT = 10**6
#: Bytes of a file beyond those of the model: ranges, and biases that a calibration adds.
_MOST_ADDED = 2**26
#: Name of the header's texts, in the order in which the sha256 covers them, and of the sha256.
_TEXTS, _DIGEST = ("fingerprint", "facts"), "sha256"


class Fingerprint(Strict):
    """Everything that a checkpoint depends on."""

    numerics: int = NUMERICS_VERSION  # version of the code's arithmetic
    model: str = ""  # architecture of the weights; empty if the caller has only one
    weights: str  # sha256 of the float weights
    calibration: str  # fingerprint of the calibration images (ids, order, transform)
    recipe: Recipe

    @field_validator("model", "weights", "calibration")
    @classmethod
    def _printable(cls, text: str) -> str:
        # Messages quote these texts, and a terminal would obey control characters.
        if not text.isprintable():
            raise ValueError("has characters that cannot be printed")
        return text

    @field_validator("recipe")
    @classmethod
    def _printable_recipe(cls, recipe: Recipe) -> Recipe:
        cls._printable(recipe.method + (recipe.scope or ""))
        return recipe

    def mismatch(self, other: "Fingerprint", fields: Fields = "all") -> str | None:
        """Say how ``other`` differs, or return None; recipe fields outside ``fields`` may differ.

        The recipe's scope always counts.
        """
        if self.numerics != other.numerics:
            versions = f"version {other.numerics}, this is version {self.numerics}"
            return f"it was made by numerics {versions}"
        if self.model != other.model:
            names = f"{other.model or 'unnamed'}, here {self.model or 'unnamed'}"
            return f"it was made of another model ({names})"
        if self.weights != other.weights:
            digests = f"sha256 {other.weights[:12]}, here {self.weights[:12]}"
            return f"it was made from other weights ({digests})"
        if self.calibration != other.calibration:
            return "it was made with other calibration images"
        mine, theirs = self.recipe, other.recipe
        compared = dict.fromkeys(["scope", *mine.names_of(fields), *theirs.names_of(fields)])
        pairs = [(name, getattr(theirs, name), getattr(mine, name)) for name in compared]
        different = [f"{name} ({old!r}, here {new!r})" for name, old, new in pairs if old != new]
        return f"it was made with another recipe: {', '.join(different)}" if different else None


class Loaded(NamedTuple):
    """Content of a checkpoint beside its tensors."""

    facts: dict[str, Any]  # JSON values
    sha256: str  # of the whole content (hex)


def state_sha256(model: nn.Module) -> str:
    """Return the sha256 (hex) of names, shapes, types and values of a model's state."""
    return _sha256(model.state_dict())


def _sha256(tensors: Mapping[str, Tensor], texts: Iterable[str] = ()) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], fingerprint: Fingerprint, facts: dict[str, Any]
) -> str:
    """Write a checkpoint, with ``facts`` (JSON values) in its header; return its sha256 (hex).

    The file appears complete or not at all.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    texts = {"fingerprint": fingerprint.model_dump_json(), "facts": json.dumps(facts)}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    sha256 = _sha256(plain, texts.values())
    with replaced_whole(path) as temporary:
        save_file(plain, temporary, metadata={**texts, _DIGEST: sha256})
    return sha256


def read_header(path: Path) -> tuple[Fingerprint, dict[str, Any]]:
    """Read fingerprint and facts of a checkpoint without its tensors.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, or no checkpoint of this project.
    """
    return _parsed(path, _content(path, None)[0])


def _content(path: Path, most_bytes: int | None) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the texts of a header, and the tensors on the CPU. Nothing else opens checkpoints.

    ``most_bytes`` bounds the size of the file; None leaves the tensors out.
    """
    try:
        open_regular(
            path, most_bytes or 2**60
        ).close()  # safe_open calls all problems "no such file"
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {path}.") from error
    except OSError as error:
        cause = cause_of(error, path)
        raise CheckpointError(f"Cannot read the checkpoint {path}: {cause}.") from error
    try:
        # Tensors are read, not mapped: a fault of the disk would end the process by a signal.
        with safe_open(path, framework="pt", backend="pread") as file:
            names = () if most_bytes is None else file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    # The last three are raised for types that PyTorch does not have.
    except (SafetensorError, OSError, MemoryError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, OSError | MemoryError) or "(os error" in str(error):
            text = f"Cannot read the checkpoint {path}: {one_line(str(error), 300)}."
            raise CheckpointError(f"{text} Check disk and memory.") from error
        raise _damaged(path, one_line(str(error), 300)) from error


def _parsed(path: Path, texts: Mapping[str, str]) -> tuple[Fingerprint, dict[str, Any]]:
    """Return fingerprint and facts of a header. Raises CheckpointError."""
    foreign = f"{path} is not a checkpoint of this project"
    if sum(map(len, texts.values())) > _MOST_TEXT:
        raise CheckpointError(f"{foreign}: the texts in its header have over {_MOST_TEXT} letters.")
    # Both parsers refuse endless nesting and numbers of thousands of digits.
    try:
        fingerprint = Fingerprint.model_validate_json(texts["fingerprint"])
    except (KeyError, ValueError) as error:
        why = f" ({first_problem(error)})" if isinstance(error, ValidationError) else ""
        raise CheckpointError(f"{foreign}: its header lacks the fingerprint{why}.") from error
    try:
        facts = from_json(texts.get("facts", ""), allow_inf_nan=False)
    except ValueError as error:
        why = one_line(str(error), 300)
        raise CheckpointError(f"{foreign}: the facts in its header are no JSON ({why}).") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{foreign}: the facts in its header are no object.")
    return fingerprint, facts


def load_checkpoint(
    path: Path,
    module: nn.Module,
    expected: Fingerprint | None,
    fields: Fields = "all",
    holds: Mapping[str, object] | None = None,
) -> Loaded:
    """Load a checkpoint into ``module``, which has the saved structure.

    Args:
        path: the file.
        module: gets the tensors, on its device.
        expected: fingerprint that the file's must agree with in the recipe's ``fields`` and in
            everything else; None accepts any fingerprint.
        fields: recipe fields that the file depends on.
        holds: facts that the header must not contradict, such as the stage.

    Raises:
        CheckpointError: the file belongs to another run, is unreadable or damaged, does not fit, or
            has values that no run writes.
    """
    fingerprint, facts = read_header(path)
    reason = None if expected is None else expected.mismatch(fingerprint, fields)
    for name, value in (holds or {}).items():
        if facts.get(name, value) != value:
            reason = reason or f"its {name} is {reprlib.repr(facts[name])}, here {value!r}"
    if reason is not None:
        raise CheckpointError(
            f"The checkpoint {path} does not belong to this run: {reason}. "
            "Delete it or use its settings."
        )
    # The codes of weights take less than the weights.
    own = sum(tensor.nbytes for tensor in module.state_dict().values())
    texts, state = _content(path, 2 * own + _MOST_ADDED)
    if _parsed(path, texts) != (fingerprint, facts):
        raise CheckpointError(f"{path} was replaced while it was read: run again.")
    sha256 = _checked_sha256(path, texts, state)
    _put(path, module, state)
    # Only the stage of MLPs is written before calibration.
    problem = _problem(module, fingerprint.recipe, calibrated=facts.get("stage") != "mlp")
    if problem is not None:
        raise _damaged(path, problem)
    return Loaded(facts, sha256)


def _put(path: Path, module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put tensors into ``module``. Raises CheckpointError if they do not fit."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    _add_biases(module, state)
    own, foreign = module.state_dict(), f"The checkpoint {path} does not fit the model"
    for name, tensor in state.items():
        if name in own and tensor.dtype != own[name].dtype:
            types = f"{name} is {tensor.dtype}, not {own[name].dtype}"
            raise CheckpointError(f"{foreign}: {types}.")
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{foreign}: {one_line(str(error), 300)}") from error
    module.to(device)


def _checked_sha256(path: Path, texts: Mapping[str, str], state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a checkpoint. Raises CheckpointError if the header has another one."""
    found = _sha256(state, [texts[name] for name in _TEXTS])
    if set(texts) == set(_TEXTS):
        _say_unchecked(path)
    elif texts.get(_DIGEST) != found:
        raise _damaged(path, "its content does not have the sha256 that its header states")
    return found


@functools.cache
def _say_unchecked(path: Path) -> None:
    message = "%s is of an older version and has no sha256: changed bits would not be noticed."
    logging.getLogger(__name__).info(message, path)


def _problem(module: nn.Module, recipe: Recipe, calibrated: bool) -> str | None:
    """Return name and value of a tensor in ``module`` that no run gives, or None."""
    parameters = dict(module.named_parameters())
    for name, tensor in module.state_dict().items():  # infinite buffers may be masks
        wrong = ~torch.isfinite(tensor) if name in parameters else torch.isnan(tensor)
        if wrong.any():
            return f"{name} is {tensor[wrong][0]:g}"
    for name, layer in quant_layers(module):
        if (problem := layer.problem(recipe.range_search, calibrated)) is not None:
            return f"{name}.{problem}".lstrip(".")
    return None


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {path} is damaged ({why}): delete it and run again.")


def _add_biases(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Create the biases that LayerNorm reparameterisation added to a float model without them."""
    for name, child in module.named_modules():
        key = f"{name}.bias" if name else "bias"
        if isinstance(child, QuantLinear | nn.LayerNorm) and child.bias is None and key in state:
            child.bias = nn.Parameter(torch.empty_like(state[key]), requires_grad=False)


@dataclass(frozen=True)
class Pieces:
    """Finished pieces of an unfinished stage: blocks or MLPs, one checkpoint each.

    The files are ``<folder>/<kind>-NNN.safetensors``.
    """

    folder: Path | None = None  # folder of the files; None keeps nothing
    kind: str = ""  # ``block`` or ``mlp``
    fingerprint: Fingerprint | None = None  # identity of the run; needed with ``folder``
    fields: Fields = "all"  # recipe fields that the files depend on

    def load(self, index: int, module: nn.Module) -> tuple[dict[str, Any], Path] | None:
        """Load a finished piece into `module`; return the facts and the file, or None."""
        path = self._path(index)
        if path is None or not is_there(path):
            return None
        holds = self._facts(index)
        return load_checkpoint(path, module, self.fingerprint, self.fields, holds).facts, path

    def save(self, index: int, module: nn.Module, facts: dict[str, Any] | None = None) -> None:
        """Keep a finished piece with `facts`."""
        path = self._path(index)
        if path is not None:
            assert self.fingerprint is not None
            facts = self._facts(index) | (facts or {})
            save_checkpoint(path, module.state_dict(), self.fingerprint, facts)

    def remove(self) -> None:
        """Remove all pieces, and the folder if it is then empty."""
        if self.folder is None:
            return
        for file in self.folder.glob(f"{self.kind}-*.safetensors"):
            remove(file)
        with contextlib.suppress(OSError):  # not empty, or removed by another process
            self.folder.rmdir()

    def _facts(self, index: int) -> dict[str, Any]:
        return {"stage": self.kind, "index": index}

    def _path(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.kind}-{index:03d}.safetensors"
