"""GPTQ and GPTAQ on both towers of CLIP."""

import pytest
import torch
from small_clip import both, clip, token_ids
from small_models import images, quick
from torch.nn import functional as F

from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import WeightLayer, quant_layers, set_quantized
from fimaq_core.pipeline import quantize_chain
from fimaq_core.samples import Samples


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_both_towers_get_codes_and_stay_near_full_precision(method: str) -> None:
    recipe = quick(method, w_bits=4, a_bits=8)
    inputs = {"vision": images(24), "text": token_ids(24)}
    for name, chain in both(clip(), recipe).items():
        with torch.no_grad():
            expected = chain(inputs[name])
        quantize_chain(chain, Samples(inputs[name]), recipe, ClassifierDivergence(20.0))
        layers = [layer for _, layer in quant_layers(chain) if isinstance(layer, WeightLayer)]
        assert all(layer.weight_quantizer.codes.numel() for layer in layers)
        with torch.no_grad():
            found = chain(inputs[name])
        assert F.cosine_similarity(found, expected).min() > 0.9
        set_quantized(chain, False)
        with torch.no_grad():
            assert torch.allclose(chain(inputs[name]), expected, atol=1e-4)
