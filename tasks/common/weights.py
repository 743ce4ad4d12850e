"""Reading local weight files without running anything in them."""

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fimaq_core.errors import ModelError, NumericsError
from tasks.common.hashing import SUFFIXES


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from .pth / .bin / .pt by PyTorch's weights-only reader.

    Raises:
        ModelError: missing, damaged, of another kind, or a pickle with code in it.
    """
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}.")
    if path.suffix not in SUFFIXES:
        raise ModelError(f"Weights {path}: give a file that ends in {', '.join(SUFFIXES)}.")
    if is_torchscript(path):
        raise ModelError(
            f"The weights {path} are a TorchScript archive: a program with weights, which is not run. Give the weights as "
            "safetensors."
        )
    try:
        content: Any = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"The weights {path} hold more than tensors (code, or objects that only code can rebuild) and are not loaded. "
            "Convert them to safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(f"The weights {path} are damaged or no weights file: {error}") from error
    for key in ("state_dict", "model", "model_ema"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"The weights {path} hold no state dict (a mapping of names to tensors).")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of ``torch.jit.save``: it holds a program's constants, which a state dict has not."""
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
            raise NumericsError(f"The weights {where} have NaN or infinite values in '{name}': use another file.")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        text = str(error).replace("\n\t", " ")
        raise ModelError(f"The weights {where} do not fit the model: {text[:600]}") from error


def state_sha256(model: nn.Module) -> str:
    """The sha256 (hex) over names, shapes and values of a model's state: the identity of weights that came from no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
