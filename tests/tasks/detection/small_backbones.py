"""Small detectors of mmdet up to the neck, with random weights, and a comparison of maps."""

from collections.abc import Mapping
from typing import Any

import torch
from small_models import quick, randomise
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from fimaq_core.chain import BlockChain
from fimaq_core.recipe import OFF, Recipe
from tasks.detection.detector import detector_segments
from tasks.detection.mm import CascadeRCNN, MaskRCNN

SMALL: dict[str, Any] = {
    "embed_dims": 16,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 4, 4),
    "mlp_ratio": 2,
    "window_size": 7,
}

#: Image sizes for which all stages pad windows (the last to one window); no stage does; only the
#: first, third and last stage do, on the wide side.
SIZES = [(96, 128), (448, 224), (224, 160)]

EVERYTHING: Mapping[str, Recipe] = {"backbone": quick(), "fpn": quick()}
OFF_BITS = {
    "w_bits": OFF,
    "a_bits": OFF,
    "s_bits": None,
    "head_bits": None,
    "patch_input_bits": OFF,
}


def detector(
    backbone: Mapping[str, Any] = SMALL,
    neck: Mapping[str, Any] | None = None,
    kind: type[nn.Module] = MaskRCNN,
    seed: int = 0,
) -> MaskRCNN | CascadeRCNN:
    """A detector without heads, with random parameters; by default a small Swin and FPN."""
    channels = [backbone["embed_dims"] * 2**stage for stage in range(len(backbone["depths"]))]
    fpn = {
        "type": "FPN",
        "in_channels": channels,
        "out_channels": 24,
        "num_outs": len(channels) + 1,
        **(neck or {}),
    }
    swin = {"type": "SwinTransformer", "drop_path_rate": 0.3, **backbone}
    model = kind(
        backbone=swin, neck=fpn, rpn_head=None, roi_head=None, train_cfg=None, test_cfg=None
    )
    return randomise(model, seed)


def chain_of(model: nn.Module, recipes: Mapping[str, Recipe] = EVERYTHING) -> BlockChain:
    """The chain of a detector's backbone and neck."""
    return BlockChain(detector_segments(model, recipes))


def pictures(height: int, width: int, count: int = 1, seed: int = 3) -> Tensor:
    """Random images (count, 3, height, width)."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def deviation(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference of two pyramids, as a share of the largest value of its level."""
    assert [one.shape for one in found] == [one.shape for one in expected]
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


class CountingBackend:
    """A compiler backend that counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, examples)
