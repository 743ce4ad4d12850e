"""What the detectors are built from: mmdet's configurations, made here for the published models and for smaller ones.

Mask R-CNN (He et al., "Mask R-CNN", ICCV 2017, arXiv 1703.06870) and Cascade Mask R-CNN (Cai and Vasconcelos, "Cascade R-CNN",
TPAMI 2019, arXiv 1906.09756) on Swin (Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030), as trained for the latter:
the cascade's box heads are four convolutions with batch norm and one linear layer, trained by GIoU on decoded boxes. Their batch
norm was synchronised over GPUs, which makes no difference to a trained model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

Config = dict[str, Any]
Kind = Literal["mask_rcnn", "cascade_mask_rcnn"]

#: Backbones: width of the first stage, blocks and heads of the stages, and the drop path rate they were trained with.
BACKBONES: dict[str, Config] = {
    "swin_tiny": {"embed_dims": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "swin_small": {"embed_dims": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "swin_base": {"embed_dims": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.3},
}
KINDS: tuple[Kind, ...] = ("mask_rcnn", "cascade_mask_rcnn")

#: Of the images, in RGB: ImageNet's.
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

#: Arguments of mmdet's ``Resize`` at test time: the shorter side to 800 pixels, unless the longer one passes 1333.
RESIZE: Config = {"scale": (1333, 800), "keep_ratio": True}

_STRIDES = [4, 8, 16, 32]
#: What the settings of training may name.
_TRAINING_TYPES = ("MaxIoUAssigner", "RandomSampler", "nms")
_NMS = {"type": "nms", "iou_threshold": 0.7}

#: The cascade's stages: overlap from which a proposal counts as an object, and standard deviations of the box deltas.
_CASCADE = ((0.5, (0.1, 0.2)), (0.6, (0.05, 0.1)), (0.7, (0.033, 0.067)))


def published_config(model: str, **changes: Any) -> Config:
    """The configuration of a published model, ``<kind>_<backbone>`` such as ``mask_rcnn_swin_tiny``.

    Args:
        model: its name.
        changes: arguments of :func:`detector_config` that are to be others.
    """
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
    training: Config | None = None,
    pixel_mean: Sequence[float] = PIXEL_MEAN,
    pixel_std: Sequence[float] = PIXEL_STD,
) -> Config:
    """mmdet's configuration of a detector: what is not named here is as in the published ones.

    Args:
        kind: of detector.
        embed_dims: width of the backbone's first stage; it doubles from stage to stage.
        depths, num_heads: of the four stages.
        window_size: of the backbone's attention.
        drop_path_rate: of the backbone in training.
        classes: of objects, without the background.
        channels: of the FPN, and of the convolutions in all heads.
        fc_channels: width of the linear layers of the box heads.
        box_convs: convolutions of the cascade's box heads; Mask R-CNN's has two linear layers instead.
        mask_convs: convolutions of the mask heads.
        anchor_scale: side of the anchors in strides of their level.
        anchor_ratios: height by width of the anchors.
        finest_scale: regions from twice this side on are not read from the finest level.
        proposals: regions that the RPN hands on at most, from as many a level.
        detections: of an image at most.
        training: replaces the settings of training as a whole, see :func:`training_config`; of the types in there.
        pixel_mean, pixel_std: of RGB, in 0..255.

    Raises:
        ValueError: a type that training does not need: mmengine would import and call whatever bears its name.
    """
    _check_types(training, "training")
    extractors = {
        f"{head}_roi_extractor": {
            "type": "SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
            "out_channels": channels,
            "featmap_strides": list(_STRIDES),
            "finest_scale": finest_scale,
        }
        for head, size in (("bbox", 7), ("mask", 14))
    }
    boxes = {"in_channels": channels, "fc_out_channels": fc_channels, "roi_feat_size": 7, "num_classes": classes}
    masks = {
        "type": "FCNMaskHead",
        "num_convs": mask_convs,
        "in_channels": channels,
        "conv_out_channels": channels,
        "num_classes": classes,
        "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
    }
    cascade = kind == "cascade_mask_rcnn"
    heads = _cascade_heads(boxes, masks, box_convs, channels) if cascade else _heads(boxes, masks)
    smooth = {"type": "SmoothL1Loss", "beta": 1.0 / 9.0, "loss_weight": 1.0}
    return {
        "type": "CascadeRCNN" if cascade else "MaskRCNN",
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            "mean": list(pixel_mean),
            "std": list(pixel_std),
            "bgr_to_rgb": True,
            "pad_mask": True,
            "pad_size_divisor": 32,
        },
        "backbone": {
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
        },
        "neck": {
            "type": "FPN",
            "in_channels": [embed_dims * 2**stage for stage in range(4)],
            "out_channels": channels,
            "num_outs": 5,
        },
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": channels,
            "feat_channels": channels,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [anchor_scale],
                "ratios": list(anchor_ratios),
                "strides": [*_STRIDES, 64],
            },
            "bbox_coder": _coder(1.0, 1.0),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": smooth if cascade else {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": {**extractors, **heads},
        "train_cfg": training if training is not None else training_config(kind),
        "test_cfg": {
            "rpn": {"nms_pre": proposals, "max_per_img": proposals, "nms": dict(_NMS), "min_bbox_size": 0},
            "rcnn": {
                "score_thr": 0.05,
                "nms": {"type": "nms", "iou_threshold": 0.5},
                "max_per_img": detections,
                "mask_thr_binary": 0.5,
            },
        },
    }


def _check_types(value: object, where: str) -> None:
    """Check all types in settings of training. Raises ValueError."""
    if isinstance(value, Mapping):
        if value.get("type", _TRAINING_TYPES[0]) not in _TRAINING_TYPES:
            raise ValueError(f"{where}: the type {value['type']!r} is none of {', '.join(_TRAINING_TYPES)}")
        for name, item in value.items():
            _check_types(item, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_types(item, where)


def training_config(
    kind: Kind, anchors: int = 256, regions: int = 512, nms_pre: int = 2000, proposals: int | None = None
) -> Config:
    """What mmdet trains a detector's heads on.

    Args:
        kind: of detector.
        anchors, regions: samples of an image for the RPN and for each box head.
        nms_pre: proposals of a level before NMS.
        proposals: of an image; None takes the published number.
    """
    cascade = kind == "cascade_mask_rcnn"
    stages = [_matching(overlap, overlap, overlap, not cascade, regions, 0.25) for overlap, _ in _CASCADE]
    rcnn = [{**stage, "mask_size": 28} for stage in stages]
    return {
        "rpn": {**_matching(0.7, 0.3, 0.3, True, anchors, 0.5), "allowed_border": 0 if cascade else -1},
        "rpn_proposal": {
            "nms_pre": nms_pre,
            "max_per_img": proposals or (2000 if cascade else 1000),
            "nms": dict(_NMS),
            "min_bbox_size": 0,
        },
        "rcnn": rcnn if cascade else rcnn[0],
    }


def build(config: Config) -> nn.Module:
    """mmdet's model of a configuration, with random weights, in eval mode. Nothing is downloaded."""
    from tasks.detection import mm

    # mmdet looks its types up in its own registry whatever another caller has set as the default
    with mm.DefaultScope.overwrite_default_scope("mmdet"):
        model: nn.Module = mm.MODELS.build(mm.ConfigDict(config))
    return model.eval()


def _coder(centre: float, side: float) -> Config:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [centre, centre, side, side]}


def _heads(boxes: Config, masks: Config) -> Config:
    box_head = {
        "type": "Shared2FCBBoxHead",
        **boxes,
        "bbox_coder": _coder(*_CASCADE[0][1]),
        "reg_class_agnostic": False,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
    }
    return {"type": "StandardRoIHead", "bbox_head": box_head, "mask_head": masks}


def _cascade_heads(boxes: Config, masks: Config, convs: int, channels: int) -> Config:
    """mmdet makes a mask head of its own for each stage."""
    box_heads = [
        {
            "type": "ConvFCBBoxHead",
            "num_shared_convs": convs,
            "num_shared_fcs": 1,
            "conv_out_channels": channels,
            **boxes,
            "bbox_coder": _coder(*deviations),
            "reg_class_agnostic": False,
            "reg_decoded_bbox": True,
            "norm_cfg": {"type": "BN", "requires_grad": True},
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
            "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0},
        }
        for _, deviations in _CASCADE
    ]
    stages = {"num_stages": len(_CASCADE), "stage_loss_weights": [1, 0.5, 0.25]}
    return {"type": "CascadeRoIHead", **stages, "bbox_head": box_heads, "mask_head": masks}


def _matching(positive: float, negative: float, lowest: float, low_quality: bool, count: int, share: float) -> Config:
    """Which boxes are trained as objects and how many: ``positive`` overlaps at least, ``negative`` at most."""
    return {
        "assigner": {
            "type": "MaxIoUAssigner",
            "pos_iou_thr": positive,
            "neg_iou_thr": negative,
            "min_pos_iou": lowest,
            "match_low_quality": low_quality,
            "ignore_iof_thr": -1,
        },
        "sampler": {
            "type": "RandomSampler",
            "num": count,
            "pos_fraction": share,
            "neg_pos_ub": -1,
            # the objects themselves join a box head's proposals; among anchors they have no place
            "add_gt_as_proposals": positive == negative,
        },
        "pos_weight": -1,
        "debug": False,
    }
