"""mmdet's FPN as a block on packed maps, its convolutions quantizable."""

from typing import Any

import pytest
import torch
from small_backbones import OFF_BITS, SMALL, CountingBackend, chain_of, detector, deviation
from small_models import quick, randomise
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantConv2d, quant_layers
from fimaq_core.recipe import OFF
from tasks.detection.mm import FPN
from tasks.detection.neck import ExplicitFPN, pack, unpack_pyramid

CHANNELS = [8, 16, 32, 64]


def fpn(**changes: Any) -> FPN:
    """A small FPN of random weights."""
    return randomise(FPN(**{"in_channels": CHANNELS, "out_channels": 12, "num_outs": 5, **changes}))


def stages(height: int, width: int) -> list[Tensor]:
    """Random stage outputs, the coarsest (1, 64, height, width)."""
    return [
        torch.randn(1, c, height * 2 ** (3 - i), width * 2 ** (3 - i))
        for i, c in enumerate(CHANNELS)
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"norm_cfg": {"type": "GN", "num_groups": 3}}, {"norm_cfg": {"type": "BN"}}]
)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4), (5, 2)])
def test_block_equals_the_real_neck(changes: dict[str, Any], height: int, width: int) -> None:
    neck, maps = fpn(**changes), stages(height, width)
    expected = neck(maps)
    block = ExplicitFPN(neck, quick())
    found = unpack_pyramid(block(pack(maps)), block.channels)
    assert len(found) == 5
    assert deviation(found, expected) < 1e-5


def test_names_and_bits_of_the_convolutions() -> None:
    recipe = quick(w_bits=3, a_bits=5, patch_input_bits=8)
    for bits, given in (((3, 5), recipe), ((OFF, OFF), recipe.model_copy(update=OFF_BITS))):
        block = chain_of(detector(SMALL), {"backbone": recipe, "fpn": given}).segment(-1).block
        layers = dict(quant_layers(block))
        assert list(layers) == [
            f"{kind}_convs.{level}.conv" for kind in ("lateral", "fpn") for level in range(4)
        ]
        for layer in layers.values():
            assert isinstance(layer, QuantConv2d)
            assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == bits


def test_compiles_once_for_all_sizes() -> None:
    block, backend = ExplicitFPN(fpn(), quick()).requires_grad_(False), CountingBackend()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    # Not smaller: PyTorch uses another convolution, so another graph, up to 20480 input values.
    for height, width in [(22, 25), (30, 21), (25, 42), (17, 40), (33, 31)]:
        x = pack(stages(height, width))
        torch._dynamo.mark_dynamic(x, (2, 3))
        assert torch.allclose(compiled(x), block(x), atol=1e-5)
    assert backend.graphs == 1


def test_other_necks_are_refused() -> None:
    with pytest.raises(
        ModelError, match="neck of type Identity is not supported: it has to be FPN"
    ):
        ExplicitFPN(nn.Identity(), quick())
