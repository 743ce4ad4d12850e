"""Checkpoints: safetensors files, so they hold no code.

The header holds a :class:`Fingerprint` of the run. A checkpoint of another run is refused with the
reason.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError, field_validator
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fimaq_core import NUMERICS_VERSION
from fimaq_core.documents import Strict
from fimaq_core.errors import CheckpointError, first_problem
from fimaq_core.files import remove, replaced_whole
from fimaq_core.layers import QuantLinear
from fimaq_core.recipe import Fields, Recipe

_DAMAGED = "The checkpoint {} is damaged ({}): delete it and run again."


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


def state_sha256(model: nn.Module) -> str:
    """Return the sha256 (hex) of names, shapes, types and values of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], fingerprint: Fingerprint, facts: dict[str, Any]
) -> None:
    """Write a checkpoint, with ``facts`` (JSON values) in its header.

    The file appears complete or not at all.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    metadata = {"fingerprint": fingerprint.model_dump_json(), "facts": json.dumps(facts)}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replaced_whole(path) as temporary:
        save_file(plain, temporary, metadata=metadata)


def read_header(path: Path) -> tuple[Fingerprint, dict[str, Any]]:
    """Read fingerprint and facts of a checkpoint without its tensors.

    Raises:
        CheckpointError: the file is missing, damaged, or no checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    foreign = f"{path} is not a checkpoint of this project"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        # Both parsers refuse endless nesting and numbers of thousands of digits.
        fingerprint = Fingerprint.model_validate_json(metadata["fingerprint"])
        facts = from_json(metadata["facts"])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_DAMAGED.format(path, error)) from error
    except (KeyError, ValueError) as error:
        why = f" ({first_problem(error)})" if isinstance(error, ValidationError) else ""
        raise CheckpointError(f"{foreign}: its header lacks the fingerprint{why}.") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{foreign}: the facts in its header are no object.")
    return fingerprint, facts


def load_checkpoint(
    path: Path, module: nn.Module, expected: Fingerprint | None, fields: Fields = "all"
) -> dict[str, Any]:
    """Load a checkpoint into ``module``, which has the saved structure; return the facts.

    The fingerprint must agree with ``expected`` in the recipe's ``fields`` and in everything else.
    None accepts any fingerprint.

    Raises:
        CheckpointError: the file belongs to another run, is damaged, or does not fit.
    """
    fingerprint, facts = read_header(path)
    reason = None if expected is None else expected.mismatch(fingerprint, fields)
    if reason is not None:
        raise CheckpointError(
            f"The checkpoint {path} does not belong to this run: {reason}. "
            "Delete it or use its settings."
        )
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # The last three are raised for types that PyTorch does not have.
    except (SafetensorError, OSError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(_DAMAGED.format(path, error)) from error
    _add_biases(module, state)
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"The checkpoint {path} does not fit the model: {error}") from error
    module.to(device)
    return facts


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
        if path is None or not path.is_file():
            return None
        return load_checkpoint(path, module, self.fingerprint, self.fields), path

    def save(self, index: int, module: nn.Module, facts: dict[str, Any] | None = None) -> None:
        """Keep a finished piece with `facts`."""
        path = self._path(index)
        if path is not None:
            assert self.fingerprint is not None
            facts = {"stage": self.kind, "index": index, **(facts or {})}
            save_checkpoint(path, module.state_dict(), self.fingerprint, facts)

    def remove(self) -> None:
        """Remove all pieces, and the folder if it is then empty."""
        if self.folder is None:
            return
        for file in self.folder.glob(f"{self.kind}-*.safetensors"):
            remove(file)
        with contextlib.suppress(OSError):  # not empty, or removed by another process
            self.folder.rmdir()

    def _path(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.kind}-{index:03d}.safetensors"
