"""All of a block's optimisation that depends on the step's number, as tables made beforehand.

A step reads its row by a counter that lives on the device, so no step waits for a Python number and
the same compiled or captured step serves all of them.
"""

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fimaq_core.quantizers.dropping import draw_keys
from fimaq_core.recipe import Recipe

#: Adam's constants, PyTorch's defaults.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
#: Numbers drawn at a time while batches are drawn.
_DRAWS = 2**22


def block_generator(seed: int, label: str) -> torch.Generator:
    """CPU random generator of one block, by seed and name only: resuming needs no saved state."""
    digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Schedule:
    """Tables with a row per step."""

    #: (steps, 5) float32: weight and exponent β of the rounding regulariser, Adam's step sizes
    #: (learning rate over its first bias correction) of α and of the scales, and the inverse root
    #: of Adam's second bias correction
    rates: Tensor
    #: (steps, B) int64, the batch's samples: drawn without repetition, or one after another
    samples: Tensor
    keys: Tensor  # (steps, streams, 2) int32, keys of the random masks

    @classmethod
    def build(
        cls,
        recipe: Recipe,
        images: int,
        streams: int,
        generator: torch.Generator,
        device: torch.device,
        in_order: bool = False,
    ) -> "Schedule":
        """Make the tables of a block for a number of images and of random masks a step (streams).

        The generator is on the CPU, so that every device sees the same. ``in_order`` takes the
        images one by one, again and again (as released for detectors).
        """
        samples = (
            torch.arange(recipe.steps)[:, None] % images
            if in_order
            else draw_batches(recipe.steps, min(recipe.batch_size, images), images, generator)
        )
        keys = draw_keys(recipe.steps * streams, generator).view(recipe.steps, streams, 2)
        return cls(_rates(recipe).to(device), samples.to(device), keys.to(device))


def draw_batches(steps: int, size: int, images: int, generator: torch.Generator) -> Tensor:
    """(steps, size) numbers below ``images``, rows without repetition, subsets equally likely."""
    rows = max(_DRAWS // images, 1)
    out = []
    for start in range(0, steps, rows):
        draws = torch.rand(min(rows, steps - start), images, generator=generator)
        out.append(draws.topk(size, dim=1).indices)
    return torch.cat(out)


def regulariser_exponent(recipe: Recipe, number: int) -> float | None:
    """β of the rounding regulariser at step ``number`` (from 0), None while it is off."""
    count, steps = number + 1, recipe.steps
    warmup = recipe.round_warmup * steps
    if count < warmup or recipe.round_weight == 0:
        return None
    left = 1 - (count - warmup) / (steps - warmup)
    return recipe.beta_end + (recipe.beta_start - recipe.beta_end) * max(0.0, left)


@functools.lru_cache(maxsize=4)
def cosine_rates(start: float, steps: int) -> tuple[float, ...]:
    """Learning rates of PyTorch's cosine schedule to zero."""
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=start)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return tuple(rates)


@functools.lru_cache(maxsize=4)
def _rates(recipe: Recipe) -> Tensor:
    rows = []
    for number, lr_scale in enumerate(cosine_rates(recipe.lr_scale, recipe.steps)):
        beta = regulariser_exponent(recipe, number)
        first, second = 1 - BETA1 ** (number + 1), 1 - BETA2 ** (number + 1)
        weight = 0.0 if beta is None else recipe.round_weight
        rows.append((weight, beta or 2.0, recipe.lr_alpha / first, lr_scale / first, second**-0.5))
    return torch.tensor(rows, dtype=torch.float64).float()
