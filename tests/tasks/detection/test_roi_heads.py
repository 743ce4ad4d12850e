"""RoI heads as parts: layers replaced in place, the same function, refusals."""

import copy
from typing import Any

import pytest
import torch
from head_detectors import CLASSES, WIDTH, box_head, build, config, mask_head, recipe
from torch import nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.errors import ModelError
from fimaq_core.layers import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    quant_layers,
    set_quantized,
)
from tasks.common.models.module_map import whole_map
from tasks.detection.roi import roi_parts

SHARED_2FC = ["shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg"]
SHARED_4CONV = [
    *(f"shared_convs.{index}.conv" for index in range(4)),
    "shared_fcs.0",
    "fc_cls",
    "fc_reg",
]
MASK = ["convs.0.conv", "convs.1.conv", "upsample", "conv_logits"]
BRANCHES = box_head(
    "ConvFCBBoxHead",
    num_cls_convs=1,
    num_cls_fcs=1,
    num_reg_convs=2,
    num_reg_fcs=1,
    conv_out_channels=8,
)


def kind_of(name: str) -> type[nn.Module]:
    if name == "upsample":
        return QuantConvTranspose2d
    return QuantConv2d if "conv" in name else QuantLinear


CASES: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {
    "mask": (config(), {"bbox": SHARED_2FC, "mask": MASK}),
    "boxes only": (config(masks=False), {"bbox": SHARED_2FC}),
    "cascade": (
        config(cascade=True),
        {f"bbox{stage}": SHARED_4CONV for stage in range(3)}
        | {f"mask{stage}": MASK for stage in range(3)},
    ),
    "branches": (
        config(masks=False, bbox_head=BRANCHES),
        {
            "bbox": [
                "fc_cls",
                "fc_reg",
                "cls_convs.0.conv",
                "cls_fcs.0",
                "reg_convs.0.conv",
                "reg_convs.1.conv",
                "reg_fcs.0",
            ]
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_swapped_in_place(case: str) -> None:
    settings, expected = CASES[case]
    model = build(settings)
    before = dict(model.roi_head.named_parameters())
    parts = roi_parts(model, recipe(3))
    assert list(parts) == list(expected)
    found = {}
    for name, chain in parts.items():
        (segment,) = list(chain)
        assert (segment.label, segment.kind) == ("head", "predictor")
        layers = dict(quant_layers(segment.block))
        assert sorted(layers) == sorted(expected[name])
        for layer_name, layer in layers.items():
            assert isinstance(layer, kind_of(layer_name))
            assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == (3, 3)
        found |= {id(layer): layer for layer in layers.values()}
    # mmdet's own modules hold the same layers, and these the same parameters
    assert {id(layer) for _, layer in quant_layers(model.roi_head)} == found.keys()
    after = dict(model.roi_head.named_parameters())
    for name, parameter in before.items():
        # a transposed convolution is kept the other way round
        turned = name.endswith("upsample.weight")
        assert (
            torch.equal(after[name], parameter.transpose(0, 1))
            if turned
            else after[name] is parameter
        )
    plain = [
        m
        for m in model.roi_head.modules()
        if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    ]
    assert len(plain) == len(found)


def test_norms_stay_in_full_precision() -> None:
    model = build(config(cascade=True))
    norms = [module for module in model.roi_head.modules() if isinstance(module, nn.BatchNorm2d)]
    parts = roi_parts(model, recipe(3))
    kept = {
        id(module)
        for chain in parts.values()
        for module in chain.modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    assert len(norms) == 12
    assert kept == {id(norm) for norm in norms}


@pytest.mark.parametrize("case", CASES)
def test_chains_equal_the_heads(case: str) -> None:
    settings, expected = CASES[case]
    float_model, model = build(settings), build(settings)
    parts = roi_parts(model, recipe(3))
    torch.manual_seed(1)
    for name in expected:
        kind, stage = name[:4], int(name[4:] or 0)
        original = getattr(float_model.roi_head, f"{kind}_head")
        head = original[stage] if isinstance(original, nn.ModuleList) else original
        x = torch.randn(5, WIDTH, *((7, 7) if kind == "bbox" else (14, 14)))
        with torch.no_grad():
            out = parts[name](x)
            if kind == "mask":
                assert out.shape == (5, CLASSES, 28, 28)
                assert torch.equal(out, head(x))
            else:
                logits, deltas = head(x)
                assert torch.equal(out[:, : CLASSES + 1], logits)
                assert torch.equal(out[:, CLASSES + 1 :], deltas)


@pytest.mark.parametrize("case", ["mask", "cascade"])
def test_calibrated_parts_run_quantized_in_mmdets_heads(case: str) -> None:
    model = build(CASES[case][0])
    torch.manual_seed(1)
    for name, chain in roi_parts(model, recipe(3)).items():
        x = torch.randn(6, WIDTH, *((7, 7) if name.startswith("bbox") else (14, 14)))
        before = chain(x)
        calibrate(chain, x, recipe(3))
        assert all(layer.quantized for _, layer in quant_layers(chain))
        after = chain(x)
        heads = getattr(model.roi_head, f"{name[:4]}_head")
        head = heads[int(name[4:])] if isinstance(heads, nn.ModuleList) else heads
        with torch.no_grad():
            theirs = head(x)
        theirs = theirs if name.startswith("mask") else torch.cat(theirs, 1)
        assert torch.equal(after, theirs)
        error = (after - before).square().mean() / before.var()
        assert 1e-4 < error < 1
        set_quantized(chain, False)
        assert torch.equal(chain(x), before)


def test_a_copy_of_a_part_runs_its_own_layers() -> None:
    model = build(config())
    x = torch.randn(4, WIDTH, 7, 7, generator=torch.Generator().manual_seed(0))
    chain = roi_parts(model, recipe(3))["bbox"]
    teacher = copy.deepcopy(chain)
    with torch.no_grad():
        expected = chain(x)
        model.roi_head.bbox_head.fc_cls.weight.zero_()
        assert torch.equal(teacher(x), expected)
        assert not torch.equal(chain(x), expected)
    assert not {id(layer) for _, layer in quant_layers(teacher)} & {
        id(layer) for _, layer in quant_layers(chain)
    }


def test_the_module_map_lists_the_layers_by_their_parts() -> None:
    model = build(config())
    found = whole_map(roi_parts(model, recipe(3)), {})
    names = [entry.name for entry in found.quantized]
    assert sorted(names) == sorted(
        [f"bbox.head.{name}" for name in SHARED_2FC] + [f"mask.head.{name}" for name in MASK]
    )
    # losses and activations of the heads are no layers
    assert not any("loss" in name for name in found.full_precision)


def test_the_first_layers_input_is_quantized() -> None:
    model = build(config())
    chain = roi_parts(model, recipe(2))["bbox"]
    x = torch.randn(6, WIDTH, 7, 7, generator=torch.Generator().manual_seed(0))
    calibrate(chain, x, recipe(2))
    layer = dict(quant_layers(chain))["segments.0.block.shared_fcs.0"]
    assert len(layer.input_quantizer(x.flatten(1)).unique()) == 4


def test_other_heads_are_refused() -> None:
    double = box_head(
        "DoubleConvFCBBoxHead", num_convs=1, num_fcs=1, conv_out_channels=8, with_avg_pool=True
    )
    with pytest.raises(ModelError, match=r"\(bbox\) of type DoubleConvFCBBoxHead"):
        roi_parts(build(config(masks=False, bbox_head=double)), recipe(4))
    with pytest.raises(ModelError, match=r"\(mask\) of type CoarseMaskHead"):
        roi_parts(build(config(mask_head=mask_head(type="CoarseMaskHead"))), recipe(4))
    model = build(config())
    model.roi_head = nn.Identity()
    with pytest.raises(ModelError, match="RoI head of type Identity"):
        roi_parts(model, recipe(4))


def test_layers_that_nobody_can_quantize_are_refused() -> None:
    with pytest.raises(ModelError, match=r"ConvWS2d \(convs.0.conv\) in a FCNMaskHead"):
        roi_parts(build(config(mask_head=mask_head(conv_cfg={"type": "ConvWS"}))), recipe(4))
    with pytest.raises(ModelError, match=r"NormedLinear \(fc_cls\)"):
        roi_parts(
            build(config(bbox_head=box_head(cls_predictor_cfg={"type": "NormedLinear"}))), recipe(4)
        )
