"""Checkpoints: safetensors files whose header says what they belong to. Strict, and free of code.

The header holds a :class:`Fingerprint`. A checkpoint of another run is refused with the reason.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fimaq_core import NUMERICS_VERSION
from fimaq_core.errors import CheckpointError, first_problem
from fimaq_core.files import replaced_whole
from fimaq_core.layers import QuantLinear
from fimaq_core.recipe import Recipe

#: The part of a recipe that a checkpoint depends on: all fields, those that determine ranges, or
#: those that determine an MLP reconstruction.
Scope = Literal["all", "ranges", "mlp"]


class Fingerprint(BaseModel):
    """All that a checkpoint depends on.

    Attributes:
        numerics: version of the code's arithmetic.
        model: which architecture the weights were loaded into; empty where the caller has one only.
        weights: sha256 of the float weights.
        calibration: fingerprint of the calibration images (ids, order, transform).
        recipe: all recipe fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    numerics: int = NUMERICS_VERSION
    model: str = ""
    weights: str
    calibration: str
    recipe: Recipe

    @field_validator("model", "weights", "calibration")
    @classmethod
    def _printable(cls, text: str) -> str:
        # They come into messages, and a terminal obeys what is not printable.
        if not text.isprintable():
            raise ValueError("has characters that cannot be printed")
        return text

    def mismatch(self, other: "Fingerprint", scope: Scope = "all") -> str | None:
        """Say what differs in ``other``, or None; recipe fields outside of ``scope`` are left out."""
        if self.numerics != other.numerics:
            return (
                f"it was made by numerics version {other.numerics}, this is version {self.numerics}"
            )
        if self.model != other.model:
            return f"it was made of another model ({other.model or 'unnamed'}, here {self.model or 'unnamed'})"
        if self.weights != other.weights:
            return f"it was made from other weights (sha256 {other.weights[:12]}, here {self.weights[:12]})"
        if self.calibration != other.calibration:
            return "it was made with other calibration images"
        mine, theirs = self.recipe, other.recipe
        fields: tuple[str, ...] = tuple(Recipe.model_fields)
        if scope == "ranges":
            fields = tuple(dict.fromkeys(("scope", *mine.range_fields(), *theirs.range_fields())))
        elif scope == "mlp":
            fields = ("scope", *Recipe.mlp_fields())
        different = [
            f"{name} ({getattr(theirs, name)!r}, here {getattr(mine, name)!r})"
            for name in fields
            if getattr(mine, name) != getattr(theirs, name)
        ]
        return f"it was made with another recipe: {', '.join(different)}" if different else None


def state_sha256(model: nn.Module) -> str:
    """The sha256 (hex) over names, shapes and values of a model's state: the identity of weights that came from no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], fingerprint: Fingerprint, facts: dict[str, Any]
) -> None:
    """Write a checkpoint so that it is there whole or not at all.

    Args:
        path: the file.
        tensors: what to keep.
        fingerprint: what it belongs to.
        facts: JSON values to keep beside it.

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
        CheckpointError: missing, damaged, or not a checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        # Neither nests without end nor has numbers of thousands of digits: this reader refuses both.
        fingerprint, facts = (
            Fingerprint.model_validate_json(metadata["fingerprint"]),
            from_json(metadata["facts"]),
        )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged ({error}): delete it and run again."
        ) from error
    except (KeyError, ValueError) as error:
        why = f" ({first_problem(error)})" if isinstance(error, ValidationError) else ""
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: its header lacks the fingerprint{why}."
        ) from error
    if not isinstance(facts, dict):
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: the facts in its header are no object."
        )
    return fingerprint, facts


def load_checkpoint(
    path: Path, module: nn.Module, expected: Fingerprint | None, scope: Scope = "all"
) -> dict[str, Any]:
    """Load a checkpoint into ``module``, strictly, and return its facts.

    Args:
        path: the file.
        module: of the structure that was saved.
        expected: fingerprint the checkpoint must have; None takes any.
        scope: which recipe fields are compared.

    Raises:
        CheckpointError: it belongs to another run (says why), is damaged, or does not fit.
    """
    fingerprint, facts = read_header(path)
    if expected is not None:
        reason = expected.mismatch(fingerprint, scope)
        if reason is not None:
            raise CheckpointError(
                f"The checkpoint {path} does not belong to this run: {reason}. Delete it or use its settings."
            )
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (
        SafetensorError,
        OSError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # also types that PyTorch does not have
        raise CheckpointError(
            f"The checkpoint {path} is damaged ({error}): delete it and run again."
        ) from error
    _add_biases(module, state)
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"The checkpoint {path} does not fit the model: {error}") from error
    module.to(device)
    return facts


def _add_biases(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Make the biases that LayerNorm reparameterisation added where the float model has none."""
    for name, child in module.named_modules():
        key = f"{name}.bias" if name else "bias"
        if isinstance(child, QuantLinear | nn.LayerNorm) and child.bias is None and key in state:
            child.bias = nn.Parameter(torch.empty_like(state[key]), requires_grad=False)
