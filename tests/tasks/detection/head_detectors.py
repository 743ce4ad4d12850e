"""Small two-stage detectors of mmdet with random weights that detect something, and images."""

import copy
from typing import Any

import torch
from torch import Tensor

import tasks.detection.mm as mm
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.recipe import Recipe, make_recipe
from tasks.detection import configs
from tasks.detection.configs import Config, DetectorSizes, detector_config
from tasks.detection.neck import ExplicitFPN, pack, rpn_segment

WIDTH, CLASSES = 8, 3
STRIDES = [4, 8, 16, 32, 64]


def config(cascade: bool = False, masks: bool = True, **roi_changes: Any) -> Config:
    """A small detector's configuration, with those changes of its RoI head."""
    sizes = DetectorSizes(
        8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        window_size=4,
        classes=CLASSES,
        channels=WIDTH,
        fc_channels=16,
        mask_convs=2,
        anchor_scale=4,
        proposals=60,
        detections=20,
    )
    settings = detector_config("cascade_mask_rcnn" if cascade else "mask_rcnn", sizes)
    settings["roi_head"] |= roi_changes
    settings["test_cfg"]["rcnn"]["score_thr"] = 0.2
    settings["train_cfg"] = None
    if not masks:
        del settings["roi_head"]["mask_head"], settings["roi_head"]["mask_roi_extractor"]
    return settings


def box_head(kind: str = "Shared2FCBBoxHead", **changes: Any) -> Config:
    return {**config()["roi_head"]["bbox_head"], "type": kind, **changes}


def mask_head(**changes: Any) -> Config:
    return {**config()["roi_head"]["mask_head"], **changes}


def build(settings: Config) -> mm.TwoStageDetector:
    """The detector in eval mode, with weights of a size at which outputs differ between regions."""
    torch.manual_seed(0)
    model = configs.build(copy.deepcopy(settings))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("backbone"):
            torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def sample(
    height: int, width: int, factors: tuple[float, float] = (1.0, 1.0), seed: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """A normalised and padded image (1, 3, H, W) of ``height`` x ``width`` pixels, and its meta."""
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    padded = torch.nn.functional.pad(image, (0, -width % 32, 0, -height % 32))
    meta = {
        "img_shape": (height, width),
        "pad_shape": tuple(padded.shape[2:]),
        "ori_shape": (round(height / factors[1]), round(width / factors[0])),
        "scale_factor": factors,
    }
    return padded, meta


def recipe(bits: int) -> Recipe:
    return make_recipe(
        "fimaq",
        {
            "w_bits": bits,
            "a_bits": bits,
            "range_candidates": 16,
            "range_rounds": 1,
            "reconstruct": False,
        },
    )


class PackedBackbone(torch.nn.Module):
    """mmdet's backbone, its stage outputs packed."""

    def __init__(self, model: mm.TwoStageDetector) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, image: Tensor) -> Tensor:
        return pack(self.backbone(image))


def chain_of(model: mm.TwoStageDetector, bits: int) -> BlockChain:
    """A chain of three segments: the backbone, the neck, both in full precision, and the RPN."""
    neck = Segment("neck", "neck", ExplicitFPN(model.neck, recipe(32)))
    return BlockChain(
        [
            Segment("backbone", "block", PackedBackbone(model)),
            neck,
            rpn_segment(model, recipe(bits)),
        ]
    )
