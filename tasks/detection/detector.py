"""A complete detector: features from a chain or the float model, everything else from mmdet."""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimaq_core.chain import BlockChain
from fimaq_core.errors import DataError, NumericsError
from tasks.detection.chain import BackboneAndNeck
from tasks.detection.mm import DetDataSample
from tasks.detection.roi import described, roi_heads

#: Name of the chain of backbone, neck and RPN.
DETECTOR = "detector"


class QuantizedDetector(nn.Module):
    """A two-stage detector of mmdet whose layers may be quantizable; it takes one image at a time.

    Features come from the chain :data:`DETECTOR` if there is one, else from the float model. The
    layers of the heads are replaced in ``model`` itself.
    """

    def __init__(self, model: nn.Module, chains: Mapping[str, BlockChain]) -> None:
        super().__init__()
        self.rpn_head, self.roi_head = model.rpn_head, model.roi_head
        chain = chains.get(DETECTOR)
        self.trunk = (
            nn.Sequential(model.backbone, model.neck) if chain is None else BackboneAndNeck(chain)
        )
        self.eval()

    def extract_feat(self, image: Tensor) -> tuple[Tensor, ...]:
        """Pyramid (B, C, h, w), finest map first, of images (B, 3, H, W)."""
        features: tuple[Tensor, ...] = self.trunk(image)
        return features

    @torch.no_grad()
    def predict(self, image: Tensor, meta: Mapping[str, object]) -> DetDataSample:
        """Detect objects in one image (1, 3, H, W), normalised and padded, with its meta.

        ``pred_instances`` are in coordinates of the original image. Raises DataError, and
        NumericsError for NaN or infinity, which would only make mmdet find fewer objects.
        """
        if len(image) != 1:
            raise DataError(
                f"Detectors are run on one image at a time, and this is a batch of {len(image)}."
            )
        sample = described(meta)
        parts = {"backbone and neck": self.trunk, "the RPN": self.rpn_head}
        parts |= {f"the RoI head {name}": head for name, head in roi_heads(self).items()}
        with ExitStack() as context, warnings.catch_warnings():
            # mmdet copies the masks of a cascade in this way.
            warnings.filterwarnings("ignore", "To copy construct from a tensor")
            for name, part in parts.items():
                context.enter_context(part.register_forward_hook(partial(_check, name)))
            features = self.extract_feat(image)
            proposals = self.rpn_head.predict(features, [sample], rescale=False)
            (sample.pred_instances,) = self.roi_head.predict(
                features, proposals, [sample], rescale=True
            )
        return sample


def _check(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
    """Refuse NaN and infinity before they are used."""
    if not all(bool(one.isfinite().all()) for one in tree_leaves(output)):
        raise NumericsError(
            f"The output of {name} holds NaN or infinity, so the objects found would be wrong."
        )
