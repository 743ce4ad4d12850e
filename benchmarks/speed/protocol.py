"""Minutes of the full protocol, from measured seconds. Plain arithmetic, so a reader can redo it.

calibration  seconds per segment at the protocol's images, by a line through two numbers of images
tape         images x (a full-precision and a quantized forward of each segment)
fisher       passes x images x (the block's forward + forward and backward of all segments behind it)
steps        steps x seconds per step of each make x blocks of the make
compile      once per make
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fimaq_core.recipe import Recipe


@dataclass(frozen=True)
class SegmentCost:
    """Seconds of one segment.

    Attributes:
        calibration: with the protocol's images.
        tape: per image.
        own: per image, the block's own forward in a Fisher pass.
        tail: per image, forward and backward as a part of another block's Fisher pass.
        step: per step.
        fisher: whether its loss needs Fisher passes.
    """

    calibration: float
    tape: float
    own: float
    tail: float
    step: float
    fisher: bool


def line(small: tuple[int, float], large: tuple[int, float], at: int) -> float:
    """Return the seconds at ``at`` images, by the line through two measurements (images, seconds).

    The line never falls. Two measurements of the same number of images give a line through zero.
    """
    (few, few_s), (many, many_s) = small, large
    if few == many:
        return many_s * at / many
    slope = max((many_s - few_s) / (many - few), 0.0)
    return max(many_s + slope * (at - many), 0.0)


def protocol_seconds(
    costs: Sequence[SegmentCost],
    order: Sequence[int],
    recipe: Recipe,
    compile_s: float = 0.0,
) -> dict[str, float]:
    """Return the seconds of the full protocol by stage.

    Args:
        costs: of the measured segments.
        order: for each segment of the model, the index of the measured segment like it.
        recipe: steps, images and Fisher passes.
        compile_s: seconds to compile all makes.
    """
    behind = fisher = 0.0
    for index in reversed(order):
        if costs[index].fisher:
            fisher += recipe.fisher_k * recipe.calibration_images * (costs[index].own + behind)
        behind += costs[index].tail
    return {
        "calibration": sum(costs[index].calibration for index in order),
        "tape": recipe.calibration_images * sum(costs[index].tape for index in order),
        "fisher": fisher,
        "steps": recipe.steps * sum(costs[index].step for index in order),
        "compile": compile_s,
    }
