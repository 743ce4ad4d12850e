"""The fast calibration against the direct one, on whole small models."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.layers import quant_layers
from tests.direct_search import calibrate_directly
from tests.small_models import chain_of, images, quick, swin, vit

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"vit": (vit, 32), "swin": (swin, 40)}


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_get_the_ranges_of_the_direct_search(name: str, bits: int) -> None:
    make, size = MODELS[name]
    recipe = quick(w_bits=bits, a_bits=bits, range_rounds=2)
    fast, slow = chain_of(make(), recipe), chain_of(make(), recipe)
    data = images(8, size)
    calibrate(fast, data, recipe)
    calibrate_directly(slow, data, recipe)
    for (layer, one), (_, two) in zip(quant_layers(fast), quant_layers(slow), strict=True):
        for (kind, found), (_, expected) in zip(
            one.named_children(), two.named_children(), strict=True
        ):
            assert torch.equal(found.zero_point, expected.zero_point), (layer, kind)
            assert torch.allclose(found.scale, expected.scale, rtol=1e-6), (layer, kind)
