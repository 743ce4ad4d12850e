"""Configurations of the detectors: mmdet's own, with Swin and with sizes that can be changed.

Mask R-CNN (arXiv:1703.06870) and Cascade Mask R-CNN (arXiv:1906.09756) as trained with Swin (Liu et
al., ICCV 2021, arXiv:2103.14030). Each box head of the cascade has four convolutions with batch
norm and one linear layer; its loss is GIoU on decoded boxes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from fimaq_core.documents import Strict
from tasks.common.models import building

Config = dict[str, Any]
Kind = Literal["mask_rcnn", "cascade_mask_rcnn"]
KINDS: tuple[Kind, ...] = ("mask_rcnn", "cascade_mask_rcnn")


_FOUR, _THREE = (Field(min_length=count, max_length=count) for count in (4, 3))
_Layers = Annotated[int, Field(strict=True, ge=0, le=200)]
_Objects = Annotated[int, Field(strict=True, ge=1, le=10_000)]


class DetectorArguments(Strict):
    """Arguments of ``--model-args``: the fields of :class:`DetectorSizes`, with bounds."""

    embed_dims: building.Count = 1
    depths: Annotated[list[building.Depth], _FOUR] = [1] * 4
    num_heads: Annotated[list[building.Count], _FOUR] = [1] * 4
    window_size: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    drop_path_rate: building.Share = 0
    classes: building.Count = 1
    channels: building.Count = 1
    fc_channels: building.Count = 1
    box_convs: _Layers = 1
    mask_convs: _Layers = 1
    anchor_scale: building.Count = 1
    anchor_ratios: Annotated[list[building.Positive], Field(min_length=1, max_length=16)] = [1]
    finest_scale: building.Side = 1
    proposals: _Objects = 1
    detections: _Objects = 1
    pixel_mean: Annotated[list[building.Real], _THREE] = [0] * 3
    pixel_std: Annotated[list[building.Positive], _THREE] = [1] * 3


@dataclass(frozen=True)
class DetectorSizes:
    """Sizes of a detector; the defaults are as published."""

    embed_dims: int  # width of the backbone's first stage; each stage doubles the width
    depths: Sequence[int]  # blocks of the four stages
    num_heads: Sequence[int]  # attention heads of the four stages
    window_size: int = 7
    drop_path_rate: float = 0.2  # in training
    classes: int = 80
    channels: int = 256  # of the FPN and of the convolutions in all heads
    fc_channels: int = 1024  # width of the linear layers of the box heads
    box_convs: int = 4  # of the cascade's box heads; Mask R-CNN has two linear layers
    mask_convs: int = 4
    anchor_scale: int = 8  # side of the anchors, in units of their level's stride
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0)
    finest_scale: int = 56  # regions of less than twice this side use the finest level
    proposals: int = 1000  # highest number of regions from the RPN, per image and per level
    detections: int = 100  # highest number of objects per image
    pixel_mean: Sequence[float] = (123.675, 116.28, 103.53)  # of RGB values, ImageNet's
    pixel_std: Sequence[float] = (58.395, 57.12, 57.375)


BACKBONES = {
    "swin_tiny": DetectorSizes(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": DetectorSizes(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": DetectorSizes(128, (2, 2, 18, 2), (4, 8, 16, 32), drop_path_rate=0.3),
}

#: Arguments of mmdet's ``Resize``: 800 pixels for the shorter side, at most 1333 for the longer.
RESIZE: Config = {"scale": (1333, 800), "keep_ratio": True}


def published_config(model: str, **changes: Any) -> Config:
    """Make the configuration of ``<kind>_<backbone>``, with other :class:`DetectorSizes`."""
    kind: Kind = "cascade_mask_rcnn" if model.startswith("cascade") else "mask_rcnn"
    return detector_config(kind, replace(BACKBONES[model.removeprefix(f"{kind}_")], **changes))


def detector_config(kind: Kind, sizes: DetectorSizes) -> Config:
    """Make the configuration of a detector for mmdet, from mmdet's own files."""
    config = copy.deepcopy(_of_mmdet(f"_base_/models/{kind.replace('_', '-')}_r50_fpn"))
    config["data_preprocessor"].update(mean=list(sizes.pixel_mean), std=list(sizes.pixel_std))
    swin = copy.deepcopy(_of_mmdet("swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco")["backbone"])
    # These two are for the import of ImageNet's weights.
    del swin["init_cfg"], swin["convert_weights"]
    names = ("embed_dims", "depths", "num_heads", "window_size", "drop_path_rate")
    config["backbone"] = {**swin, **{name: getattr(sizes, name) for name in names}}
    channels = sizes.channels
    widths = [sizes.embed_dims * 2**stage for stage in range(4)]
    config["neck"].update(in_channels=widths, out_channels=channels)
    rpn, roi, test = config["rpn_head"], config["roi_head"], config["test_cfg"]
    rpn.update(in_channels=channels, feat_channels=channels)
    rpn["anchor_generator"].update(scales=[sizes.anchor_scale], ratios=list(sizes.anchor_ratios))
    for head in ("bbox", "mask"):
        extractor = roi[f"{head}_roi_extractor"]
        extractor.update(out_channels=channels, finest_scale=sizes.finest_scale)
    own = {"in_channels": channels, "num_classes": sizes.classes}
    roi["mask_head"].update(own, num_convs=sizes.mask_convs, conv_out_channels=channels)
    cascade = roi["bbox_head"] if kind == "cascade_mask_rcnn" else []
    for box_head in cascade or [roi["bbox_head"]]:
        box_head.update(own, fc_out_channels=sizes.fc_channels)
    for box_head in cascade:
        box_head.update(
            type="ConvFCBBoxHead",
            num_shared_convs=sizes.box_convs,
            num_shared_fcs=1,
            conv_out_channels=channels,
            reg_class_agnostic=False,
            reg_decoded_bbox=True,
            norm_cfg={"type": "BN", "requires_grad": True},
            loss_bbox={"type": "GIoULoss", "loss_weight": 10.0},
        )
    test["rpn"].update(nms_pre=sizes.proposals, max_per_img=sizes.proposals)
    test["rcnn"]["max_per_img"] = sizes.detections
    return config


@cache
def _of_mmdet(name: str) -> Config:
    """Load the model of a file among mmdet's configurations."""
    from mmengine.config import Config as File

    (package,) = find_spec("mmdet").submodule_search_locations  # type: ignore[union-attr, misc]
    path = Path(package, ".mim", "configs", f"{name}.py")
    content: Config = File.fromfile(str(path)).model.to_dict()
    return content


def build(config: Config) -> nn.Module:
    """Build mmdet's model of a configuration: random weights, evaluation mode, no download."""
    from tasks.detection import mm

    # mmdet finds types in its own registry, also if another caller has set another default.
    with mm.DefaultScope.overwrite_default_scope("mmdet"):
        model: nn.Module = mm.MODELS.build(mm.ConfigDict(config))
    return model.eval()
