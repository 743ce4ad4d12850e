"""Samples of equal or of varying shapes: calibration inputs, block outputs and what is kept about each of them.

Samples of equal shapes are one tensor (n, ...). Those of varying shapes are a :class:`Ragged`, of which one is taken at a time.
Both are sliced by rows, so most code need not know which it has.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from fimaq_core.errors import RecipeError


class Ragged:
    """Samples that are processed one by one, each a tensor with a leading dimension of its own, (1, ...) as a rule.

    Args:
        items: one tensor a sample, all on one device.
    """

    def __init__(self, items: Sequence[Tensor]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.items)

    @overload
    def __getitem__(self, key: int) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice) -> "Tensor | Ragged": ...

    def __getitem__(self, key: int | slice) -> "Tensor | Ragged":
        """Sample ``key``; or of a slice the one sample, or another :class:`Ragged` where it is none or several."""
        if isinstance(key, int):
            return self.items[key]
        chosen = self.items[key]
        return chosen[0] if len(chosen) == 1 else Ragged(chosen)

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.items[0].device

    def map(self, function: Callable[[Tensor], Tensor]) -> "Ragged":
        """``function`` of every sample."""
        return Ragged([function(item) for item in self.items])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Ragged":
        """The samples on ``device``."""
        return self.map(lambda item: item.to(device, non_blocking=non_blocking))


Samples = Tensor | Ragged


def slices(samples: Samples, size: int) -> Iterator[slice]:
    """Slices of ``size`` samples in a row; of one where shapes vary."""
    step = 1 if isinstance(samples, Ragged) else size
    for start in range(0, len(samples), step):
        yield slice(start, min(start + step, len(samples)))


def batches(samples: Samples, size: int) -> Iterator[Tensor]:
    """The samples of :func:`slices`."""
    for part in slices(samples, size):
        found = samples[part]
        assert isinstance(found, Tensor)
        yield found


def first(samples: Samples, count: int) -> Samples:
    """The first ``count`` samples, of the same kind."""
    return Ragged(samples.items[:count]) if isinstance(samples, Ragged) else samples[:count]


def joined(parts: Sequence[Tensor], like: Samples) -> Samples:
    """Batches in a row as samples of the kind of ``like``."""
    return Ragged(parts) if isinstance(like, Ragged) else torch.cat(list(parts))


def check_alone(samples: Samples, batch: int, field: str) -> None:
    """Check that a batch is one sample where shapes vary. ``field``: of the recipe. Raises RecipeError."""
    if isinstance(samples, Ragged) and batch != 1:
        raise RecipeError(f"These images vary in size and are taken one at a time: set {field} 1 (now {batch}).")
