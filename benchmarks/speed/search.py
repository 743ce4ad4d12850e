"""The fast calibration beside direct candidate search, in one run: same images, same candidates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.speed import direct
from benchmarks.speed.stages import calibration_seconds
from benchmarks.speed.subjects import Subject
from benchmarks.speed.timing import now
from fimaq_core.calibration import layer_ranges
from fimaq_core.chain import BlockChain
from fimaq_core.layers import QuantLinear, quant_layers
from fimaq_core.recipe import Recipe


@dataclass(frozen=True)
class SearchTimes:
    """Seconds of both ways.

    Attributes:
        calibration_s, calibration_direct_s: of the whole calibration.
        weights_s, weights_direct_s: within it, of all searches of linear weights by the output's error. (The direct one
            does every round; the fast one leaves out rounds that could only repeat their choice.)
        same_rows: share of the linear weights' rows for which both choose the same range.
        images: that both saw.
    """

    calibration_s: float
    calibration_direct_s: float
    weights_s: float
    weights_direct_s: float
    same_rows: float
    images: int

    def as_dict(self) -> dict[str, float]:
        """All of it, with the two ratios."""
        return {
            **asdict(self),
            "calibration_speedup": self.calibration_direct_s / self.calibration_s,
            "weights_speedup": self.weights_direct_s / self.weights_s,
        }


def compare_searches(load: Callable[[], Subject], recipe: Recipe, fast_s: float | None = None) -> SearchTimes:
    """Calibrate a model both ways.

    Args:
        load: makes the model anew, since calibration changes it.
        recipe: of the search.
        fast_s: seconds that the fast way took before in this run; the smaller of the two counts.
    """
    subject, other = load(), load().chain
    images = subject.images[: recipe.range_images]
    device = images.device
    with _clock(layer_ranges, "_search_rows", device) as fast_weights:
        again_s = sum(calibration_seconds(subject.chain, images, recipe))
    with _clock(direct, "search_weight", device) as direct_weights:
        start = now(device)
        direct.calibrate_directly(other, images, recipe)
        direct_s = now(device) - start
    same = _same_rows(subject.chain, other)
    return SearchTimes(min(again_s, fast_s or again_s), direct_s, sum(fast_weights), sum(direct_weights), same, len(images))


@contextmanager
def _clock(module: ModuleType, name: str, device: torch.device) -> Iterator[list[float]]:
    """Collect the seconds of every call of a module's function."""
    function, taken = getattr(module, name), []

    def timed(*args: Any) -> Any:
        start = now(device)
        out = function(*args)
        taken.append(now(device) - start)
        return out

    with patch.object(module, name, timed):
        yield taken


def _same_rows(a: BlockChain, b: BlockChain) -> float:
    same = rows = 0
    for (_, first), (_, second) in zip(quant_layers(a), quant_layers(b), strict=True):
        if isinstance(first, QuantLinear) and isinstance(second, QuantLinear) and not first.weight_quantizer.off:
            mine, its = first.weight_quantizer, second.weight_quantizer
            # Reparameterised weights differ in their last bits where a tie in a norm's ranges fell differently.
            equal = torch.isclose(mine.scale, its.scale, rtol=1e-4) & (mine.zero_point == its.zero_point)
            same += int(equal.sum())
            rows += equal.numel()
    return same / rows
