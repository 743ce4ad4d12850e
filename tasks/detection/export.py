"""Export of a detector's backbone and neck; its heads run in torch on the exported maps."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.export.writing import Outputs
from fimaq_core.layers import WeightLayer, quant_layers
from tasks.common.task import CalibrationSet, Chains, Exportable, LoadedModel
from tasks.detection.detector import DETECTOR, BackboneAndNeck, QuantizedDetector
from tasks.detection.neck import STRIDES

#: Pieces of a detector that an exported file holds.
PIECES = ("backbone", "fpn")
#: Names of the maps in a file. Sides of images are multiples of the stride of P5.
_NAMES = Outputs("images", ("p2", "p3", "p4", "p5", "p6"), sides=STRIDES[-2])


def exportable(loaded: LoadedModel, chains: Chains, images: CalibrationSet) -> Exportable:
    """Return backbone and neck; the answer for an image is the place of its best proposal.

    Raises ModelError if the checkpoint quantizes neither backbone nor FPN.
    """
    quantized = _pieces(chains)
    held = [name for name in PIECES if name in quantized]
    rest = sorted(quantized - set(held))
    if DETECTOR not in chains or (rest and not held):
        raise ModelError(
            "An exported file holds backbone and FPN, and the checkpoint quantizes neither: "
            "quantize with a scope such as backbone+fpn."
        )
    head = loaded.model.rpn_head

    @torch.no_grad()
    def answers(maps: Any) -> Tensor:
        logits, _ = head(maps)
        return torch.cat([one.flatten(1) for one in logits], dim=1).argmax(1)

    # One batch needs images of one size: the most frequent one.
    sizes = Counter(tuple(image.shape[2:]) for image in images.images)
    (size, _), *_ = sizes.most_common(1)
    same = [image for image in images.images if tuple(image.shape[2:]) == size]
    notes = [f"the file holds backbone and FPN, and not the quantized {' and '.join(rest)}"]
    return Exportable(
        BackboneAndNeck(chains[DETECTOR]).chain,
        torch.cat(same),
        answers,
        score="best proposal",
        names=_NAMES,
        around=BackboneAndNeck,
        scope="+".join(held) or None,
        notes=notes if rest else (),
    )


def _pieces(chains: Chains) -> set[str]:
    """Return the pieces of a detector that have quantized layers."""
    found = {"roi"} if set(chains) - {DETECTOR} else set()
    names = {"backbone": "backbone", "neck": "fpn", "rpn_head": "rpn"}
    for segment in chains.get(DETECTOR, ()):
        layers = (layer for _, layer in quant_layers(segment.block))
        if any(isinstance(one, WeightLayer) and not one.weight_quantizer.off for one in layers):
            found.add(names.get(segment.label.partition(".")[0], "roi"))
    return found


def with_trunk(loaded: LoadedModel, trunk: nn.Module) -> QuantizedDetector:
    """Return the detector with an exported file as ``trunk``. Raises ModelError if it misfits."""
    detector = QuantizedDetector(loaded.model, {})
    image = torch.zeros(1, *(loaded.input_shape or (3, 64, 64)))
    with torch.no_grad():
        found, wanted = trunk(image), detector.trunk(image)
    shapes = [tuple(one.shape) for one in found], [tuple(one.shape) for one in wanted]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"The file gives maps of shapes {shapes[0]}, but {loaded.tag} gives {shapes[1]}: "
            "export the checkpoint again."
        )
    detector.trunk = trunk
    return detector
