"""Configurations of the detectors: mmdet's own, and for the cascade that of its checkpoints."""

import functools
import importlib.metadata
from typing import Any

import pytest
import torch

from tasks.detection.configs import (
    BACKBONES,
    KINDS,
    RESIZE,
    DetectorSizes,
    build,
    detector_config,
    published_config,
)

TINY = DetectorSizes(8, (1, 1, 1, 1), (1, 1, 1, 1), 2, channels=8, fc_channels=8)
MODELS = [f"{kind}_{backbone}" for kind in KINDS for backbone in BACKBONES]

#: Millions of parameters, from the paper's (rounded) tables; the paper has no Mask R-CNN on Swin-B.
PARAMETERS = {
    "mask_rcnn_swin_tiny": 48,
    "mask_rcnn_swin_small": 69,
    "mask_rcnn_swin_base": 107,
    "cascade_mask_rcnn_swin_tiny": 86,
    "cascade_mask_rcnn_swin_small": 107,
    "cascade_mask_rcnn_swin_base": 145,
}


def from_mmdet(file: str) -> Any:
    """A configuration that mmdet brings."""
    from mmengine.config import Config

    return Config.fromfile(
        str(
            importlib.metadata.distribution("onedl-mmdetection").locate_file(
                f"mmdet/.mim/configs/{file}"
            )
        )
    )


def plain(value: Any) -> Any:
    """Convert tuples to lists."""
    if isinstance(value, dict):
        return {name: plain(content) for name, content in value.items()}
    return [plain(content) for content in value] if isinstance(value, list | tuple) else value


def without_finest_scale(config: dict[str, Any]) -> dict[str, Any]:
    """mmdet's configurations leave it at its default, which is 56."""
    for head in ("bbox", "mask"):
        assert config["roi_head"][f"{head}_roi_extractor"].pop("finest_scale") == 56
    return config


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("mask_rcnn_swin_tiny", "mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"),
        ("mask_rcnn_swin_small", "mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py"),
    ],
)
def test_mask_rcnn_is_as_mmdet_has_it(model: str, file: str) -> None:
    own, mmdets = (
        plain(without_finest_scale(published_config(model))),
        plain(from_mmdet(f"swin/{file}").model.to_dict()),
    )
    assert (
        mmdets["backbone"].pop("init_cfg")["type"] == "Pretrained"
    )  # weights to train from, and their format
    assert mmdets["backbone"].pop("convert_weights")
    assert own == mmdets


def test_images_are_resized_as_mmdet_does_it() -> None:
    config = from_mmdet("swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py")
    (resize,) = [step for step in config.test_pipeline if step["type"] == "Resize"]
    assert plain(dict(resize)) == {"type": "Resize", **plain(RESIZE)}


@pytest.mark.parametrize(
    ("model", "width", "rate"), [("tiny", 96, 0.2), ("small", 96, 0.2), ("base", 128, 0.3)]
)
def test_the_cascade_is_mmdets_with_the_heads_of_the_published_checkpoints(
    model: str, width: int, rate: float
) -> None:
    own = plain(without_finest_scale(published_config(f"cascade_mask_rcnn_swin_{model}")))
    base = plain(from_mmdet("_base_/models/cascade-mask-rcnn_r50_fpn.py").model.to_dict())
    backbone = own.pop("backbone")
    assert base.pop("backbone")["type"] == "ResNet"
    assert backbone["embed_dims"] == width
    assert backbone["window_size"] == 7
    assert backbone["depths"] == [2, 2, 6 if model == "tiny" else 18, 2]
    assert [width * 2**stage // heads for stage, heads in enumerate(backbone["num_heads"])] == [
        32
    ] * 4
    assert backbone["drop_path_rate"] == rate
    assert own["neck"].pop("in_channels") == [width, 2 * width, 4 * width, 8 * width]
    base["neck"].pop("in_channels")
    for head in base["roi_head"]["bbox_head"]:
        head.update(
            type="ConvFCBBoxHead",
            num_shared_convs=4,
            num_shared_fcs=1,
            conv_out_channels=256,
            reg_class_agnostic=False,
            reg_decoded_bbox=True,
            norm_cfg={"type": "BN", "requires_grad": True},
            loss_bbox={"type": "GIoULoss", "loss_weight": 10.0},
        )
    assert own == base


@pytest.mark.parametrize("model", MODELS)
def test_published_models_have_the_papers_sizes(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "linspace", functools.partial(torch.linspace, device="cpu")
    )  # read for drop path rates
    with torch.device("meta"):
        built = build(published_config(model))
    assert not built.training
    assert (
        round(sum(parameter.numel() for parameter in built.parameters()) / 1e6) == PARAMETERS[model]
    )
    assert all(parameter.is_meta for parameter in built.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_small_detectors_follow_the_arguments(kind: Any) -> None:
    sizes = DetectorSizes(
        16,
        (2, 1, 1, 1),
        (2, 2, 4, 4),
        4,
        classes=10,
        channels=24,
        fc_channels=40,
        box_convs=1,
        mask_convs=2,
        detections=7,
    )
    model = build(detector_config(kind, sizes))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    head = "roi_head.bbox_head.0" if kind == "cascade_mask_rcnn" else "roi_head.bbox_head"
    assert shapes["backbone.stages.0.blocks.1.attn.w_msa.relative_position_bias_table"] == (49, 2)
    assert shapes["neck.lateral_convs.3.conv.weight"] == (24, 128, 1, 1)
    assert shapes[f"{head}.fc_cls.weight"] == (11, 40)
    assert shapes[f"{head}.fc_reg.weight"] == (40, 40)
    assert shapes[f"{head}.shared_fcs.0.weight"] == (40, 24 * 49)
    assert (f"{head}.shared_convs.0.bn.running_mean" in shapes) == (kind == "cascade_mask_rcnn")
    assert model.test_cfg.rcnn.max_per_img == 7


def test_building_leaves_the_default_scope_alone() -> None:
    from tasks.detection.mm import DefaultScope

    def present() -> str | None:
        scope = DefaultScope.get_current_instance()  # a training in this process has left one
        return None if scope is None else str(scope.scope_name)

    before = present()
    with DefaultScope.overwrite_default_scope("mmengine"):
        build(detector_config("mask_rcnn", TINY))
        assert present() == "mmengine"
    assert present() == before


def test_a_configuration_is_not_written_into() -> None:
    config = detector_config("cascade_mask_rcnn", TINY)
    build(config)
    assert config == detector_config("cascade_mask_rcnn", TINY)
