"""The fast calibration beside direct candidate search, in one run: same images, same candidates."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.speed.direct import calibrate_directly, run_segment, search_weight
from benchmarks.speed.stages import calibration_seconds
from benchmarks.speed.subjects import Subject
from benchmarks.speed.timing import best_seconds, seconds
from fimaq_core.calibration.candidates import MIN_WEIGHT_SCALE, Candidates, ascending, grid_candidates
from fimaq_core.calibration.own_error import best_by_own_error
from fimaq_core.calibration.weight_error import best_rows, input_moments
from fimaq_core.layers import QuantLinear, quant_layers, set_quantized
from fimaq_core.recipe import Recipe


@dataclass(frozen=True)
class SearchTimes:
    """Seconds of both ways.

    Attributes:
        calibration_s, calibration_direct_s: of the whole calibration.
        weights_s, weights_direct_s: of one search of every linear weight of a block by its output's error.
        same_rows: share of those weights' rows for which both choose the same candidate.
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
    subject = load()
    images = subject.images[: recipe.range_images]
    again_s = sum(calibration_seconds(subject.chain, images, recipe))
    weights_s, weights_direct_s, same = _compare_weights(subject, recipe)
    direct = load().chain
    direct_s = seconds(lambda: calibrate_directly(direct, images, recipe), images.device)
    return SearchTimes(min(again_s, fast_s or again_s), direct_s, weights_s, weights_direct_s, same, len(images))


@torch.no_grad()
def _compare_weights(subject: Subject, recipe: Recipe) -> tuple[float, float, float]:
    """Both weight searches on a calibrated model's first block of the main make; the time of the inputs' ranges is in neither."""
    chain, device = subject.chain, subject.images.device
    set_quantized(chain, False)
    x = subject.images[: recipe.range_images]
    index = subject.make_of.index(subject.main)
    for number in range(index):
        x, _ = run_segment(chain.segment(number), x)
    _, inputs = run_segment(chain.segment(index), x)
    fast_s = direct_s = 0.0
    same, rows = 0, 0
    for name, layer in quant_layers(chain.segment(index).block):
        if isinstance(layer, QuantLinear) and not layer.weight_quantizer.off:
            seen = inputs[name][0]
            ordered = ascending(layer.weight.detach())
            candidates = grid_candidates(ordered, layer.weight_quantizer.levels, recipe.range_candidates, MIN_WEIGHT_SCALE)
            guess = best_by_own_error(ordered, candidates, layer.weight_quantizer.levels)
            search = _FastSearch(layer, seen.reshape(-1, seen.shape[-1]), candidates, guess)
            search()
            fast_s += best_seconds(search, device, 3)
            direct_s += seconds(lambda: search_weight(layer, seen, candidates), device)  # noqa: B023 (called at once)
            chosen = candidates.scale.gather(0, search.index[None])[0]
            same += int((chosen == layer.weight_quantizer.scale[:, 0]).sum())
            rows += len(chosen)
    set_quantized(chain, True)
    return fast_s, direct_s, same / rows


@dataclass
class _FastSearch:
    """The fast search of one weight: moments of the inputs (tokens, d), then the best candidate of each row."""

    layer: QuantLinear
    inputs: Tensor
    candidates: Candidates
    index: Tensor

    def __post_init__(self) -> None:
        self.guess = self.index

    def __call__(self) -> None:
        quantizer = self.layer.input_quantizer
        moments = input_moments(
            self.inputs,
            quantizer(self.inputs),
            self.layer.weight.detach(),
            None if quantizer.off else quantizer.scale,
            quantizer.levels,
        )
        levels = self.layer.weight_quantizer.levels
        self.index = best_rows(self.layer.weight.detach(), self.candidates, levels, *moments, self.guess)
