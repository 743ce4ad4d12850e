"""Tables of everything that depends on the number of the step, made before the optimisation.

A step reads the row of a counter on the device. So no step waits for a Python number, and one
compiled or captured step serves all steps.
"""

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fimaq_core.quantizers.dropping import draw_keys
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples

#: Adam's constants, PyTorch's defaults.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
#: Random numbers drawn at a time while batches are drawn.
_DRAWS = 2**22


def block_generator(seed: int, label: str) -> torch.Generator:
    """Return a CPU random generator of seed and label; a resumed run needs no saved state."""
    digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Schedule:
    """Tables with one row per step."""

    #: (steps, 5) float32: weight and exponent β of the rounding regulariser; Adam's step sizes of
    #: the weights' variables and of the scales (learning rate over the first bias correction); the
    #: inverse root of Adam's second bias correction
    rates: Tensor
    samples: Tensor  # (steps, B) int64, numbers of the batch's samples
    keys: Tensor  # (steps, streams, 2) int32, keys of the random masks

    @classmethod
    def build(
        cls, recipe: Recipe, samples: Samples, streams: int, generator: torch.Generator
    ) -> "Schedule":
        """Make the tables of a block with ``streams`` random masks per step, on the CPU.

        The generator is on the CPU too, so random numbers do not depend on the device. A batch has
        no sample twice. Samples of varying shapes are taken one by one, in order and repeatedly (as
        released for detectors).
        """
        count = len(samples)
        if samples.varying:
            rows = torch.arange(recipe.steps)[:, None] % count
        else:
            rows = draw_batches(recipe.steps, min(recipe.batch_size, count), count, generator)
        keys = draw_keys(recipe.steps * streams, generator).view(recipe.steps, streams, 2)
        return cls(_rates(recipe), rows, keys)

    def to(self, device: torch.device) -> "Schedule":
        """Return the tables on ``device``."""
        return Schedule(self.rates.to(device), self.samples.to(device), self.keys.to(device))


def draw_batches(steps: int, size: int, images: int, generator: torch.Generator) -> Tensor:
    """Draw (steps, size) numbers below ``images``; all subsets are equally likely in each row."""
    rows = max(_DRAWS // images, 1)
    out = []
    for start in range(0, steps, rows):
        draws = torch.rand(min(rows, steps - start), images, generator=generator)
        out.append(draws.topk(size, dim=1).indices)
    return torch.cat(out)


def regulariser_exponent(recipe: Recipe, number: int) -> float | None:
    """Return β of the rounding regulariser at step ``number`` (from 0); None while it is off.

    It acts from the first step if a closed form chose the start.
    """
    count, steps = number + 1, recipe.steps
    warmup = recipe.round_warmup * steps if recipe.start == "nearest" else 0.0
    if count < warmup or recipe.round_weight == 0:
        return None
    left = 1 - (count - warmup) / (steps - warmup)
    return recipe.beta_end + (recipe.beta_start - recipe.beta_end) * max(0.0, left)


@functools.lru_cache(maxsize=4)
def cosine_rates(start: float, steps: int) -> tuple[float, ...]:
    """Return the learning rates of PyTorch's cosine schedule to zero."""
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
    rows, steps, rounding = [], recipe.steps, recipe.weight_learning == "rounding"
    own = (recipe.lr_alpha,) * steps if rounding else cosine_rates(recipe.lr_weight, steps)
    pairs = zip(own, cosine_rates(recipe.lr_scale, steps), strict=True)
    for number, (lr, lr_scale) in enumerate(pairs):
        beta = regulariser_exponent(recipe, number)
        first, second = 1 - BETA1 ** (number + 1), 1 - BETA2 ** (number + 1)
        weight = 0.0 if beta is None else recipe.round_weight
        rows.append((weight, beta or 2.0, lr / first, lr_scale / first, second**-0.5))
    return torch.tensor(rows, dtype=torch.float64).float()
