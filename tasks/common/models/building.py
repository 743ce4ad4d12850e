"""Building of models from arguments that may come from a file: names, types, sizes and memory.

``--model-args`` and the header of a checkpoint give arguments of a model's constructor. A library
takes many more than sizes: files, caches, repositories, names of classes. So each task lists the
arguments that it takes, with their types and bounds, and no other reaches the library. The model is
then built without memory first, and its values are counted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from fimaq_core.documents import Strict, validate
from fimaq_core.errors import ModelError
from tasks.common.models.weights import ADVICE

#: Values that a model may have beyond those of its file: computed tables, resized embeddings.
_MORE_VALUES = 2**24
#: Last parts of names of tensors that libraries resize to another number of positions or pixels.
_RESIZED = ("pos_embed", "positional_embedding", "bias_table", "patch_embed.proj.weight")


#: Values of a tensor before it is resized, per value after it.
_MOST_SHRUNK = 1024


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


Flag = Annotated[bool, Field(strict=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1000, le=1000)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Positive = Annotated[float, Field(strict=True, gt=0, le=1000)]
#: Numbers of blocks, of positions or pixels, and of anything else; ``Number`` may be 0.
Depth = Annotated[int, Field(strict=True, ge=1, le=200)]
Side = Annotated[int, Field(strict=True, ge=1, le=8192)]
Count = Annotated[int, Field(strict=True, ge=1, le=2**20)]
Number = Annotated[int, Field(strict=True, ge=0, le=2**20)]
#: One number, or a list of numbers.
Sides = Annotated[list[Side], BeforeValidator(_listed), Field(min_length=1, max_length=2)]
Depths = Annotated[list[Depth], BeforeValidator(_listed), Field(min_length=1, max_length=4)]
Counts = Annotated[list[Count], BeforeValidator(_listed), Field(min_length=1, max_length=16)]
#: Name of a kind of layer or of a model: no path, no address, no module.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{0,60}\z")]


def check_arguments(allowed: type[Strict], arguments: dict[str, Any]) -> None:
    """Raise ModelError unless ``arguments`` have the names, types and bounds of ``allowed``."""
    validate(allowed, arguments, "The arguments of the model (--model-args)", ModelError)


class _WithoutMemory(DeviceContext):
    """Device ``meta``, except for the few values that constructors read as Python numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.linspace:
            kwargs = {**(kwargs or {}), "device": "cpu"}
        return super().__torch_function__(func, types, args, kwargs)


def build_bounded(build: Callable[[str], nn.Module], weights: Path) -> nn.Module:
    """Return the model that ``build`` makes on a device, here the CPU.

    Before that it is made on the device ``meta``, which has no memory, and its values are counted.
    Raises ModelError: it has many more values than the file ``weights`` can hold.
    """
    with _WithoutMemory("meta"):
        sketch = build("meta")
    values = sum(one.numel() for one in (*sketch.parameters(), *sketch.buffers()))
    size = weights.stat().st_size
    if values > size // 2 + _MORE_VALUES:
        raise ModelError(
            f"The model would have {values:,} values, and the weights {weights} have {size:,} "
            f"bytes: they do not fit. {ADVICE}"
        )
    return build("cpu")


def check_resizable(state: dict[str, Tensor], model: nn.Module) -> None:
    """Raise ModelError unless tensors that libraries resize have the other sizes of the model.

    A small file could otherwise make them compute tensors of any size: its patch embedding could
    have kernels of 10,000 pixels, or its position embedding millions of channels.
    """
    sizes: dict[str, set[tuple[int, ...]]] = {}
    most: dict[str, int] = {}
    for tensors in (model.state_dict(), state):
        for name, value in tensors.items():
            kind = next((one for one in _RESIZED if name.endswith(one)), None)
            if kind is None:
                continue
            fixed = tuple(value.shape[:2] if kind.endswith("weight") else value.shape[-1:])
            if tensors is not state:
                sizes.setdefault(kind, set()).add(fixed)
                most[kind] = max(most.get(kind, 0), _MOST_SHRUNK * value.numel())
            elif kind in sizes and (fixed not in sizes[kind] or value.numel() > most[kind]):
                wanted = " or ".join(map(str, sorted(sizes[kind])[:3]))
                raise ModelError(
                    f"The weights do not fit the model: {name!r} is {tuple(value.shape)} in the "
                    f"file, and cannot be resized to {wanted} in the model. {ADVICE}"
                )
