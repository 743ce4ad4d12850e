"""Configurations of the detectors: mmdet's own, with Swin and the sizes asked for.

Mask R-CNN (arXiv 1703.06870) and Cascade Mask R-CNN (arXiv 1906.09756) as trained for Swin (Liu et
al., ICCV 2021, arXiv 2103.14030): the cascade's box heads are four convolutions with batch norm and
one linear layer, trained by GIoU on decoded boxes.
"""

import copy
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import nn

Config = dict[str, Any]
Kind = Literal["mask_rcnn", "cascade_mask_rcnn"]

#: Width of the first stage, blocks and heads of the stages, and drop path rate in training.
BACKBONES: dict[str, Config] = {
    "swin_tiny": {
        "embed_dims": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "drop_path_rate": 0.2,
    },
    "swin_small": {
        "embed_dims": 96,
        "depths": (2, 2, 18, 2),
        "num_heads": (3, 6, 12, 24),
        "drop_path_rate": 0.2,
    },
    "swin_base": {
        "embed_dims": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "drop_path_rate": 0.3,
    },
}
KINDS: tuple[Kind, ...] = ("mask_rcnn", "cascade_mask_rcnn")

#: Mean and deviation of ImageNet's pixels, RGB.
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

#: Arguments of mmdet's ``Resize``: the shorter side to 800 pixels, the longer to 1333 at most.
RESIZE: Config = {"scale": (1333, 800), "keep_ratio": True}


def published_config(model: str, **changes: Any) -> Config:
    """Configuration of ``<kind>_<backbone>``, with changed arguments."""
    kind: Kind = "cascade_mask_rcnn" if model.startswith("cascade") else "mask_rcnn"
    return detector_config(kind, **{**BACKBONES[model.removeprefix(f"{kind}_")], **changes})


def detector_config(
    kind: Kind,
    embed_dims: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int = 7,
    drop_path_rate: float = 0.2,
    classes: int = 80,
    channels: int = 256,
    fc_channels: int = 1024,
    box_convs: int = 4,
    mask_convs: int = 4,
    anchor_scale: int = 8,
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    finest_scale: int = 56,
    proposals: int = 1000,
    detections: int = 100,
    pixel_mean: Sequence[float] = PIXEL_MEAN,
    pixel_std: Sequence[float] = PIXEL_STD,
) -> Config:
    """Configuration of a detector for mmdet; all that has no argument is as published.

    Args:
        embed_dims: width of the backbone's first stage; it doubles from stage to stage.
        depths, num_heads: of the four stages.
        channels: of the FPN and of the convolutions in all heads.
        fc_channels: width of the linear layers of the box heads.
        box_convs: convolutions of the cascade's box heads; Mask R-CNN has two linear layers.
        anchor_scale: side of the anchors, in strides of their level.
        finest_scale: regions from twice this side on are not read from the finest level.
        proposals: most regions of an image, and of a level, that the RPN hands on.
    """
    config = copy.deepcopy(_of_mmdet("mask-rcnn" if kind == "mask_rcnn" else "cascade-mask-rcnn"))
    config["data_preprocessor"].update(mean=list(pixel_mean), std=list(pixel_std))
    config["backbone"] = {
        "type": "SwinTransformer",
        "embed_dims": embed_dims,
        "depths": list(depths),
        "num_heads": list(num_heads),
        "window_size": window_size,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "qk_scale": None,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": drop_path_rate,
        "patch_norm": True,
        "out_indices": (0, 1, 2, 3),
        "with_cp": False,
    }
    widths = [embed_dims * 2**stage for stage in range(4)]
    config["neck"].update(in_channels=widths, out_channels=channels)
    rpn, roi, test = config["rpn_head"], config["roi_head"], config["test_cfg"]
    rpn.update(in_channels=channels, feat_channels=channels)
    rpn["anchor_generator"].update(scales=[anchor_scale], ratios=list(anchor_ratios))
    for head in ("bbox", "mask"):
        roi[f"{head}_roi_extractor"].update(out_channels=channels, finest_scale=finest_scale)
    own = {"in_channels": channels, "num_classes": classes}
    roi["mask_head"].update(own, num_convs=mask_convs, conv_out_channels=channels)
    cascade = roi["bbox_head"] if kind == "cascade_mask_rcnn" else []
    for box_head in cascade or [roi["bbox_head"]]:
        box_head.update(own, fc_out_channels=fc_channels)
    for box_head in cascade:
        box_head.update(
            type="ConvFCBBoxHead",
            num_shared_convs=box_convs,
            num_shared_fcs=1,
            conv_out_channels=channels,
            reg_class_agnostic=False,
            reg_decoded_bbox=True,
            norm_cfg={"type": "BN", "requires_grad": True},
            loss_bbox={"type": "GIoULoss", "loss_weight": 10.0},
        )
    test["rpn"].update(nms_pre=proposals, max_per_img=proposals)
    test["rcnn"]["max_per_img"] = detections
    return config


@cache
def _of_mmdet(name: str) -> Config:
    """One of the configurations on ResNet-50 that mmdet's package brings."""
    from mmengine.config import Config as File

    (package,) = find_spec("mmdet").submodule_search_locations  # type: ignore[union-attr, misc]
    path = Path(package, ".mim", "configs", "_base_", "models", f"{name}_r50_fpn.py")
    content: Config = File.fromfile(str(path)).model.to_dict()
    return content


def build(config: Config) -> nn.Module:
    """Build mmdet's model of a configuration, with random weights, in eval mode; no download."""
    from tasks.detection import mm

    # mmdet looks its types up in its own registry, whatever default another caller has set.
    with mm.DefaultScope.overwrite_default_scope("mmdet"):
        model: nn.Module = mm.MODELS.build(mm.ConfigDict(config))
    return model.eval()
