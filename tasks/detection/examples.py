"""Inputs of which only the shape matters, for counting operations."""

import torch
from torch import Tensor, nn

from tasks.detection.heads import stages


def region_examples(model: nn.Module) -> dict[str, Tensor]:
    """What each RoI head takes for one image, by part: as many regions (n, C, h, w) as an image has at most.

    That is the number of proposals for box heads, and of detections for mask heads.
    """
    roi_head, settings = model.roi_head, model.test_cfg
    found = {}
    for kind, count in (("bbox", settings.rpn.max_per_img), ("mask", settings.rcnn.max_per_img)):
        extractors = getattr(roi_head, f"{kind}_roi_extractor", None)
        for name, extractor in [] if extractors is None else stages(kind, extractors):
            found[name] = torch.zeros(count, extractor.out_channels, *extractor.roi_layers[0].output_size)
    return found
