"""Rotated backbones of mmdet: the same maps for the heads, on any size."""

from typing import Any

import pytest
import torch
from small_backbones import SIZES, SMALL, chain_of, detector, deviation, pictures
from small_models import quick

from tasks.detection.detector import BackboneAndNeck

RECIPES = {"backbone": quick(rotate="hadamard"), "fpn": quick()}


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("size", "changes"),
    [(SIZES[0], {}), (SIZES[2], {"qkv_bias": False}), (SIZES[2], {"patch_norm": False})],
)
def test_a_rotated_chain_equals_backbone_and_neck(
    size: tuple[int, int], changes: dict[str, Any]
) -> None:
    model, x = detector({**SMALL, **changes}).double(), pictures(*size)
    expected = model.extract_feat(x)
    trunk = BackboneAndNeck(chain_of(model, RECIPES))
    assert deviation(trunk(x), expected) < 1e-12
    norms = [segment.keep.norm for segment in trunk.chain if segment.keep is not None]
    assert [norm.bias.abs().max() for norm in norms] == [0.0] * 4
