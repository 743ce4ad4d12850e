"""Small Mask R-CNN and Cascade Mask R-CNN for the digit scenes, with their weights.

Both are of mmdet's own classes. Only widths, depths, anchors and numbers of proposals differ from
the published detectors.
"""

import copy
from pathlib import Path

from torch import nn

from tasks.common.demo.demo_models import DemoModels, DemoSpec
from tasks.detection.configs import DetectorSizes, Kind, build, detector_config
from tasks.detection.demo.coco_files import CLASSES

#: Mean and standard deviation of the pixels (0 to 255) of the part `train`.
PIXEL_MEAN, PIXEL_STD = 49.08, 40.23


class DetectorModels(DemoModels):
    """Demo models whose keyword arguments are configurations of mmdet."""

    def build(self, name: str) -> nn.Module:
        """Build a demo model with random weights, in evaluation mode."""
        spec = self.spec(name)
        # mmdet's constructors change their arguments.
        return build({"type": spec.cls, **copy.deepcopy(spec.kwargs)})


def _spec(kind: Kind, fc_channels: int, mask_convs: int) -> DemoSpec:
    sizes = DetectorSizes(
        # Each attention head has 8 channels. Three stages shift their windows; in the last stage,
        # one window covers the map.
        embed_dims=16,
        depths=(2, 2, 2, 1),
        num_heads=(2, 4, 8, 16),
        window_size=4,
        drop_path_rate=0.0,
        classes=len(CLASSES),
        channels=32,
        fc_channels=fc_channels,
        box_convs=2,
        mask_convs=mask_convs,
        # Digits are 10 to 38 pixels high and mostly narrower. Sides from 24 pixels on use stride 8.
        anchor_scale=4,
        anchor_ratios=(0.8, 1.5, 3.0),
        finest_scale=12,
        proposals=80,
        detections=30,
        pixel_mean=(PIXEL_MEAN,) * 3,
        pixel_std=(PIXEL_STD,) * 3,
    )
    config = detector_config(kind, sizes)
    training = config["train_cfg"]
    # The largest anchors are larger than a scene; by default, training would ignore all of them.
    training["rpn"]["allowed_border"] = -1
    training["rpn_proposal"].update(nms_pre=200, max_per_img=100)
    stages = training["rcnn"] if isinstance(training["rcnn"], list) else [training["rcnn"]]
    for sampled in (training["rpn"], *stages):
        sampled["sampler"]["num"] = 64
    return DemoSpec("mmdet.models.detectors", config.pop("type"), config)


DEMO = DetectorModels(
    {
        "demo_mask_rcnn": _spec("mask_rcnn", fc_channels=96, mask_convs=3),
        "demo_cascade": _spec("cascade_mask_rcnn", fc_channels=64, mask_convs=2),
    },
    Path(__file__).parent / "weights",
)
