"""From measured seconds to the full protocol's minutes. Plain arithmetic, so that a reader can redo it.

calibration  each segment's seconds at the protocol's images, by a line through two numbers of images
tape         images x (one full-precision and one quantized forward of each segment)
fisher       passes x images x (the block's own forward + forward and backward of every segment behind it)
steps        steps x seconds a step of each make x blocks of the make
compile      once for every make
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from fimaq_core.recipe import Recipe


@dataclass(frozen=True)
class SegmentCost:
    """Seconds that a segment costs.

    Attributes:
        calibration: for the protocol's images.
        tape: an image.
        own: an image, the block's own forward in a Fisher pass.
        tail: an image, forward and backward as part of another block's Fisher pass.
        step: a step.
        fisher: whether its loss asks for Fisher passes.
    """

    calibration: float
    tape: float
    own: float
    tail: float
    step: float
    fisher: bool


@dataclass(frozen=True)
class Stages:
    """Seconds by stage."""

    calibration: float
    tape: float
    fisher: float
    steps: float
    compile: float = 0.0

    @property
    def total(self) -> float:
        """Their sum, seconds."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, float]:
        """By name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def line(small: tuple[int, float], large: tuple[int, float], at: int) -> float:
    """Seconds at ``at`` images by the line through two measurements (images, seconds); it never falls.

    Measured twice at the same number of images, seconds are proportional to images.
    """
    (few, few_s), (many, many_s) = small, large
    if few == many:
        return many_s * at / many
    slope = max((many_s - few_s) / (many - few), 0.0)
    return max(many_s + slope * (at - many), 0.0)


def protocol_seconds(costs: Sequence[SegmentCost], order: Sequence[int], recipe: Recipe, compile_s: float = 0.0) -> Stages:
    """Seconds of the full protocol.

    Args:
        costs: of each segment that was measured.
        order: for each segment of the model, in order, the measured one that stands for it.
        recipe: steps, images and Fisher passes.
        compile_s: of all makes.
    """
    behind = fisher = 0.0
    for index in reversed(order):
        if costs[index].fisher:
            fisher += recipe.fisher_k * recipe.calibration_images * (costs[index].own + behind)
        behind += costs[index].tail
    return Stages(
        sum(costs[index].calibration for index in order),
        recipe.calibration_images * sum(costs[index].tape for index in order),
        fisher,
        recipe.steps * sum(costs[index].step for index in order),
        compile_s,
    )


def with_depth(order: Sequence[int], repeated: int, depth: int) -> list[int]:
    """``order`` with all occurrences of segment ``repeated`` (they follow one another) replaced by ``depth`` of them."""
    start = list(order).index(repeated)
    rest = [index for index in order[start:] if index != repeated]
    return [*order[:start], *[repeated] * depth, *rest]


def depth_scaling(costs: Sequence[SegmentCost], order: Sequence[int], repeated: int, recipe: Recipe) -> dict[str, float]:
    """Time of 24 blocks over that of 12, and the Fisher passes' share of each. Compilation does not grow and is left out.

    Args:
        costs, order, recipe: as in :func:`protocol_seconds`.
        repeated: the measured segment that is repeated.
    """
    shallow, deep = (protocol_seconds(costs, with_depth(order, repeated, depth), recipe) for depth in (12, 24))
    return {
        "depth_ratio_12_24": deep.total / shallow.total,
        "fisher_share_12": shallow.fisher / shallow.total,
        "fisher_share_24": deep.fisher / deep.total,
    }
