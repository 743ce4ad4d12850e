"""The RPN as a segment: mmdet's outputs in one tensor, its length, quantizable layers."""

import pytest
import torch
from closeness import close
from head_detectors import WIDTH, build, config, recipe, sample
from torch import nn

from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantConv2d, quant_layers, set_quantized
from tasks.detection.neck import pack, rpn_levels, rpn_segment

ANCHORS = 3


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (160, 224)], ids=str)
def test_outputs_equal_those_of_mmdet(size: tuple[int, int]) -> None:
    model = build(config())
    image, _ = sample(*size)
    with torch.no_grad():
        features = model.extract_feat(image)
        logits, deltas = model.rpn_head(features)
        segment = rpn_segment(model, recipe(4)).eval()
        found = segment(pack(features[:4]))
    counts = rpn_levels(*size)
    assert counts == [level[0, 0].numel() for level in features]
    assert found.shape == (1, sum(counts), 5 * ANCHORS)
    for level, part in enumerate(found.split(counts, 1)):
        height, width = features[level].shape[2:]
        for row, column in [(0, 0), (height - 1, width - 1), (height // 2, width // 3)]:
            position = part[0, row * width + column]
            # anchor by anchor as mmdet reads them
            expected = deltas[level][0, :, row, column]
            assert close(position[:ANCHORS], logits[level][0, :, row, column])
            assert close(position[ANCHORS:], expected)
            assert close(position[ANCHORS + 4 : ANCHORS + 8], expected.reshape(ANCHORS, 4)[1])
        whole = (
            torch.cat([logits[level], deltas[level]], 1)
            .permute(0, 2, 3, 1)
            .reshape(1, -1, 5 * ANCHORS)
        )
        assert close(part, whole)


def test_outputs_keep_images_of_a_batch_apart() -> None:
    model = build(config())
    images = torch.cat([sample(64, 96, seed=seed)[0] for seed in range(3)])
    segment = rpn_segment(model, recipe(4)).eval()
    with torch.no_grad():
        packed = pack(model.extract_feat(images)[:4])
        together = segment(packed)
        for index in range(3):
            assert torch.allclose(
                segment(packed[index : index + 1]), together[index : index + 1], atol=1e-5
            )


def test_layers_are_swapped_in_the_head_itself() -> None:
    model = build(config())
    weights = [getattr(model.rpn_head, name).weight for name in ("rpn_conv", "rpn_cls", "rpn_reg")]
    segment = rpn_segment(model, recipe(4))
    assert (segment.label, segment.kind) == ("rpn_head", "predictor")
    layers = dict(quant_layers(segment.block))
    assert list(layers) == ["rpn_conv", "rpn_cls", "rpn_reg"]
    for (name, layer), weight in zip(layers.items(), weights, strict=True):
        assert isinstance(layer, QuantConv2d)
        assert layer is getattr(model.rpn_head, name)
        assert layer.weight is weight
        assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == (4, 4)


def test_quantized_flags_reach_the_head_of_mmdet() -> None:
    model = build(config())
    image, _ = sample(64, 64)
    segment = rpn_segment(model, recipe(2)).eval()
    for _, layer in quant_layers(segment.block):
        layer.weight_quantizer.set_range(
            layer.weight.detach().flatten(1).abs().amax(1, True),
            torch.full((len(layer.weight), 1), 1.0),
        )
        layer.input_quantizer.set_range(torch.tensor(0.5), torch.tensor(1.0))
    with torch.no_grad():
        features = model.extract_feat(image)
        packed = pack(features[:4])
        before = segment(packed)
        set_quantized(segment.block, True)
        after = segment(packed)
        logits, deltas = model.rpn_head(features)
    assert not torch.allclose(before, after, atol=1e-2)
    theirs = [
        torch.cat(pair, 1).flatten(2).transpose(1, 2) for pair in zip(logits, deltas, strict=True)
    ]
    # A value between two codes may take the other one.
    assert ((after - torch.cat(theirs, 1)).abs() > 1e-4).double().mean() < 0.1


def test_bits_of_32_change_nothing_when_switched_on() -> None:
    model = build(config())
    segment = rpn_segment(model, recipe(32)).eval()
    packed = torch.randn(1, 85 * WIDTH, 2, 3)
    with torch.no_grad():
        before = segment(packed)
        set_quantized(segment.block, True)
        assert torch.equal(segment(packed), before)


def test_levels_of_sizes_that_halve_unevenly() -> None:
    # 96 x 160: 24 x 40, 12 x 20, 6 x 10, 3 x 5, and 2 x 3 of every second position
    assert rpn_levels(96, 160) == [960, 240, 60, 15, 6]


def test_images_that_are_not_padded_have_no_levels() -> None:
    with pytest.raises(ModelError, match="100 x 64 pixels is not padded"):
        rpn_levels(100, 64)


def test_other_heads_are_refused() -> None:
    model = build(config())
    model.rpn_head = nn.Identity()
    with pytest.raises(ModelError, match="type Identity is not supported: it has to be RPNHead"):
        rpn_segment(model, recipe(4))


def test_a_head_whose_layers_were_swapped_is_refused() -> None:
    model = build(config())
    rpn_segment(model, recipe(4))
    with pytest.raises(ModelError, match="\\(rpn_conv\\) in an RPNHead of type QuantConv2d"):
        rpn_segment(model, recipe(4))
