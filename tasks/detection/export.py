"""Export of a detector's backbone and neck; RPN and RoI heads stay in PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.export.writing import Outputs
from fimaq_core.layers import QuantMatMul, quant_layers
from fimaq_core.samples import Samples
from tasks.common.task import CalibrationSet, Exportable, LoadedModel
from tasks.detection.detector import BackboneAndNeck, QuantizedDetector
from tasks.detection.neck import STRIDES, unpack_pyramid
from tasks.detection.roi import sample_of

#: Names of the outputs, one per map of the pyramid.
LEVELS = tuple(f"p{level}" for level in range(2, 2 + len(STRIDES)))
#: Highest number of pixels of all images for the check: all codes of a batch are kept at once.
_PIXELS = 2**21


class PyramidChain(BlockChain):
    """Backbone and neck as one chain, from images (n, 3, H, W) to the maps (P2, ..., P6)."""

    def __init__(self, chain: BlockChain) -> None:
        inner = BackboneAndNeck(chain)
        super().__init__(list(inner.chain))
        self.channels = inner.channels

    def forward(self, x: Tensor) -> Any:
        return unpack_pyramid(super().forward(x), self.channels)


def scope_of(chain: BlockChain) -> str:
    """Return the pieces (backbone, fpn) of a chain that have quantized layers, as a scope."""
    found = {
        "fpn" if segment.kind == "neck" else "backbone"
        for segment in PyramidChain(chain)
        for _, layer in quant_layers(segment)
        if not (
            layer.a_quantizer.off and layer.b_quantizer.off
            if isinstance(layer, QuantMatMul)
            else layer.weight_quantizer.off and layer.input_quantizer.off
        )
    }
    return "+".join(sorted(found))


def check_quantized(chain: BlockChain | None) -> None:
    """Raise ModelError if neither backbone nor neck of a checkpoint is quantized."""
    if chain is None or not scope_of(chain):
        raise ModelError(
            "The checkpoint leaves backbone and neck in full precision, and a file holds only "
            "these: export one with backbone or fpn in its scope."
        )


def exportable(loaded: LoadedModel, chain: BlockChain, images: CalibrationSet) -> Exportable:
    """Return backbone and neck; the answer for an image is the class of its best object."""
    detector, metas = QuantizedDetector(loaded.model, {}), images.metas

    @torch.no_grad()
    def answers(maps: Sequence[Tensor]) -> Tensor:
        found = []
        for index, meta in enumerate(metas[: len(maps[0])]):
            one = tuple(level[index : index + 1] for level in maps)
            objects = detector.objects(one, sample_of(meta)).pred_instances
            best = objects.scores.argmax() if len(objects) else None
            found.append(-1 if best is None else int(objects.labels[best]))
        return torch.tensor(found)

    scope, rest = scope_of(chain), "RPN and RoI heads are not in the file"
    return Exportable(
        PyramidChain(chain),
        padded(images.images),
        answers,
        names=Outputs("images", LEVELS, sides=STRIDES[-2]),
        class_names=loaded.class_names,
        extra={"input": _input_facts(loaded)},
        scope=scope,
        notes=(f"{rest}: `evaluate` runs them in full precision, so its record has scope {scope}",),
    )


def padded(images: Samples | Tensor) -> Tensor:
    """Return the first images in one tensor (n >= 2, 3, H, W), with zeros below and beside.

    Their pixels are bounded in number. Images are padded like this before each detector.
    """
    samples = Samples.of(images)
    height, width = (max(image.shape[dim] for image in samples) for dim in (2, 3))
    count = min(max(2, _PIXELS // (height * width)), len(samples))
    own = [
        F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]))
        for image in samples.first(count)
    ]
    return torch.cat(own)


def with_file(loaded: LoadedModel, file: nn.Module) -> QuantizedDetector:
    """Return the detector with the float heads and a file's maps. Raises ModelError."""
    side, channels = 2 * STRIDES[-1], loaded.model.neck.out_channels
    wanted = [(1, channels, side // stride, side // stride) for stride in STRIDES]
    with torch.no_grad():
        maps = file(torch.zeros(1, 3, side, side))
    found = [tuple(one.shape) for one in ([maps] if isinstance(maps, Tensor) else maps)]
    if found != wanted:
        raise ModelError(
            f"The file gives maps of shapes {found} for an image of {side} x {side} pixels, but "
            f"the heads of {loaded.tag} take {wanted}: export the checkpoint again."
        )
    return QuantizedDetector(loaded.model, {}, file)


def _input_facts(loaded: LoadedModel) -> dict[str, Any]:
    """Return how an image becomes an input: order of channels, mean, deviation and padding."""
    pipeline: Any = loaded.eval_transform
    own = pipeline.preprocessor
    resize = pipeline.resize
    return {
        "channels": "RGB" if own._channel_conversion else "BGR",
        "mean": own.mean.flatten().tolist(),
        "std": own.std.flatten().tolist(),
        "pad_size_divisor": own.pad_size_divisor,
        "resize": None if resize is None else list(resize.scale),
    }
