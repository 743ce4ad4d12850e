"""A small Mask R-CNN and a small Cascade Mask R-CNN for the digit scenes, and their weights.

They are mmdet's own classes; only widths, depths, anchors and numbers of proposals differ from the
published detectors.
"""

import copy
from pathlib import Path

from torch import nn

from tasks.common.demo.demo_models import DemoModels, DemoSpec
from tasks.detection.configs import Kind, build, detector_config
from tasks.detection.demo.coco_files import CLASSES

# Mean and standard deviation of the `train` part's pixels in 0..255; constants, so that
# preprocessing never drifts.
PIXEL_MEAN = 49.08
PIXEL_STD = 40.23


class DetectorModels(DemoModels):
    """Demo models whose keyword arguments are configurations of mmdet's."""

    def build(self, name: str) -> nn.Module:
        """Build a demo model with random weights, in eval mode."""
        spec = self.spec(name)
        # mmdet's constructors write into what they are given.
        return build({"type": spec.cls, **copy.deepcopy(spec.kwargs)})


def _spec(kind: Kind, **widths: int) -> DemoSpec:
    config = detector_config(
        kind,
        # Heads of 8 channels. Windows shift in the first three stages; the last, of 4 x 4 at most, is one window.
        embed_dims=16,
        depths=[2, 2, 2, 1],
        num_heads=[2, 4, 8, 16],
        window_size=4,
        drop_path_rate=0.0,
        classes=len(CLASSES),
        channels=32,
        # Digits are 10 to 38 pixels high and mostly higher than wide; those from 24 on are read at stride 8.
        anchor_scale=4,
        anchor_ratios=[0.8, 1.5, 3.0],
        finest_scale=12,
        proposals=80,
        detections=30,
        pixel_mean=[PIXEL_MEAN] * 3,
        pixel_std=[PIXEL_STD] * 3,
        **widths,
    )
    training = config["train_cfg"]
    # Scenes are smaller than the largest anchors, which would all be left out for crossing the border.
    training["rpn"]["allowed_border"] = -1
    training["rpn_proposal"].update(nms_pre=200, max_per_img=100)
    stages = training["rcnn"] if isinstance(training["rcnn"], list) else [training["rcnn"]]
    for sampled in (training["rpn"], *stages):
        sampled["sampler"]["num"] = 64
    return DemoSpec("mmdet.models.detectors", config.pop("type"), config)


DEMO = DetectorModels(
    {
        "demo_mask_rcnn": _spec("mask_rcnn", fc_channels=96, mask_convs=3),
        "demo_cascade": _spec("cascade_mask_rcnn", fc_channels=64, box_convs=2, mask_convs=2),
    },
    Path(__file__).parent / "weights",
)
